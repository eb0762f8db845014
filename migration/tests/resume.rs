//! Links that are lost while the guest runs, and made again, or not.

mod fake;

use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use fake::cutting::{Cut, Cutter};
use fake::scene::*;
use fake::{FakeSource, StopFault, Tracking, Workload};
use ferry_migration::destination::DestinationError;
use ferry_migration::guest::{FRAME_SIZE, GuestEnd, SourceGuest};
use ferry_migration::postcopy::Lateness;
use ferry_migration::source::{MOST_BEFORE_THE_END, NewTerms, SourceError, SourceOrder, SourceOutcome, SourceReport};
use proptest::prelude::*;

const BUSY: Workload = Workload::Uniform {
    frames: 3000,
    rate: 20_000,
};

/// What the usual guest has populated.
const POPULATED: u64 = 6300 * FRAME_SIZE;

/// The scene of a link that may be made again for so long.
fn resumable(source: FakeSource, window: Duration) -> Scene {
    let mut scene = Scene::new(source);
    scene.parameters.resume_window = window;
    scene.destination_parameters.resume_window = window;
    scene
}

const LONG: Duration = Duration::from_secs(20);

/// An agent that makes each lost link again, and arms.
fn healing() -> Agent {
    let mut arm = arming();
    Box::new(move |report, controls| {
        if matches!(report, SourceReport::LinkLost { .. }) {
            controls.reconnect();
        }
        arm(report, controls);
    })
}

/// As [`healing`]; cuts once when the copy has come so far, in percent.
fn cutting_at(percent: u32, cut: impl Fn(&Controls) + Send + 'static) -> Agent {
    let (mut heal, mut is_cut) = (healing(), false);
    Box::new(move |report, controls| {
        if let SourceReport::Progress(progress) = report
            && progress.copied.percent >= percent
            && !std::mem::replace(&mut is_cut, true)
        {
            cut(controls);
        }
        heal(report, controls);
    })
}

fn slowly(scene: &mut Scene, bytes_per_second: u64) {
    scene.parameters.bandwidth = NonZeroU64::new(bytes_per_second);
}

fn resumed(ends: &Ends) -> Vec<(u64, u64)> {
    let resumed = |report: &SourceReport| match report {
        SourceReport::Resumed { held_pages, due_pages } => Some((*held_pages, *due_pages)),
        _ => None,
    };
    ends.reports.iter().filter_map(resumed).collect()
}

/// The link is cut at these words, and a guest that writes all the while arrives whole.
#[track_caller]
fn arrives_though_cut_at(words: &[(&'static str, Cut)]) {
    let cutter = Cutter::new(words);
    let mut source = guest(Tracking::Log, BUSY);
    // The switchover is not asked for before all of it was said.
    source.settles_after = [100].into();
    let mut scene = resumable(source, LONG);
    scene.wire.cutter = Some(cutter.clone());
    scene.agent = healing();
    let ends = migrate(scene);
    ends.arrived();
    assert!(cutter.is_done(), "not all of {words:?} was said");
    assert!(!resumed(&ends).is_empty());
}

macro_rules! cut_at {
    ($($name:ident: $word:literal, $cut:ident;)*) => {
        $(
            #[test]
            fn $name() {
                arrives_though_cut_at(&[($word, Cut::$cut)]);
            }
        )*
    };
}

cut_at! {
    a_link_cut_before_hello_is_made_again: "hello", Before;
    a_link_cut_after_hello_is_made_again: "hello", After;
    a_link_cut_before_its_reply_is_made_again: "hello-reply", Before;
    a_link_cut_after_its_reply_is_made_again: "hello-reply", After;
    a_link_cut_before_the_population_map_is_made_again: "population", Before;
    a_link_cut_after_the_population_map_is_made_again: "population", After;
    a_link_cut_before_its_answer_is_made_again: "population-ready", Before;
    a_link_cut_after_its_answer_is_made_again: "population-ready", After;
    a_link_cut_before_a_barrier_is_made_again: "barrier", Before;
    a_link_cut_after_a_barrier_is_made_again: "barrier", After;
    a_link_cut_before_a_barrier_is_answered_is_made_again: "barrier-reached", Before;
    a_link_cut_after_a_barrier_was_answered_is_made_again: "barrier-reached", After;
}

/// The link is cut once when this is told, which is between the handshake and the first page.
#[track_caller]
fn arrives_though_cut_when(told: fn(&SourceReport) -> bool, cut: impl Fn(&Controls) + Send + 'static) {
    let mut scene = resumable(guest(Tracking::Log, BUSY), LONG);
    let (mut heal, mut is_cut) = (healing(), false);
    slowly(&mut scene, 40_000_000);
    scene.agent = Box::new(move |report, controls| {
        if told(report) && !std::mem::replace(&mut is_cut, true) {
            cut(controls);
        }
        heal(report, controls);
    });
    let ends = migrate(scene);
    ends.arrived();
    assert_eq!(resumed(&ends).len(), 1);
}

#[test]
fn a_link_cut_right_after_the_handshake_is_made_again() {
    let accepted = |report: &SourceReport| matches!(report, SourceReport::Accepted { .. });
    arrives_though_cut_when(accepted, Controls::cut);
    arrives_though_cut_when(accepted, |controls| controls.cut_page_stream(0));
}

#[test]
fn a_link_cut_right_before_the_first_page_is_made_again() {
    let copying = |report: &SourceReport| matches!(report, SourceReport::Copying { .. });
    arrives_though_cut_when(copying, Controls::cut);
    arrives_though_cut_when(copying, |controls| controls.cut_page_stream(1));
}

#[test]
fn a_link_is_cut_at_every_word_of_its_being_made_again() {
    use Cut::{After, Before};
    arrives_though_cut_at(&[
        ("barrier", Before),
        ("hello", Before),
        ("hello", After),
        ("hello-reply", Before),
        ("hello-reply", After),
        ("holding", Before),
        ("holding", After),
        ("proceed", Before),
        ("proceed", After),
        ("barrier", After),
        ("holding", Before),
        ("barrier-reached", Before),
    ]);
}

/// Neither side takes what its own disk does for the link's fault, which would be made again without an end.
#[test]
fn a_disk_that_cannot_be_read_at_the_source_ends_the_migration_with_its_reason() {
    let mut scene = resumable(guest(Tracking::Log, BUSY), LONG);
    scene.source.memory().fail_transfers();
    scene.agent = healing();
    let ends = migrate(scene);
    assert!(
        matches!(ends.cancelled(), SourceError::Guest { cause, .. } if cause.to_string().contains("storage")),
        "{}",
        ends.cancelled()
    );
    let Err(DestinationError::AbortedBySource(reason)) = &ends.loaded else {
        panic!("{:?}", ends.loaded.map(|_| ()))
    };
    assert!(reason.contains("storage"), "{reason}");
}

#[test]
fn a_disk_that_takes_nothing_at_the_destination_ends_the_migration_with_its_reason() {
    let mut scene = resumable(guest(Tracking::Log, BUSY), LONG);
    scene.destination.memory.fail_transfers();
    scene.agent = healing();
    let ends = migrate(scene);
    let SourceError::Refused(reasons) = ends.cancelled() else {
        panic!("{}", ends.cancelled())
    };
    assert!(reasons.len() == 1 && reasons[0].contains("storage"), "{reasons:?}");
    assert!(matches!(&ends.loaded, Err(DestinationError::Guest { .. })));
}

#[test]
fn a_round_whose_answer_is_lost_is_not_sent_again() {
    let mut scene = resumable(guest(Tracking::Log, Workload::Idle), LONG);
    scene.wire.cutter = Some(Cutter::new(&[("barrier-reached", Cut::Before)]));
    scene.agent = healing();
    let ends = migrate(scene);
    let (summary, _) = ends.arrived();
    assert!(summary.bytes_sent < POPULATED * 101 / 100, "{}", summary.bytes_sent);
    assert_eq!(resumed(&ends), [(0, 0)]);
}

#[test]
fn what_arrived_late_in_the_first_round_is_not_sent_again() {
    let mut scene = resumable(guest(Tracking::Log, Workload::Idle), LONG);
    slowly(&mut scene, 20_000_000);
    scene.agent = cutting_at(50, Controls::cut);
    let ends = migrate(scene);
    let (summary, _) = ends.arrived();
    let [(held, due)] = resumed(&ends)[..] else {
        panic!("{:?}", ends.reports)
    };
    assert!(held > 3000 && held + due == 6300, "{held} are there, {due} are due");
    // Beside the pages no more than what was under way.
    assert!(summary.bytes_sent < POPULATED * 5 / 4, "{}", summary.bytes_sent);
}

#[track_caller]
fn a_busy_guest_arrives_though_cut_in_mid_round(tracking: Tracking, cut: impl Fn(&Controls) + Send + 'static) {
    let mut scene = resumable(guest(tracking, BUSY), LONG);
    scene.streams = 4;
    slowly(&mut scene, 40_000_000);
    scene.parameters.manner = live(Duration::from_secs(2));
    scene.agent = cutting_at(30, cut);
    let ends = migrate(scene);
    ends.arrived();
    assert_eq!(resumed(&ends).len(), 1);
}

#[test]
fn a_log_loses_no_dirty_page_in_a_cut() {
    a_busy_guest_arrives_though_cut_in_mid_round(Tracking::Log, Controls::cut);
}

#[test]
fn a_harvest_loses_no_dirty_page_in_a_cut() {
    a_busy_guest_arrives_though_cut_in_mid_round(Tracking::Harvest, Controls::cut);
}

#[test]
fn one_page_stream_of_four_is_made_again_with_the_others() {
    a_busy_guest_arrives_though_cut_in_mid_round(Tracking::Log, |controls| controls.cut_page_stream(2));
}

#[test]
fn a_control_stream_is_made_again_with_its_page_streams() {
    a_busy_guest_arrives_though_cut_in_mid_round(Tracking::Harvest, Controls::cut_control);
}

#[test]
fn pages_that_become_zero_after_a_cut_inside_their_frame_are_zero() {
    let flip = Workload::ZeroFlip {
        frames: 6000,
        rate: 60_000,
    };
    let mut scene = resumable(guest(Tracking::Log, flip), LONG);
    slowly(&mut scene, 30_000_000);
    scene.parameters.manner = live(Duration::from_secs(2));
    scene.agent = cutting_at(20, Controls::cut);
    let ends = migrate(scene);
    ends.arrived();
    assert_eq!(resumed(&ends).len(), 1);
}

#[test]
fn a_link_that_a_destination_finds_silent_is_made_again() {
    // The other end lives, and only its link is dead: what is told on it arrives nowhere.
    let mut scene = resumable(guest(Tracking::Log, BUSY), LONG);
    slowly(&mut scene, 20_000_000);
    scene.parameters.manner = live(Duration::from_secs(2));
    let mut heal = healing();
    let mut is_done = false;
    scene.agent = Box::new(move |report, controls| {
        if matches!(report, SourceReport::Progress(_)) && !std::mem::replace(&mut is_done, true) {
            // As an agent that has heard of a loss before its VMM has.
            controls.reconnect();
        }
        heal(report, controls);
    });
    let ends = migrate(scene);
    ends.arrived();
    assert!(!resumed(&ends).is_empty());
}

#[test]
fn progress_does_not_run_backwards_over_a_cut() {
    let mut scene = resumable(guest(Tracking::Log, Workload::Idle), LONG);
    slowly(&mut scene, 15_000_000);
    scene.agent = cutting_at(40, Controls::cut);
    let ends = migrate(scene);
    ends.arrived();
    let told = |report: &SourceReport| match report {
        SourceReport::Copying { copied, .. } | SourceReport::Round { copied, .. } => Some(*copied),
        SourceReport::Progress(progress) => Some(progress.copied),
        _ => None,
    };
    let told: Vec<_> = ends.reports.iter().filter_map(told).collect();
    let ascends = |pair: &[ferry_migration::source::Copied]| {
        pair[0].percent <= pair[1].percent && pair[0].memory.processed <= pair[1].memory.processed
    };
    assert!(told.windows(2).all(ascends), "{told:?}");
    assert!(told.iter().all(|copied| copied.percent <= MOST_BEFORE_THE_END));
}

#[test]
fn a_link_that_is_not_made_again_ends_the_migration_when_the_window_does() {
    let window = Duration::from_millis(400);
    let mut scene = resumable(guest(Tracking::Log, BUSY), window);
    slowly(&mut scene, 10_000_000);
    scene.destination_parameters.liveness.silence = Duration::from_millis(300);
    scene.agent = arming_and(|report| matches!(report, SourceReport::Progress(_)), Controls::cut);
    let ends = migrate(scene);
    let error = ends.cancelled();
    assert!(
        matches!(error, SourceError::LinkStaysLost { window: waited, .. } if *waited == window),
        "{error}"
    );
    assert!(ends.took > window);
}

#[test]
fn without_a_window_a_lost_link_ends_the_migration_at_once() {
    let mut scene = Scene::new(guest(Tracking::Log, BUSY));
    slowly(&mut scene, 10_000_000);
    scene.agent = arming_and(|report| matches!(report, SourceReport::Progress(_)), Controls::cut);
    let ends = migrate(scene);
    assert!(matches!(
        ends.cancelled(),
        SourceError::ControlLost(_) | SourceError::StreamLost { .. }
    ));
    assert!(
        !ends
            .reports
            .iter()
            .any(|report| matches!(report, SourceReport::LinkLost { .. }))
    );
}

/// The link is cut and stays so; `act` is done as soon as that is told.
fn cut_and(act: impl Fn(&Controls) + Send + 'static) -> Agent {
    Box::new(move |report, controls| match report {
        SourceReport::Progress(_) => controls.cut(),
        SourceReport::LinkLost { .. } => act(controls),
        _ => {}
    })
}

fn abort_both(controls: &Controls) {
    let reason = "by its user".to_owned();
    let order = ferry_migration::destination::DestinationOrder::Abort { reason };
    controls.destination_orders.send(order).unwrap();
    controls.abort();
}

#[test]
fn an_abort_is_obeyed_while_a_link_is_waited_for() {
    let mut scene = resumable(guest(Tracking::Log, BUSY), LONG);
    slowly(&mut scene, 10_000_000);
    scene.agent = cut_and(abort_both);
    let ends = migrate(scene);
    assert!(matches!(ends.cancelled(), SourceError::Aborted(_)));
    assert!(ends.took < LONG, "it waited all the same");
}

#[test]
fn a_guest_that_ends_while_a_link_is_waited_for_ends_the_migration() {
    let source = guest(Tracking::Log, BUSY);
    let notes = source.notes.clone();
    let mut scene = resumable(source, LONG);
    slowly(&mut scene, 10_000_000);
    scene.agent = cut_and(move |controls| {
        *notes.end.lock().unwrap() = Some(GuestEnd::PoweredOff);
        let reason = "the guest stopped".to_owned();
        let order = ferry_migration::destination::DestinationOrder::Abort { reason };
        controls.destination_orders.send(order).unwrap();
    });
    let ends = migrate(scene);
    assert!(matches!(
        ends.outcome,
        SourceOutcome::GuestEnded {
            end: GuestEnd::PoweredOff,
            ..
        }
    ));
}

#[test]
fn a_timeout_holds_while_a_link_is_waited_for() {
    let mut scene = resumable(guest(Tracking::Log, BUSY), LONG);
    slowly(&mut scene, 10_000_000);
    scene.parameters.timeout = Duration::from_millis(900);
    scene.destination_parameters.resume_window = Duration::from_millis(200);
    scene.destination_parameters.liveness.silence = Duration::from_millis(300);
    scene.agent = arming_and(|report| matches!(report, SourceReport::Progress(_)), Controls::cut);
    let ends = migrate(scene);
    assert!(
        matches!(ends.cancelled(), SourceError::TimedOut { .. }),
        "{:?}",
        ends.took
    );
}

#[test]
fn a_link_lost_once_a_grant_may_come_ends_the_migration() {
    let is_cut = Arc::new(AtomicBool::new(false));
    let mut scene = resumable(guest(Tracking::Log, BUSY), Duration::from_millis(200));
    scene.destination_parameters.liveness.silence = Duration::from_millis(300);
    let seen = is_cut.clone();
    scene.agent = Box::new(move |report, controls| {
        if matches!(report, SourceReport::Converged { .. }) {
            seen.store(true, Ordering::Relaxed);
            controls.cut();
        }
    });
    let ends = migrate(scene);
    assert!(is_cut.load(Ordering::Relaxed));
    assert!(matches!(
        ends.cancelled(),
        SourceError::ControlLost(_) | SourceError::StreamLost { .. }
    ));
}

#[test]
fn after_a_switchover_was_called_off_a_lost_link_is_made_again() {
    let mut source = guest(Tracking::Log, BUSY);
    source.stop_faults.push_back(StopFault::Fails);
    // The next attempt is not asked for before long.
    source.settles_after = [0, 400].into();
    let mut scene = resumable(source, LONG);
    let mut heal = healing();
    scene.agent = Box::new(move |report, controls| {
        heal(report, controls);
        if matches!(report, SourceReport::Disarmed { .. }) {
            controls.cut();
        }
    });
    let ends = migrate(scene);
    let (summary, loaded) = ends.arrived();
    assert_eq!(loaded.attempt.attempt, 2, "{:?}", summary.decisions);
    assert_eq!(resumed(&ends).len(), 1);
}

#[test]
fn a_guest_that_moves_cold_stands_still_until_its_link_is_back() {
    let mut scene = resumable(guest(Tracking::Log, BUSY), LONG);
    slowly(&mut scene, 30_000_000);
    scene.parameters.manner = ferry_migration::source::Manner::Cold;
    scene.agent = cutting_at(30, Controls::cut);
    let ends = migrate(scene);
    let (summary, _) = ends.arrived();
    assert!(summary.bytes_sent < POPULATED * 5 / 4, "{}", summary.bytes_sent);
}

#[test]
fn a_cold_guest_whose_link_stays_lost_is_woken() {
    let mut scene = resumable(guest(Tracking::Log, BUSY), Duration::from_millis(200));
    slowly(&mut scene, 10_000_000);
    scene.parameters.manner = ferry_migration::source::Manner::Cold;
    scene.destination_parameters.liveness.silence = Duration::from_millis(300);
    scene.agent = arming_and(|report| matches!(report, SourceReport::Progress(_)), Controls::cut);
    let ends = migrate(scene);
    assert!(matches!(ends.cancelled(), SourceError::LinkStaysLost { .. }));
}

#[test]
fn rounds_before_late_pages_are_resumed_too() {
    let mut scene = resumable(guest(Tracking::Log, BUSY), LONG);
    scene.parameters.lateness = Lateness::WhenItPays;
    scene.parameters.verify = false;
    scene.parameters.manner = live(Duration::from_secs(2));
    slowly(&mut scene, 30_000_000);
    scene.agent = cutting_at(30, Controls::cut);
    let ends = migrate(scene);
    assert_eq!(resumed(&ends).len(), 1);
    assert!(
        matches!(ends.outcome, SourceOutcome::GoSent(_)),
        "{:?}",
        ends.loaded.err()
    );
    assert!(ends.loaded.is_ok());
}

#[test]
fn connections_for_late_pages_that_were_lost_before_are_made_again() {
    let mut scene = resumable(guest(Tracking::Log, BUSY), LONG);
    scene.parameters.lateness = Lateness::WhenItPays;
    scene.parameters.digests = false;
    scene.parameters.verify = false;
    slowly(&mut scene, 30_000_000);
    scene.agent = cutting_at(30, |controls| controls.cut_late_stream(2));
    let ends = migrate(scene);
    assert_eq!(resumed(&ends).len(), 1, "{:?}", ends.reports);
    assert!(
        matches!(ends.outcome, SourceOutcome::GoSent(_)),
        "{:?}",
        ends.loaded.err()
    );
}

/// An attempt fails in mid-round; what is left of it is a guest that can be moved again, to whichever host.
#[track_caller]
fn a_retry_to_another_host_is_right(tracking: Tracking) {
    let mut scene = Scene::new(guest(tracking, BUSY));
    slowly(&mut scene, 20_000_000);
    scene.agent = arming_and(|report| matches!(report, SourceReport::Progress(_)), Controls::cut);
    let SourceOutcome::Cancelled { guest, .. } = migrate(scene).outcome else {
        panic!("it went on without a link")
    };
    migrate(Scene::new(guest)).arrived();
}

#[test]
fn a_guest_with_a_log_moves_to_another_host_after_a_failed_attempt() {
    a_retry_to_another_host_is_right(Tracking::Log);
}

#[test]
fn a_guest_with_a_ring_moves_to_another_host_after_a_failed_attempt() {
    a_retry_to_another_host_is_right(Tracking::Harvest);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// Cuts at any times of the first pass, several of them, and whatever the guest writes.
    #[test]
    fn a_guest_arrives_whole_however_often_its_link_is_cut(
        percents in prop::collection::vec(1u32..50, 1..5),
        ring in any::<bool>(),
        rate in 0u64..30_000,
    ) {
        let tracking = if ring { Tracking::Harvest } else { Tracking::Log };
        let workload = Workload::ZeroFlip { frames: 6000, rate };
        let mut source = guest(tracking, workload);
        // A cut that was made is noticed before the switchover is asked for.
        source.settles_after = [60].into();
        let mut scene = resumable(source, LONG);
        slowly(&mut scene, 20_000_000);
        scene.parameters.manner = live(Duration::from_secs(2));
        let (mut heal, mut left) = (healing(), percents);
        left.sort_unstable();
        left.reverse();
        scene.agent = Box::new(move |report, controls| {
            // Once the switchover was asked for, a cut is the end of it.
            if let SourceReport::Progress(progress) = report
                && progress.round == 1
                && left.last().is_some_and(|&percent| progress.copied.percent >= percent)
            {
                left.pop();
                controls.cut();
            }
            // From there on it need not be slow.
            if matches!(report, SourceReport::Round { round, .. } if round.number == 1) {
                let terms = NewTerms { bandwidth: Some(None), ..NewTerms::default() };
                let _ = controls.source_orders.send(SourceOrder::Retune(terms));
            }
            heal(report, controls);
        });
        let ends = migrate(scene);
        ends.arrived();
        prop_assert!(!resumed(&ends).is_empty(), "nothing was cut");
    }
}
