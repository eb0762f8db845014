//! What devices add to a blackout: Linux with two vCPUs, bare, and with a disk and a network card, moved to and fro in turn.

use std::fs::File;

use anyhow::{Context, Result};
use ferry_tests::Pair;
use ferry_tests::linux::{BOOT, Linux, wait_printed};

use super::Samples;
use crate::bench::devices::network;
use crate::bench::{Options, ferry};

const BRIDGE: &str = "bench1";
const DISK_BYTES: u64 = 64 << 20;

pub(super) fn measure(options: &Options, ferry: &ferry::Binary) -> Result<Vec<Samples>> {
    network::in_network_of_its_own(|| {
        network::ip(&format!("link add {BRIDGE} type bridge"))?;
        network::ip(&format!("link set {BRIDGE} up"))?;
        moves(options, ferry)
    })
}

fn moves(options: &Options, ferry: &ferry::Binary) -> Result<Vec<Samples>> {
    let mut pair = Pair::prepare_with(ferry.file())?;
    pair.a.start()?;
    pair.b.start()?;
    let disk = pair.folder().join("disk.img");
    let file = File::create(&disk).context("failed to make a disk")?;
    file.set_len(DISK_BYTES).context("failed to make a disk")?;
    let with_devices = Linux::new("devices")?
        .disk(&format!("path={}", disk.display()))
        .nic(&format!("bridge={BRIDGE}"));
    let mut all = [Samples::of("bare", "ms"), Samples::of("disk and card", "ms")];
    // One after the other: each has the host's two processors for itself, and a console that can be told from the other's.
    for (guest, name, samples) in [(Linux::new("bare")?, "bare", 0), (with_devices, "devices", 1)] {
        guest.run(&pair.a)?;
        wait_printed(&pair.a, "TICK 3", 1, BOOT)?;
        for run in 1..=options.runs {
            eprintln!("switchover-devices: run {run} of {}", options.runs);
            for to in ["b", "a"] {
                let moved = pair.a.ferry(&["migrate", name, "--to", to])?;
                let moved = moved.exit(0)?.migration()?.is("completed", to)?;
                all[samples].add(moved.number("downtime_ms.total")?);
            }
        }
        pair.a.ferry(&["delete", name, "--force"])?.exit(0)?;
    }
    pair.close()?;
    all.iter().for_each(Samples::print);
    let [bare, devices] = &all;
    println!("a disk and a card add {:.1} ms", devices.median() - bare.median());
    Ok(all.into())
}
