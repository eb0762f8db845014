//! The probe keeps a disk or a network card busy: what it was given is what there is, also while it moves.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ferry_probe::device_work::{STAMPED_BYTES, disk_stamp};
use ferry_probe::report::Transfers;
use ferry_tests::{Guest, LoopDevice, Pair, Witness};
use libtest_mimic::Trial;
use rustix::fs::statvfs;

use crate::scenario::{command, in_a_network, ip, make_file_system, on_kvm, with_mounts_of_its_own};

pub(crate) fn trials() -> Vec<Trial> {
    let disks = on_kvm![
        a_guest_that_reads_its_disk_as_it_moves_reads_the_right_blocks,
        a_guest_that_writes_its_disk_as_it_moves_leaves_it_whole,
        a_disk_that_holds_something_else_is_told,
        a_disk_that_shrinks_fails_its_guests_requests_and_nothing_else,
        more_requests_than_the_queue_has_room_for_are_refused_by_the_guest,
    ];
    let mounted = match LoopDevice::can_be_had() {
        true => on_kvm![writes_that_the_host_has_no_room_for_fail_and_nothing_else],
        false => Vec::new(),
    };
    let networks = in_a_network![
        frames_that_the_guest_sends_come_out_of_its_tap,
        frames_for_the_guest_arrive,
    ];
    disks.into_iter().chain(mounted).chain(networks).collect()
}

const PAGES: u64 = 16 << 8;

/// An image with the stamps that the probe looks for.
pub(crate) fn stamped_image(pair: &Pair) -> Result<PathBuf> {
    let path = pair.folder().join("disk");
    let mut file = File::create(&path)?;
    for number in 0..PAGES {
        let mut page = [0x5a; STAMPED_BYTES as usize];
        page[..8].copy_from_slice(&disk_stamp(number).to_le_bytes());
        file.write_all(&page)?;
    }
    Ok(path)
}

pub(crate) fn with_disk(image: &Path, work: &str) -> Guest {
    Guest::new("g")
        .disk(&format!("path={}", image.display()))
        .work(&format!("heartbeat_ms=20 work=blk {work}"))
}

/// Runs the guest, moves it in the middle of its work, and gives what it says of it.
fn moved_at_work(pair: &Pair, guest: &Guest) -> Result<Transfers> {
    let witness = pair.run(guest)?;
    let began = Instant::now();
    pair.migrate("g", &[])?.exit(0)?.migration()?.is("completed", "b")?;
    pair.runs_only_at(&pair.b, "g", &witness)?;
    witness.transfers_after(began)
}

fn a_guest_that_reads_its_disk_as_it_moves_reads_the_right_blocks(pair: &mut Pair) -> Result<()> {
    let image = stamped_image(pair)?;

    let told = moved_at_work(pair, &with_disk(&image, "io=randread depth=16 seconds=30"))?;

    ensure!(told.operations > 0 && told.failed == 0 && told.wrong == 0, "{told}");
    Ok(())
}

fn a_guest_that_writes_its_disk_as_it_moves_leaves_it_whole(pair: &mut Pair) -> Result<()> {
    let image = stamped_image(pair)?;

    let told = moved_at_work(pair, &with_disk(&image, "io=randwrite block_kib=8 depth=16 seconds=30"))?;

    ensure!(told.operations > 0 && told.failed == 0, "{told}");
    pair.b.ferry(&["stop", "g", "--force"])?.exit(0)?;
    is_stamped(&image)
}

/// Each page of the image is in its place, and the guest wrote some.
pub(crate) fn is_stamped(image: &Path) -> Result<()> {
    let mut file = File::open(image)?;
    let mut page = vec![0; STAMPED_BYTES as usize];
    let mut written = 0;
    for number in 0..PAGES {
        file.read_exact(&mut page)?;
        ensure!(
            page[..8] == disk_stamp(number).to_le_bytes(),
            "page {number} is not in its place"
        );
        written += u64::from(page[8..] != [0x5a; STAMPED_BYTES as usize - 8]);
    }
    ensure!(written > 0, "the guest wrote nothing");
    Ok(())
}

fn a_disk_that_holds_something_else_is_told(pair: &mut Pair) -> Result<()> {
    let image = pair.folder().join("disk");
    File::create(&image)?.set_len(PAGES * STAMPED_BYTES)?;

    let witness = pair.run(&with_disk(&image, "io=seqread block_kib=64 depth=2 seconds=1"))?;

    let told = witness.transfers()?;
    ensure!(
        told.wrong > 0 && told.wrong == told.operations && told.failed == 0,
        "{told}"
    );
    Ok(())
}

fn a_disk_that_shrinks_fails_its_guests_requests_and_nothing_else(pair: &mut Pair) -> Result<()> {
    pair.expect_complaint("a disk request failed");
    let image = stamped_image(pair)?;
    pair.run(&with_disk(&image, "io=randread depth=16 seconds=10"))?;
    let id = pair.a.show("g")?["id"].as_str().unwrap_or_default().to_owned();
    let witness = Witness::of_instance(&[&pair.a, &pair.b], &id);

    File::options()
        .write(true)
        .open(&image)?
        .set_len(PAGES * STAMPED_BYTES / 2)?;

    pair.a.ferry(&Guest::new("other").arguments(&pair.kernel()))?.exit(0)?;
    let told = witness.transfers()?;
    ensure!(
        told.operations > told.failed && told.failed > 0 && told.wrong == 0,
        "{told}"
    );
    let logged = pair.a.ferry(&["logs", "g"])?.exit(0)?.stdout;
    ensure!(logged.matches("a disk request failed").count() < 4, "{logged}");
    // To the destination it is another disk than the guest's.
    let all = PAGES * STAMPED_BYTES;
    let sizes = format!("it has {} bytes, and the guest's disk {all}", all / 2);
    pair.migrate("g", &[])?.exit(4)?.says(&sizes)?.says("DISKS")?;
    pair.a.wait_for_status("other", "running")?;
    pair.a.ferry(&["delete", "other", "--force"])?.exit(0)?;
    pair.runs_only_at(&pair.a, "g", &witness)
}

fn writes_that_the_host_has_no_room_for_fail_and_nothing_else(pair: &mut Pair) -> Result<()> {
    pair.expect_complaint("a disk request failed");
    let (file_system, folder) = (pair.folder().join("small.img"), pair.folder().join("small"));
    make_file_system(&file_system)?;
    fs::create_dir(&folder)?;
    let image = folder.join("disk");
    // A quarter of what the guest's disk may grow to is left.
    const ROOM: u64 = PAGES * STAMPED_BYTES / 4;
    pair.a.terminate()?;
    pair.b.terminate()?;
    with_mounts_of_its_own(|| {
        let names = [&file_system, &folder].map(|path| path.display().to_string());
        command("mount", &["-o", "loop", &names[0], &names[1]])?;
        File::create(&image)?.set_len(PAGES * STAMPED_BYTES)?;
        let free = statvfs(&folder)?;
        let filler = free.f_bavail * free.f_frsize - ROOM;
        command(
            "fallocate",
            &["-l", &filler.to_string(), &folder.join("filler").display().to_string()],
        )?;
        pair.a.start()?;
        pair.b.start()
    })?;

    let witness = pair.run(&with_disk(&image, "io=seqwrite block_kib=64 depth=4 seconds=2"))?;

    let told = witness.transfers()?;
    ensure!(told.operations > told.failed && told.failed > 0, "{told}");
    let logged = pair.a.ferry(&["logs", "g"])?.exit(0)?.stdout;
    ensure!(logged.contains("No space left"), "{logged}");
    ensure!(logged.matches("a disk request failed").count() < 4, "{logged}");
    pair.migrate("g", &["--digests"])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn more_requests_than_the_queue_has_room_for_are_refused_by_the_guest(pair: &mut Pair) -> Result<()> {
    let image = stamped_image(pair)?;
    let guest = with_disk(&image, "depth=86");

    pair.a.ferry(&guest.arguments(&pair.kernel()))?.exit(0)?;

    let witness = Witness::of(&[&pair.a]);
    let told = witness.transfers().err().context("the guest did not complain")?;
    ensure!(told.to_string().contains("depth= is more"), "{told:#}");
    Ok(())
}

const TAP: &str = "work0";
const MAC: &str = "02:00:5e:10:00:03";
const GUEST: &str = "198.51.100.2";

fn with_card(work: &str) -> Guest {
    Guest::new("g")
        .nic(&format!("tap={TAP},mac={MAC}"))
        .work(&format!("heartbeat_ms=20 work=net {work}"))
}

fn make_tap() -> Result<()> {
    ip(&["tuntap", "add", TAP, "mode", "tap", "vnet_hdr"])?;
    ip(&["link", "set", TAP, "up"])?;
    Ok(())
}

/// Frames and bytes that came out of the tap.
fn out_of_the_tap() -> Result<(u64, u64)> {
    let shown: serde_json::Value = serde_json::from_str(&ip(&["-json", "-statistics", "link", "show", TAP])?)?;
    let counts = &shown[0]["stats64"]["rx"];
    counts["packets"]
        .as_u64()
        .zip(counts["bytes"].as_u64())
        .with_context(|| format!("no counts in {shown}"))
}

fn frames_that_the_guest_sends_come_out_of_its_tap(pair: &mut Pair) -> Result<()> {
    make_tap()?;

    let witness = pair.run(&with_card("direction=send packet=64294 depth=16 seconds=1"))?;

    let told = witness.transfers()?;
    let (frames, bytes) = out_of_the_tap()?;
    ensure!(told.operations > 0 && told.bytes == told.operations * 64_294, "{told}");
    ensure!(
        frames >= told.operations && bytes >= told.bytes,
        "{told}, and {frames} frames of {bytes} bytes came out"
    );
    Ok(())
}

fn frames_for_the_guest_arrive(pair: &mut Pair) -> Result<()> {
    make_tap()?;
    ip(&["address", "add", "198.51.100.1/24", "dev", TAP])?;
    ip(&["neighbour", "add", GUEST, "lladdr", MAC, "dev", TAP, "nud", "permanent"])?;
    let socket = UdpSocket::bind("198.51.100.1:0")?;
    socket.connect((GUEST, 9))?;
    socket.set_write_timeout(Some(Duration::from_millis(100)))?;
    let over = AtomicBool::new(false);

    let (told, sent) = thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let mut sent = 0;
            while !over.load(Ordering::Relaxed) {
                sent += u64::from(socket.send(&[0; 58]).is_ok());
            }
            sent
        });
        let told = pair
            .run(&with_card("direction=receive packet=100 depth=64 seconds=1"))
            .and_then(|witness| witness.transfers());
        over.store(true, Ordering::Relaxed);
        (told, sender.join().expect("sending does not panic"))
    });

    let told = told?;
    ensure!(
        told.operations > 0 && told.operations <= sent && told.bytes == told.operations * 100,
        "{told}, of {sent} frames sent"
    );
    Ok(())
}
