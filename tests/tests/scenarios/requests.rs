//! What a user may ask while and after a guest moves: watch, detach, wait, refuse.

use anyhow::{Result, ensure};
use ferry_tests::{Guest, Pair, until, waiting::MOVE};
use libtest_mimic::Trial;

use crate::scenario::on_kvm;

pub(crate) fn trials() -> Vec<Trial> {
    on_kvm![
        both_agents_keep_the_record,
        a_detached_migration_is_watched_to_its_end,
        a_wait_that_runs_out_leaves_the_migration_going,
        an_interrupted_client_leaves_the_migration_going,
        the_destination_is_the_only_peer_by_default,
        any_agent_takes_the_order,
        a_migrating_guest_is_not_paused_stopped_or_deleted,
        a_forced_stop_ends_a_migration_before_go,
        a_second_migration_of_the_same_guest_is_refused,
        a_timeout_aborts_and_the_guest_runs_on,
        a_guest_that_powers_off_meanwhile_ends_the_migration,
    ]
}

/// Slow enough to be looked at: 64 MiB at 20 MB/s.
const SLOW: &[&str] = &["--bandwidth", "160Mbit"];
const SLOW_WORK: &str = "fill=random fill_mib=64 work=idle heartbeat_ms=20";

fn both_agents_keep_the_record(pair: &mut Pair) -> Result<()> {
    pair.run(&Guest::new("g"))?;
    let moved = pair.migrate("g", &[])?.exit(0)?.migration()?.is("completed", "b")?;
    let id = moved.text("id")?;

    for host in [&pair.a, &pair.b] {
        let record = host
            .ferry(&["migration", "show", id])?
            .exit(0)?
            .migration()?
            .is("completed", "b")?;
        ensure!(
            record.text("source")? == "a" && record.text("destination")? == "b",
            "{}",
            record.record
        );
        let listed = host.ferry(&["migration", "list"])?.exit(0)?.json_lines()?;
        ensure!(listed.iter().filter(|one| one["id"] == id).count() == 1, "{listed:?}");
    }
    Ok(())
}

fn a_detached_migration_is_watched_to_its_end(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g").work(SLOW_WORK))?;

    let began = pair.migrate("g", &[SLOW, &["--detach"]].concat())?.exit(0)?;
    let id = began.migration()?.text("id")?.to_owned();
    let watched = pair.a.ferry(&["migration", "watch", &id])?.exit(0)?;

    ensure!(
        watched.json_lines()?.len() >= 2,
        "one snapshot at least before the last: {watched}"
    );
    watched.migration()?.is("completed", "b")?;
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn a_wait_that_runs_out_leaves_the_migration_going(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g").work(SLOW_WORK))?;

    pair.migrate("g", &[SLOW, &["--wait", "200ms"]].concat())?.exit(5)?;

    until("the guest arrives", MOVE, || {
        Ok((pair.b.ferry(&["show", "g"])?.code == Some(0)).then_some(()))
    })?;
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn an_interrupted_client_leaves_the_migration_going(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g").work(SLOW_WORK))?;

    let call = pair.begin_migrate("g", SLOW)?;
    let id = until("it migrates", MOVE, || {
        let shown = pair.a.show("g")?;
        Ok(shown["migration"]
            .as_str()
            .filter(|_| shown["task"] == "migrating")
            .map(str::to_owned))
    })?;
    call.interrupt()?;

    call.wait()?.exit(130)?.says(&id)?;
    pair.a
        .ferry(&["migration", "watch", &id])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn the_destination_is_the_only_peer_by_default(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g"))?;

    pair.a
        .ferry(&["migrate", "g"])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;

    pair.runs_only_at(&pair.b, "g", &witness)
}

fn any_agent_takes_the_order(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g"))?;

    pair.b
        .ferry(&["migrate", "g", "--to", "b"])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;

    pair.runs_only_at(&pair.b, "g", &witness)
}

fn a_migrating_guest_is_not_paused_stopped_or_deleted(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g").work(SLOW_WORK))?;
    let id = pair
        .migrate("g", &[SLOW, &["--detach"]].concat())?
        .exit(0)?
        .migration()?
        .text("id")?
        .to_owned();

    for verb in ["pause", "resume", "stop", "delete"] {
        pair.a.ferry(&[verb, "g"])?.exit(4)?.says(&id)?;
    }

    pair.a
        .ferry(&["migration", "watch", &id])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn a_forced_stop_ends_a_migration_before_go(pair: &mut Pair) -> Result<()> {
    pair.run(&Guest::new("g").work(SLOW_WORK))?;
    let id = pair
        .migrate("g", &[SLOW, &["--detach"]].concat())?
        .exit(0)?
        .migration()?
        .text("id")?
        .to_owned();

    pair.a.ferry(&["stop", "g", "--force"])?.exit(0)?;

    pair.a.wait_for_status("g", "stopped")?;
    let record = pair.a.ferry(&["migration", "show", &id])?.exit(0)?.migration()?;
    ensure!(
        matches!(record.text("status")?, "cancelled" | "failed"),
        "{}",
        record.record
    );
    until("no VMM is left", MOVE, || {
        Ok((pair.a.vmms().is_empty() && pair.b.vmms().is_empty()).then_some(()))
    })
}

fn a_second_migration_of_the_same_guest_is_refused(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g").work(SLOW_WORK))?;
    let id = pair
        .migrate("g", &[SLOW, &["--detach"]].concat())?
        .exit(0)?
        .migration()?
        .text("id")?
        .to_owned();

    pair.migrate("g", &[])?.exit(4)?.says(&id)?;

    pair.a
        .ferry(&["migration", "watch", &id])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn a_timeout_aborts_and_the_guest_runs_on(pair: &mut Pair) -> Result<()> {
    let work = "fill=random fill_mib=16 work=uniform work_mib=64 rate=50000 heartbeat_ms=20";
    let witness = pair.run(&Guest::new("g").work(work))?;

    let told = pair
        .migrate(
            "g",
            &["--bandwidth", "80Mbit", "--max-downtime", "20ms", "--timeout", "2s"],
        )?
        .exit(1)?;

    let record = told.migration()?;
    ensure!(
        record.text("guest_location")? == "a" && record.text("error")?.contains("2s"),
        "{}",
        record.record
    );
    pair.runs_only_at(&pair.a, "g", &witness)
}

fn a_guest_that_powers_off_meanwhile_ends_the_migration(pair: &mut Pair) -> Result<()> {
    let work = "fill=random fill_mib=64 work=idle heartbeat_ms=20 poweroff_after_ms=1500";
    pair.run(&Guest::new("g").work(work))?;

    let told = pair.migrate("g", &["--bandwidth", "80Mbit"])?.exit(7)?;

    ensure!(told.migration()?.text("error")?.contains("guest"), "{told}");
    pair.a.wait_for_status("g", "stopped")?;
    until("no VMM is left", MOVE, || {
        Ok((pair.a.vmms().is_empty() && pair.b.vmms().is_empty()).then_some(()))
    })
}
