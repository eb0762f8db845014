//! Callers that leave, callers at the wrong host, and two at once: what was begun is ended, and one copy runs.

use anyhow::{Context, Result, ensure};
use ferry_tests::{
    Guest, Pair, Witness, process, until,
    waiting::{CALL, MOVE},
};
use libtest_mimic::Trial;
use rustix::process::Signal;

use crate::scenario::{expect_a_lost_peer, on_kvm, stays_and_moves_later};

pub(crate) fn trials() -> Vec<Trial> {
    on_kvm![
        a_forced_delete_at_the_destination_ends_the_migration,
        a_forced_stop_whose_caller_leaves_is_carried_out,
        two_sources_move_a_guest_each_to_one_destination,
    ]
}

const WORK: &str = "fill=random fill_mib=64 work=uniform work_mib=8 rate=1000 heartbeat_ms=20";

fn a_forced_delete_at_the_destination_ends_the_migration(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer(pair);
    let witness = pair.run(&Guest::new("g").work(WORK))?;
    let underway = pair.migrate_until("g", &["--bandwidth", "80Mbit"], |record| {
        Ok(record.number("bytes_sent")? > f64::from(1 << 20))
    })?;

    pair.b
        .ferry(&["delete", "g", "--force"])?
        .exit(4)?
        .says(&underway.id)?
        .says("stays at host a")?;

    let record = underway.call.wait()?.exit(1)?.migration()?;
    ensure!(
        matches!(record.text("status")?, "failed" | "cancelled") && record.text("guest_location")? == "a",
        "{}",
        record.record
    );
    ensure!(!record.text("error")?.is_empty(), "{}", record.record);
    stays_and_moves_later(pair, &witness)
}

fn a_forced_stop_whose_caller_leaves_is_carried_out(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer(pair);
    let witness = pair.run(&Guest::new("g").work(WORK))?;
    let underway = pair.migrate_until("g", &["--bandwidth", "80Mbit"], |record| {
        Ok(record.number("bytes_sent")? > f64::from(1 << 20))
    })?;
    let vmm = pair.a.vmm()?;

    // Its VMM does not answer, so the stop waits for the migration's end when its caller is killed.
    process::signal(vmm, Signal::STOP)?;
    let stop = pair.a.begin(&["stop", "g", "--force"])?;
    let begun = until("the stop has begun", CALL, || {
        let events = pair.a.ferry(&["events", "g"])?.exit(0)?.json_lines()?;
        Ok((events[0]["action"] == "stop --force" && events[0]["result"].is_null()).then_some(()))
    });
    if begun.is_err() {
        process::signal(vmm, Signal::CONT)?;
    }
    begun?;
    ensure!(stop.kill()?, "the stop was over before its caller left");
    process::signal(vmm, Signal::CONT)?;

    pair.a.wait_for_status("g", "stopped")?;
    let record = pair.wait_over(&underway.id)?;
    ensure!(record.text("status")? != "completed", "{}", record.record);
    until("no VMM is left", MOVE, || {
        Ok((pair.a.vmms().is_empty() && pair.b.vmms().is_empty()).then_some(()))
    })?;
    pair.a.ferry(&["start", "g"])?.exit(0)?;
    witness.wait_ready_times(2)?;
    pair.a.wait_for_status("g", "running")?;
    pair.exists_only_at(&pair.a, "g")
}

fn two_sources_move_a_guest_each_to_one_destination(pair: &mut Pair) -> Result<()> {
    pair.start_third()?;
    let work = "fill=random fill_mib=32 work=uniform work_mib=8 rate=2000 heartbeat_ms=20";
    let (a, b, c) = (&pair.a, &pair.b, pair.c.as_ref().context("host c was started")?);
    let witnesses = [(a, "g"), (c, "h")].map(|(host, name)| -> Result<Witness> {
        let started = host.ferry(&Guest::new(name).work(work).arguments(&pair.kernel()))?;
        let id = started.exit(0)?.json()?["id"].as_str().unwrap_or_default().to_owned();
        Ok(Witness::of_instance(&[host, b], &id))
    });
    let [g, h] = witnesses;
    let (g, h) = (g?, h?);
    g.wait_ready()?;
    h.wait_ready()?;

    let further = ["--to", "b", "--digests", "--bandwidth", "400Mbit"];
    let calls = [
        a.begin(&[&["migrate", "g"], &further[..]].concat())?,
        c.begin(&[&["migrate", "h"], &further[..]].concat())?,
    ];
    until("both come in at once", CALL, || Ok((b.vmms().len() == 2).then_some(())))?;
    pair.keep_logs();

    for call in calls {
        call.wait()?.exit(0)?.migration()?.is("completed", "b")?;
    }
    for (name, witness) in [("g", &g), ("h", &h)] {
        b.wait_for_status(name, "running")?;
        witness.wait_for_beats_at("b", 5)?;
        witness.check()?;
    }
    pair.keep_logs();
    until("each guest has one VMM", CALL, || {
        Ok((a.vmms().is_empty() && c.vmms().is_empty() && b.vmms().len() == 2).then_some(()))
    })
}
