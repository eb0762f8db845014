//! Every mode, and every way from one to another, over a link that carries less than the hosts could send; and the link goes down and comes up again.

use anyhow::{Context, Result, ensure};
use ferry_tests::{Answer, Guest, Migration, Pair, ShapedLink, until, waiting::CALL};
use libtest_mimic::Trial;

use crate::postcopy::completes;
use crate::scenario::{across, expect_a_lost_peer, in_a_network};

pub(crate) fn trials() -> Vec<Trial> {
    in_a_network![
        a_guest_moves_by_rounds,
        a_guest_stands_still_while_all_of_it_moves,
        a_guest_that_rounds_bring_within_the_budget_has_no_late_pages,
        a_guest_moves_at_once_and_its_pages_follow,
        a_guest_that_writes_more_than_the_link_carries_goes_over_to_late_pages,
        late_pages_come_over_grpc,
        a_guest_whose_time_is_up_stays_where_it_was_and_why_is_told,
        a_guest_whose_time_is_up_goes_over_to_late_pages,
        a_guest_whose_time_is_up_stands_still_for_the_rest,
        a_guest_that_is_completed_by_force_stands_still_for_the_rest,
        a_guest_that_is_completed_by_force_goes_over_to_late_pages,
        a_guest_that_writes_more_than_the_link_carries_is_throttled,
        a_copy_goes_on_after_the_link_was_down,
        late_pages_come_after_the_link_was_down,
        a_data_port_that_is_out_of_reach_is_told_by_a_dry_run,
    ]
}

/// In bytes a second, and as `tc` has it.
const CARRIED: f64 = 25e6;
const RATE: &str = "200mbit";
/// Writes a fifth of what the link carries.
const CALM: &str = "fill=random fill_mib=48 work=uniform work_mib=16 rate=1200 heartbeat_ms=20";
/// Writes next to nothing.
const QUIET: &str = "fill=random fill_mib=48 work=uniform work_mib=4 rate=100 heartbeat_ms=20";
/// Writes three times as much as the link carries.
const BUSY: &str = "fill=random fill_mib=24 work=uniform work_mib=32 rate=20000 heartbeat_ms=20";

/// Told by what it changes of its pages, that guest comes to its end all the same.
const WHOLE: [&str; 2] = ["--compress", "off"];

/// Moves a guest, and looks whether it is whole.
fn moves(pair: &mut Pair, work: &str, further: &[&str]) -> Result<Migration> {
    let (_link, witness) = across(pair, RATE, &Guest::new("g").work(work))?;
    let moved = pair.migrate("g", further)?.exit(0)?.migration()?.is("completed", "b")?;
    completes(pair, moved.text("id")?, &witness)?;
    Ok(moved)
}

fn came_late(moved: &Migration) -> Result<()> {
    let (late, missing) = (moved.number("late_pages")?, moved.number("late_missing")?);
    ensure!(late > 0.0 && missing == 0.0, "{}", moved.record);
    Ok(())
}

fn was_decided(moved: &Migration, deed: &str) -> Result<()> {
    let decisions = moved.record["decisions"].as_array().context("no decisions")?;
    let is_there = decisions.iter().any(|decision| decision["deed"] == deed);
    ensure!(is_there, "no {deed}: {}", moved.record);
    Ok(())
}

fn a_guest_moves_by_rounds(pair: &mut Pair) -> Result<()> {
    let moved = moves(pair, CALM, &["--digests"])?;
    let carried = moved.number("bytes_sent")? / (moved.number("total_ms")? / 1e3);
    // What a link's queue takes at once is little beside two seconds of it.
    ensure!(carried < 1.1 * CARRIED, "{carried} bytes a second: {}", moved.record);
    was_decided(&moved, "switch")
}

fn a_guest_stands_still_while_all_of_it_moves(pair: &mut Pair) -> Result<()> {
    let moved = moves(pair, BUSY, &["--cold", "--digests"])?;
    ensure!(moved.record["mode"] == "cold", "{}", moved.record);
    // All that it has in memory is sent meanwhile.
    let stood_still = moved.number("downtime_ms.total")?;
    ensure!(stood_still > 500.0, "{stood_still} ms: {}", moved.record);
    Ok(())
}

fn a_guest_that_rounds_bring_within_the_budget_has_no_late_pages(pair: &mut Pair) -> Result<()> {
    let moved = moves(pair, QUIET, &["--mode", "hybrid"])?;
    was_decided(&moved, "switch")?;
    ensure!(
        moved.number("late_pages").unwrap_or_default() == 0.0,
        "{}",
        moved.record
    );
    Ok(())
}

fn late_pages_come_over_grpc(pair: &mut Pair) -> Result<()> {
    let moved = moves(pair, BUSY, &["--mode", "postcopy", "--transport", "grpc"])?;
    ensure!(moved.record["transport"] == "grpc", "{}", moved.record);
    came_late(&moved)
}

fn a_guest_whose_time_is_up_stays_where_it_was_and_why_is_told(pair: &mut Pair) -> Result<()> {
    let (_link, witness) = across(pair, RATE, &Guest::new("g").work(BUSY))?;

    let told = pair
        .migrate("g", &[&WHOLE[..], &["--timeout", "6s"]].concat())?
        .exit(1)?;

    let ended = told.migration()?.is("failed", "a")?;
    let why = ended.text("error")?;
    ensure!(
        why.contains("not done within 6s: after round ") && why.contains("infeasible"),
        "{why}"
    );
    // Nobody had to wait for that.
    let progress = told
        .stderr
        .lines()
        .any(|line| line.contains("running") && line.contains("infeasible"));
    ensure!(progress, "{told}");
    pair.runs_only_at(&pair.a, "g", &witness)
}

fn a_guest_moves_at_once_and_its_pages_follow(pair: &mut Pair) -> Result<()> {
    let moved = moves(pair, BUSY, &["--mode", "postcopy"])?;
    ensure!(moved.rounds() <= 1, "{}", moved.record);
    came_late(&moved)
}

fn a_guest_that_writes_more_than_the_link_carries_goes_over_to_late_pages(pair: &mut Pair) -> Result<()> {
    let moved = moves(pair, BUSY, &[&WHOLE[..], &["--mode", "hybrid"]].concat())?;
    was_decided(&moved, "postcopy")?;
    came_late(&moved)
}

fn a_guest_whose_time_is_up_goes_over_to_late_pages(pair: &mut Pair) -> Result<()> {
    let moved = moves(
        pair,
        BUSY,
        &[&WHOLE[..], &["--timeout", "5s", "--on-timeout", "postcopy"]].concat(),
    )?;
    was_decided(&moved, "infeasible")?;
    was_decided(&moved, "time-up")?;
    came_late(&moved)
}

fn a_guest_whose_time_is_up_stands_still_for_the_rest(pair: &mut Pair) -> Result<()> {
    let moved = moves(
        pair,
        BUSY,
        &[&WHOLE[..], &["--timeout", "5s", "--on-timeout", "pause", "--digests"]].concat(),
    )?;
    was_decided(&moved, "infeasible")?;
    was_decided(&moved, "pause")
}

fn a_guest_that_is_completed_by_force_stands_still_for_the_rest(pair: &mut Pair) -> Result<()> {
    let (_link, witness) = across(pair, RATE, &Guest::new("g").work(BUSY))?;
    let underway = pair.migrate_until("g", &[&WHOLE[..], &["--digests"]].concat(), |record| {
        Ok(record.rounds() >= 2)
    })?;

    pair.a.ferry(&["migration", "force-complete", &underway.id])?.exit(0)?;

    let moved = underway.call.wait()?.exit(0)?.migration()?.is("completed", "b")?;
    ensure!(moved.number("downtime_ms.last_pages")? > 300.0, "{}", moved.record);
    completes(pair, &underway.id, &witness)
}

fn a_guest_that_is_completed_by_force_goes_over_to_late_pages(pair: &mut Pair) -> Result<()> {
    let (_link, witness) = across(pair, RATE, &Guest::new("g").work(BUSY))?;
    let late = [&WHOLE[..], &["--on-timeout", "postcopy"]].concat();
    let underway = pair.migrate_until("g", &late, |record| Ok(record.rounds() >= 2))?;

    pair.a.ferry(&["migration", "force-complete", &underway.id])?.exit(0)?;

    let moved = underway.call.wait()?.exit(0)?.migration()?.is("completed", "b")?;
    was_decided(&moved, "postcopy")?;
    came_late(&moved)?;
    completes(pair, &underway.id, &witness)
}

fn a_guest_that_writes_more_than_the_link_carries_is_throttled(pair: &mut Pair) -> Result<()> {
    let moved = moves(pair, BUSY, &[&WHOLE[..], &["--auto-converge", "--digests"]].concat())?;
    was_decided(&moved, "throttle")?;
    ensure!(moved.number("throttle_percent")? > 0.0, "{}", moved.record);
    was_decided(&moved, "switch")
}

fn a_copy_goes_on_after_the_link_was_down(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer(pair);
    // So slow that the copy is far from its end when the link goes.
    let (link, witness) = across(pair, "80mbit", &Guest::new("g").work(QUIET))?;
    let begun = |record: &Migration| Ok(record.record["progress_percent"].as_f64() > Some(15.0));
    let underway = pair.migrate_until("g", &["--resume-window", "2m", "--verify"], begun)?;

    while_it_is_down(pair, &link, &underway.id, |shown| {
        shown.record["status"] == "running (link lost)"
    })?;

    let moved = underway.call.wait()?.exit(0)?.migration()?.is("completed", "b")?;
    ensure!(moved.number("resumed_links")? >= 1.0, "{}", moved.record);
    completes(pair, &underway.id, &witness)
}

/// Has the link down until its source says that this is so.
fn while_it_is_down(pair: &Pair, link: &ShapedLink, id: &str, is_said: fn(&Migration) -> bool) -> Result<()> {
    link.cut()?;
    until("the source says that the link is down", CALL, || {
        let shown = pair.a.ferry(&["migration", "show", id])?.exit(0)?.migration()?;
        ensure!(!shown.is_over(), "it ended: {}", shown.record);
        Ok(is_said(&shown).then_some(()))
    })?;
    link.heal()
}

fn late_pages_come_after_the_link_was_down(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer(pair);
    let (link, witness) = across(pair, RATE, &Guest::new("g").work(BUSY))?;
    let is_late = |record: &Migration| Ok(record.record["status"] == "running (post-copy)");
    let underway = pair.migrate_until("g", &["--mode", "postcopy", "--bandwidth", "80Mbit"], is_late)?;

    while_it_is_down(pair, &link, &underway.id, |shown| {
        shown.record["decision"]
            .as_str()
            .is_some_and(|words| words.contains("waits for pages"))
    })?;

    let moved = underway.call.wait()?.exit(0)?.migration()?.is("completed", "b")?;
    came_late(&moved)?;
    completes(pair, &underway.id, &witness)
}

fn a_data_port_that_is_out_of_reach_is_told_by_a_dry_run(pair: &mut Pair) -> Result<()> {
    let (_link, witness) = across(pair, RATE, &Guest::new("g").work(CALM))?;
    dry_run(pair, &[])?.exit(0)?.says("the source gets to 198.51.100.2")?;
    pair.b.terminate()?;
    // As where nobody thinks of it: its own host gets there, and no other.
    pair.b.take_pages_at("127.0.0.1");
    pair.b.start()?;

    let told = until("the agent is heard again", CALL, || {
        let told = dry_run(pair, &[])?;
        Ok((!told.to_string().contains("DESTINATION_DOWN")).then_some(told))
    })?;
    told.exit(4)?
        .says("DATA_PORT")?
        .says("does not get to 127.0.0.1")?
        .says("--data-listen")?;
    dry_run(pair, &["--transport", "grpc"])?.exit(0)?;
    pair.migrate("g", &["--transport", "grpc"])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn dry_run(pair: &Pair, further: &[&str]) -> Result<Answer> {
    pair.migrate("g", &[&["--dry-run", "--sample", "none"], further].concat())
}
