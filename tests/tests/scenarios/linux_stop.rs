//! A Linux guest that is asked to switch itself off does, and leaves its disk as it should; one that does not is told of.

use std::fs::File;
use std::path::Path;

use anyhow::{Result, bail, ensure};
use ferry_linux_guest::chain;
use ferry_tests::linux::{BOOT, Linux, ticks, wait_printed};
use ferry_tests::{Host, Pair, process, until, waiting::CALL};
use libtest_mimic::Trial;
use rustix::process::Signal;
use serde_json::Value;

use crate::booted;
use crate::scenario::{command, make_file_system, on_kvm};

pub(crate) fn trials() -> Vec<Trial> {
    on_kvm![
        a_guest_that_is_asked_to_stop_leaves_a_clean_disk,
        a_guest_hears_its_button_after_a_move,
        a_stop_tells_what_became_of_a_guest_that_does_not_listen,
    ]
}

fn a_guest_that_is_asked_to_stop_leaves_a_clean_disk(pair: &mut Pair) -> Result<()> {
    let disk = pair.folder().join("g.img");
    make_file_system(&disk)?;
    Linux::new("g")?
        .vcpus(1)
        .disk(&format!("path={}", disk.display()))
        .words("ferry.disk")
        .run(&pair.a)?;
    wait_printed(&pair.a, "BUTTON ready", 1, BOOT)?;
    wait_printed(&pair.a, "RECORDS", 1, BOOT)?;

    let stopped = stopped(&pair.a)?;

    ensure!(
        stopped["status"] == "stopped" && stopped["reason"] == "the guest powered off",
        "{stopped}"
    );
    wait_printed(&pair.a, "BUTTON pressed", 1, CALL)?;
    is_clean(&disk)?;
    let chain = pair.folder().join("chain");
    command(
        "debugfs",
        &["-R", &format!("dump /records {}", chain.display()), &text(&disk)],
    )?;
    match chain::verify(File::open(chain)?)? {
        Ok(end) => ensure!(end.records > 0, "the guest wrote nothing"),
        Err(broken) => bail!("the chain is broken at {broken}"),
    }
    // It is off: nobody is left to be asked.
    pair.a.ferry(&["stop", "g"])?.exit(0)?;
    Ok(())
}

fn a_guest_hears_its_button_after_a_move(pair: &mut Pair) -> Result<()> {
    booted::run(pair)?;
    pair.migrate("g", &["--digests"])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;
    wait_printed(&pair.b, "TICK", 1, CALL)?;

    let stopped = stopped(&pair.b)?;

    ensure!(
        stopped["status"] == "stopped" && stopped["host"] == "b" && stopped["reason"] == "the guest powered off",
        "{stopped}"
    );
    wait_printed(&pair.b, "BUTTON pressed", 1, CALL)?;
    Ok(())
}

fn a_stop_tells_what_became_of_a_guest_that_does_not_listen(pair: &mut Pair) -> Result<()> {
    pair.expect_complaint("crashed");
    Linux::new("g")?.vcpus(1).words("ferry.deaf").run(&pair.a)?;
    let text = wait_printed(&pair.a, "TICK 1 ", 1, BOOT)?;

    pair.a
        .ferry(&["stop", "g", "--timeout", "1s"])?
        .exit(1)?
        .says("did not within 1s")?
        .says("--force")?;
    pair.a.wait_for_status("g", "running")?;
    wait_printed(&pair.a, "TICK", ticks(&text)?.len() + 2, CALL)?;

    let stop = pair.a.begin(&["stop", "g"])?;
    was_pressed(&pair.a, 2)?;
    pair.migrate("g", &[])?.exit(0)?.migration()?.is("completed", "b")?;
    stop.wait()?.exit(3)?.says("host b")?;
    wait_printed(&pair.b, "TICK", 1, CALL)?;

    let stop = pair.b.begin(&["stop", "g"])?;
    was_pressed(&pair.b, 1)?;
    process::signal(pair.b.vmm()?, Signal::KILL)?;
    stop.wait()?.exit(7)?.says("crashed")?;
    pair.b.wait_for_status("g", "crashed")?;
    Ok(())
}

/// Asks the guest to stop, and waits as long as for a boot.
fn stopped(host: &Host) -> Result<Value> {
    let stop = host.begin(&["stop", "g", "--timeout", "5m"])?;
    stop.wait_for(BOOT + CALL)?.exit(0)?.json()
}

/// Waits until the guest's VMM has told so many times that its button was pressed.
fn was_pressed(host: &Host, times: usize) -> Result<()> {
    let what = format!("the button is pressed {times} times at {}", host.name);
    until(&what, CALL, || {
        let log = host.ferry(&["logs", "g"])?.exit(0)?;
        Ok((log.stdout.matches("the power button was pressed").count() >= times).then_some(()))
    })
}

/// The file system was unmounted: there is no journal to be replayed, and nothing to be repaired.
fn is_clean(disk: &Path) -> Result<()> {
    let header = command("dumpe2fs", &["-h", &text(disk)])?;
    let state = header.lines().find(|line| line.starts_with("Filesystem state:"));
    ensure!(state.is_some_and(|state| state.ends_with(" clean")), "{header}");
    ensure!(!header.contains("needs_recovery"), "{header}");
    command("e2fsck", &["-f", "-n", &text(disk)])?;
    Ok(())
}

fn text(path: &Path) -> String {
    path.display().to_string()
}
