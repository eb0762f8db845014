//! Nobody knows who has the guest, and a person says so; and whoever comes back later learns of it.

use std::mem;

use anyhow::{Context, Result, ensure};
use ferry_rpc::faults::{Moment, Site, Word};
use ferry_tests::{Guest, Pair, Relay, Tampering, Witness, process, until, waiting::CALL, waiting::MOVE};
use libtest_mimic::Trial;
use rustix::process::Signal;
use serde_json::Value;

use crate::full_journals::gates;
use crate::gate::Gate;
use crate::journal;
use crate::postcopy::{BUSY, begin_with};
use crate::scenario::{expect_a_lost_peer_and, has_nothing, on_kvm};

pub(crate) fn trials() -> Vec<Trial> {
    on_kvm![
        a_guest_resolved_at_the_source_boots_anew_and_the_stale_copy_is_destroyed,
        a_guest_that_runs_twice_by_its_users_mistake_runs_once_when_the_hosts_meet,
        a_copy_that_is_discarded_at_the_source_leaves_the_guest_to_the_destination,
        a_destination_that_went_down_asks_the_source_before_it_starts_the_guest,
        a_guest_resolved_at_the_destination_boots_anew_and_the_source_destroys_its_copy,
        a_guest_resolved_on_both_hosts_is_told_as_such_until_one_of_them_is_deleted,
        an_instance_that_came_stopped_is_stopped_again_once_its_silent_source_answers,
        a_source_that_has_heard_the_decision_goes_on_without_the_destination,
        memory_that_is_kept_for_a_host_that_is_gone_is_freed_by_a_word,
        an_agent_with_another_journal_at_the_destinations_url_decides_nothing,
        an_agent_with_another_journal_at_the_sources_url_acknowledges_nothing,
    ]
}

fn a_guest_resolved_at_the_source_boots_anew_and_the_stale_copy_is_destroyed(pair: &mut Pair) -> Result<()> {
    let (witness, id) = arrive_unheard(pair)?;
    let resolve = ["migration", "resolve", id.as_str(), "--run-here", "--confirm"];
    pair.a.ferry(&with(&resolve, "g"))?.exit(4)?;
    lose_b(pair)?;
    pair.a.wait_for_indeterminate("g")?;

    pair.a
        .ferry(&with(&resolve, "another"))?
        .exit(4)?
        .says("nothing was done")?;
    pair.a
        .ferry(&with(&resolve, "g"))?
        .exit(0)?
        .migration()?
        .is("failed", "a")?;

    witness.wait_ready_times(2)?;
    let shown = pair.a.wait_for_status("g", "running")?;
    // It ran under 1 here, under 2 there, and that counts.
    ensure!(shown["epoch"] == 3, "{shown}");
    ensure!(journal::of(&pair.a)?.audited("resolve", "run-here")? == 1);

    b_is_back(pair)?;
    has_nothing(&pair.b)?;
    pair.b.ferry(&["show", "g"])?.exit(3)?.says("moved_to")?;
    ensure!(journal::of(&pair.b)?.audited("destroy-stale", "host a has it under epoch 3")? == 1);
    witness.wait_for_beats_at("a", 5)?;
    pair.exists_only_at(&pair.a, "g")
}

fn a_guest_that_runs_twice_by_its_users_mistake_runs_once_when_the_hosts_meet(pair: &mut Pair) -> Result<()> {
    let (witness, id) = arrive_unheard(pair)?;
    // Only its agent is gone; its guest runs.
    pair.b.kill();
    pair.a.wait_for_indeterminate("g")?;
    let resolve = ["migration", "resolve", id.as_str(), "--run-here", "--confirm", "g"];
    pair.a.ferry(&resolve)?.exit(0)?;
    witness.wait_ready_times(2)?;
    ensure!(pair.b.vmms().len() == 1, "nobody told b anything");

    b_is_back(pair)?;

    has_nothing(&pair.b)?;
    witness.wait_for_beats_at("a", 5)?;
    pair.exists_only_at(&pair.a, "g")
}

fn a_copy_that_is_discarded_at_the_source_leaves_the_guest_to_the_destination(pair: &mut Pair) -> Result<()> {
    let (witness, id) = arrive_unheard(pair)?;
    pair.b.kill();
    pair.a.wait_for_indeterminate("g")?;

    let resolve = ["migration", "resolve", id.as_str(), "--discard-here", "--confirm", "g"];
    pair.a.ferry(&resolve)?.exit(0)?.migration()?.is("error", "b")?;

    has_nothing(&pair.a)?;
    // Only its agent was gone.
    b_is_back(pair)?;
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn a_destination_that_went_down_asks_the_source_before_it_starts_the_guest(pair: &mut Pair) -> Result<()> {
    let (witness, _) = arrive_unheard(pair)?;
    lose_both(pair)?;

    b_is_back(pair)?;
    pair.b.wait_for_indeterminate("g")?;
    pair.b.ferry(&["start", "g"])?.exit(4)?;
    ensure!(pair.b.vmms().is_empty());
    pair.a.start()?;

    witness.wait_ready_times(2)?;
    pair.b.wait_for_status("g", "running")?;
    witness.wait_for_beats_at("b", 5)?;
    has_nothing(&pair.a)?;
    pair.exists_only_at(&pair.b, "g")
}

fn a_guest_resolved_at_the_destination_boots_anew_and_the_source_destroys_its_copy(pair: &mut Pair) -> Result<()> {
    let (witness, id) = arrive_unheard(pair)?;
    lose_both(pair)?;
    b_is_back(pair)?;
    pair.b.wait_for_indeterminate("g")?;

    let resolve = ["migration", "resolve", id.as_str(), "--run-here", "--confirm", "g"];
    pair.b.ferry(&resolve)?.exit(0)?;

    witness.wait_ready_times(2)?;
    let shown = pair.b.wait_for_status("g", "running")?;
    // It ran under 2. What A could come to meanwhile is left out.
    ensure!(shown["epoch"].as_u64().is_some_and(|epoch| epoch > 1000), "{shown}");
    pair.a.start()?;
    has_nothing(&pair.a)?;
    witness.wait_for_beats_at("b", 5)?;
    pair.exists_only_at(&pair.b, "g")
}

fn a_guest_resolved_on_both_hosts_is_told_as_such_until_one_of_them_is_deleted(pair: &mut Pair) -> Result<()> {
    let (_, id) = arrive_unheard(pair)?;
    pair.expect_complaint("on two hosts");
    lose_both(pair)?;
    let resolve = ["migration", "resolve", id.as_str(), "--run-here", "--confirm", "g"];
    b_is_back(pair)?;
    pair.b.wait_for_indeterminate("g")?;
    pair.b.ferry(&resolve)?.exit(0)?;
    // Its guest runs on.
    pair.b.kill();
    pair.a.start()?;
    pair.a.wait_for_indeterminate("g")?;
    pair.a.ferry(&resolve)?.exit(0)?;

    pair.b.start()?;

    let shown = until("b knows that a has it, too", CALL, || {
        let shown = pair.b.show("g")?;
        Ok((shown["also_at"] == "a").then_some(shown))
    })?;
    let told = shown["fault"]["message"].as_str().unwrap_or_default();
    ensure!(told.contains("two hosts have the instance"), "{shown}");
    let events = pair.b.ferry(&["events", "g"])?.exit(0)?.json_lines()?;
    let failed = |event: &&Value| event["action"] == "resolve" && event["result"] == "error";
    ensure!(events.iter().filter(failed).count() == 1, "{events:?}");
    let needs = pair.b.ferry(&["doctor"])?.exit(1)?.json_lines()?;
    let found = |need: &Value| !need["ok"].as_bool().unwrap_or(true) && need["found"] == "g is on b and on a";
    ensure!(needs.iter().any(found), "{needs:?}");

    pair.a.ferry(&["delete", "g", "--force"])?.exit(0)?;

    until("b has it alone", CALL, || {
        Ok(pair.b.show("g")?["also_at"].is_null().then_some(()))
    })?;
    pair.exists_only_at(&pair.b, "g")
}

fn an_instance_that_came_stopped_is_stopped_again_once_its_silent_source_answers(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer_and(pair, &["--fault-gate", "indeterminate", "source", "transport", "VMM"]);
    let gate = Gate::open(pair.folder())?;
    let flag = ["--fault-gate".to_owned(), gate.socket().display().to_string()];
    pair.b.arguments.extend(flag);
    pair.b.terminate()?;
    pair.b.start()?;
    pair.run(&Guest::new("g"))?;
    pair.a.ferry(&["stop", "g", "--force"])?.exit(0)?;
    gate.hold(Moment::Before, Site::JournalRunning);
    let moving = pair.a.ferry(&["migrate", "g", "--to", "b", "--cold", "--detach"])?;
    moving.exit(0)?;
    ensure!(gate.wait_held(MOVE), "agent b does not come to RUNNING");
    pair.a.kill();
    gate.say(Word::Go);
    pair.b.wait_for_status("g", "stopped")?;

    let start = ["start", "g"];
    pair.b.ferry(&start)?.exit(4)?.says("had not acknowledged")?;
    pair.b.wait_for_indeterminate("g")?;
    // What it was is in the journal, and that somebody wanted to start it is not.
    pair.b.kill();
    pair.b.start()?;
    pair.b.wait_for_status("g", "stopped")?;
    pair.b.ferry(&start)?.exit(4)?.says("had not acknowledged")?;
    pair.b.wait_for_indeterminate("g")?;
    pair.a.start()?;

    let there = pair.b.wait_for_status("g", "stopped")?;
    let reason = there["reason"].as_str().unwrap_or_default();
    ensure!(reason.contains("it was stopped when it came from host a"), "{there}");
    has_nothing(&pair.a)?;
    pair.b.ferry(&start)?.exit(0)?;
    Witness::of(&[&pair.b]).wait_ready()?;
    pair.exists_only_at(&pair.b, "g")
}

fn a_source_that_has_heard_the_decision_goes_on_without_the_destination(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer_and(
        pair,
        &["--fault-gate", "source", "transport", "VMM", "stream", "indeterminate"],
    );
    let (at_a, at_b) = gates(pair)?;
    let witness = pair.run(&Guest::new("g"))?;
    at_b.hold(Moment::Before, Site::JournalClaimed);
    at_a.hold(Moment::Before, Site::JournalResumed);
    pair.a.ferry(&["migrate", "g", "--to", "b", "--detach"])?.exit(0)?;
    ensure!(at_b.wait_held(MOVE), "agent b does not come to its claim");
    process::signal(pair.b.vmm()?, Signal::KILL)?;
    at_b.say(Word::Go);
    ensure!(at_a.wait_held(MOVE), "agent a does not hear that the guest is to go on");
    pair.a.kill();
    pair.b.kill();

    at_a.say(Word::Go);
    pair.a.start()?;

    until("the guest goes on at a", MOVE, || {
        Ok((pair.a.show("g")?["epoch"] == 3).then_some(()))
    })?;
    pair.a.wait_for_status("g", "running")?;
    witness.wait_for_beats_at("a", 5)?;
    pair.b.start()?;
    has_nothing(&pair.b)?;
    pair.runs_only_at(&pair.a, "g", &witness)
}

fn memory_that_is_kept_for_a_host_that_is_gone_is_freed_by_a_word(pair: &mut Pair) -> Result<()> {
    let further = [
        "the host went down",
        "crashed",
        "resolved by its user",
        "VMM",
        "source",
        "stream",
        "lost",
    ];
    expect_a_lost_peer_and(pair, &further);
    pair.run(&Guest::new("g").work(BUSY))?;
    let underway = begin_with(pair, &[])?;
    let id = underway.id.as_str();
    let resolve = |wish: &'static str, name: &'static str| ["migration", "resolve", id, wish, "--confirm", name];
    let answers = pair.a.ferry(&resolve("--discard-here", "g"))?;
    answers.exit(4)?.says("answers")?;
    lose_b(pair)?;

    pair.a
        .ferry(&resolve("--run-here", "g"))?
        .exit(4)?
        .says("--discard-here frees it")?;
    let other = pair.a.ferry(&resolve("--discard-here", "another"))?;
    other.exit(4)?.says("nothing was done")?;
    ensure!(pair.a.vmms().len() == 1, "its memory is kept");
    let resolved = pair.a.ferry(&resolve("--discard-here", "g"))?;
    resolved.exit(0)?.migration()?.is("error", "b")?;

    has_nothing(&pair.a)?;
    ensure!(journal::of(&pair.a)?.audited("resolve", "discard-here")? == 1);
    underway.call.wait()?.migration()?.is("error", "b")?;
    b_is_back(pair)?;
    pair.b.wait_for_status("g", "crashed")?;
    pair.b.ferry(&["delete", "g"])?.exit(0)?;
    has_nothing(&pair.b)
}

fn an_agent_with_another_journal_at_the_destinations_url_decides_nothing(pair: &mut Pair) -> Result<()> {
    let (witness, id) = arrive_unheard(pair)?;
    pair.expect_complaint("this decides nothing");
    pair.b.kill();
    let of_another = pair.folder().join("b-again");
    let own = mem::replace(&mut pair.b.data_dir, of_another);
    b_is_back(pair)?;

    until("a says who answers", CALL, || {
        let record = pair.a.ferry(&["migration", "show", &id])?.exit(0)?.json()?;
        let error = record["error"].as_str().unwrap_or_default();
        Ok(error.contains("another journal answers").then_some(()))
    })?;
    pair.a.wait_for_indeterminate("g")?;
    let shown = pair.a.show("g")?;
    ensure!(shown["fault"]["reason"] == "JOURNAL_IS_OTHER", "{shown}");
    ensure!(journal::of(&pair.b)?.rows("decisions")?.is_empty(), "it decided");

    pair.b.terminate()?;
    pair.b.data_dir = own;
    pair.b.start()?;
    let record = pair.wait_over(&id)?.is("completed", "b")?;
    ensure!(record.record["error"].is_null(), "{}", record.record);
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn an_agent_with_another_journal_at_the_sources_url_acknowledges_nothing(pair: &mut Pair) -> Result<()> {
    let (witness, id) = arrive_unheard(pair)?;
    lose_both(pair)?;
    let of_another = pair.folder().join("a-again");
    let own = mem::replace(&mut pair.a.data_dir, of_another);
    pair.a.start()?;

    b_is_back(pair)?;

    pair.b.wait_for_indeterminate("g")?;
    pair.b.ferry(&["start", "g"])?.exit(4)?;
    ensure!(pair.b.vmms().is_empty());
    let resolve = ["migration", "resolve", id.as_str(), "--run-here", "--confirm", "g"];
    pair.b.ferry(&resolve)?.exit(4)?.says("--host-is-gone")?;
    pair.a.terminate()?;
    pair.a.data_dir = own;
    pair.a.start()?;
    witness.wait_ready_times(2)?;
    pair.b.wait_for_status("g", "running")?;
    has_nothing(&pair.a)?;
    pair.exists_only_at(&pair.b, "g")
}

/// A guest that has moved to B, of which A does not hear: when it has begun to move, B's way to A is cut.
fn arrive_unheard(pair: &mut Pair) -> Result<(Witness, String)> {
    let further = [
        "nobody knows",
        "resolved by a person",
        "stale copy",
        "indeterminate",
        "the host went down",
        "crashed",
        "source",
        "transport",
        "VMM",
    ];
    expect_a_lost_peer_and(pair, &further);
    let way_to_a = Relay::before(&pair.a, Tampering::None)?;
    pair.b.set_peer("a", &way_to_a.url());
    pair.b.terminate()?;
    pair.b.start()?;
    let slow_to_copy = "fill=random fill_mib=24 work=idle heartbeat_ms=20";
    let witness = pair.run(&Guest::new("g").work(slow_to_copy).restart("on-crash"))?;
    let underway = pair.migrate_until("g", &["--bandwidth", "16Mbit"], |record| {
        Ok(record.record["status"] == "running")
    })?;
    drop(way_to_a);
    let id = underway.id.clone();
    underway.call.kill()?;
    pair.a
        .ferry(&["migration", "retune", &id, "--bandwidth", "none"])?
        .exit(0)?;
    let journal = journal::of(&pair.b)?;
    until("the guest runs at b", MOVE, || {
        Ok(journal.decision_of(&id, "RUNNING")?.then_some(()))
    })?;
    pair.keep_logs();
    Ok((witness, id))
}

/// Host B goes down: its agent and its guest.
fn lose_b(pair: &mut Pair) -> Result<()> {
    let vmm = pair.b.vmm()?;
    pair.b.kill();
    process::signal(vmm, Signal::KILL)?;
    until("the VMM is gone", CALL, || Ok(pair.b.vmms().is_empty().then_some(())))?;
    journal::reboot(&pair.b)
}

/// Host B goes down, and the agent of A too.
fn lose_both(pair: &mut Pair) -> Result<()> {
    pair.a.kill();
    lose_b(pair)
}

/// The agent of B comes back, and finds A now.
fn b_is_back(pair: &mut Pair) -> Result<()> {
    let url = pair.a.url();
    pair.b.set_peer("a", &url);
    pair.b.start().context("agent b comes back")
}

fn with<'a>(words: &[&'a str], last: &'a str) -> Vec<&'a str> {
    [words, &[last]].concat()
}
