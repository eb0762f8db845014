//! From the order to run to the guest's first process: the same kernel and initramfs, one vCPU.

use std::fs;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use ferry_linux_guest::CMDLINE;
use ferry_tests::linux::{BOOT, Linux, wait_printed};

use super::Samples;
use crate::bench::{Options, Peer, ferry, qemu, two_hosts};

/// What the first process prints first.
const GREETING: &str = "LINUX ";

/// The memory that [`Linux`] has by default.
const MEMORY_MIB: u64 = 256;

pub(super) fn measure(options: &Options, ferry: &ferry::Binary) -> Result<Vec<Samples>> {
    let mut all = vec![Samples::of("ferry", "ms")];
    if options.peer == Some(Peer::Qemu) {
        all.push(Samples::of("qemu microvm", "ms"));
    }
    for run in 1..=options.runs {
        eprintln!("boot: run {run} of {}", options.runs);
        for (samples, start) in all
            .iter_mut()
            .zip([ferry_boots as fn(&ferry::Binary) -> Result<Duration>, qemu_boots])
        {
            samples.add(start(ferry)?.as_secs_f64() * 1e3);
        }
    }
    all.iter().for_each(Samples::print);
    if let [ferry, qemu] = &all[..] {
        println!("boot: {:.2} of the peer's", ferry.median() / qemu.median());
    }
    Ok(all)
}

fn ferry_boots(ferry: &ferry::Binary) -> Result<Duration> {
    let mut pair = two_hosts(ferry.file())?;
    pair.a.start()?;
    let guest = Linux::new("g")?.vcpus(1);
    let began = Instant::now();
    guest.run(&pair.a)?;
    wait_printed(&pair.a, GREETING, 1, BOOT)?;
    let took = began.elapsed();
    pair.a.ferry(&["stop", "g", "--force"])?.exit(0)?;
    pair.close()?;
    Ok(took)
}

fn qemu_boots(_: &ferry::Binary) -> Result<Duration> {
    let image = ferry_linux_guest::image()?;
    let folder = tempfile::Builder::new().prefix("ferry-q").tempdir();
    let folder = folder.context("failed to make a folder")?;
    let console = folder.path().join("console");
    let mut command = qemu::command(MEMORY_MIB, &image.kernel, CMDLINE);
    command
        .arg("-initrd")
        .arg(&image.initramfs)
        .args(["-serial", &format!("file:{}", console.display())])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let began = Instant::now();
    let mut process = qemu::Ended(command.spawn().context("failed to start QEMU")?);
    loop {
        // Not there yet, at first.
        let printed = fs::read(&console).unwrap_or_default();
        if String::from_utf8_lossy(&printed).contains(GREETING) {
            return Ok(began.elapsed());
        }
        if let Some(status) = process.0.try_wait()? {
            bail!("QEMU ended before its guest was up: {status}");
        }
        if began.elapsed() > BOOT {
            bail!("QEMU's guest printed {:?}", String::from_utf8_lossy(&printed));
        }
        // As often as Ferry's guest is looked at.
        thread::sleep(Duration::from_millis(10));
    }
}
