//! The destination has no memory left for what arrives: the guest stays where it is, and arrives at the next host.

use super::fake::memory::FakeMemory;
use super::fake::scene::{Scene, guest, memory, migrate, run};
use super::fake::{FakeDestination, FakeSource, StopFault, Tracking, Workload};
use super::{BUSY, Duration};
use ferry_migration::destination::DestinationError;
use ferry_migration::guest::{FRAMES_PER_HUGE_PAGE, FrameRun};
use ferry_migration::source::{SourceError, SourceOutcome, SourceReport};

/// The first of the usual guest's huge pages. There are eleven more of which it has half or more.
const FIRST: FrameRun = run(0, FRAMES_PER_HUGE_PAGE);
const OTHERS: u64 = 11 * FRAMES_PER_HUGE_PAGE;

/// A destination with memory for so many frames that are backed ahead.
fn with_room_for(frames: u64) -> FakeMemory {
    let memory = memory();
    memory.has_room_for(frames);
    memory
}

/// Both sides say that the destination's memory is what failed, and the guest runs on; what was reported on the way.
#[track_caller]
fn is_refused_for_lack_of_memory(source: FakeSource, room: u64) -> (FakeSource, Vec<SourceReport>) {
    let mut scene = Scene::new(source);
    scene.destination = FakeDestination::new(with_room_for(room));
    // Nobody takes it for the link's fault, and waits for another one.
    let window = Duration::from_secs(20);
    (
        scene.parameters.resume_window,
        scene.destination_parameters.resume_window,
    ) = (window, window);
    let ends = migrate(scene);
    let SourceError::Refused(reasons) = ends.cancelled() else {
        panic!("{}", ends.cancelled())
    };
    let is_named = |reason: &String| {
        reason.contains("could not take in what arrives") && reason.contains("Cannot allocate memory")
    };
    assert!(reasons.len() == 1 && is_named(&reasons[0]), "{reasons:?}");
    let Err(error @ DestinationError::Guest { .. }) = &ends.loaded else {
        panic!("{:?}", ends.loaded.as_ref().err())
    };
    assert_eq!(ferry_migration::error_chain(error), reasons[0]);
    let SourceOutcome::Cancelled { guest, .. } = ends.outcome else {
        panic!("it was cancelled a moment ago")
    };
    (guest, ends.reports)
}

#[track_caller]
fn arrives_elsewhere_after_memory_ran_out(tracking: Tracking, room: u64) {
    let (source, reports) = is_refused_for_lack_of_memory(guest(tracking, BUSY), room);
    let is_round = |report: &SourceReport| matches!(report, SourceReport::Round { .. });
    assert!(!reports.iter().any(is_round), "memory ran out after the first pass");
    // It wrote before, and goes on.
    migrate(Scene::new(source)).arrived();
}

#[test]
fn a_guest_for_which_there_is_no_memory_at_all_arrives_elsewhere() {
    arrives_elsewhere_after_memory_ran_out(Tracking::Log, 0);
}

#[test]
fn a_guest_for_which_memory_runs_out_in_the_first_pass_arrives_elsewhere() {
    arrives_elsewhere_after_memory_ran_out(Tracking::Log, OTHERS / 2);
}

#[test]
fn a_guest_with_harvested_tracking_for_which_memory_runs_out_arrives_elsewhere() {
    arrives_elsewhere_after_memory_ran_out(Tracking::Harvest, OTHERS / 2);
}

/// A huge page that the guest called free is backed when something of it comes after all: here with the last pages.
#[test]
fn a_guest_for_which_memory_runs_out_in_the_blackout_runs_on_and_arrives_elsewhere() {
    let mut source = guest(Tracking::Log, Workload::Idle);
    source.names_free(&[FIRST]);
    source.stop_faults.push_back(StopFault::SlowSends(Duration::ZERO));
    let (mut source, reports) = is_refused_for_lack_of_memory(source, OTHERS);
    let is_stopped = |report: &SourceReport| matches!(report, SourceReport::Switching { .. });
    assert!(reports.iter().any(is_stopped), "memory ran out before the blackout");
    assert_eq!(source.notes.resumed.load(std::sync::atomic::Ordering::Relaxed), 1);
    // What its disks wrote while it was stopped goes along.
    source.hints = None;
    migrate(Scene::new(source)).arrived();
}
