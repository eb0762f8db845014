//! Guests whose memory is from the pool of huge pages (hugetlbfs). The pool is made larger for them, and as it was after it.

use std::fs;

use anyhow::{Context, Result, ensure};
use ferry_tests::{Cut, CutPoint, Guest, HugePages, Migration, Pair, Tampering};
use libtest_mimic::Trial;

use crate::postcopy::BUSY;
use crate::scenario::{between, expect_a_lost_peer, has_nothing, on_kvm};

pub(crate) fn trials() -> Vec<Trial> {
    on_kvm![
        a_guest_of_the_pool_moves_by_pre_copy,
        a_guest_of_the_pool_moves_by_post_copy_and_back_by_a_hybrid,
        a_guest_of_the_pool_waits_while_the_link_is_cut,
        a_pool_that_is_too_small_is_told_before_anything_moves,
    ]
}

/// Memory of such a guest.
const GUEST: u64 = 64;
/// Of one on two hosts, and a few more.
const PAGES: u64 = 2 * GUEST + 8;

/// Runs the scenario where so many huge pages are to be had.
fn with_pool(pages: u64, scenario: impl FnOnce() -> Result<()>) -> Result<()> {
    let Some(pool) = HugePages::more(pages)? else {
        eprintln!("skipped: this host has no {pages} huge pages for its pool");
        return Ok(());
    };
    let ended = scenario();
    drop(pool);
    ended
}

/// All of a guest's memory is from the pool.
fn is_of_the_pool(vmm: u32) -> Result<()> {
    let text = fs::read_to_string(format!("/proc/{vmm}/smaps_rollup"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("Private_Hugetlb:"));
    let kib = line
        .and_then(|line| line.trim().strip_suffix(" kB"))
        .context("no Private_Hugetlb")?;
    let mib = kib.trim().parse::<u64>()? >> 10;
    ensure!(mib >= 72, "{mib} MiB are from the pool");
    Ok(())
}

/// Pages came late, by whole huge pages; how many.
fn came_late(moved: &Migration) -> Result<u64> {
    let late = moved.number("late_pages")? as u64;
    ensure!(late > 0 && late.is_multiple_of(512), "{}", moved.record);
    ensure!(moved.number("late_missing")? == 0.0, "{}", moved.record);
    Ok(late)
}

fn a_guest_of_the_pool_moves_by_pre_copy(pair: &mut Pair) -> Result<()> {
    with_pool(PAGES, || {
        let witness = pair.run(&Guest::new("g").work(BUSY).hugepages())?;

        pair.migrate("g", &["--digests"])?
            .exit(0)?
            .migration()?
            .is("completed", "b")?;

        pair.runs_only_at(&pair.b, "g", &witness)?;
        is_of_the_pool(pair.b.vmm()?)?;
        pair.b.ferry(&["delete", "g", "--force"])?.exit(0).map(drop)
    })
}

fn a_guest_of_the_pool_moves_by_post_copy_and_back_by_a_hybrid(pair: &mut Pair) -> Result<()> {
    with_pool(PAGES, || {
        let witness = pair.run(&Guest::new("g").work(BUSY).vcpus(2).hugepages())?;

        let postcopy = ["--mode", "postcopy", "--verify"];
        let moved = pair
            .migrate("g", &postcopy)?
            .exit(0)?
            .migration()?
            .is("completed", "b")?;
        pair.runs_only_at(&pair.b, "g", &witness)?;
        is_of_the_pool(pair.b.vmm()?)?;
        let hybrid = [
            "migrate",
            "g",
            "--to",
            "a",
            "--mode",
            "hybrid",
            "--max-downtime",
            "1ms",
            "--verify",
        ];
        let back = pair.b.ferry(&hybrid)?.exit(0)?.migration()?.is("completed", "a")?;
        pair.runs_only_at(&pair.a, "g", &witness)?;
        is_of_the_pool(pair.a.vmm()?)?;

        let (there, back_again) = (came_late(&moved)?, came_late(&back)?);
        ensure!(there >= 72 << 8, "{}", moved.record);
        eprintln!("{there} pages came late, and {back_again} on the way back");
        for record in [&moved, &back] {
            ensure!(
                record.number("late_verified")? == record.number("late_pages")?,
                "{}",
                record.record
            );
        }
        has_nothing(&pair.b)?;
        pair.a.ferry(&["delete", "g", "--force"])?.exit(0).map(drop)
    })
}

fn a_guest_of_the_pool_waits_while_the_link_is_cut(pair: &mut Pair) -> Result<()> {
    with_pool(PAGES, || {
        expect_a_lost_peer(pair);
        // With one page stream this is the one on which pages are pushed.
        let (stream, at, cut) = (4, CutPoint::Frames(8), Cut::All);
        let relay = between(pair, Tampering::CutsAt { stream, at, cut })?;
        let witness = pair.run(&Guest::new("g").work(BUSY).hugepages())?;

        let slow = ["--mode", "postcopy", "--streams", "1", "--bandwidth", "320Mbit"];
        let call = pair.begin_migrate("g", &slow)?;
        relay.wait_tampered()?;
        relay.wait_tried_in_vain(2)?;
        relay.heal();

        let moved = call.wait()?.exit(0)?.migration()?.is("completed", "b")?;
        came_late(&moved)?;
        pair.runs_only_at(&pair.b, "g", &witness)?;
        pair.b.ferry(&["delete", "g", "--force"])?.exit(0).map(drop)
    })
}

fn a_pool_that_is_too_small_is_told_before_anything_moves(pair: &mut Pair) -> Result<()> {
    with_pool(GUEST + 8, || {
        let witness = pair.run(&Guest::new("g").work(BUSY).hugepages())?;
        let told = pair
            .migrate("g", &["--dry-run", "--sample", "none"])?
            .says("64 are needed")?;
        if told.code == Some(0) {
            eprintln!("skipped: this host has huge pages of its own that nobody uses");
            return pair.a.ferry(&["delete", "g", "--force"])?.exit(0).map(drop);
        }
        let told = told.exit(4)?.json()?;
        let refused = &told["hosts"][0]["refusals"];
        ensure!(
            refused.as_array().is_some_and(|all| all.len() == 1) && refused[0]["reason"] == "HUGE_PAGES",
            "{told}"
        );
        pair.migrate("g", &[])?.exit(4)?.says("HUGE_PAGES")?;

        pair.runs_only_at(&pair.a, "g", &witness)?;
        pair.a.ferry(&["delete", "g", "--force"])?.exit(0).map(drop)
    })
}
