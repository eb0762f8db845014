//! Terms that change while a guest is copied.

mod fake;

use std::num::NonZeroU64;
use std::sync::mpsc;
use std::time::{Duration, Instant};

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
    let (mut retune, (told, rounds)) = (scene.agent, mpsc::channel());
    scene.agent = Box::new(move |report, controls| {
        if let SourceReport::Round { round, .. } = report {
            let _ = told.send((Instant::now(), round.bytes));
        }
        retune(report, controls);
    });
    let ends = migrate(scene);
    assert!(matches!(ends.cancelled(), SourceError::TimedOut { .. }));
    // The round that went on may have been half done.
    let ended: Vec<_> = rounds.try_iter().skip(1).collect();
    let [(first, _), .., (last, _)] = ended[..] else {
        panic!("too few rounds: {ended:?}");
    };
    let bytes: u64 = ended[1..].iter().map(|(_, bytes)| bytes).sum();
    // Between the ends of two rounds nothing else is sent. Nothing was for 50 ms at most that still counts, and a frame may be under way.
    let allowed = ((last - first).as_secs_f64() + 0.05) * f64::from(32 << 20) + f64::from(2 << 20);
    assert!(bytes as f64 <= allowed, "{bytes} bytes of {allowed}, {ended:?}");
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
