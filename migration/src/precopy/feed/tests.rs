use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;
use crate::guest::{MemoryShape, Region};

/// Notes which frames were re-armed.
#[derive(Clone, Default)]
struct Notes(Arc<Mutex<Vec<u64>>>);

impl DirtyClearer for Notes {
    fn rearm(&self, run: FrameRun, dirty: &[u64]) -> Result<(), GuestError> {
        assert_eq!(dirty.len() as u64, run.count.div_ceil(64));
        let is_dirty = |&index: &u64| dirty[(index / 64) as usize] >> (index % 64) & 1 == 1;
        let frames = (0..run.count).filter(is_dirty).map(|index| run.first + index);
        self.0.lock().unwrap().extend(frames);
        Ok(())
    }
}

fn shape() -> MemoryShape {
    let regions = vec![
        Region {
            start_frame: 7,
            frames: 70_000,
        },
        Region {
            start_frame: 100_000,
            frames: 1000,
        },
    ];
    MemoryShape::new(regions).unwrap()
}

fn set(runs: &[FrameRun]) -> PageSet {
    let mut set = PageSet::new(&shape());
    runs.iter().for_each(|&run| set.insert(run));
    set
}

fn round(set: PageSet, clearer: Option<Notes>) -> Round<Notes> {
    Round {
        number: 1,
        sets: vec![set],
        clearer,
        pace: Pace::Yielding,
        free: None,
    }
}

fn drain(feed: &Feed<Notes>) -> Vec<Vec<FrameRun>> {
    let mut chunks = Vec::new();
    loop {
        let mut runs = Vec::new();
        feed.next(&mut runs, MAX_DATA_PAGES, || ()).unwrap().unwrap();
        chunks.push(runs);
        if feed.sent() == Standing::Done {
            return chunks;
        }
    }
}

proptest! {
    #[test]
    fn every_page_is_given_out_once_after_it_was_armed_and_the_later_sets_after_the_earlier_ones(
        steps in prop::collection::vec((0u64..102_000, 1u64..3000), 1..40),
        hot in prop::collection::vec((0u64..102_000, 1u64..3000), 0..40),
        streams in 1u32..5,
        number in 1u32..3,
    ) {
        let runs = |steps: Vec<(u64, u64)>| -> Vec<FrameRun> {
            steps.into_iter().map(|(first, count)| FrameRun { first, count }).collect()
        };
        let whole = set(&runs(steps));
        prop_assume!(!whole.is_empty());
        let (mut cold, mut hot_ones) = (whole.clone(), whole.emptied());
        for run in runs(hot) {
            cold.move_to(run, &mut hot_ones);
        }
        let frames_of = |set: &PageSet| set.runs().flat_map(|run| run.first..run.end()).collect::<Vec<u64>>();
        let expected: Vec<u64> = [&cold, &hot_ones].into_iter().flat_map(frames_of).collect();
        let notes = Notes::default();
        let feed = Feed::new(streams);
        feed.start(Round { number, sets: vec![cold, hot_ones], ..round(whole.clone(), Some(notes.clone())) });
        prop_assert_eq!(feed.remaining(), whole.count());

        let mut given = Vec::new();
        loop {
            let mut runs = Vec::new();
            feed.next(&mut runs, MAX_DATA_PAGES, || ()).unwrap().unwrap();
            prop_assert!(runs.len() <= MAX_RUNS);
            prop_assert!(runs.iter().map(|run| run.count).sum::<u64>() <= MAX_DATA_PAGES);
            prop_assert!(runs.iter().all(|&run| shape().contains(run)));
            prop_assert!(runs.windows(2).all(|pair| pair[0].end() < pair[1].first));
            given.extend(runs.iter().flat_map(|run| run.first..run.end()));
            // What is re-armed is so in the order in which it is given out.
            prop_assert!(notes.0.lock().unwrap().starts_with(&given));
            if feed.sent() == Standing::Done {
                break;
            }
        }
        prop_assert_eq!(&given, &expected);
        prop_assert_eq!(&*notes.0.lock().unwrap(), &given);
        prop_assert_eq!(feed.finish().unwrap().set, whole);
    }
}

#[test]
fn a_round_of_which_all_is_free_is_done_without_a_page() {
    let said = Arc::new(Said::default());
    let whole = FrameRun { first: 7, count: 5000 };
    said.0.lock().unwrap().push(whole);
    let feed = Feed::new(2);
    feed.start(Round {
        free: Some(said),
        ..round(set(&[whole]), Some(Notes::default()))
    });
    assert_eq!(drain(&feed), [vec![]]);
    let Finished { set, free } = feed.finish().unwrap();
    assert_eq!((set.count(), free.unwrap().count()), (0, 5000));
}

/// What a guest says.
#[derive(Default)]
struct Said(Mutex<Vec<FrameRun>>);

impl FreePages for Said {
    fn take(&self, found: &mut Vec<FrameRun>) {
        found.append(&mut self.0.lock().unwrap());
    }
}

/// A guest's pages, with a version in place of the contents of each, and their dirty bits.
#[derive(Clone)]
struct World(Arc<Mutex<Pages>>);

struct Pages {
    versions: Vec<u64>,
    dirty: Vec<bool>,
    /// What a page holds is nothing to the guest: it was named, and not written since.
    free: Vec<bool>,
}

impl DirtyClearer for World {
    fn rearm(&self, run: FrameRun, dirty: &[u64]) -> Result<(), GuestError> {
        let mut pages = self.0.lock().unwrap();
        for index in (0..run.count).filter(|index| dirty[(index / 64) as usize] >> (index % 64) & 1 == 1) {
            pages.dirty[(run.first + index) as usize] = false;
        }
        Ok(())
    }
}

/// Ranges of the world: each region is one.
const RANGES: u64 = 6;
const PAGES: u64 = 4;

#[derive(Clone, Copy, Debug)]
enum Step {
    /// The guest writes a page, free or not.
    Write(u64),
    /// It frees a page and names it.
    Free(u64),
    /// The oldest page that was named is told to whoever asked.
    Tell,
    /// A thread takes so many pages to send.
    Take(u64),
    /// The oldest pages that were taken and not sent are read and sent.
    Send,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let frames = RANGES * PAGES;
    let step = prop_oneof![
        4 => (0..frames).prop_map(Step::Write),
        4 => (0..frames).prop_map(Step::Free),
        4 => Just(Step::Tell),
        2 => (1u64..6).prop_map(Step::Take),
        2 => Just(Step::Send),
    ];
    prop::collection::vec(step, 0..120)
}

/// The first round with these steps, and then the fetch: which pages the destination lacks although they matter and are not told to be dirty.
fn lost(steps: &[Step]) -> Vec<u64> {
    let frames = RANGES * PAGES;
    let region = |index| Region {
        start_frame: index * PAGES,
        frames: PAGES,
    };
    let mut set = PageSet::new(&MemoryShape::new((0..RANGES).map(region).collect()).unwrap());
    set.insert(FrameRun {
        first: 0,
        count: frames,
    });
    let pages = |value: bool| vec![value; frames as usize];
    let world = World(Arc::new(Mutex::new(Pages {
        versions: vec![1; frames as usize],
        dirty: pages(false),
        free: pages(false),
    })));
    let said = Arc::new(Said::default());
    let feed = Feed::new(1);
    feed.start(Round {
        number: 1,
        sets: vec![set],
        clearer: Some(world.clone()),
        pace: Pace::Yielding,
        free: Some(said.clone()),
    });
    let mut named = VecDeque::new();
    let mut there = vec![0; frames as usize];
    let mut taken: VecDeque<Vec<FrameRun>> = VecDeque::new();
    let take = |taken: &mut VecDeque<_>, most| {
        let mut runs = Vec::new();
        if feed.remaining() > 0 {
            feed.next(&mut runs, most, || ()).unwrap();
            taken.push_back(runs);
        }
    };
    let mut send = |runs: Vec<FrameRun>| {
        let pages = world.0.lock().unwrap();
        for frame in runs.iter().flat_map(|run| run.first..run.end()) {
            there[frame as usize] = pages.versions[frame as usize];
        }
        feed.sent()
    };
    for &step in steps {
        match step {
            Step::Write(frame) => {
                let mut pages = world.0.lock().unwrap();
                pages.versions[frame as usize] += 1;
                pages.dirty[frame as usize] = true;
                pages.free[frame as usize] = false;
            }
            Step::Free(frame) => {
                world.0.lock().unwrap().free[frame as usize] = true;
                named.push_back(FrameRun { first: frame, count: 1 });
            }
            Step::Tell => said.0.lock().unwrap().extend(named.pop_front()),
            Step::Take(most) => take(&mut taken, most),
            Step::Send => {
                taken.pop_front().map(&mut send);
            }
        }
    }
    while feed.remaining() > 0 {
        take(&mut taken, 5);
    }
    for runs in taken {
        send(runs);
    }
    let pages = world.0.lock().unwrap();
    let is_lost = |&frame: &u64| {
        let frame = frame as usize;
        !pages.free[frame] && !pages.dirty[frame] && there[frame] != pages.versions[frame]
    };
    (0..frames).filter(is_lost).collect()
}

proptest! {
    #[test]
    fn no_write_to_a_page_that_was_called_free_is_lost_whenever_that_is_heard(steps in steps()) {
        prop_assert_eq!(lost(&steps), Vec::<u64>::new());
    }
}

#[test]
fn a_cut_round_is_done_once_what_is_under_way_was_sent() {
    let feed = Feed::new(1);
    feed.start(round(set(&[FrameRun { first: 7, count: 5000 }]), None));
    feed.next(&mut Vec::new(), MAX_DATA_PAGES, || ()).unwrap();
    assert_eq!(feed.cut(), Standing::Open);
    assert_eq!(feed.sent(), Standing::Done);
    assert_eq!(feed.finish().unwrap().set.count(), 5000);
}

#[test]
fn a_round_cut_before_its_first_page_is_done_at_once() {
    let feed = Feed::new(1);
    feed.start(round(set(&[FrameRun { first: 7, count: 5 }]), None));
    assert_eq!(feed.cut(), Standing::Done);
}

#[test]
fn a_closed_feed_gives_nothing_out() {
    let feed = Feed::new(1);
    feed.start(round(set(&[FrameRun { first: 7, count: 5 }]), None));
    feed.close();
    assert!(feed.next(&mut Vec::new(), MAX_DATA_PAGES, || ()).unwrap().is_none());
}
