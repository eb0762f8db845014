//! What moves is compared before the guest is handed over, and late pages when they come: what was damaged on its way is sent again.

use std::ops::RangeInclusive;

use anyhow::{Result, ensure};
use ferry_tests::{Guest, Migration, Pair, Tampering};
use libtest_mimic::Trial;

use crate::scenario::{between, expect_a_lost_peer, expect_a_lost_peer_and, has_nothing, on_kvm};

pub(crate) fn trials() -> Vec<Trial> {
    on_kvm![
        what_was_compared_is_in_the_record,
        pages_that_are_damaged_on_their_way_are_sent_again,
        pages_that_are_damaged_again_keep_the_guest_where_it_is,
        pages_that_come_late_are_checked_when_they_come,
        what_came_before_is_compared_and_the_rest_when_it_comes,
        late_pages_that_are_damaged_on_their_way_are_asked_for_again,
        a_guest_whose_late_pages_are_damaged_each_time_is_lost_and_never_sees_them,
    ]
}

const WORK: &str = "fill=random fill_mib=48 work=uniform work_mib=8 rate=1000 heartbeat_ms=20";

/// Frames before those that are full of what the guest never writes again.
const UNWRITTEN: u64 = 4;

fn what_was_compared_is_in_the_record(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g").work(WORK))?;

    let there = pair.migrate("g", &["--verify"])?.exit(0)?.migration()?;
    let back = pair.b.ferry(&["migrate", "g", "--to", "a"])?.exit(0)?.migration()?;

    let verified = &there.record["verified"];
    ensure!(
        verified["pages"].as_u64() > Some(48 << 8) && verified["ranges_sent_again"] == 0,
        "{}",
        there.record
    );
    let total = there.record["downtime_ms"]["total"].as_f64();
    ensure!(verified["blackout_ms"].as_f64() < total, "{}", there.record);
    ensure!(back.record["verified"].is_null(), "{}", back.record);
    pair.runs_only_at(&pair.a, "g", &witness)
}

fn pages_that_are_damaged_on_their_way_are_sent_again(pair: &mut Pair) -> Result<()> {
    pair.expect_complaint("is not what was sent");
    let relay = between(pair, damage(0..=0, UNWRITTEN, Some(2)))?;
    let witness = pair.run(&Guest::new("g").work(WORK))?;

    let told = pair.migrate("g", &["--digests", "--streams", "2"])?.exit(0)?;

    ensure!(relay.has_tampered(), "nothing was tampered with: {told}");
    let moved = told.migration()?.is("completed", "b")?;
    ensure!(
        moved.record["verified"]["ranges_sent_again"].as_u64() >= Some(1),
        "{}",
        moved.record
    );
    let decisions = moved.record["decisions"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    ensure!(
        decisions.iter().any(|decision| decision["deed"] == "verify"),
        "{}",
        moved.record
    );
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn pages_that_are_damaged_again_keep_the_guest_where_it_is(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer(pair);
    pair.expect_complaint("is not what was sent");
    let relay = between(pair, damage(0..=0, UNWRITTEN, None))?;
    let witness = pair.run(&Guest::new("g").work(WORK))?;

    let told = pair.migrate("g", &["--streams", "1"])?.exit(1)?;

    ensure!(relay.has_tampered(), "nothing was tampered with: {told}");
    let record = told.migration()?.is("failed", "a")?;
    let says = "what the destination holds is not what was sent, and was not when it was sent again";
    ensure!(record.text("error")?.contains(says), "{told}");
    pair.runs_only_at(&pair.a, "g", &witness)?;
    has_nothing(&pair.b)?;
    pair.migrate("g", &["--digests"])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;
    pair.runs_only_at(&pair.b, "g", &witness)
}

/// How many pages came late, all of them checked, and how many were asked for again.
fn checked(moved: &Migration) -> Result<(u64, u64)> {
    let (late, verified) = (moved.number("late_pages")?, moved.number("late_verified")?);
    ensure!(late > 0.0 && late == verified, "{}", moved.record);
    Ok((late as u64, moved.number("late_sent_again")? as u64))
}

fn pages_that_come_late_are_checked_when_they_come(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g").work(WORK))?;

    let told = pair.migrate("g", &["--mode", "postcopy", "--verify"])?.exit(0)?;
    let back = ["migrate", "g", "--to", "a", "--mode", "postcopy"];
    let back = pair.b.ferry(&back)?.exit(0)?.migration()?;

    let moved = told.migration()?.is("completed", "b")?;
    let (late, again) = checked(&moved)?;
    ensure!(late > 48 << 8 && again == 0, "{}", moved.record);
    // None had come before.
    ensure!(moved.record["verified"]["pages"] == 0, "{}", moved.record);
    ensure!(
        back.record["late_verified"].is_null() && back.record["late_sent_again"].is_null(),
        "{}",
        back.record
    );
    pair.runs_only_at(&pair.a, "g", &witness)
}

fn what_came_before_is_compared_and_the_rest_when_it_comes(pair: &mut Pair) -> Result<()> {
    let busy = "fill=random fill_mib=48 work=uniform work_mib=24 rate=20000 heartbeat_ms=20";
    let witness = pair.run(&Guest::new("g").work(busy))?;

    // No round brings a guest that writes so much within this.
    let hybrid = ["--mode", "hybrid", "--max-downtime", "1ms", "--verify"];
    let moved = pair.migrate("g", &hybrid)?.exit(0)?.migration()?.is("completed", "b")?;

    let (late, again) = checked(&moved)?;
    let compared = moved.record["verified"]["pages"].as_u64();
    ensure!(compared >= Some(48 << 8) && again == 0, "{late} late: {}", moved.record);
    pair.runs_only_at(&pair.b, "g", &witness)
}

/// With one page stream these are the streams of late pages: two on which they are asked for, then the one on which the others are pushed.
const LATE: RangeInclusive<u16> = 2..=4;

fn late_pages_that_are_damaged_on_their_way_are_asked_for_again(pair: &mut Pair) -> Result<()> {
    pair.expect_complaint("is not what was sent");
    let relay = between(pair, damage(LATE, 1, Some(3)))?;
    let witness = pair.run(&Guest::new("g").work(WORK))?;

    let postcopy = ["--mode", "postcopy", "--verify", "--streams", "1"];
    let moved = pair
        .migrate("g", &postcopy)?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;

    ensure!(relay.has_tampered(), "nothing was tampered with: {}", moved.record);
    let (_, again) = checked(&moved)?;
    ensure!(again > 0, "{}", moved.record);
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn a_guest_whose_late_pages_are_damaged_each_time_is_lost_and_never_sees_them(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer_and(
        pair,
        &["VMM", "source", "stream", "lost", "is not what was sent", "late pages"],
    );
    let relay = between(pair, damage(LATE, 1, None))?;
    let witness = pair.run(&Guest::new("g").work(WORK).restart("on-crash"))?;

    let postcopy = ["--mode", "postcopy", "--verify", "--streams", "1"];
    let told = pair.migrate("g", &postcopy)?.exit(7)?;

    ensure!(relay.has_tampered(), "nothing was tampered with: {told}");
    let lost = told.migration()?;
    ensure!(
        lost.record["status"] == "error" && lost.record["guest_ended"] == "lost",
        "{told}"
    );
    ensure!(lost.text("error")?.contains("damaged on"), "{told}");
    witness.wait_ready_times(2)?;
    let shown = pair.b.wait_for_status("g", "running")?;
    ensure!(shown["epoch"] == 3, "{shown}");
    pair.exists_only_at(&pair.b, "g")?;
    has_nothing(&pair.a)
}

/// A bit of each page that is in so many frames of these streams, behind so many others.
fn damage(streams: RangeInclusive<u16>, number: u64, frames: Option<u64>) -> Tampering {
    Tampering::Pages {
        streams,
        number,
        frames,
        change: |page| page[100] ^= 1,
    }
}
