//! Cold moves: the guest stands still while it is copied, or is off and stays off; and what is undone when they fail.

use std::time::Duration;

use anyhow::{Result, ensure};
use ferry_tests::{Guest, Migration, Pair, Witness, until, waiting::CALL};
use libtest_mimic::Trial;

use crate::scenario::{expect_a_lost_peer, has_nothing, on_kvm, stays_and_moves_later};

pub(crate) fn trials() -> Vec<Trial> {
    on_kvm![
        a_running_guest_moves_cold_and_runs_there,
        a_guest_that_its_user_paused_arrives_cold_and_paused,
        an_aborted_cold_move_wakes_its_guest_at_the_source,
        a_source_agent_killed_during_a_cold_move_goes_on_with_it,
        a_cold_move_whose_agent_is_gone_wakes_its_guest_when_the_time_is_up,
        a_source_agent_killed_while_preparing_undoes_it_and_says_what,
        a_stopped_instance_moves_cold_and_starts_there,
        a_stopped_instance_stays_stopped_when_its_move_is_aborted,
        a_stopped_instance_stays_stopped_when_its_agent_is_killed,
        a_stopped_instance_stays_stopped_when_its_destination_is_killed,
        a_host_kept_at_an_older_version_is_named,
    ]
}

/// Too much for the links of these scenarios: live it would not arrive.
const WILD: &str = "fill=random fill_mib=48 work=uniform work_mib=32 rate=200000 heartbeat_ms=20";

/// What was undone, a step each.
fn undone(record: &Migration) -> Vec<&str> {
    let lines = record.record["undone"].as_array().into_iter().flatten();
    lines
        .filter_map(|line| line.as_str()?.split_once(':'))
        .map(|(step, _)| step)
        .collect()
}

fn is_copying(record: &Migration) -> Result<bool> {
    Ok(record.text("status")? == "running" && record.number("bytes_sent")? > f64::from(1 << 20))
}

fn a_running_guest_moves_cold_and_runs_there(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g").work(WILD).vcpus(2))?;

    let moved = pair
        .migrate("g", &["--cold", "--digests", "--bandwidth", "1Gbit"])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;

    let (mode, was, step) = (moved.text("mode")?, moved.text("guest_was")?, moved.text("step")?);
    ensure!((mode, was, step) == ("cold", "running", "confirm"), "{}", moved.record);
    let rounds = moved.record["rounds"].as_array().cloned().unwrap_or_default();
    // What KVM itself writes while the state is exported is all that can be sent again.
    let again: u64 = rounds.iter().skip(1).filter_map(|round| round["pages"].as_u64()).sum();
    ensure!(again < 16, "it was copied more than once: {}", moved.record);
    let (total, bound) = (
        moved.number("downtime_ms.total")?,
        moved.number("downtime_ms.upper_bound")?,
    );
    let first = rounds[0]["ms"].as_f64().unwrap_or(f64::MAX);
    ensure!(
        first <= total && total <= bound,
        "not all of it is told: {}",
        moved.record
    );
    pair.runs_only_at(&pair.b, "g", &witness)?;
    let there = pair.b.ferry(&["migration", "show", moved.text("id")?])?.exit(0)?;
    ensure!(there.migration()?.text("mode")? == "cold", "{there}");
    Ok(())
}

fn a_guest_that_its_user_paused_arrives_cold_and_paused(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g"))?;
    pair.a.ferry(&["pause", "g"])?.exit(0)?;

    let moved = pair.migrate("g", &["--cold", "--digests"])?.exit(0)?.migration()?;

    ensure!(moved.text("guest_was")? == "paused", "{}", moved.record);
    pair.b.wait_for_status("g", "paused")?;
    pair.exists_only_at(&pair.b, "g")?;
    ensure!(witness.is_silent(Duration::from_millis(300)), "a paused guest beats");
    pair.b.ferry(&["resume", "g"])?.exit(0)?;
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn an_aborted_cold_move_wakes_its_guest_at_the_source(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g").work(WILD))?;
    let underway = pair.migrate_until("g", &["--cold", "--bandwidth", "40Mbit"], is_copying)?;
    ensure!(
        witness.is_silent(Duration::from_millis(300)),
        "it beats while it is copied"
    );

    pair.a.ferry(&["migration", "abort", &underway.id])?.exit(0)?;

    let record = underway.call.wait()?.exit(1)?.migration()?.is("cancelled", "a")?;
    ensure!(undone(&record) == ["copy", "prepare", "queue"], "{}", record.record);
    stays_and_moves_later(pair, &witness)
}

fn a_source_agent_killed_during_a_cold_move_goes_on_with_it(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer(pair);
    let witness = pair.run(&Guest::new("g").work(WILD))?;
    let underway = pair.migrate_until("g", &["--cold", "--bandwidth", "80Mbit"], is_copying)?;

    pair.a.kill();
    pair.a.start()?;

    let record = pair.wait_over(&underway.id)?.is("completed", "b")?;
    ensure!(record.text("restarted_in")? == "copy", "{}", record.record);
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn a_cold_move_whose_agent_is_gone_wakes_its_guest_when_the_time_is_up(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer(pair);
    let witness = pair.run(&Guest::new("g").work(WILD))?;
    let slow = ["--cold", "--bandwidth", "40Mbit", "--timeout", "4s"];
    let underway = pair.migrate_until("g", &slow, is_copying)?;

    pair.a.kill();
    witness.wait_for_beats_at("a", 5)?;
    pair.a.start()?;

    let record = pair.wait_over(&underway.id)?.is("failed", "a")?;
    ensure!(record.text("error")?.contains("not done within"), "{}", record.record);
    pair.runs_only_at(&pair.a, "g", &witness)?;
    has_nothing(&pair.b)
}

fn a_source_agent_killed_while_preparing_undoes_it_and_says_what(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer(pair);
    let witness = pair.run(&Guest::new("g"))?;
    let underway = pair.migrate_until("g", &["--hold-at", "preparing"], |record| {
        Ok(record.text("step")? == "prepare" && !pair.b.vmms().is_empty())
    })?;

    pair.a.kill();
    pair.a.start()?;

    let record = pair.wait_over(&underway.id)?.is("failed", "a")?;
    ensure!(record.text("restarted_in")? == "prepare", "{}", record.record);
    ensure!(record.text("error")?.contains("in step prepare"), "{}", record.record);
    ensure!(undone(&record) == ["prepare", "queue"], "{}", record.record);
    stays_and_moves_later(pair, &witness)
}

/// An instance that is off.
fn stopped(pair: &Pair) -> Result<()> {
    pair.run(&Guest::new("g"))?;
    pair.a.ferry(&["stop", "g", "--force"])?.exit(0)?;
    pair.a.wait_for_status("g", "stopped").map(drop)
}

/// It is off at A, where it can be started, and B has nothing of it.
fn is_stopped_at_the_source(pair: &Pair) -> Result<()> {
    pair.a.wait_for_status("g", "stopped")?;
    until("no VMM is left at a", CALL, || {
        Ok(pair.a.vmms().is_empty().then_some(()))
    })?;
    has_nothing(&pair.b)?;
    pair.a.ferry(&["start", "g"])?.exit(0)?;
    Witness::of(&[&pair.a, &pair.b]).wait_ready()?;
    pair.exists_only_at(&pair.a, "g")
}

fn a_stopped_instance_moves_cold_and_starts_there(pair: &mut Pair) -> Result<()> {
    stopped(pair)?;
    pair.migrate("g", &[])?.exit(4)?.says("--cold")?;

    let moved = pair
        .migrate("g", &["--cold", "--digests"])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;

    ensure!(moved.text("guest_was")? == "stopped", "{}", moved.record);
    let there = pair.b.wait_for_status("g", "stopped")?;
    ensure!(
        there["reason"].as_str().is_some_and(|reason| reason.contains("host a")),
        "{there}"
    );
    pair.a.wait_until_gone("g")?.says("moved_to")?;
    until("no VMM is left", CALL, || {
        Ok((pair.a.vmms().is_empty() && pair.b.vmms().is_empty()).then_some(()))
    })?;
    pair.b.ferry(&["start", "g"])?.exit(0)?;
    Witness::of(&[&pair.b]).wait_ready()?;
    pair.exists_only_at(&pair.b, "g")
}

fn a_stopped_instance_stays_stopped_when_its_move_is_aborted(pair: &mut Pair) -> Result<()> {
    stopped(pair)?;
    let underway = pair.migrate_until("g", &["--cold", "--hold-at", "running"], |record| {
        Ok(record.text("step")? == "copy" && record.rounds() > 0)
    })?;
    ensure!(pair.a.show("g")?["status"] == "stopped", "its user sees something else");

    pair.a.ferry(&["migration", "abort", &underway.id])?.exit(0)?;

    let record = underway.call.wait()?.exit(1)?.migration()?.is("cancelled", "a")?;
    ensure!(
        undone(&record) == ["copy", "prepare", "build", "queue"],
        "{}",
        record.record
    );
    is_stopped_at_the_source(pair)
}

fn a_stopped_instance_stays_stopped_when_its_agent_is_killed(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer(pair);
    stopped(pair)?;
    let underway = pair.migrate_until("g", &["--cold", "--hold-at", "preparing"], |record| {
        Ok(record.text("step")? == "prepare" && !pair.b.vmms().is_empty())
    })?;

    pair.a.kill();
    pair.a.start()?;

    let record = pair.wait_over(&underway.id)?.is("failed", "a")?;
    ensure!(undone(&record) == ["prepare", "build", "queue"], "{}", record.record);
    is_stopped_at_the_source(pair)
}

fn a_stopped_instance_stays_stopped_when_its_destination_is_killed(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer(pair);
    stopped(pair)?;
    let underway = pair.migrate_until("g", &["--cold", "--hold-at", "running"], |record| {
        Ok(record.text("step")? == "copy" && record.rounds() > 0)
    })?;

    ferry_tests::process::signal(pair.b.vmm()?, rustix::process::Signal::KILL)?;

    underway.call.wait()?.exit(1)?.migration()?.is("failed", "a")?;
    is_stopped_at_the_source(pair)
}

fn a_host_kept_at_an_older_version_is_named(pair: &mut Pair) -> Result<()> {
    pair.b.arguments.extend(["--rpc-cap".to_owned(), "4.2".to_owned()]);
    pair.verifies = false;
    pair.b.terminate()?;
    pair.b.start()?;
    let witness = pair.run(&Guest::new("g"))?;

    let told = pair.migrate("g", &["--cold"])?.exit(4)?;

    told.says("RPC_VERSION")?.says("host b")?.says("4.2")?.says("4.3")?;
    pair.runs_only_at(&pair.a, "g", &witness)?;
    pair.migrate("g", &[])?.exit(0)?.migration()?.is("completed", "b")?;
    pair.runs_only_at(&pair.b, "g", &witness)
}
