//! How fast the engine moves a fake guest over loopback, beside what the bare sockets give.
//!
//! `cargo run --release -p ferry-migration --example throughput -- [MiB]`

#[path = "../tests/fake/mod.rs"]
mod fake;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::Instant;

use fake::memory::FakeMemory;
use fake::scene::{Scene, migrate, run};
use fake::{FakeDestination, FakeSource, Tracking, Workload};
use ferry_migration::guest::{MemoryShape, Region};

const FRAMES_PER_MIB: u64 = 256;

fn main() {
    let mib = std::env::args()
        .nth(1)
        .and_then(|argument| argument.parse().ok())
        .unwrap_or(1024);
    for turn in ["warming up", "measured"] {
        println!("{turn}, {mib} MiB");
        println!("  one bare socket   {:6.2} GB/s", bare_socket(mib));
        for streams in [1, 2] {
            for (kind, rate) in [("idle", 0), ("20,000 pages/s", 20_000)] {
                println!("  {streams} streams, {kind}: {}", engine(mib, streams, rate));
            }
        }
    }
}

fn engine(mib: u64, streams: usize, rate: u64) -> String {
    let shape = || {
        MemoryShape::new(vec![Region {
            start_frame: 0,
            frames: mib * FRAMES_PER_MIB,
        }])
        .unwrap()
    };
    let memory = || FakeMemory::new(shape(), 512);
    let frames = mib * FRAMES_PER_MIB;
    let workload = if rate == 0 {
        Workload::Idle
    } else {
        Workload::Uniform {
            frames: frames / 16,
            rate,
        }
    };
    let source = FakeSource::new(memory(), Tracking::Log, &[run(0, frames)], workload);
    let destination = memory();
    // Warm memory: what is measured is the engine, not the host's first touch.
    (0..frames).for_each(|frame| destination.fill(frame, 0));
    let mut scene = Scene {
        streams,
        destination: FakeDestination::new(destination),
        ..Scene::new(source)
    };
    scene.parameters.digests = false;
    scene.parameters.verify = std::env::args().any(|argument| argument == "--verify");
    let ends = migrate(scene);
    let (summary, loaded) = ends.arrived();
    let first = summary.rounds[0];
    let blackout = summary.blackout.expect("GO was sent");
    format!(
        "{:6.2} GB/s in the first pass, {} rounds, {:.0} ms in all, {:.2} ms from pause to GO, {} last pages, {:.2} ms from GO to loaded",
        first.bytes as f64 / first.elapsed.as_secs_f64() / 1e9,
        summary.rounds.len(),
        ends.took.as_secs_f64() * 1e3,
        (blackout.go_sent - blackout.pause_began).as_secs_f64() * 1e3,
        summary.rounds.last().map_or(0, |round| round.pages),
        (loaded.timings.last_pages + loaded.timings.restore).as_secs_f64() * 1e3,
    )
}

fn bare_socket(mib: u64) -> f64 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let mut far = listener.accept().unwrap().0;
    let (sent, mut received) = (vec![1u8; 512 << 20], vec![1u8; 512 << 20]);
    let began = Instant::now();
    let piece = |index: u64| (index as usize % 256) * (2 << 20);
    thread::scope(|scope| {
        scope.spawn(|| (0..mib / 2).for_each(|index| near.write_all(&sent[piece(index)..][..2 << 20]).unwrap()));
        (0..mib / 2).for_each(|index| far.read_exact(&mut received[piece(index)..][..2 << 20]).unwrap());
    });
    (mib << 20) as f64 / began.elapsed().as_secs_f64() / 1e9
}
