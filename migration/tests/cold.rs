//! A cold move: the guest stands still from before its first page, is copied once, and runs on where it was unless GO was sent.

mod fake;

use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use fake::scene::{Controls, Ends, FRAMES, Scene, arming_and, attempt, guest, memory, migrate, run};
use fake::{FakeSource, StopFault, Tracking, Workload};
use ferry_migration::guest::{GuestEnd, GuestWas, SourceGuest};
use ferry_migration::handover::Traded;
use ferry_migration::source::{Manner, SourceError, SourceOutcome, SourceReport};
use proptest::prelude::*;

/// More writes than the link takes: live, it would never arrive.
const WILD: Workload = Workload::Uniform {
    frames: 6000,
    rate: 400_000,
};

fn cold(source: FakeSource) -> Scene {
    let mut scene = Scene::new(source);
    scene.parameters.manner = Manner::Cold;
    scene
}

/// It arrived, each frame that held anything was told or sent once, and the guest never ran in between.
#[track_caller]
fn arrived_in_one_pass(ends: &Ends) {
    let (summary, loaded) = ends.arrived();
    let SourceOutcome::GoSent(parked) = &ends.outcome else {
        panic!("not sent")
    };
    let populated = parked.guest().populated().unwrap().populated;
    let frames: u64 = populated.iter().map(|run| run.count).sum();
    let totals = loaded.summary.totals;
    assert_eq!(
        totals.pages + totals.zero_pages,
        frames,
        "a frame was missed, or sent twice"
    );
    let pages: Vec<_> = summary.rounds.iter().map(|round| round.pages).collect();
    assert_eq!(pages, [frames, 0]);
}

#[test]
fn a_guest_that_never_converges_arrives_cold_in_one_pass() {
    let ends = migrate(cold(guest(Tracking::Log, WILD)));
    arrived_in_one_pass(&ends);
}

#[test]
fn harvested_tracking_sends_nothing_twice_either() {
    let ends = migrate(cold(guest(Tracking::Harvest, WILD)));
    arrived_in_one_pass(&ends);
}

#[test]
fn the_blackout_is_told_from_the_stop_on() {
    let mut scene = cold(guest(Tracking::Log, Workload::Idle));
    // A cap holds although the guest stands still: 24 MiB take a while.
    scene.parameters.bandwidth = NonZeroU64::new(100 << 20);

    let ends = migrate(scene);

    let (summary, _) = ends.arrived();
    let blackout = summary.blackout.unwrap();
    let whole = blackout.go_sent - blackout.pause_began;
    let parts = blackout.stop.pause + blackout.stop.drain + blackout.state + blackout.last_pages + blackout.verify;
    assert!(summary.rounds[0].elapsed > Duration::from_millis(100));
    assert!(blackout.last_pages >= summary.rounds[0].elapsed, "{blackout:?}");
    assert!(parts <= whole, "{blackout:?}");
}

#[test]
fn an_abort_during_the_pass_lets_the_guest_run_on() {
    let mut scene = cold(guest(Tracking::Log, WILD));
    scene.parameters.bandwidth = NonZeroU64::new(10 << 20);
    scene.agent = arming_and(|report| matches!(report, SourceReport::Progress(_)), Controls::abort);
    let notes = Arc::clone(&scene.source.notes);

    let ends = migrate(scene);

    assert!(matches!(ends.cancelled(), SourceError::Aborted(_)));
    assert_eq!(notes.resumed.load(Ordering::Relaxed), 1);
}

#[test]
fn a_lost_link_lets_the_guest_run_on_at_once() {
    let mut scene = cold(guest(Tracking::Log, WILD));
    scene.agent = arming_and(
        |report| matches!(report, SourceReport::Converged { .. }),
        Controls::cut_control,
    );
    let ends = migrate(scene);
    // Which of the two is noticed first is chance; silence is what is noticed last.
    let error = ends.cancelled();
    assert!(
        matches!(error, SourceError::ControlLost(_) | SourceError::StreamLost { .. }),
        "{error}"
    );
}

#[test]
fn a_guest_that_its_user_had_paused_stays_paused_after_an_abort() {
    let mut source = guest(Tracking::Log, WILD);
    source.pause();
    let mut scene = cold(source);
    scene.parameters.guest_was = GuestWas::PausedByUser;
    scene.agent = arming_and(
        |report| matches!(report, SourceReport::Converged { .. }),
        Controls::abort,
    );

    let ends = migrate(scene);

    let SourceOutcome::Cancelled { guest, .. } = &ends.outcome else {
        panic!("not cancelled")
    };
    assert!(guest.is_stopped(), "it was woken");
}

#[test]
fn a_grant_taken_back_does_not_wake_the_guest() {
    let mut scene = cold(guest(Tracking::Log, WILD));
    scene
        .source
        .stop_faults
        .extend([StopFault::None, StopFault::Slow(Duration::from_millis(50))]);
    scene.agent = arming_and(
        |report| matches!(report, SourceReport::Switching { .. }),
        |controls| {
            assert_eq!(controls.grants.trade_for_cancelled(attempt(1)), Traded::Cancelled);
        },
    );
    let notes = Arc::clone(&scene.source.notes);

    let ends = migrate(scene);

    assert_eq!(ends.arrived().1.attempt, attempt(2));
    assert_eq!(notes.resumed.load(Ordering::Relaxed), 0, "it ran between two attempts");
}

#[test]
fn a_guest_that_does_not_stand_still_at_once_is_stopped_again() {
    let mut source = guest(Tracking::Log, WILD);
    source.stop_faults.push_back(StopFault::Fails);
    let notes = Arc::clone(&source.notes);

    let ends = migrate(cold(source));

    arrived_in_one_pass(&ends);
    assert_eq!(notes.resumed.load(Ordering::Relaxed), 1);
}

#[test]
fn a_guest_that_powers_off_just_then_has_ended() {
    let mut source = guest(Tracking::Log, WILD);
    source.stop_faults.push_back(StopFault::PowersOff);
    let ends = migrate(cold(source));
    assert!(matches!(
        ends.outcome,
        SourceOutcome::GuestEnded {
            end: GuestEnd::PoweredOff,
            ..
        }
    ));
    assert!(ends.loaded.is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn whatever_it_holds_and_does_it_arrives_in_one_pass(
        first in 0u64..FRAMES - 1200,
        count in 1u64..200,
        rate in 0u64..200_000,
        streams in 1usize..5,
        harvests in any::<bool>(),
        was_paused in any::<bool>(),
    ) {
        let tracking = if harvests { Tracking::Harvest } else { Tracking::Log };
        let workload = Workload::ZeroFlip { frames: 3000, rate };
        let mut source = FakeSource::new(memory(), tracking, &[run(first, count)], workload);
        if was_paused {
            source.pause();
        }
        let mut scene = Scene { streams, ..cold(source) };
        if was_paused {
            scene.parameters.guest_was = GuestWas::PausedByUser;
        }
        arrived_in_one_pass(&migrate(scene));
    }
}
