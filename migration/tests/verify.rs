//! Digests that are kept as pages go: what differs is sent again, once.

mod fake;

use std::num::NonZeroU64;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use fake::memory::FakeMemory;
use fake::scene::{Ends, Scene, guest, live, memory, migrate};
use fake::{FakeDestination, FakeSource, StopFault, Tracking, Workload};
use ferry_migration::guest::DestinationGuest;
use ferry_migration::source::{Manner, SourceError, SourceReport};

const BUSY: Workload = Workload::Uniform {
    frames: 4000,
    rate: 20_000,
};

/// A frame that the busy guest does not write.
const QUIET: u64 = 5000;

/// A migration at whose destination this frame is damaged so many times as it arrives. Nothing but the digests of what was sent is compared.
fn damaged(source: FakeSource, frame: u64, times: u64) -> Scene {
    let mut memory = memory();
    memory.damage = Some(frame);
    memory.damages = AtomicU64::new(times);
    let mut scene = Scene::new(source);
    scene.destination = FakeDestination::new(memory);
    scene.parameters.digests = false;
    scene
}

#[track_caller]
fn is_mended(ends: &Ends) {
    let (summary, loaded) = ends.arrived();
    assert_eq!(summary.verified.unwrap().ranges_sent_again, 1);
    assert_eq!(summary.bytes_sent, loaded.summary.totals.bytes);
    let decisions = summary.decisions.iter().filter(|decided| decided.deed == "verify");
    let words: Vec<&str> = decisions.map(|decided| decided.words.as_str()).collect();
    assert!(
        matches!(words[..], [words] if words.starts_with("1 of 17 ranges, pages 0x1200+0x200 differ")),
        "{words:?}"
    );
}

#[test]
fn a_page_that_is_damaged_once_is_sent_again() {
    is_mended(&migrate(damaged(guest(Tracking::Log, Workload::Idle), QUIET, 1)));
}

#[test]
fn a_page_that_is_damaged_once_is_sent_again_with_the_last_pages_before_it() {
    is_mended(&migrate(damaged(guest(Tracking::Log, BUSY), QUIET, 1)));
}

#[test]
fn a_page_that_is_damaged_once_is_sent_again_with_harvested_tracking() {
    is_mended(&migrate(damaged(guest(Tracking::Harvest, BUSY), QUIET, 1)));
}

#[test]
fn a_page_that_is_damaged_once_is_sent_again_cold() {
    let mut scene = damaged(guest(Tracking::Log, BUSY), QUIET, 1);
    scene.parameters.manner = Manner::Cold;
    is_mended(&migrate(scene));
}

#[test]
fn a_page_that_is_damaged_each_time_keeps_the_guest_here() {
    let ends = migrate(damaged(guest(Tracking::Log, BUSY), QUIET, u64::MAX));
    let error = ends.cancelled();
    assert!(
        matches!(error, SourceError::Differs(what) if what == "1 of 17 ranges, pages 0x1200+0x200"),
        "{error}"
    );
}

#[test]
fn a_damaged_page_that_the_guest_writes_again_is_right_by_then() {
    let sweep = Workload::Sweep {
        frames: 100,
        rate: 5000,
    };
    let mut scene = damaged(guest(Tracking::Log, sweep), 10, 1);
    // The first round lasts many times as long as the guest takes to write all of its pages.
    scene.parameters.bandwidth = NonZeroU64::new(64 << 20);
    let ends = migrate(scene);
    let (summary, _) = ends.arrived();
    assert_eq!(summary.verified.unwrap().ranges_sent_again, 0);
}

#[test]
fn what_cannot_be_sent_again_within_the_budget_is_while_the_guest_runs() {
    let source = FakeSource::new(
        memory(),
        Tracking::Log,
        &[fake::scene::run(QUIET, 1200)],
        Workload::Idle,
    );
    let mut scene = damaged(source, QUIET, 1);
    // A range takes a quarter of a second; nothing is left to send when the guest stands still.
    scene.parameters.bandwidth = NonZeroU64::new(8 << 20);
    scene.parameters.manner = live(Duration::from_millis(100));
    let ends = migrate(scene);
    let (summary, loaded) = ends.arrived();
    assert_eq!(summary.verified.unwrap().ranges_sent_again, 1);
    assert!(loaded.attempt.attempt > 1);
    let called_off = |report: &SourceReport| matches!(report, SourceReport::Disarmed { reason, .. } if reason.contains("cannot be sent again within the budget"));
    assert!(ends.reports.iter().any(called_off), "{:?}", ends.reports);
}

/// Twice the time that a guest may stand still.
const LATE: Duration = Duration::from_millis(800);

/// A migration whose destination is slowed down while the guest is stopped first, and where a page is damaged so many times.
fn answered_too_late(times: u64, slow: impl Fn(&FakeMemory) + Send + 'static) -> Ends {
    let mut scene = damaged(guest(Tracking::Log, BUSY), QUIET, times);
    scene.parameters.manner = live(LATE / 2);
    let there = scene.destination.memory();
    scene
        .source
        .stop_faults
        .push_back(StopFault::Meanwhile(Box::new(move || slow(&there))));
    migrate(scene)
}

#[test]
fn an_answer_that_takes_too_long_calls_the_switchover_off() {
    let ends = answered_too_late(0, |there| there.slow_digest(LATE));
    let (_, loaded) = ends.arrived();
    assert!(loaded.attempt.attempt > 1);
    let called_off = |report: &SourceReport| matches!(report, SourceReport::Disarmed { reason, .. } if reason.contains("was being compared"));
    assert!(ends.reports.iter().any(called_off), "{:?}", ends.reports);
}

#[test]
fn a_round_whose_end_is_answered_too_late_calls_the_switchover_off_and_is_sent_again() {
    let ends = answered_too_late(1, |there| there.slow_once_to_be_durable(LATE));
    let (summary, loaded) = ends.arrived();
    assert_eq!(summary.verified.unwrap().ranges_sent_again, 1);
    assert!(loaded.attempt.attempt > 1);
    let called_off = |report: &SourceReport| matches!(report, SourceReport::Disarmed { reason, .. } if reason.contains("the end of the round was being answered"));
    assert!(ends.reports.iter().any(called_off), "{:?}", ends.reports);
    // What the guest felt of it stays in the report.
    let told = summary.decisions.iter().find(|decided| decided.deed == "called-off");
    let told = told.expect("it is told");
    assert!(told.blackout > Some(LATE / 2), "{told:?}");
    assert!(told.words.contains("after the guest stood still for"), "{told:?}");
}

#[test]
fn memory_that_was_never_written_is_not_read_for_it() {
    let ends = migrate(damaged(
        FakeSource::new(memory(), Tracking::Log, &[fake::scene::run(100, 10)], Workload::Idle),
        QUIET,
        0,
    ));
    let (summary, loaded) = ends.arrived();
    assert_eq!(summary.verified.unwrap().pages, 10);
    assert_eq!(loaded.restored.memory.zeroed.load(Ordering::Relaxed), 0);
}
