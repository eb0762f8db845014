//! Hands the pages of a round to the sending threads, chunk by chunk, re-arming each range right before its first page
//! is given out.
//!
//! ```text
//!   idle ──start──► open ──(last chunk sent)──► done ──finish──► idle
//!                    └───cut: what was not given out stays in the set───► done
//! ```

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::guest::{DirtyClearer, FrameRun, GuestError};
use crate::precopy::page_set::{PageSet, next_run, word_of};
use crate::wire::{MAX_DATA_PAGES, MAX_RUNS};

/// Frames that are re-armed at once: 128 MiB, so that calls into the host are few and yet the time between re-arming a
/// page and sending it, in which a write makes it dirty again, is short. A multiple of 64.
const REARM_FRAMES: u64 = 32 << 10;

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
        };
        self.lock().open = Some(open);
        self.work.notify_all();
    }

    /// Waits for pages to send and puts their runs into `runs`, `most` pages at most. `None` once the feed is closed. `before_waiting` is called if
    /// there are none yet.
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

    /// Takes back the set of a round that is done, all its pages in it.
    pub(crate) fn finish(&self) -> Option<PageSet> {
        self.lock().open.take().map(|open| open.round.set)
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

    /// Re-arms the range that holds frame `offset` of the current region, unless that was done.
    fn rearm_up_to(&mut self, offset: u64) -> Result<(), GuestError> {
        let Some(clearer) = &self.round.clearer else {
            return Ok(());
        };
        if offset < self.armed {
            return Ok(());
        }
        let region = self.round.set.region(self.region);
        let start = offset - offset % REARM_FRAMES;
        let end = (start + REARM_FRAMES).min(region.frames);
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
    use std::sync::Arc;

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
            prop_assert_eq!(feed.finish(), Some(set));
        }
    }

    #[test]
    fn a_cut_round_is_done_once_what_is_under_way_was_sent() {
        let feed = Feed::new(1);
        feed.start(round(set(&[FrameRun { first: 7, count: 5000 }]), None));
        feed.next(&mut Vec::new(), MAX_DATA_PAGES, || ()).unwrap();
        assert_eq!(feed.cut(), Standing::Open);
        assert_eq!(feed.sent(), Standing::Done);
        assert_eq!(feed.finish().unwrap().count(), 5000);
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
