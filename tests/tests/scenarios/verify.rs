//! What moves is compared before the guest is handed over: what was damaged on its way is sent again, once.

use anyhow::{Result, ensure};
use ferry_tests::{Guest, Pair, Tampering};
use libtest_mimic::Trial;

use crate::scenario::{between, expect_a_lost_peer, has_nothing, on_kvm};

pub(crate) fn trials() -> Vec<Trial> {
    on_kvm![
        what_was_compared_is_in_the_record,
        pages_that_are_damaged_on_their_way_are_sent_again,
        pages_that_are_damaged_again_keep_the_guest_where_it_is,
        pages_that_come_late_cannot_be_compared,
    ]
}

const WORK: &str = "fill=random fill_mib=48 work=uniform work_mib=8 rate=1000 heartbeat_ms=20";

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
    let relay = between(pair, damage(Some(2)))?;
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
    let relay = between(pair, damage(None))?;
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

fn pages_that_come_late_cannot_be_compared(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g"))?;

    for mode in ["postcopy", "hybrid"] {
        let refused = pair.migrate("g", &["--mode", mode, "--verify"])?.exit(4)?;
        refused
            .says("options.verify")?
            .says("pages that come late cannot be compared")?;
    }

    pair.runs_only_at(&pair.a, "g", &witness)
}

/// A bit of each page that is in so many frames of the first stream: those are full of what the guest never writes again.
fn damage(frames: Option<u64>) -> Tampering {
    Tampering::Pages {
        stream: 0,
        number: 4,
        frames,
        change: |page| page[100] ^= 1,
    }
}
