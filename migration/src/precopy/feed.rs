//! Hands the pages of a round to the sending threads, chunk by chunk, re-arming each range right before its first page
//! is given out.
//!
//! ```text
//!   idle ──start──► open ──(last chunk sent)──► done ──finish──► idle
//!                    └───cut: what was not given out stays in the set───► done
//! ```
//!
//! What the guest says is free is left out of the round, and is not owed for it. That is decided right before a range is re-armed, and never later:
//! a page that is left out is not in the words with which its range is re-armed, so its bit, if it has one, stays where it is. The guest may use the
//! page again at any time after it named it, and that is after tracking began; whatever it writes then is told by the first fetch, which is
//! after the first round. Were a page left out whose range was re-armed already, a write between its being named and its being re-armed
//! would be forgotten. For the same reason hints are taken in the first round only: a fetch may have told of a write to a page after it was named,
//! and leaving it out of what was fetched would lose that.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::guest::{DirtyClearer, FrameRun, FreePages, GuestError};
use crate::precopy::page_set::{PageSet, next_run, word_of};
use crate::wire::{MAX_DATA_PAGES, MAX_RUNS};

/// Frames that are re-armed at once: 128 MiB, so that calls into the host are few and yet the time between re-arming a
/// page and sending it, in which a write makes it dirty again, is short. A multiple of 64.
const REARM_FRAMES: u64 = 32 << 10;

/// The same while the guest is asked what is free, which helps for the ranges alone that are not re-armed yet: 16 MiB.
const REARM_FRAMES_ASKING: u64 = 4 << 10;

/// The fewest pages worth a frame of their own, when a small round is shared among streams.
const MIN_CHUNK_PAGES: u64 = 32;

/// What slows a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pace {
    /// The guest runs: the cap applies, and the copy yields to the vCPUs.
    Yielding,
    /// The guest stands still while all of it is copied: the cap applies.
    Hurried,
    /// The guest stands still for the last pages: nothing.
    Unlimited,
}

/// One round's orders.
pub(crate) struct Round<C> {
    /// Its number.
    pub(crate) number: u32,
    /// The pages to send; at least one.
    pub(crate) set: PageSet,
    /// How to re-arm; `None` while the guest stands still.
    pub(crate) clearer: Option<C>,
    /// How fast.
    pub(crate) pace: Pace,
    /// Who says what of it is free; only in the first round.
    pub(crate) free: Option<Arc<dyn FreePages>>,
}

/// What a round came to.
pub(crate) struct Finished {
    /// Its pages, but for those that were left out.
    pub(crate) set: PageSet,
    /// Pages that were left out because they are free.
    pub(crate) free: Option<PageSet>,
}

/// Pages for one frame, and what goes with them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Chunk {
    pub(crate) round: u32,
    pub(crate) pace: Pace,
}

/// Whether the round is over with what was just reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// Pages of it are still under way or to be given out.
    Open,
    /// Every page given out was sent, and none is left. Told to one caller only.
    Done,
}

/// The meeting point of the script and the sending threads.
pub(crate) struct Feed<C> {
    state: Mutex<State<C>>,
    work: Condvar,
    streams: u64,
}

struct State<C> {
    open: Option<OpenRound<C>>,
    closed: bool,
}

struct OpenRound<C> {
    round: Round<C>,
    chunk_pages: u64,
    /// Pages not yet given out.
    remaining: u64,
    /// Chunks given out and not yet reported as sent.
    under_way: u32,
    region: usize,
    /// Frames of the region before this one were given out.
    offset: u64,
    /// Frames of the region before this one were re-armed.
    armed: u64,
    /// What was left out, and how many pages that is.
    left_out: Option<PageSet>,
    left_out_pages: u64,
    /// What was said to be free; kept to save allocations.
    said: Vec<FrameRun>,
}

impl<C: DirtyClearer> Feed<C> {
    pub(crate) fn new(streams: u32) -> Self {
        Self {
            state: Mutex::new(State {
                open: None,
                closed: false,
            }),
            work: Condvar::new(),
            streams: u64::from(streams),
        }
    }

    /// Opens a round. The one before it is finished.
    pub(crate) fn start(&self, round: Round<C>) {
        let remaining = round.set.count();
        let chunk_pages = (remaining / (2 * self.streams)).clamp(MIN_CHUNK_PAGES, MAX_DATA_PAGES);
        let open = OpenRound {
            round,
            chunk_pages,
            remaining,
            under_way: 0,
            region: 0,
            offset: 0,
            armed: 0,
            left_out: None,
            left_out_pages: 0,
            said: Vec::new(),
        };
        self.lock().open = Some(open);
        self.work.notify_all();
    }

    /// Waits for pages to send and puts their runs into `runs`, `most` pages at most; none at all if those that were left turned out to be free, which
    /// is reported as sent like any others. `None` once the feed is closed. `before_waiting` is called if there are none yet.
    ///
    /// # Errors
    /// If the range cannot be re-armed.
    pub(crate) fn next(
        &self,
        runs: &mut Vec<FrameRun>,
        most: u64,
        before_waiting: impl FnOnce(),
    ) -> Result<Option<Chunk>, GuestError> {
        let mut before_waiting = Some(before_waiting);
        let mut state = self.lock();
        loop {
            if state.closed {
                return Ok(None);
            }
            if let Some(open) = state.open.as_mut().filter(|open| open.remaining > 0) {
                open.take(runs, most)?;
                return Ok(Some(Chunk {
                    round: open.round.number,
                    pace: open.round.pace,
                }));
            }
            if let Some(before_waiting) = before_waiting.take() {
                drop(state);
                before_waiting();
                state = self.lock();
                continue;
            }
            state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Reports a chunk as sent.
    pub(crate) fn sent(&self) -> Standing {
        let mut state = self.lock();
        let Some(open) = state.open.as_mut() else {
            return Standing::Open;
        };
        open.under_way -= 1;
        open.standing()
    }

    /// Gives out no more of the open round. [`Standing::Done`] if nothing is under way either; otherwise whoever reports the
    /// last chunk learns it.
    pub(crate) fn cut(&self) -> Standing {
        let mut state = self.lock();
        let Some(open) = state.open.as_mut() else {
            return Standing::Open;
        };
        if open.remaining == 0 {
            // Over already, or about to be: that is told to somebody else.
            return Standing::Open;
        }
        open.remaining = 0;
        open.standing()
    }

    /// Pages of the open round not yet given out.
    pub(crate) fn remaining(&self) -> u64 {
        self.lock().open.as_ref().map_or(0, |open| open.remaining)
    }

    /// Pages of the open round that were left out so far, because they are free.
    pub(crate) fn left_out(&self) -> u64 {
        self.lock().open.as_ref().map_or(0, |open| open.left_out_pages)
    }

    /// Takes back the set of a round that is done, or will never be.
    pub(crate) fn finish(&self) -> Option<Finished> {
        self.lock().open.take().map(|open| Finished {
            set: open.round.set,
            free: open.left_out,
        })
    }

    /// Sends the sending threads home.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.work.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State<C>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<C: DirtyClearer> OpenRound<C> {
    fn standing(&self) -> Standing {
        if self.remaining == 0 && self.under_way == 0 {
            Standing::Done
        } else {
            Standing::Open
        }
    }

    /// Takes the next pages of the set, a frame's worth at most.
    fn take(&mut self, runs: &mut Vec<FrameRun>, most: u64) -> Result<(), GuestError> {
        runs.clear();
        let mut wanted = self.chunk_pages.min(most).min(self.remaining);
        while wanted > 0 && runs.len() < MAX_RUNS && self.region < self.round.set.regions() {
            let region = self.round.set.region(self.region);
            let Some((first, count)) = next_run(self.round.set.words(self.region), self.offset, region.frames) else {
                (self.region, self.offset, self.armed) = (self.region + 1, 0, 0);
                continue;
            };
            if self.leave_out_free() {
                continue;
            }
            self.rearm_up_to(first)?;
            let armed_end = if self.round.clearer.is_some() {
                self.armed
            } else {
                region.frames
            };
            let count = count.min(wanted).min(armed_end - first);
            match runs.last_mut() {
                // A range ended inside a run, and it goes on in the next one.
                Some(last) if self.offset == first && last.end() == region.start_frame + first => last.count += count,
                _ => runs.push(FrameRun {
                    first: region.start_frame + first,
                    count,
                }),
            }
            self.offset = first + count;
            wanted -= count;
            self.remaining -= count;
        }
        self.under_way += 1;
        Ok(())
    }

    /// Takes out of the round what the guest has said is free and is not re-armed. Whether there was any: each time it is fewer pages, so that ends.
    fn leave_out_free(&mut self) -> bool {
        let Some(free) = &self.round.free else { return false };
        self.said.clear();
        free.take(&mut self.said);
        // Whatever lies before this was re-armed. Regions ascend.
        let from = self.round.set.region(self.region).start_frame + self.armed.max(self.offset);
        let mut count = 0;
        for run in &self.said {
            let first = run.first.max(from);
            let run = FrameRun {
                first,
                count: run.first.saturating_add(run.count).saturating_sub(first),
            };
            let left_out = self.left_out.get_or_insert_with(|| self.round.set.emptied());
            count += self.round.set.move_to(run, left_out);
        }
        self.remaining -= count;
        self.left_out_pages += count;
        count > 0
    }

    /// Re-arms the range that holds frame `offset` of the current region, unless that was done.
    fn rearm_up_to(&mut self, offset: u64) -> Result<(), GuestError> {
        let Some(clearer) = &self.round.clearer else {
            return Ok(());
        };
        if offset < self.armed {
            return Ok(());
        }
        let region = self.round.set.region(self.region);
        let most = match self.round.free {
            Some(_) => REARM_FRAMES_ASKING,
            None => REARM_FRAMES,
        };
        let start = offset - offset % most;
        let end = (start + most).min(region.frames);
        let words = &self.round.set.words(self.region)[word_of(start)..word_of(end.next_multiple_of(64))];
        clearer.rearm(
            FrameRun {
                first: region.start_frame + start,
                count: end - start,
            },
            words,
        )?;
        self.armed = end;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;
    use crate::guest::{MemoryShape, Region};

    /// Notes what was re-armed.
    #[derive(Clone, Default)]
    struct Notes(Arc<Mutex<Vec<FrameRun>>>);

    impl DirtyClearer for Notes {
        fn rearm(&self, run: FrameRun, dirty: &[u64]) -> Result<(), GuestError> {
            assert_eq!(dirty.len() as u64, run.count.div_ceil(64));
            self.0.lock().unwrap().push(run);
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
            set,
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
        fn every_page_is_given_out_once_and_after_its_range_was_armed(
            steps in prop::collection::vec((0u64..102_000, 1u64..3000), 1..40),
            streams in 1u32..5,
        ) {
            let runs: Vec<FrameRun> = steps.into_iter().map(|(first, count)| FrameRun { first, count }).collect();
            let set = set(&runs);
            prop_assume!(!set.is_empty());
            let notes = Notes::default();
            let feed = Feed::new(streams);
            feed.start(round(set.clone(), Some(notes.clone())));

            let chunks = drain(&feed);
            let frames: Vec<u64> = chunks.iter().flatten().flat_map(|run| run.first..run.end()).collect();
            let expected: Vec<u64> = set.runs().flat_map(|run| run.first..run.end()).collect();
            prop_assert_eq!(&frames, &expected);
            prop_assert!(chunks.iter().all(|runs| runs.len() <= MAX_RUNS));
            prop_assert!(chunks.iter().all(|runs| runs.iter().map(|run| run.count).sum::<u64>() <= MAX_DATA_PAGES));
            prop_assert!(chunks.iter().flatten().all(|&run| shape().contains(run)));
            let armed = notes.0.lock().unwrap();
            prop_assert!(frames.iter().all(|frame| armed.iter().any(|run| (run.first..run.end()).contains(frame))));
            prop_assert!(armed.windows(2).all(|pair| pair[0].end() <= pair[1].first));
            prop_assert_eq!(feed.finish().unwrap().set, set);
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
            set,
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
}
