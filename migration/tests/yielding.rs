//! The threads that copy yield to the guest while it runs, and to nobody while it stands still and waits for them.

mod fake;

use std::time::Duration;

use fake::processors::{Deed, Done, nice_of_who_stands_back};
use fake::scene::{Agent, Ends, Scene, guest, migrate};
use fake::{FakeSource, StopFault, Tracking, Workload};
use ferry_migration::Compression;
use ferry_migration::guest::SourceGuest;
use ferry_migration::source::{Manner, SourceOutcome, SourceReport};

/// What the usual guest has populated, which goes in the first round.
const POPULATED: u64 = 6300;

/// What both ends did with the processors.
struct Copied {
    ends: Ends,
    source: Vec<Done>,
    destination: Vec<Done>,
    /// How often each let somebody else have its processor.
    gave_way: (Vec<Done>, Vec<Done>),
}

/// Moves a guest, and sees it arrive.
#[track_caller]
fn copied(scene: Scene) -> Copied {
    let (source, destination) = (scene.source.memory(), scene.destination.memory.clone());
    let ends = migrate(scene);
    ends.arrived();
    Copied {
        ends,
        source: source.processors().done(Deed::Sent),
        destination: destination.processors().done(Deed::Received),
        gave_way: (
            source.processors().done(Deed::GaveWay),
            destination.processors().done(Deed::GaveWay),
        ),
    }
}

/// A guest that writes some pages after the first round, which go in a second one while it runs, and whose disks write others while it is stopped:
/// they are the last pages.
fn in_three_rounds() -> Scene {
    let mut source = guest(Tracking::Log, Workload::Idle);
    source.stop_faults.push_back(StopFault::SlowSends(Duration::ZERO));
    let agent = granting_after_a_second_round(&source);
    let mut scene = Scene {
        agent,
        ..Scene::new(source)
    };
    // Every frame goes through the memory's hands.
    scene.parameters.compression = Compression::Off;
    scene
}

fn granting_after_a_second_round(source: &FakeSource) -> Agent {
    let write = source.writer();
    Box::new(move |report, controls| match report {
        SourceReport::Round { round, .. } if round.number == 1 => (3000..3300).for_each(|frame| write(frame, 7)),
        SourceReport::Round { round, .. } if round.number == 2 => controls.grant(1),
        _ => {}
    })
}

/// Parts frames into those of the first so many pages, and the others.
fn parted(frames: &[Done], pages: u64) -> (&[Done], &[Done]) {
    let mut before = 0;
    let is_first = |frame: &&Done| {
        before += frame.pages();
        before <= pages
    };
    frames.split_at(frames.iter().take_while(is_first).count())
}

fn pages(frames: &[Done]) -> u64 {
    frames.iter().map(Done::pages).sum()
}

#[test]
fn frames_are_sent_by_turns_while_the_guest_runs_and_without_while_it_stands_still() {
    let scene = in_three_rounds();
    scene.source.memory().processors().have_turns();
    let Copied {
        source,
        gave_way: (gave_way, _),
        ..
    } = copied(scene);
    let (last, running): (Vec<_>, Vec<_>) = source.into_iter().partition(|frame| frame.guest_stands_still);
    assert!(pages(&running) > POPULATED, "no second round while the guest ran");
    assert!(pages(&last) >= 200, "no last pages");
    assert!(running.iter().all(|frame| frame.turns.is_some()), "{running:?}");
    assert!(last.iter().all(|frame| frame.turns.is_none()), "{last:?}");
    // After each frame, and after none that the guest waits for.
    assert_eq!(gave_way.len(), running.len());
    assert!(gave_way.iter().all(|done| !done.guest_stands_still), "{gave_way:?}");
}

#[test]
fn where_there_are_no_turns_frames_are_sent_with_less_weight_while_the_guest_runs() {
    let Copied { source, .. } = copied(in_three_rounds());
    let mut running = source.iter().filter(|frame| !frame.guest_stands_still);
    // How much the last ones have is for the host to say: taking it back needs a right.
    let stands_back = nice_of_who_stands_back();
    assert!(running.all(|frame| frame.nice == stands_back), "{source:?}");
}

#[test]
fn a_destination_yields_in_the_first_round_and_in_no_later_one() {
    let scene = in_three_rounds();
    scene.destination.memory.processors().have_turns();
    let Copied {
        destination,
        gave_way: (_, gave_way),
        ..
    } = copied(scene);
    let (first, later) = parted(&destination, POPULATED);
    assert_eq!(pages(first), POPULATED);
    assert!(pages(later) >= 500, "no later rounds");
    assert!(first.iter().all(|frame| frame.turns.is_some()), "{first:?}");
    assert!(later.iter().all(|frame| frame.turns.is_none()), "{later:?}");
    assert_eq!(gave_way.len(), first.len());
}

#[test]
fn a_guest_that_stands_still_from_the_first_page_on_is_yielded_to_by_no_sender() {
    let mut scene = Scene::new(guest(Tracking::Log, Workload::Idle));
    scene.parameters.manner = Manner::Cold;
    scene.parameters.compression = Compression::Off;
    scene.source.memory().processors().have_turns();
    let Copied {
        ends,
        source,
        gave_way: (gave_way, _),
        ..
    } = copied(scene);
    assert!(matches!(ends.outcome, SourceOutcome::GoSent(_)));
    assert_eq!(pages(&source), POPULATED);
    assert!(
        source
            .iter()
            .all(|frame| frame.guest_stands_still && frame.turns.is_none()),
        "{source:?}"
    );
    assert_eq!(gave_way.len(), 0);
}
