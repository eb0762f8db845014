//! Guests that end without their user, and what their restart policy makes of it.

use anyhow::{Result, ensure};
use ferry_tests::{Guest, Pair, process, until, waiting::CALL};
use libtest_mimic::Trial;
use rustix::process::Signal;

use crate::journal;
use crate::scenario::on_kvm;

pub(crate) fn trials() -> Vec<Trial> {
    on_kvm![
        a_killed_vmm_is_followed_by_another_and_the_policy_moves_along,
        a_crash_loop_slows_down_until_its_user_stops_it,
        a_guest_that_is_always_to_run_is_started_after_a_power_off_but_not_after_a_stop,
        a_guest_is_started_again_after_its_host_rebooted,
    ]
}

fn a_killed_vmm_is_followed_by_another_and_the_policy_moves_along(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g").restart("on-crash"))?;
    process::signal(pair.a.vmm()?, Signal::KILL)?;

    witness.wait_ready_times(2)?;
    let shown = pair.a.wait_for_status("g", "running")?;
    ensure!(shown["epoch"] == 2 && shown["restart"] == "on-crash", "{shown}");
    pair.exists_only_at(&pair.a, "g")?;
    let journal = journal::of(&pair.a)?;
    ensure!(journal.audited("run", "done")? == 1 && journal.audited("restart", "done")? == 1);

    pair.migrate("g", &["--digests"])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;
    process::signal(pair.b.vmm()?, Signal::KILL)?;
    witness.wait_ready_times(3)?;
    let shown = pair.b.wait_for_status("g", "running")?;
    ensure!(shown["epoch"] == 4, "{shown}");
    pair.exists_only_at(&pair.b, "g")
}

fn a_crash_loop_slows_down_until_its_user_stops_it(pair: &mut Pair) -> Result<()> {
    let looping = Guest::new("g")
        .work("panic_after_ms=50 heartbeat_ms=20")
        .restart("on-crash");
    pair.a.ferry(&looping.arguments(&pair.kernel()))?.exit(0)?;

    until("the next start waits for 4 s", CALL, || {
        let reason = pair.a.show("g")?["reason"].to_string();
        Ok(reason.contains("started again in 4s, start 4 in a row").then_some(()))
    })?;
    pair.a.ferry(&["stop", "g"])?.exit(0)?;

    let shown = pair.a.show("g")?;
    ensure!(shown["reason"] == "stopped by its user", "{shown}");
    ensure!(!journal::of(&pair.a)?.has_a_start_due()?);
    ensure!(pair.a.vmms().is_empty());
    Ok(())
}

fn a_guest_that_is_always_to_run_is_started_after_a_power_off_but_not_after_a_stop(pair: &mut Pair) -> Result<()> {
    let ends = Guest::new("g").work("poweroff_after_ms=500 heartbeat_ms=20");
    let witness = pair.run(&ends.restart("always"))?;

    witness.wait_ready_times(2)?;
    pair.a.ferry(&["stop", "g", "--force"])?.exit(0)?;

    pair.a.wait_for_status("g", "stopped")?;
    ensure!(!journal::of(&pair.a)?.has_a_start_due()?);
    ensure!(journal::of(&pair.a)?.audited("stop --force", "done")? == 1);
    Ok(())
}

fn a_guest_is_started_again_after_its_host_rebooted(pair: &mut Pair) -> Result<()> {
    pair.expect_complaint("the host went down");
    let witness = pair.run(&Guest::new("g").restart("on-crash"))?;
    let vmm = pair.a.vmm()?;
    pair.a.kill();
    process::signal(vmm, Signal::KILL)?;
    journal::reboot(&pair.a)?;

    pair.a.start()?;

    witness.wait_ready_times(2)?;
    pair.a.wait_for_status("g", "running")?;
    pair.exists_only_at(&pair.a, "g")
}
