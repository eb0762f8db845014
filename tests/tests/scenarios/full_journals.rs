//! A journal that takes nothing in the middle of a switchover or at an instance's end, under agents that go on: nothing that depends on the write
//! happens, and nobody is left in doubt once it takes something again. Somebody else has the journal locked meanwhile: to the agent that is a disk that fails.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ferry_rpc::faults::{Moment, Site, Word};
use ferry_tests::{Guest, Host, Pair, Witness, process, until, waiting::MOVE};
use libtest_mimic::Trial;
use rusqlite::Connection;
use rustix::process::Signal;

use crate::gate::Gate;
use crate::journal;
use crate::scenario::{expect_a_lost_peer_and, has_nothing, on_kvm};

pub(crate) fn trials() -> Vec<Trial> {
    on_kvm![
        an_attempt_that_cannot_be_armed_is_called_off,
        an_attempt_that_cannot_be_expected_is_called_off,
        a_claim_that_cannot_be_written_gives_the_guest_back,
        a_source_that_cannot_write_that_it_resumes_does_so_later_without_the_destination,
        a_stop_that_cannot_be_written_is_said_to_be_and_is_made_up_for,
    ]
}

/// Nothing is written to the host's journal but by who has this.
fn lock(host: &Host) -> Result<Connection> {
    let connection = Connection::open(host.data_dir.join("journal.db"))?;
    connection.busy_timeout(Duration::from_secs(5))?;
    connection.execute_batch("BEGIN IMMEDIATE")?;
    Ok(connection)
}

/// A gate for each agent, which starts anew behind it.
pub(crate) fn gates(pair: &mut Pair) -> Result<(Gate, Gate)> {
    let folder = pair.folder().join("gate-of-b");
    std::fs::create_dir(&folder)?;
    let (at_a, at_b) = (Gate::open(pair.folder())?, Gate::open(&folder)?);
    for (host, gate) in [(&mut pair.a, &at_a), (&mut pair.b, &at_b)] {
        let flag = ["--fault-gate".to_owned(), gate.socket().display().to_string()];
        host.arguments.extend(flag);
        host.terminate()?;
        host.start()?;
    }
    Ok((at_a, at_b))
}

/// A gate for each agent, and a guest at A.
fn gated(pair: &mut Pair) -> Result<(Gate, Gate, Witness)> {
    let further = [
        "--fault-gate",
        "journal",
        "indeterminate",
        "nobody knows",
        "source",
        "transport",
        "VMM",
        "stream",
    ];
    expect_a_lost_peer_and(pair, &further);
    let (at_a, at_b) = gates(pair)?;
    let witness = pair.run(&Guest::new("g"))?;
    Ok((at_a, at_b, witness))
}

/// Begins to move the guest; the migration's id.
fn begin(pair: &Pair) -> Result<String> {
    let begun = pair.a.ferry(&["migrate", "g", "--to", "b", "--detach"])?.exit(0)?;
    let id = begun.json()?["id"].as_str().map(str::to_owned);
    id.context("it has no id")
}

fn held(gate: &Gate) -> Result<()> {
    ensure!(gate.wait_held(MOVE), "nobody comes there: {}", gate.story());
    Ok(())
}

/// Agent A trades the attempt while the journal takes nothing, and the guest runs on.
fn is_called_off(at_a: &Gate, witness: &Witness) -> Result<()> {
    until("agent a calls the attempt off", MOVE, || {
        Ok(at_a.is_past("a", Moment::Before, Site::AskTrade).then_some(()))
    })?;
    witness.wait_for_beats_at("a", 5)
}

fn stays_at_a(pair: &Pair, id: &str, witness: &Witness) -> Result<()> {
    pair.wait_over(id)?.is("failed", "a")?;
    pair.runs_only_at(&pair.a, "g", witness)?;
    has_nothing(&pair.b)
}

fn an_attempt_that_cannot_be_armed_is_called_off(pair: &mut Pair) -> Result<()> {
    let (at_a, _at_b, witness) = gated(pair)?;
    at_a.hold(Moment::Before, Site::JournalArmed);
    let id = begin(pair)?;
    held(&at_a)?;
    let locked = lock(&pair.a)?;
    at_a.say(Word::Go);
    is_called_off(&at_a, &witness)?;

    drop(locked);

    stays_at_a(pair, &id, &witness)
}

fn an_attempt_that_cannot_be_expected_is_called_off(pair: &mut Pair) -> Result<()> {
    let (at_a, at_b, witness) = gated(pair)?;
    at_b.hold(Moment::Before, Site::JournalOpen);
    let id = begin(pair)?;
    held(&at_b)?;
    let locked = lock(&pair.b)?;
    at_b.say(Word::Go);
    is_called_off(&at_a, &witness)?;

    drop(locked);

    stays_at_a(pair, &id, &witness)
}

fn a_claim_that_cannot_be_written_gives_the_guest_back(pair: &mut Pair) -> Result<()> {
    let (at_a, at_b, witness) = gated(pair)?;
    at_b.hold(Moment::Before, Site::JournalClaimed);
    let id = begin(pair)?;
    held(&at_b)?;
    let locked = lock(&pair.b)?;
    at_b.say(Word::Go);
    // Neither runs it, and nobody guesses.
    until("agent a asks for the decision and has none", MOVE, || {
        Ok(at_a.is_past("a", Moment::Before, Site::SayIndeterminate).then_some(()))
    })?;

    drop(locked);

    stays_at_a(pair, &id, &witness)?;
    ensure!(
        pair.a.show("g")?["epoch"] == 3,
        "it resumed under a right that nobody had"
    );
    Ok(())
}

fn a_source_that_cannot_write_that_it_resumes_does_so_later_without_the_destination(pair: &mut Pair) -> Result<()> {
    let (at_a, at_b, witness) = gated(pair)?;
    at_b.hold(Moment::Before, Site::JournalClaimed);
    at_a.hold(Moment::Before, Site::JournalResumed);
    let id = begin(pair)?;
    held(&at_b)?;
    process::signal(pair.b.vmm()?, Signal::KILL)?;
    at_b.say(Word::Go);
    held(&at_a)?;
    let locked = lock(&pair.a)?;
    pair.b.kill();
    at_a.say(Word::Go);
    until("agent a cannot write it", MOVE, || {
        Ok(at_a.is_past("a", Moment::Before, Site::SayIndeterminate).then_some(()))
    })?;

    drop(locked);

    pair.wait_over(&id)?.is("failed", "a")?;
    ensure!(pair.a.show("g")?["epoch"] == 3);
    witness.wait_for_beats_at("a", 5)?;
    pair.b.start()?;
    has_nothing(&pair.b)?;
    pair.runs_only_at(&pair.a, "g", &witness)
}

fn a_stop_that_cannot_be_written_is_said_to_be_and_is_made_up_for(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer_and(pair, &["journal", "failed to write"]);
    pair.run(&Guest::new("g").restart("always"))?;
    let locked = lock(&pair.a)?;

    pair.a.ferry(&["stop", "g", "--force"])?.exit(1)?.says("journal")?;

    ensure!(pair.a.vmms().is_empty(), "it has ended all the same");
    pair.a.ferry(&["delete", "g"])?.exit(1)?.says("journal")?;
    drop(locked);
    let journal = journal::of(&pair.a)?;
    until("the journal says that it is stopped", MOVE, || {
        let rows = journal.rows("instances")?;
        Ok(rows.iter().any(|row| row.contains("stopped by its user")).then_some(()))
    })?;
    pair.a.kill();
    pair.a.start()?;
    pair.a.wait_for_status("g", "stopped")?;
    ensure!(!journal.has_a_start_due()?, "its user stopped it");
    pair.a.ferry(&["delete", "g"])?.exit(0)?;
    has_nothing(&pair.a)
}
