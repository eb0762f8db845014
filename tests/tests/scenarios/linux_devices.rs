//! What is inside a moving Linux guest notices nothing: a process that writes and flushes, a TCP connection.

use std::fs::{self, File};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use ferry_linux_guest::chain;
use ferry_tests::echo::EchoClient;
use ferry_tests::linux::{BOOT, Console, Linux, wait_printed};
use ferry_tests::{Host, Pair, ShapedLink, Switch, waiting::CALL};
use libtest_mimic::Trial;

use crate::scenario::{command, in_a_network, make_file_system};

pub(crate) fn trials() -> Vec<Trial> {
    in_a_network![
        a_writer_and_a_connection_notice_no_move,
        a_writer_notices_no_move_of_its_disk
    ]
}

const GUEST: &str = "10.9.0.2";

/// Two hosts, each with a bridge in a network of its own, and a client at the switch that both hang on.
fn two_hosts_at_a_switch(pair: &mut Pair) -> Result<(ShapedLink, Switch)> {
    let link = ShapedLink::join("10gbit")?;
    let switch = Switch::between(&link)?;
    for host in [&mut pair.a, &mut pair.b] {
        host.terminate()?;
    }
    link.part(pair);
    let guest = ferry_linux_guest::image()?;
    let folders = [&guest.kernel, &guest.initramfs].map(|file| file.parent().unwrap_or(file).display().to_string());
    for host in [&mut pair.a, &mut pair.b] {
        for folder in &folders {
            host.arguments.extend(["--image-dir".to_owned(), folder.clone()]);
        }
        host.start()?;
    }
    Ok((link, switch))
}

fn a_writer_and_a_connection_notice_no_move(pair: &mut Pair) -> Result<()> {
    let (_link, switch) = two_hosts_at_a_switch(pair)?;
    let disk = pair.folder().join("g.img");
    make_file_system(&disk)?;
    Linux::new("g")?
        .vcpus(1)
        .disk(&format!("path={}", disk.display()))
        .nic("bridge=br0")
        .words(&format!("ferry.disk ferry.ip={GUEST}/24"))
        .run(&pair.a)?;
    wait_printed(&pair.a, "ECHO port=7000", 1, BOOT)?;
    wait_printed(&pair.a, "RECORDS", 1, BOOT)?;
    let server = format!("{GUEST}:7000").parse()?;
    let client = switch.network().within(|| EchoClient::start(server, |_| {}))?;

    let mut gaps = Vec::new();
    for _ in 0..5 {
        gaps.extend(moves_on(pair, &["--digests"])?);
    }

    let echoes = client.stop()?;
    ensure!(echoes.count > 10, "{echoes:?}");
    gaps_are_those_of(&gaps, echoes.longest)?;
    holds_what_was_told(pair, &disk)
}

fn a_writer_notices_no_move_of_its_disk(pair: &mut Pair) -> Result<()> {
    let (a, b, both) = (
        pair.folder().join("disks-a"),
        pair.folder().join("disks-b"),
        pair.folder().join("disks"),
    );
    for folder in [&a, &b, &both] {
        fs::create_dir(folder)?;
    }
    pair.a.see(&a, &both);
    pair.b.see(&b, &both);
    for host in [&mut pair.a, &mut pair.b] {
        host.terminate()?;
        host.start()?;
    }
    make_file_system(&a.join("g.img"))?;
    Linux::new("g")?
        .disk(&format!("path={}", both.join("g.img").display()))
        .words("ferry.disk")
        .run(&pair.a)?;
    let text = wait_printed(&pair.a, "RECORDS", 1, BOOT)?;
    ensure!(text.contains("CPUS 2"), "{text}");

    for _ in 0..5 {
        moves_on(pair, &["--storage", "copy", "--digests"])?;
    }

    ensure!(fs::read_dir(&b)?.count() == 0);
    holds_what_was_told(pair, &a.join("g.img"))
}

/// What was told of each move is no more than a client noticed that always had a question under way. It noticed an answer when it was given the
/// processor, which is later than when the answer passed the card.
fn gaps_are_those_of(gaps: &[Option<f64>], longest: Duration) -> Result<()> {
    const LATER_MS: f64 = 100.0;
    let told: Vec<f64> = gaps.iter().flatten().copied().collect();
    // Of a guest that is too slow to answer within a second no gap is known.
    ensure!(!told.is_empty(), "no gap is told: {gaps:?}");
    let longest = longest.as_secs_f64() * 1e3;
    let most = told.into_iter().fold(0.0, f64::max);
    ensure!(
        most > 0.0 && most < longest + LATER_MS,
        "{longest} ms at the client: {gaps:?}"
    );
    Ok(())
}

/// Moves the guest there and back; its writer goes on at each end. What gaps the network saw, if that is known.
fn moves_on(pair: &Pair, further: &[&str]) -> Result<Vec<Option<f64>>> {
    let mut gaps = Vec::new();
    for (from, to) in [(&pair.a, &pair.b), (&pair.b, &pair.a)] {
        let words = [&["migrate", "g", "--to", to.name, "--verify"], further].concat();
        let moved = from.ferry(&words)?.exit(0)?.migration()?.is("completed", to.name)?;
        gaps.push(moved.record["network_gap_ms"].as_f64());
        pair.exists_only_at(to, "g")?;
        writes_on(to)?;
    }
    Ok(gaps)
}

/// The writer makes progress here, and nothing of the kernel's says otherwise.
fn writes_on(host: &Host) -> Result<()> {
    let text = wait_printed(host, "RECORDS", 2, CALL)?;
    for wrong in ["I/O error", "EXT4-fs error", "broken", "failed"] {
        ensure!(!text.contains(wrong), "{text}");
    }
    Ok(())
}

/// Ends the guest as if its power failed: every record that it told of is on the disk, in order and whole.
fn holds_what_was_told(pair: &Pair, disk: &Path) -> Result<()> {
    let console = Console::of(&pair.a)?;
    pair.a.ferry(&["stop", "g", "--force"])?.exit(0)?;
    let text = console.text()?;
    // The last line may have been cut short by the stop.
    let whole = |line: &str| line.strip_prefix("RECORDS n=")?.strip_suffix(" ok")?.parse().ok();
    let told: u64 = text.lines().rev().find_map(whole).context("no record was told of")?;

    let name = disk.display().to_string();
    // The journal is replayed first, as the next mount would.
    let _ = std::process::Command::new("e2fsck").args(["-p", &name]).output()?;
    command("e2fsck", &["-f", "-n", &name])?;
    let chain = pair.folder().join("chain");
    command("debugfs", &["-R", &format!("dump /records {}", chain.display()), &name])?;
    match chain::verify(File::open(chain)?)? {
        Ok(end) => ensure!(end.records >= told, "{} records, {told} were told of", end.records),
        Err(broken) => bail!("the chain is broken at {broken}"),
    }
    Ok(())
}
