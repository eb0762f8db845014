//! An abort in any phase before GO: the guest runs on at the source, nothing is left at the destination, a retry works.

use std::time::Duration;

use anyhow::{Result, ensure};
use ferry_tests::{Guest, Migration, Pair, process, until, waiting::CALL};
use libtest_mimic::Trial;

use crate::journal;
use crate::scenario::on_kvm;

pub(crate) fn trials() -> Vec<Trial> {
    on_kvm![
        an_abort_while_queued_leaves_the_guest_at_the_source,
        an_abort_while_preparing_leaves_the_guest_at_the_source,
        an_abort_in_the_first_pass_leaves_the_guest_at_the_source,
        an_abort_between_rounds_leaves_the_guest_at_the_source,
        an_abort_before_the_grant_leaves_the_guest_at_the_source,
        an_abort_after_the_destination_expects_the_guest_leaves_it_at_the_source,
        an_abort_at_once_leaves_the_guest_at_the_source,
        an_abort_after_the_end_changes_nothing,
    ]
}

fn an_abort_while_queued_leaves_the_guest_at_the_source(pair: &mut Pair) -> Result<()> {
    stays_when_aborted(pair, &["--hold-at", "queued"], |record| {
        Ok(record.text("status")? == "queued")
    })
}

fn an_abort_while_preparing_leaves_the_guest_at_the_source(pair: &mut Pair) -> Result<()> {
    stays_when_aborted(pair, &["--hold-at", "preparing"], |record| {
        Ok(record.text("status")? == "preparing")
    })
}

fn an_abort_in_the_first_pass_leaves_the_guest_at_the_source(pair: &mut Pair) -> Result<()> {
    stays_when_aborted(pair, &["--bandwidth", "40Mbit"], |record| {
        Ok(record.number("bytes_sent")? > f64::from(1 << 20) && record.rounds() == 0)
    })
}

fn an_abort_between_rounds_leaves_the_guest_at_the_source(pair: &mut Pair) -> Result<()> {
    stays_when_aborted(pair, &["--bandwidth", "160Mbit", "--max-downtime", "1ms"], |record| {
        Ok(record.rounds() >= 2)
    })
}

fn an_abort_before_the_grant_leaves_the_guest_at_the_source(pair: &mut Pair) -> Result<()> {
    stays_when_aborted(pair, &["--hold-at", "running"], |record| Ok(record.rounds() >= 2))
}

fn an_abort_after_the_destination_expects_the_guest_leaves_it_at_the_source(pair: &mut Pair) -> Result<()> {
    let journal = journal::of(&pair.b)?;
    stays_when_aborted(pair, &["--hold-at", "armed"], |record| {
        journal.decision_of(record.text("id")?, "OPEN")
    })
}

fn stays_when_aborted(pair: &Pair, further: &[&str], held: impl Fn(&Migration) -> Result<bool>) -> Result<()> {
    let work = "fill=random fill_mib=32 work=uniform work_mib=16 rate=5000 heartbeat_ms=20";
    let witness = pair.run(&Guest::new("g").work(work))?;
    let source = pair.a.vmm()?;
    let threads = process::threads(source);
    let descriptors = descriptors(source);
    let underway = pair.migrate_until("g", &[further, &["--digests"]].concat(), held)?;

    pair.a.ferry(&["migration", "abort", &underway.id])?.exit(0)?;

    underway.call.wait()?.exit(1)?.migration()?.is("cancelled", "a")?;
    pair.runs_only_at(&pair.a, "g", &witness)?;
    until("the source's VMM is as it was", CALL, || {
        Ok((process::threads(source) == threads && self::descriptors(source) == descriptors).then_some(()))
    })?;
    ensure!(
        pair.b.ferry(&["show", "g"])?.code == Some(3),
        "the destination still has it"
    );
    pair.migrate("g", &["--digests"])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn descriptors(process: u32) -> usize {
    std::fs::read_dir(format!("/proc/{process}/fd"))
        .into_iter()
        .flatten()
        .count()
}

fn an_abort_at_once_leaves_the_guest_at_the_source(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g"))?;
    let id = pair
        .migrate("g", &["--detach", "--bandwidth", "8Mbit"])?
        .exit(0)?
        .migration()?
        .text("id")?
        .to_owned();

    pair.a.ferry(&["migration", "abort", &id])?.exit(0)?;

    pair.a
        .ferry(&["migration", "watch", &id])?
        .exit(1)?
        .migration()?
        .is("cancelled", "a")?;
    pair.runs_only_at(&pair.a, "g", &witness)
}

fn an_abort_after_the_end_changes_nothing(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g"))?;
    let moved = pair.migrate("g", &[])?.exit(0)?.migration()?.is("completed", "b")?;

    pair.a.ferry(&["migration", "abort", moved.text("id")?])?.exit(4)?;

    ensure!(!witness.is_silent(Duration::from_millis(500)), "the guest stands still");
    pair.runs_only_at(&pair.b, "g", &witness)
}
