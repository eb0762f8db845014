//! A guest that moves on as soon as it has come, and agents that die before they wrote that it came.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ferry_rpc::faults::{Moment, Site, Word};
use ferry_tests::{Guest, Pair, process, until, waiting::CALL, waiting::MOVE};
use libtest_mimic::Trial;
use rustix::process::Signal;

use crate::gate::Gate;
use crate::journal;
use crate::scenario::{expect_a_lost_peer_and, on_kvm};

pub(crate) fn trials() -> Vec<Trial> {
    on_kvm![
        an_agent_killed_before_it_wrote_that_a_guest_came_goes_on_with_the_move_that_has_it_since,
        an_agent_killed_before_it_wrote_that_a_guest_came_keeps_the_place_of_the_next_move,
        an_instance_is_looked_at_while_the_silent_host_that_it_came_from_is_waited_for,
    ]
}

/// The guest has come to B, whose agent is held before it writes that the migration is over: its id.
fn arrive_unwritten(pair: &mut Pair, gate: &Gate) -> Result<(String, ferry_tests::Witness)> {
    expect_a_lost_peer_and(pair, &["transport", "source", "--fault-gate"]);
    let flag = ["--fault-gate".to_owned(), gate.socket().display().to_string()];
    pair.b.arguments.extend(flag);
    pair.b.terminate()?;
    pair.b.start()?;
    gate.hold(Moment::Before, Site::RowDestinationOver);
    let witness = pair.run(&Guest::new("g").work("fill=random fill_mib=64 work=uniform work_mib=8 heartbeat_ms=20"))?;
    let came = pair.migrate("g", &[])?.exit(0)?.migration()?.is("completed", "b")?;
    ensure!(gate.wait_held(CALL), "agent b does not come to its last row");
    Ok((came.text("id")?.to_owned(), witness))
}

/// Begins to move the guest back from B: the id of that migration.
fn go_on(pair: &Pair, further: &[&str]) -> Result<String> {
    let words = [&["migrate", "g", "--to", "a", "--detach", "--verify"], further].concat();
    let began = pair.b.ferry(&words)?.exit(0)?;
    Ok(began.migration()?.text("id")?.to_owned())
}

fn an_agent_killed_before_it_wrote_that_a_guest_came_goes_on_with_the_move_that_has_it_since(
    pair: &mut Pair,
) -> Result<()> {
    let gate = Gate::open(pair.folder())?;
    let (came, witness) = arrive_unwritten(pair, &gate)?;
    let onward = go_on(pair, &["--bandwidth", "160Mbit"])?;
    until("pages are being sent", MOVE, || {
        let record = pair.b.ferry(&["migration", "show", &onward])?.exit(0)?.migration()?;
        Ok((record.number("bytes_sent")? > f64::from(4 << 20)).then_some(()))
    })?;
    pair.keep_logs();
    ensure!(!journal::of(&pair.b)?.is_over(&came)?, "its last row is written");

    pair.b.kill();
    gate.say(Word::Go);
    pair.b.start()?;

    let record = pair.wait_over(&onward)?.is("completed", "a")?;
    ensure!(record.text("restarted_in")? == "copy", "{}", record.record);
    ensure!(journal::of(&pair.b)?.is_over(&came)?, "the arrival is not settled");
    pair.runs_only_at(&pair.a, "g", &witness)
}

fn an_agent_killed_before_it_wrote_that_a_guest_came_keeps_the_place_of_the_next_move(pair: &mut Pair) -> Result<()> {
    let gate = Gate::open(pair.folder())?;
    let (came, witness) = arrive_unwritten(pair, &gate)?;
    let onward = go_on(pair, &["--hold-at", "queued"])?;

    pair.b.kill();
    gate.say(Word::Go);
    pair.b.start()?;

    ensure!(journal::of(&pair.b)?.is_over(&came)?, "the arrival is not settled");
    let record = pair.b.ferry(&["migration", "show", &onward])?.exit(0)?.migration()?;
    ensure!(record.text("status")? == "queued", "{}", record.record);
    ensure!(pair.b.show("g")?["task"] == "migrating");
    pair.b.ferry(&["migration", "abort", &onward])?.exit(0)?;
    pair.wait_over(&onward)?.is("cancelled", "b")?;
    pair.runs_only_at(&pair.b, "g", &witness)
}

/// A is asked whether it knows that the guest left it, and is silent for as long as a call takes: nothing else is to wait for that.
fn an_instance_is_looked_at_while_the_silent_host_that_it_came_from_is_waited_for(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer_and(pair, &["transport", "source", "--fault-gate"]);
    let gate = Gate::open(pair.folder())?;
    let flag = ["--fault-gate".to_owned(), gate.socket().display().to_string()];
    pair.b.arguments.extend(flag);
    pair.start_third()?;
    gate.hold(Moment::Before, Site::TellRunning);
    let witness = pair.run(&Guest::new("g"))?;
    let moving = pair.begin_migrate("g", &[])?;
    ensure!(gate.wait_held(MOVE), "agent b does not come to tell its source");
    let agent = pair.a.pid().context("agent a runs")?;
    process::signal(agent, Signal::STOP)?;

    let (began, onward) = (
        Instant::now(),
        pair.b.begin(&["migrate", "g", "--to", "c", "--detach", "--verify"])?,
    );
    let waiting = thread::spawn(move || onward.wait().map(|answer| (answer, began.elapsed())));
    let mut longest = Duration::ZERO;
    while !waiting.is_finished() {
        let asked = Instant::now();
        pair.b.ferry(&["show", "g"])?.exit(0)?;
        longest = longest.max(asked.elapsed());
    }
    let (refused, waited) = waiting.join().expect("waiting does not panic")?;
    refused.exit(4)?.says("has not acknowledged")?;
    ensure!(longest < waited / 2, "{longest:?} to look, {waited:?} to be refused");

    process::signal(agent, Signal::CONT)?;
    gate.say(Word::Go);
    moving.wait()?.exit(0)?;
    pair.runs_only_at(&pair.b, "g", &witness)
}
