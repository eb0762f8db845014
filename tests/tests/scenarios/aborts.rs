//! An abort in any phase before GO: the guest runs on at the source, nothing is left at the destination, a retry works.

use std::time::Duration;

use anyhow::{Result, ensure};
use ferry_tests::{Guest, Pair, process, until, waiting::CALL};
use libtest_mimic::Trial;

use crate::scenario::{self, on_kvm};

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = on_kvm![
        an_abort_after_the_end_changes_nothing,
        an_abort_before_the_first_page_leaves_nothing
    ];
    for phase in PHASES {
        let name = format!("scenarios::aborts::an_abort_at_{phase}_leaves_the_guest_at_the_source");
        trials.push(scenario::trial_on_kvm(&name, move |pair| {
            an_abort_leaves_the_guest_at_the_source(pair, phase)
        }));
    }
    trials
}

/// Where `--hold-at` makes the source wait.
const PHASES: [&str; 4] = ["handshake", "first-pass", "rounds", "converged"];

fn an_abort_leaves_the_guest_at_the_source(pair: &Pair, phase: &str) -> Result<()> {
    let work = "fill=random fill_mib=32 work=uniform work_mib=16 rate=5000 heartbeat_ms=20";
    let witness = pair.run(&Guest::new("g").work(work))?;
    let source = pair.a.vmm()?;
    let threads = process::threads(source);
    let descriptors = descriptors(source);
    let held = pair.migrate_held_at("g", phase)?;

    pair.a.ferry(&["migration", "abort", &held.id])?.exit(0)?;

    held.call.wait()?.exit(1)?.migration()?.is("cancelled", "a")?;
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

fn an_abort_before_the_first_page_leaves_nothing(pair: &mut Pair) -> Result<()> {
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
