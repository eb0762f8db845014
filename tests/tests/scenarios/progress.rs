//! How far a migration is: bytes of memory and of disks, and one number that never runs backwards.

use anyhow::{Context, Result, ensure};
use ferry_tests::{Guest, Pair, answer::Migration, until, waiting::MOVE};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::scenario::{expect_a_lost_peer_and, on_kvm};

pub(crate) fn trials() -> Vec<Trial> {
    on_kvm![
        a_migration_tells_how_far_it_is_and_that_all_of_it_has_come,
        progress_does_not_run_backwards_when_the_agent_restarts,
        a_migration_that_is_called_off_never_claims_to_be_whole,
    ]
}

const MEMORY: f64 = (128 << 20) as f64;
const WORK: &str = "fill=random fill_mib=64 work=uniform work_mib=8 rate=1000 heartbeat_ms=20";
const SLOW: [&str; 3] = ["--detach", "--bandwidth", "160Mbit"];

fn a_migration_tells_how_far_it_is_and_that_all_of_it_has_come(pair: &mut Pair) -> Result<()> {
    pair.run(&Guest::new("g").work(WORK))?;
    let began = pair.migrate("g", &SLOW)?.exit(0)?.migration()?;
    let has_begun = began.text("status")? == "running";
    ensure!(
        has_begun || began.record["memory_total"].is_null() && began.record["progress_percent"].is_null(),
        "{}",
        began.record
    );

    let watched = pair.a.ferry(&["migration", "watch", began.text("id")?])?.exit(0)?;

    let seen = watched.json_lines()?;
    let between = seen.iter().filter_map(|one| one["progress_percent"].as_u64());
    ensure!(
        between.filter(|percent| (1..100).contains(percent)).count() >= 2,
        "{watched}"
    );
    never_backwards(&seen)?;
    let last = watched.migration()?.is("completed", "b")?;
    ensure!(last.number("progress_percent")? as u64 == 100, "{watched}");
    ensure!(last.number("memory_total")? == MEMORY, "{watched}");
    ensure!(last.number("memory_remaining")? == 0.0, "{watched}");
    let processed = last.number("memory_processed")?;
    ensure!(
        (f64::from(72 << 20)..MEMORY).contains(&processed),
        "{processed} of {MEMORY}"
    );
    ensure!(last.number("disk_total")? == 0.0 && last.number("disk_processed")? == 0.0);
    Ok(())
}

fn progress_does_not_run_backwards_when_the_agent_restarts(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer_and(pair, &["transport", "source"]);
    let witness = pair.run(&Guest::new("g").work(WORK))?;
    let began = pair.migrate("g", &SLOW)?.exit(0)?.migration()?;
    let id = began.text("id")?;
    let watching = pair.a.begin(&["migration", "watch", id])?;
    until("a third of it is there", MOVE, || {
        let percent = percent(&pair.a.ferry(&["migration", "show", id])?.exit(0)?.migration()?);
        Ok(percent.is_some_and(|percent| percent > 30).then_some(()))
    })?;

    pair.a.kill();
    pair.a.start()?;

    let watched = watching.wait()?.exit(0)?;
    never_backwards(&watched.json_lines()?)?;
    let last = watched.migration()?.is("completed", "b")?;
    ensure!(percent(&last) == Some(100), "{watched}");
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn a_migration_that_is_called_off_never_claims_to_be_whole(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g").work(WORK))?;
    let began = pair.migrate("g", &SLOW)?.exit(0)?.migration()?;
    let id = began.text("id")?;
    until("some of it is there", MOVE, || {
        let percent = percent(&pair.a.ferry(&["migration", "show", id])?.exit(0)?.migration()?);
        Ok(percent.is_some_and(|percent| percent > 10).then_some(()))
    })?;

    pair.a.ferry(&["migration", "abort", id])?.exit(0)?;

    let last = pair.wait_over(id)?.is("cancelled", "a")?;
    let reached = percent(&last).context("it was known how far it was")?;
    ensure!((10..100).contains(&reached), "{}", last.record);
    ensure!(last.number("memory_remaining")? > 0.0, "{}", last.record);
    pair.runs_only_at(&pair.a, "g", &witness)
}

fn percent(migration: &Migration) -> Option<u64> {
    migration.record["progress_percent"].as_u64()
}

/// What is not known meanwhile is told as null.
fn never_backwards(seen: &[Value]) -> Result<()> {
    let told: Vec<u64> = seen.iter().filter_map(|one| one["progress_percent"].as_u64()).collect();
    ensure!(told.is_sorted(), "{told:?}");
    Ok(())
}
