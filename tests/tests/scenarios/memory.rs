//! Memory that a guest does without: given up because it was asked to, or free. The host has it back, and no migration sends it.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ferry_tests::linux::{BOOT, Linux, carry_out, wait_printed};
use ferry_tests::waiting::CALL;
use ferry_tests::{Guest, Host, Pair, until};
use libtest_mimic::Trial;

use crate::scenario::{is_long, on_kvm};

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = on_kvm![
        memory_that_a_guest_gave_up_is_not_sent,
        a_guest_that_gives_nothing_up_is_named,
    ];
    // Where ring 0 is emulated a guest takes minutes to fill its page cache once.
    if is_long() {
        trials.extend(on_kvm![
            freed_page_cache_is_not_sent,
            a_gibibyte_of_freed_page_cache_is_not_sent,
        ]);
    }
    trials
}

const MIB: u64 = 1 << 20;
/// How long a guest of 128 MiB may take to do something with all of its memory where ring 0 is emulated.
const ALL_MEMORY: Duration = Duration::from_secs(1800);
/// Has free blocks of 32 KiB and more reported. Left to itself this kernel reports whole 4 MiB, and a page that is in use keeps its block
/// back: of 128 MiB that were freed a fifth. (Linux 6.1 overwrites what the command line says of it.)
const REPORT_FINELY: [&str; 3] = [
    "$b mkdir /sys; $b mount -t sysfs sys /sys",
    "cd /sys/module/page_reporting/parameters",
    "echo 3 >page_reporting_order",
];
/// Has the guest read its disk. Kept open, because a block device that nobody has open any more has no page cache either.
const READ_DISK: &str = "exec 3</dev/vda; cat <&3 >/dev/null";

fn freed_page_cache_is_not_sent(pair: &mut Pair) -> Result<()> {
    freed_page_cache(pair, 128 * MIB, "256M")
}

fn a_gibibyte_of_freed_page_cache_is_not_sent(pair: &mut Pair) -> Result<()> {
    freed_page_cache(pair, 1024 * MIB, "1280M")
}

fn freed_page_cache(pair: &Pair, cache: u64, memory: &str) -> Result<()> {
    let deadline = ALL_MEMORY * (cache / (128 * MIB)) as u32;
    let disk = make_disk(pair.folder(), cache)?;
    Linux::new("g")?
        .memory(memory)
        .disk(&format!("path={}", disk.display()))
        .run(&pair.a)?;
    wait_printed(&pair.a, "TICK 2 ", 1, BOOT)?;
    for line in REPORT_FINELY {
        carry_out(&pair.a, "g", line, BOOT)?;
    }
    let fresh = sent(&pair.a, &pair.b)?;

    carry_out(&pair.b, "g", READ_DISK, deadline)?;
    let full = sent(&pair.b, &pair.a)?;
    ensure!(
        full > fresh + cache / 20 * 19,
        "the page cache was not there: {full} bytes, fresh {fresh}"
    );
    let most_given_back = resident(pair.a.vmm()?)?.saturating_sub(cache / 5 * 4);
    carry_out(&pair.a, "g", "echo 3 >/proc/sys/vm/drop_caches", deadline)?;

    // The guest tells a few seconds later, and takes its time, which a move would only make longer: it is moved once its host has most of the
    // memory back, and again until the guest had told nearly all of it. It also takes some into use meanwhile.
    let (mut from, mut to) = (&pair.a, &pair.b);
    let mut vmm = from.vmm()?;
    let mut freed = Vec::new();
    let none = until("what the guest freed is not sent", deadline, || {
        if resident(vmm)? > most_given_back {
            return Ok(None);
        }
        let bytes = sent(from, to)?;
        (from, to) = (to, from);
        vmm = from.vmm()?;
        freed.push(bytes);
        Ok((bytes < fresh + cache / 20).then_some(()))
    });
    eprintln!("bytes sent: fresh {fresh}, with page cache {full}, freed {freed:?}");
    none.with_context(|| format!("fresh {fresh}, with page cache {full}, freed {freed:?}"))
}

fn memory_that_a_guest_gave_up_is_not_sent(pair: &mut Pair) -> Result<()> {
    const ALL: u64 = 128 * MIB;
    const LESS: u64 = 64 * MIB;
    // As large as its memory: all of that is populated then.
    let disk = make_disk(pair.folder(), ALL)?;
    Linux::new("g")?
        .memory("128M")
        .disk(&format!("path={}", disk.display()))
        .run(&pair.a)?;
    wait_printed(&pair.a, "TICK 2 ", 1, BOOT)?;
    pair.a
        .ferry(&["balloon", "g", "--size", "129M"])?
        .exit(4)?
        .says("instance g has 134217728 bytes")?;
    has(&pair.a, ALL, ALL)?;
    carry_out(&pair.a, "g", READ_DISK, ALL_MEMORY)?;
    let full = sent(&pair.a, &pair.b)?;

    balloon(&pair.b, "64M")?;
    has(&pair.b, LESS, LESS)?;
    let less = sent(&pair.b, &pair.a)?;

    eprintln!("bytes sent: {full}, and {less} with {LESS} fewer to have");
    ensure!(less + LESS / 4 * 3 < full, "{less} bytes were sent, {full} before");
    has(&pair.a, LESS, LESS)?;
    balloon(&pair.a, "128M")?;
    has(&pair.a, ALL, ALL)
}

fn a_guest_that_gives_nothing_up_is_named(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g"))?;
    let all = pair.a.show("g")?["memory_bytes"].as_u64().context("memory_bytes")?;

    pair.a
        .ferry(&["balloon", "g", "--size", "32M", "--timeout", "10s"])?
        .exit(1)?
        .says("no balloon driver")?;

    has(&pair.a, 32 * MIB, all)?;
    pair.a.ferry(&["pause", "g"])?.exit(0)?;
    pair.a
        .ferry(&["balloon", "g", "--size", "32M"])?
        .exit(4)?
        .says("paused")?;
    pair.a.ferry(&["resume", "g"])?.exit(0)?;
    pair.migrate("g", &[])?.exit(0)?.migration()?.is("completed", "b")?;
    has(&pair.b, 32 * MIB, all)?;
    pair.runs_only_at(&pair.b, "g", &witness)
}

/// Asks the guest to have so much, and waits until it does.
fn balloon(host: &Host, size: &str) -> Result<()> {
    let call = host.begin(&["balloon", "g", "--size", size, "--timeout", "10m"])?;
    call.wait_for(ALL_MEMORY + CALL)?.exit(0)?;
    Ok(())
}

/// What the host shows of how much the guest is to have and has.
fn has(host: &Host, target: u64, actual: u64) -> Result<()> {
    // A VMM that does not answer at once has none to show.
    let shown = until("the balloon is shown", CALL, || {
        let shown = host.show("g")?;
        Ok((!shown["balloon"].is_null()).then_some(shown))
    })?;
    let balloon = &shown["balloon"];
    ensure!(
        balloon["target_bytes"] == target && balloon["actual_bytes"] == actual,
        "{target} and {actual} expected: {shown}"
    );
    Ok(())
}

/// Moves the guest, and tells how much was sent.
fn sent(from: &Host, to: &Host) -> Result<u64> {
    let moved = from.ferry(&["migrate", "g", "--to", to.name])?.exit(0)?.migration()?;
    Ok(moved.is("completed", to.name)?.number("bytes_sent")? as u64)
}

/// Bytes of this process that are in the host's memory.
fn resident(process: u32) -> Result<u64> {
    let path = format!("/proc/{process}/statm");
    let told = fs::read_to_string(&path).with_context(|| format!("failed to read {path}"))?;
    let pages = told.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok());
    Ok(pages.with_context(|| format!("{path} says {told:?}"))? * 4096)
}

/// A disk of which no page is zeroes, and none like another.
fn make_disk(folder: &Path, bytes: u64) -> Result<PathBuf> {
    let path = folder.join("g.img");
    let mut file = BufWriter::new(File::create(&path)?);
    for page in 1..=bytes / 4096 {
        file.write_all(&page.to_le_bytes().repeat(512))?;
    }
    file.flush()?;
    Ok(path)
}
