//! Pages that the guest says are free: they are not sent, and nothing that it writes is lost by it.

mod fake;

use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use fake::scene::*;
use fake::{Hints, StopFault, Tracking, Workload};
use ferry_migration::guest::{FRAME_SIZE, FrameRun, GuestMemory as _, SourceGuest};
use ferry_migration::postcopy::Lateness;
use ferry_migration::source::{Manner, SourceError, SourceOutcome, SourceReport, SourceSummary};

/// What the usual guest has populated.
const POPULATED: u64 = 6300;

/// What it says is free: most of it, some that it never had, and some that are no memory.
fn free() -> Vec<FrameRun> {
    vec![
        run(2000, 1000),
        run(2500, 3000),
        run(HIGH + 600, 100),
        run(6500, 8),
        run(1 << 30, u64::MAX),
    ]
}

/// How many of these it has populated.
const FREE: u64 = 3500 + 100;

const BUSY: Workload = Workload::Uniform {
    frames: 6000,
    rate: 20_000,
};

/// Writes less than a slow link carries.
const CALM: Workload = Workload::Uniform {
    frames: 6000,
    rate: 300,
};

fn scene(tracking: Tracking, workload: Workload) -> (Scene, Arc<Hints>) {
    let mut source = guest(tracking, workload);
    let hints = source.names_free(&free());
    (Scene::new(source), hints)
}

/// It was asked once, and knows that it is asked no more.
#[track_caller]
fn is_its_own_again(hints: &Hints) {
    assert_eq!(hints.asked.load(Ordering::Relaxed), 1);
    assert!(hints.ended.load(Ordering::Relaxed) > 0);
}

/// Pages that were sent in the first pass, zero or not.
fn first_pass(summary: &SourceSummary) -> u64 {
    summary.rounds[0].pages
}

#[test]
fn free_pages_are_not_sent_and_digests_agree() {
    let (scene, hints) = scene(Tracking::Log, Workload::Idle);
    let ends = migrate(scene);
    let (summary, _) = ends.arrived();
    assert_eq!((summary.hinted_pages, summary.rounds[0].hinted_pages), (FREE, FREE));
    assert_eq!(first_pass(summary), POPULATED - FREE);
    assert!(
        summary.bytes_sent < (POPULATED - FREE + 10) * FRAME_SIZE,
        "{}",
        summary.bytes_sent
    );
    is_its_own_again(&hints);
}

#[test]
fn without_digests_a_free_page_is_left_as_it_is_and_is_zero_at_the_destination() {
    let (mut scene, _) = scene(Tracking::Log, Workload::Idle);
    scene.parameters.digests = false;
    let ends = migrate(scene);
    let (SourceOutcome::GoSent(parked), Ok(loaded)) = (&ends.outcome, &ends.loaded) else {
        panic!("{:?}", ends.loaded.as_ref().err())
    };
    let (here, there) = (parked.guest().memory(), &loaded.restored.memory);
    let zero = there.digest(run(NEVER, 1)).unwrap();
    assert_eq!(there.digest(run(2000, 1)).unwrap(), zero);
    assert_ne!(here.digest(run(2000, 1)).unwrap(), zero);
    assert_eq!(here.digest(run(1999, 1)).unwrap(), there.digest(run(1999, 1)).unwrap());
}

/// A frame that the usual guest never populated.
const NEVER: u64 = 7000;

#[test]
fn a_guest_that_uses_pages_which_it_called_free_keeps_what_it_writes() {
    for tracking in [Tracking::Log, Tracking::Harvest] {
        let (scene, hints) = scene(tracking, BUSY);
        let ends = migrate(scene);
        let (summary, _) = ends.arrived();
        assert_eq!(summary.hinted_pages, FREE);
        is_its_own_again(&hints);
    }
}

/// Pages are named and written at once, again and again, while the first pass goes on.
#[test]
fn pages_that_are_named_and_written_all_the_while_arrive_as_they_are() {
    for tracking in [Tracking::Log, Tracking::Harvest] {
        let mut source = guest(tracking, Workload::Idle);
        let hints = source.names_free(&[]);
        let write = source.writer();
        let mut scene = Scene::new(source);
        scene.parameters.bandwidth = NonZeroU64::new(40 << 20);
        let (mut arm, said, mut value, mut rounds) = (arming(), hints.clone(), 0, 0);
        scene.agent = Box::new(move |report, controls| {
            rounds += u32::from(matches!(report, SourceReport::Round { .. }));
            if let (SourceReport::Copying { .. } | SourceReport::Progress(_), 0) = (report, rounds) {
                for frame in 3..6000 {
                    said.said.lock().unwrap().push(run(frame, 1));
                    value += 1;
                    write(frame, value);
                }
            }
            arm(report, controls);
        });
        migrate(scene).arrived();
        is_its_own_again(&hints);
    }
}

#[test]
fn a_guest_that_says_nothing_is_copied_whole() {
    let mut source = guest(Tracking::Log, BUSY);
    let hints = source.names_free(&[]);
    let ends = migrate(Scene::new(source));
    let (summary, _) = ends.arrived();
    assert_eq!((summary.hinted_pages, first_pass(summary)), (0, POPULATED));
    is_its_own_again(&hints);
}

#[test]
fn all_of_it_may_be_free() {
    let mut source = guest(Tracking::Log, Workload::Idle);
    let hints = source.names_free(&[run(0, u64::MAX)]);
    let ends = migrate(Scene::new(source));
    let (summary, _) = ends.arrived();
    assert_eq!((summary.hinted_pages, first_pass(summary)), (POPULATED, 0));
    is_its_own_again(&hints);
}

#[test]
fn what_is_named_after_the_first_pass_is_not_heard() {
    let (mut scene, hints) = scene(Tracking::Log, BUSY);
    let (mut arm, said) = (arming(), hints.clone());
    scene.agent = Box::new(move |report, controls| {
        if let SourceReport::Round { .. } = report {
            said.said.lock().unwrap().push(run(0, u64::MAX));
        }
        arm(report, controls);
    });
    let ends = migrate(scene);
    assert_eq!(ends.arrived().0.hinted_pages, FREE);
}

#[test]
fn an_abort_in_the_first_pass_gives_pages_back() {
    let (mut scene, hints) = scene(Tracking::Log, BUSY);
    scene.parameters.bandwidth = NonZeroU64::new(4 << 20);
    scene.agent = arming_and(|report| matches!(report, SourceReport::Copying { .. }), Controls::abort);
    let ends = migrate(scene);
    assert!(matches!(ends.cancelled(), SourceError::Aborted(_)));
    is_its_own_again(&hints);
}

#[test]
fn a_lost_link_gives_pages_back() {
    let (mut scene, hints) = scene(Tracking::Log, BUSY);
    scene.parameters.bandwidth = NonZeroU64::new(4 << 20);
    scene.agent = arming_and(|report| matches!(report, SourceReport::Copying { .. }), Controls::cut);
    let ends = migrate(scene);
    ends.cancelled();
    is_its_own_again(&hints);
}

#[test]
fn a_refused_guest_gives_pages_back_or_was_not_asked() {
    let (mut scene, hints) = scene(Tracking::Log, BUSY);
    scene.source.profile = "cpu: avx9".to_owned();
    let ends = migrate(scene);
    assert!(matches!(ends.cancelled(), SourceError::Incompatible(_)));
    assert_eq!(hints.asked.load(Ordering::Relaxed), 0);
}

/// They are given back when the link is lost, before there is another one; what was left out until then stays left out, and arrives if it was written since.
#[test]
fn over_another_link_nothing_is_lost_and_nobody_is_asked_again() {
    let (mut scene, hints) = scene(Tracking::Log, CALM);
    let window = Duration::from_secs(20);
    (
        scene.parameters.resume_window,
        scene.destination_parameters.resume_window,
    ) = (window, window);
    scene.parameters.bandwidth = NonZeroU64::new(8 << 20);
    let (mut arm, mut is_cut, told) = (arming(), false, hints.clone());
    scene.agent = Box::new(move |report, controls| {
        match report {
            SourceReport::Progress(progress)
                if progress.copied.percent >= 30 && !std::mem::replace(&mut is_cut, true) =>
            {
                controls.cut();
            }
            SourceReport::LinkLost { .. } => {
                assert!(told.ended.load(Ordering::Relaxed) > 0);
                told.said.lock().unwrap().push(run(0, u64::MAX));
                controls.reconnect();
            }
            _ => {}
        }
        arm(report, controls);
    });
    let ends = migrate(scene);
    assert!(
        ends.reports
            .iter()
            .any(|report| matches!(report, SourceReport::Resumed { .. }))
    );
    let (summary, _) = ends.arrived();
    assert_eq!(summary.hinted_pages, FREE);
    is_its_own_again(&hints);
}

#[test]
fn a_switchover_that_is_called_off_loses_nothing() {
    let (mut scene, hints) = scene(Tracking::Log, BUSY);
    scene.source.stop_faults = [StopFault::Fails, StopFault::None].into();
    let ends = migrate(scene);
    assert!(
        ends.reports
            .iter()
            .any(|report| matches!(report, SourceReport::Disarmed { .. }))
    );
    ends.arrived();
    is_its_own_again(&hints);
}

/// What it named until it was stopped.
#[test]
fn of_a_cold_move_free_pages_are_not_sent_either() {
    let (mut scene, hints) = scene(Tracking::Log, BUSY);
    scene.parameters.manner = Manner::Cold;
    let ends = migrate(scene);
    let (summary, _) = ends.arrived();
    assert_eq!(summary.hinted_pages, FREE);
    is_its_own_again(&hints);
}

#[test]
fn free_pages_do_not_come_late() {
    let (mut scene, hints) = scene(Tracking::Log, Workload::Idle);
    scene.parameters.lateness = Lateness::AtOnce;
    (scene.parameters.digests, scene.parameters.verify) = (false, false);
    let ends = migrate(scene);
    let SourceOutcome::GoSent(parked) = &ends.outcome else {
        panic!("{:?}", ends.loaded.as_ref().err())
    };
    assert_eq!(parked.summary().hinted_pages, FREE);
    assert_eq!(parked.summary().late_pages, POPULATED - FREE);
    is_its_own_again(&hints);
}

#[test]
fn free_pages_that_were_written_since_come_late() {
    let (mut scene, _) = scene(Tracking::Log, Workload::Idle);
    scene.parameters.lateness = Lateness::AtOnce;
    (scene.parameters.digests, scene.parameters.verify) = (false, false);
    let write = scene.source.writer();
    scene.agent = arming_and(
        |report| matches!(report, SourceReport::Copying { .. }),
        move |_| write(2100, 7),
    );
    let ends = migrate(scene);
    let SourceOutcome::GoSent(parked) = &ends.outcome else {
        panic!("{:?}", ends.loaded.as_ref().err())
    };
    assert_eq!(parked.summary().late_pages, POPULATED - FREE + 1);
}
