//! Processes that are stopped for a while, and a preparation that is slow: what is silent is waited for or ended, never
//! taken for dead.

use anyhow::{Context, Result, ensure};
use ferry_tests::{Guest, Pair, Relay, Tampering, Witness, pair::Underway, process, until, waiting::CALL};
use libtest_mimic::Trial;
use rustix::process::Signal;

use crate::scenario::{expect_a_lost_peer, has_nothing, on_kvm, stays_and_moves_later};

pub(crate) fn trials() -> Vec<Trial> {
    on_kvm![
        a_silent_vmm_is_waited_for_by_a_restarted_agent,
        a_silent_vmm_in_a_migration_is_waited_for_by_a_restarted_agent,
        an_abort_is_answered_while_the_destination_is_silent,
        an_abort_before_the_preparation_is_answered_leaves_nothing,
        an_abort_that_overtakes_the_preparation_leaves_nothing,
        a_silent_vmm_is_ended_by_a_forced_stop,
        a_silent_vmm_is_ended_by_a_forced_delete,
    ]
}

fn a_silent_vmm_is_waited_for_by_a_restarted_agent(pair: &mut Pair) -> Result<()> {
    let (witness, vmm) = run_and_silence(pair)?;

    let shown = pair.a.show("g")?;
    ensure!(
        shown["status"] == "running",
        "a VMM that is silent is not dead: {shown}"
    );
    pair.a.ferry(&["start", "g"])?.exit(4)?.says("running")?;
    ensure!(pair.a.vmm()? == vmm, "another VMM was started");
    process::signal(vmm, Signal::CONT)?;

    until("the agent has its VMM again", CALL, || {
        Ok((pair.a.show("g")?["vmm_pid"] == vmm).then_some(()))
    })?;
    pair.a.ferry(&["pause", "g"])?.exit(0)?;
    pair.a.ferry(&["resume", "g"])?.exit(0)?;
    pair.runs_only_at(&pair.a, "g", &witness)?;
    ensure!(pair.a.vmm()? == vmm, "another VMM runs");
    pair.migrate("g", &["--digests"])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn a_silent_vmm_in_a_migration_is_waited_for_by_a_restarted_agent(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer(pair);
    let work = "fill=random fill_mib=64 work=uniform work_mib=8 rate=1000 heartbeat_ms=20";
    let witness = pair.run(&Guest::new("g").work(work))?;
    let underway = pair.migrate_until("g", &["--bandwidth", "160Mbit"], |record| {
        Ok(record.number("bytes_sent")? > f64::from(1 << 20))
    })?;
    let vmm = pair.a.vmm()?;

    process::signal(vmm, Signal::STOP)?;
    pair.a.kill();
    pair.a.start()?;
    let shown = pair.a.show("g")?;
    ensure!(
        shown["status"] == "running" && shown["task"] == "migrating" && shown["migration"] == underway.id.as_str(),
        "{shown}"
    );
    process::signal(vmm, Signal::CONT)?;

    let record = pair.wait_over(&underway.id)?;
    let host = if record.text("guest_location")? == "a" {
        &pair.a
    } else {
        &pair.b
    };
    pair.runs_only_at(host, "g", &witness)?;
    ensure!(host.name == "b" || pair.a.vmm()? == vmm, "another VMM runs");
    Ok(())
}

fn an_abort_is_answered_while_the_destination_is_silent(pair: &mut Pair) -> Result<()> {
    let (relay, witness) = run_before_a_relay(pair, Tampering::HoldPrepared)?;
    let agent = pair.b.pid().context("agent b runs")?;

    let underway = pair.migrate_until("g", &[], |_| Ok(relay.has_tampered()))?;
    process::signal(agent, Signal::STOP)?;
    is_aborted(pair, underway, &witness)?;
    process::signal(agent, Signal::CONT)?;
    relay.release();

    stays_and_moves_later(pair, &witness)
}

fn an_abort_before_the_preparation_is_answered_leaves_nothing(pair: &mut Pair) -> Result<()> {
    let (relay, witness) = run_before_a_relay(pair, Tampering::HoldPrepared)?;

    let underway = pair.migrate_until("g", &[], |_| Ok(relay.has_tampered()))?;
    is_aborted(pair, underway, &witness)?;
    has_nothing(&pair.b)?;
    relay.release();

    stays_and_moves_later(pair, &witness)
}

fn a_silent_vmm_is_ended_by_a_forced_stop(pair: &mut Pair) -> Result<()> {
    let (witness, vmm) = run_and_silence(pair)?;

    pair.a.ferry(&["stop", "g", "--force"])?.exit(0)?;

    pair.a.wait_for_status("g", "stopped")?;
    ensure!(!process::is_alive(vmm), "stopped, and its VMM lives");
    pair.a.ferry(&["start", "g"])?.exit(0)?;
    witness.wait_ready_times(2)?;
    pair.a.wait_for_status("g", "running")?;
    pair.exists_only_at(&pair.a, "g")
}

fn a_silent_vmm_is_ended_by_a_forced_delete(pair: &mut Pair) -> Result<()> {
    let (_, vmm) = run_and_silence(pair)?;

    pair.a.ferry(&["delete", "g", "--force"])?.exit(0)?;

    pair.a.wait_until_gone("g")?;
    ensure!(!process::is_alive(vmm), "deleted, and its VMM lives");
    Ok(())
}

fn an_abort_that_overtakes_the_preparation_leaves_nothing(pair: &mut Pair) -> Result<()> {
    let (relay, witness) = run_before_a_relay(pair, Tampering::HoldPrepare)?;

    let underway = pair.migrate_until("g", &[], |_| Ok(relay.has_tampered()))?;
    is_aborted(pair, underway, &witness)?;
    relay.release();

    stays_and_moves_later(pair, &witness)
}

/// A guest, and a relay that makes its preparation at the destination slow.
fn run_before_a_relay(pair: &mut Pair, slow: Tampering) -> Result<(Relay, Witness)> {
    expect_a_lost_peer(pair);
    let relay = Relay::before(&pair.b, slow)?;
    pair.a.set_peer("b", &relay.url());
    pair.a.terminate()?;
    pair.a.start()?;
    let witness = pair.run(&Guest::new("g"))?;
    Ok((relay, witness))
}

/// The abort is answered although the destination is not.
fn is_aborted(pair: &Pair, underway: Underway, witness: &Witness) -> Result<()> {
    let shown = pair
        .a
        .ferry(&["migration", "show", &underway.id])?
        .exit(0)?
        .migration()?;
    ensure!(shown.text("status")? == "preparing", "{}", shown.record);
    pair.a.ferry(&["migration", "abort", &underway.id])?.exit(0)?;
    underway.call.wait()?.exit(1)?.migration()?.is("cancelled", "a")?;
    witness.wait_for_beats_at("a", 5)
}

/// A guest whose VMM is silent when its agent comes back.
fn run_and_silence(pair: &mut Pair) -> Result<(Witness, u32)> {
    pair.expect_complaint("does not answer, asking again");
    let witness = pair.run(&Guest::new("g"))?;
    let vmm = pair.a.vmm()?;
    process::signal(vmm, Signal::STOP)?;
    pair.a.kill();
    pair.a.start()?;
    Ok((witness, vmm))
}
