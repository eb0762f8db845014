//! `cargo xtask bench --devices`: the probe keeps a virtio device busy, in Ferry and in a peer, in turn in one run.
//!
//! The guest measures by its own clock, looks for what is done instead of waiting for interrupts, and checks what it reads. The disk is one raw
//! file that nobody caches; the network card is on a tap in a network of the bench's own.

mod contender;
mod image;
pub(super) mod network;
mod row;
mod table;

use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use ferry_probe::console::parse;
use ferry_probe::report::{Line, Transfers};
use serde_json::json;

use super::{Options, Peer, clock, ferry, qemu, write_record};
use contender::{Contender, Host, Running};
use image::Image;
use network::Sender;
use row::{Device, Row, SECONDS};
use table::{Runs, Sample};

/// Builds, prepares disk and network, runs in turn, prints the tables.
pub(super) fn run(options: &Options) -> Result<ExitCode> {
    let rows: Vec<_> = row::ALL
        .iter()
        .filter(|row| options.workload.as_deref().is_none_or(|text| row.name.contains(text)))
        .collect();
    if rows.is_empty() {
        let names: Vec<_> = row::ALL.iter().map(|row| row.name).collect();
        bail!("no workload has that in its name; there are {}", names.join(", "));
    }
    if options.peer == Some(Peer::Qemu) {
        qemu::check()?;
    }
    let ferry = ferry::build()?;
    let host = Host {
        image: Image::write()?,
        ferry,
        tsc_khz: clock::tsc_khz()?,
    };
    let mut record = Vec::new();
    let mut failed = false;
    network::with_network(|| {
        for row in &rows {
            let all = measure(row, options, &host);
            table::print(row, &all);
            failed |= all.iter().any(Runs::has_failed);
            record.push(json!({
                "workload": row.name,
                "contenders": all.iter().map(Runs::to_json).collect::<Vec<_>>(),
            }));
        }
        Ok(())
    })?;
    write_record(options, record)?;
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn measure(row: &Row, options: &Options, host: &Host) -> Vec<Runs> {
    let peers = match options.peer {
        Some(Peer::Qemu) => Contender::peers(row),
        Some(Peer::CloudHypervisor) | None => &[],
    };
    let contenders = [&[Contender::Ferry], peers].concat();
    let mut all: Vec<_> = contenders.iter().copied().map(Runs::of).collect();
    for round in 1..=options.runs {
        eprintln!("{}: run {round} of {}", row.name, options.runs);
        // Each is first now and then: a disk is slower, or faster, after it has had a rest.
        for turn in 0..contenders.len() {
            let index = (turn + round as usize) % contenders.len();
            all[index].add(run_once(contenders[index], row, host));
        }
    }
    all
}

fn run_once(contender: Contender, row: &Row, host: &Host) -> Result<Sample> {
    let frames_before = network::frames_from_guest()?;
    let mut running = Running::start(contender, row, host)?;
    let told = wait_for(&mut running, |line| match line {
        Line::Ready(ready) => Some(ready.tsc_khz),
        _ => None,
    })?;
    ensure!(
        told == host.tsc_khz,
        "the guest was told that its clock runs at {} kHz and took it to run at {told}",
        host.tsc_khz
    );
    let sender = match row.device {
        Device::Receiver(bytes) => Some(Sender::start(bytes)?),
        Device::Disk | Device::Sender => None,
    };
    // Nothing but the guest and its VMM is to run now.
    thread::sleep(Duration::from_secs(SECONDS));
    let transfers = wait_for(&mut running, |line| match line {
        Line::Transfers(transfers) => Some(*transfers),
        _ => None,
    })?;
    drop(sender);
    running.end()?;
    let frames = network::frames_from_guest()?.saturating_sub(frames_before);
    judge(row, &transfers, frames)
}

/// What the guest says, if it can be.
fn judge(row: &Row, transfers: &Transfers, frames_from_guest: u64) -> Result<Sample> {
    let Transfers {
        operations,
        bytes,
        nanoseconds,
        latency_ns,
        failed,
        wrong,
    } = *transfers;
    ensure!(operations > 0 && nanoseconds > 0, "the guest got nothing done");
    ensure!(failed == 0, "the device failed {failed} of {operations} requests");
    ensure!(wrong == 0, "{wrong} of {operations} blocks are not what is on the disk");
    if row.device == Device::Sender {
        ensure!(
            frames_from_guest >= operations,
            "the guest sent {operations} frames, {frames_from_guest} came out"
        );
    }
    let seconds = nanoseconds as f64 / 1e9;
    Ok(Sample {
        operations_per_s: operations as f64 / seconds,
        bytes_per_s: bytes as f64 / seconds,
        median_us: latency_ns.map(|(median, _)| median as f64 / 1e3),
        p99_us: latency_ns.map(|(_, p99)| p99 as f64 / 1e3),
    })
}

/// Waits for a line of the guest's.
fn wait_for<T>(running: &mut Running, wanted: impl Fn(&Line<'_>) -> Option<T>) -> Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let console = running.console()?;
        // The last line may be half of one.
        let whole = console.rfind('\n').map_or("", |end| &console[..end]);
        for line in whole.lines().filter_map(parse) {
            if let Line::Error(text) = line {
                bail!("the guest says {text}");
            }
            if let Some(found) = wanted(&line) {
                return Ok(found);
            }
        }
        if Instant::now() > deadline {
            bail!("the guest does not get on; it printed {console:?}");
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// How long the guest may take for a line, its own time aside.
const PATIENCE: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;

    fn done() -> Transfers {
        Transfers {
            operations: 1000,
            bytes: 4_096_000,
            nanoseconds: 2_000_000_000,
            latency_ns: Some((1500, 9000)),
            failed: 0,
            wrong: 0,
        }
    }

    fn row(device: Device) -> &'static Row {
        row::ALL.iter().find(|row| row.device == device).unwrap()
    }

    #[test]
    fn a_sound_run_is_a_sample() {
        let sample = judge(row(Device::Disk), &done(), 0).unwrap();
        assert_eq!((sample.operations_per_s, sample.bytes_per_s), (500.0, 2_048_000.0));
        assert_eq!((sample.median_us, sample.p99_us), (Some(1.5), Some(9.0)));
    }

    #[test]
    fn what_the_device_failed_or_lost_is_no_sample() {
        let judged = |device, transfers: Transfers, frames| judge(row(device), &transfers, frames);
        assert!(judged(Device::Disk, Transfers { failed: 1, ..done() }, 0).is_err());
        assert!(judged(Device::Disk, Transfers { wrong: 1, ..done() }, 0).is_err());
        assert!(judged(Device::Disk, Transfers::default(), 0).is_err());
        assert!(judged(Device::Sender, done(), 999).is_err());
        assert!(judged(Device::Sender, done(), 1000).is_ok());
    }
}
