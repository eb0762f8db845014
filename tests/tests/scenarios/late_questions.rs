//! A guest waits for pages that do not come, and its host asks for them where it came from: they are there, or gone, or nobody knows.

use std::fs;

use anyhow::{Context, Result, ensure};
use ferry_tests::waiting::{CALL, MOVE};
use ferry_tests::{Guest, Host, Migration, Pair, Relay, Tampering, pair::Underway, process, until};
use libtest_mimic::Trial;
use rusqlite::Connection;
use rustix::process::Signal;

use crate::journal;
use crate::postcopy::{BUSY, begin_with, completes};
use crate::scenario::{expect_a_lost_peer_and, on_kvm};

pub(crate) fn trials() -> Vec<Trial> {
    on_kvm![
        a_guest_whose_source_cannot_reach_it_is_lost_once_that_says_that_its_pages_are_gone,
        a_source_that_took_the_migration_for_over_says_so_and_corrects_its_record,
        a_source_that_does_not_answer_is_waited_for_and_that_is_said_once,
        a_source_of_an_older_version_is_not_asked,
    ]
}

/// What this host itself says, whatever the other one does.
fn record(host: &Host, id: &str) -> Result<Migration> {
    let record = journal::of(host)?.record_of(id)?;
    Ok(Migration { record })
}

/// The guest's end is told by both hosts: in the record, by what a watcher exits with, and as the instance's fault.
fn is_lost_at_both(pair: &Pair, id: &str, words: &str) -> Result<()> {
    for host in [&pair.b, &pair.a] {
        let lost = until("the guest is told to be lost", MOVE, || {
            let record = record(host, id)?;
            Ok((record.record["status"] == "error").then_some(record))
        })?;
        ensure!(lost.record["guest_ended"] == "lost", "{}", lost.record);
        let error = lost.text("error")?;
        ensure!(error.contains(words), "{} does not say {words:?}: {error}", host.name);
        host.ferry(&["migration", "watch", id])?.exit(7)?;
        let events = host.ferry(&["events", "g"])?.exit(0)?.json_lines()?;
        let tells = |event: &serde_json::Value| {
            event["migration"] == id
                && event["result"] == "error"
                && event["message"].as_str().is_some_and(|text| text.contains(words))
        };
        ensure!(events.iter().any(tells), "{}: {events:?}", host.name);
    }
    let shown = pair.b.wait_for_status("g", "crashed")?;
    let reason = shown["reason"].as_str().unwrap_or_default();
    ensure!(reason.contains("lost"), "{shown}");
    Ok(())
}

fn a_guest_whose_source_cannot_reach_it_is_lost_once_that_says_that_its_pages_are_gone(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer_and(pair, &["VMM", "source", "stream", "lost"]);
    let relay = Relay::before(&pair.b, Tampering::Cuts)?;
    pair.a.set_peer("b", &relay.url());
    pair.a.terminate()?;
    pair.a.start()?;
    pair.run(&Guest::new("g").work(BUSY))?;
    let Underway { id, call } = begin_with(pair, &[])?;

    // From here on only B gets through to A.
    relay.cut_off();
    process::signal(pair.a.vmm()?, Signal::KILL)?;

    is_lost_at_both(pair, &id, "host a has them no more")?;
    call.wait()?.exit(7)?;
    until("nothing is left at a", CALL, || {
        Ok(pair.a.vmms().is_empty().then_some(()))
    })
}

fn a_source_that_took_the_migration_for_over_says_so_and_corrects_its_record(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer_and(pair, &["VMM", "source", "stream", "lost"]);
    pair.run(&Guest::new("g").work(BUSY))?;
    let Underway { id, .. } = begin_with(pair, &[])?;

    let vmm = pair.a.vmm()?;
    pair.a.kill();
    process::signal(vmm, Signal::KILL)?;
    let journal = Connection::open(pair.a.data_dir.join("journal.db"))?;
    let over = "UPDATE migrations SET over = 1, info = json_set(info, '$.status', 'completed', '$.ended', '2026-01-01T00:00:00Z')
                WHERE id = ?1";
    ensure!(journal.execute(over, [&id])? == 1, "A's journal has no row of it");
    drop(journal);
    pair.a.start()?;

    is_lost_at_both(pair, &id, "host a has them no more")
}

/// No page comes from A, whose agent is not there either.
fn silence(pair: &mut Pair) -> Result<u32> {
    let vmm = pair.a.vmm()?;
    pair.a.kill();
    process::signal(vmm, Signal::STOP)?;
    Ok(vmm)
}

/// B has asked in vain so often; the guest runs, its record says in these words that nothing is known, and its events once.
fn is_in_doubt(pair: &Pair, id: &str, times: usize, words: &str) -> Result<()> {
    until("the source was asked in vain", MOVE, || {
        let log = fs::read_to_string(&pair.b.log).context("failed to read the log of b")?;
        let asked = log.matches("it is not known whether the source has the pages").count();
        let waiting = record(&pair.b, id)?;
        ensure!(!waiting.is_over(), "{}", waiting.record);
        let decision = waiting.record["decision"].as_str().unwrap_or_default();
        let says = decision.contains("is not known") && decision.contains(words);
        Ok((asked >= times && says).then_some(()))
    })?;
    ensure!(pair.b.show("g")?["status"] == "running");
    doubted_once(pair)
}

fn doubted_once(pair: &Pair) -> Result<()> {
    let events = pair.b.ferry(&["events", "g"])?.exit(0)?.json_lines()?;
    let doubts = events.iter().filter(|event| event["action"] == "ask-for-pages");
    ensure!(doubts.count() == 1, "{events:?}");
    Ok(())
}

fn a_source_that_does_not_answer_is_waited_for_and_that_is_said_once(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer_and(pair, &["VMM", "source", "stream"]);
    let witness = pair.run(&Guest::new("g").work(BUSY))?;
    let Underway { id, .. } = begin_with(pair, &[])?;

    let vmm = silence(pair)?;
    is_in_doubt(pair, &id, 2, "host a")?;
    process::signal(vmm, Signal::CONT)?;
    pair.a.start()?;

    completes(pair, &id, &witness)?;
    let over = record(&pair.b, &id)?.is("completed", "b")?;
    ensure!(over.record["decision"].is_null(), "{}", over.record);
    doubted_once(pair)
}

fn a_source_of_an_older_version_is_not_asked(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer_and(pair, &["VMM", "source", "stream"]);
    let witness = pair.run(&Guest::new("g").work(BUSY))?;
    let Underway { id, .. } = begin_with(pair, &[])?;

    let vmm = silence(pair)?;
    pair.a.arguments.extend(["--rpc-cap".to_owned(), "4.2".to_owned()]);
    // It waits for its VMM, and would say so.
    pair.a.start()?;
    is_in_doubt(pair, &id, 1, "a question for late pages")?;
    process::signal(vmm, Signal::CONT)?;

    completes(pair, &id, &witness)
}
