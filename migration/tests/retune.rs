//! Terms that change while a guest is copied.

mod fake;

use std::num::NonZeroU64;
use std::time::Duration;

use fake::scene::{Controls, Scene, arming_and, guest, live, migrate};
use fake::{Tracking, Workload};
use ferry_migration::source::{NewTerms, SourceError, SourceOrder, SourceReport, SourceSummary};

/// All of 16 MiB again and again.
const BUSY: Workload = Workload::Uniform {
    frames: 4096,
    rate: 100_000,
};

/// It takes 1.5 s for 24 MiB.
const SLOW: Option<NonZeroU64> = NonZeroU64::new(16 << 20);

/// A guest that is copied too slowly for ever; when the first round has ended, or after a first look at how far it is, its terms change.
fn retuned(workload: Workload, when: fn(&SourceReport) -> bool, new: NewTerms) -> Scene {
    let retune = move |controls: &Controls| controls.source_orders.send(SourceOrder::Retune(new)).unwrap();
    let mut scene = Scene::new(guest(Tracking::Log, workload));
    // Rounds of whole pages tell what they lead to.
    scene.parameters.compression = ferry_migration::Compression::Off;
    scene.parameters.manner = live(Duration::from_millis(50));
    scene.parameters.bandwidth = SLOW;
    scene.agent = arming_and(when, retune);
    scene
}

fn is_progress(report: &SourceReport) -> bool {
    matches!(report, SourceReport::Progress(_))
}

fn is_second_round(report: &SourceReport) -> bool {
    matches!(report, SourceReport::Round { round, .. } if round.number == 2)
}

fn deeds(summary: &SourceSummary) -> Vec<&str> {
    summary.decisions.iter().map(|decided| decided.deed).collect()
}

#[test]
fn a_cap_that_is_lifted_is_gone_at_once() {
    let lifted = NewTerms {
        bandwidth: Some(None),
        ..NewTerms::default()
    };
    let mut scene = retuned(Workload::Idle, is_progress, lifted);
    let cap = 4 << 20;
    scene.parameters.bandwidth = NonZeroU64::new(cap);
    let ends = migrate(scene);
    let (summary, _) = ends.arrived();
    let capped = Duration::from_secs_f64(summary.rounds[0].bytes as f64 / cap as f64);
    assert!(
        summary.rounds[0].elapsed < capped / 2,
        "{:?} of {capped:?}",
        summary.rounds[0]
    );
    assert_eq!(deeds(summary)[..2], ["retune", "switch"]);
    assert_eq!(summary.decisions[0].round, 1);
    assert!(
        summary.decisions[0].words.contains("as fast as it goes"),
        "{:?}",
        summary.decisions[0]
    );
}

#[test]
fn a_cap_that_is_set_holds_from_then_on() {
    let capped = NewTerms {
        bandwidth: Some(NonZeroU64::new(32 << 20)),
        ..NewTerms::default()
    };
    let is_first_round = |report: &SourceReport| matches!(report, SourceReport::Round { .. });
    let mut scene = retuned(BUSY, is_first_round, capped);
    scene.parameters.bandwidth = None;
    // Less than stop and start take: it goes on until its time is up.
    scene.parameters.manner = live(Duration::from_millis(1));
    scene.parameters.timeout = Duration::from_secs(3);
    let ends = migrate(scene);
    assert!(matches!(ends.cancelled(), SourceError::TimedOut { .. }));
    let rounds = ends.reports.iter().filter_map(|report| match report {
        SourceReport::Round { round, .. } => Some(round),
        _ => None,
    });
    // The round that went on may have been half done.
    let later: Vec<_> = rounds.skip(2).collect();
    // Between two rounds nothing is sent, and what that time was worth comes with the next one: 50 ms of it at most.
    let between = 0.05 * later.len() as f64;
    let (bytes, seconds) = later.iter().fold((0, 0.0), |(bytes, seconds), round| {
        (bytes + round.bytes, seconds + round.elapsed.as_secs_f64())
    });
    let share = bytes as f64 / (seconds + between) / (32 << 20) as f64;
    assert!(!later.is_empty() && share <= 1.05, "{share} of the cap, {later:?}");
}

#[test]
fn a_longer_blackout_ends_what_did_not_converge() {
    let patient = NewTerms {
        max_downtime: Some(Duration::from_secs(20)),
        ..NewTerms::default()
    };
    let ends = migrate(retuned(BUSY, is_second_round, patient));
    let (summary, _) = ends.arrived();
    let deeds = deeds(summary);
    assert!(deeds.contains(&"infeasible"), "{deeds:?}");
    let at = deeds.iter().position(|&deed| deed == "retune").unwrap();
    // More than one, where the grant takes longer than a round.
    let later = &deeds[at + 1..];
    assert!(
        !later.is_empty() && later.iter().all(|&deed| deed == "switch"),
        "{deeds:?}"
    );
}

#[test]
fn a_shorter_time_is_counted_from_the_begin() {
    let hurried = NewTerms {
        timeout: Some(Duration::from_millis(1)),
        ..NewTerms::default()
    };
    let ends = migrate(retuned(BUSY, is_second_round, hurried));
    assert!(matches!(ends.cancelled(), SourceError::TimedOut { after, .. } if *after == Duration::from_millis(1)));
}
