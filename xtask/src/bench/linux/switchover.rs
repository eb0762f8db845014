//! What devices add to a blackout: Linux with two vCPUs, bare, and with a disk and a network card that are idle, moved to and fro in turn.

use std::fs::File;

use anyhow::{Context, Result};
use ferry_tests::Pair;
use ferry_tests::linux::{BOOT, Linux, wait_printed};
use ferry_vmm::measuring::warm_host_memory;

use super::Samples;
use crate::bench::devices::network;
use crate::bench::{Options, ferry, two_hosts};

const BRIDGE: &str = "bench1";
const DISK_BYTES: u64 = 64 << 20;

/// More than a guest has, which is what a destination touches.
const WARM_BYTES: u64 = 512 << 20;

/// The guests; the second has devices.
const GUESTS: [&str; 2] = ["bare", "disk and card"];

pub(super) fn measure(options: &Options, ferry: &ferry::Binary) -> Result<Vec<Samples>> {
    network::in_network_of_its_own(|| {
        network::ip(&format!("link add {BRIDGE} type bridge"))?;
        network::ip(&format!("link set {BRIDGE} up"))?;
        moves(options, ferry)
    })
}

fn moves(options: &Options, ferry: &ferry::Binary) -> Result<Vec<Samples>> {
    // Hosts of its own for each: a guest is told by its console, of which a host has one here.
    let pairs = GUESTS.map(|_| two_hosts(ferry.file()));
    let mut all = GUESTS.map(|name| Samples::of(name, "ms"));
    let mut running = Vec::new();
    for (has_devices, pair) in [false, true].into_iter().zip(pairs) {
        running.push(booted(pair?, has_devices)?);
    }
    for run in 1..=options.runs {
        eprintln!("switchover-devices: run {run} of {}", options.runs);
        for to in ["b", "a"] {
            for (pair, samples) in running.iter().zip(&mut all) {
                warm_host_memory(WARM_BYTES).context("failed to touch memory first")?;
                let moved = pair.a.ferry(&["migrate", "g", "--to", to])?;
                let moved = moved.exit(0)?.migration()?.is("completed", to)?;
                samples.add(moved.number("downtime_ms.total")?);
            }
        }
    }
    for pair in &running {
        pair.a.ferry(&["stop", "g", "--force"])?.exit(0)?;
        pair.close()?;
    }
    all.iter().for_each(Samples::print);
    let [bare, devices] = &all;
    println!("an idle disk and card add {:.1} ms", devices.median() - bare.median());
    Ok(all.into())
}

fn booted(mut pair: Pair, has_devices: bool) -> Result<Pair> {
    pair.a.start()?;
    pair.b.start()?;
    let mut guest = Linux::new("g")?;
    if has_devices {
        let disk = pair.folder().join("disk.img");
        let file = File::create(&disk).context("failed to make a disk")?;
        file.set_len(DISK_BYTES).context("failed to make a disk")?;
        guest = guest
            .disk(&format!("path={}", disk.display()))
            .nic(&format!("bridge={BRIDGE}"));
    }
    guest.run(&pair.a)?;
    wait_printed(&pair.a, "TICK 3", 1, BOOT)?;
    Ok(pair)
}
