//! An abort in any phase before GO: the guest runs on at the source, nothing is left at the destination, a retry works. And its opposite:
//! a migration that would never end is completed by force.

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
        a_migration_that_does_not_converge_is_completed_by_force,
        force_is_refused_while_nothing_is_copied_and_when_all_is_over,
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

fn a_migration_that_does_not_converge_is_completed_by_force(pair: &mut Pair) -> Result<()> {
    let work = "fill=random fill_mib=32 work=uniform work_mib=32 rate=max heartbeat_ms=20";
    let witness = pair.run(&Guest::new("g").work(work))?;
    let slow = [
        "--bandwidth",
        "400Mbit",
        "--max-downtime",
        "1ms",
        "--compress",
        "off",
        "--digests",
    ];
    let underway = pair.migrate_until("g", &slow, |record| Ok(record.rounds() >= 3))?;

    // At the other host: it is forwarded to the source.
    pair.b.ferry(&["migration", "force-complete", &underway.id])?.exit(0)?;

    let record = underway.call.wait()?.exit(0)?.migration()?.is("completed", "b")?;
    ensure!(record.number("downtime_ms.total")? > 1.0, "{}", record.record);
    pair.runs_only_at(&pair.b, "g", &witness)?;
    let events = pair.b.ferry(&["events", "g"])?.exit(0)?;
    let at_a = pair.a.ferry(&["events", "g"])?.exit(0)?;
    ensure!(at_a.stdout.contains("force-complete"), "{at_a}");
    ensure!(!events.stdout.contains("force-complete"), "{events}");
    Ok(())
}

fn force_is_refused_while_nothing_is_copied_and_when_all_is_over(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g"))?;
    let underway = pair.migrate_until("g", &["--hold-at", "preparing"], |record| {
        Ok(record.text("status")? == "preparing")
    })?;

    let force = ["migration", "force-complete", &underway.id];
    pair.a.ferry(&force)?.exit(4)?.says("nothing is being copied")?;
    pair.a.ferry(&["migration", "abort", &underway.id])?.exit(0)?;
    underway.call.wait()?.exit(1)?;
    pair.a.ferry(&force)?.exit(4)?.says("it is over")?;

    let nobody = "00000000-0000-4000-8000-000000000000";
    pair.a.ferry(&["migration", "force-complete", nobody])?.exit(3)?;
    pair.runs_only_at(&pair.a, "g", &witness)
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
    pair.b.wait_until_gone("g")?;
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
