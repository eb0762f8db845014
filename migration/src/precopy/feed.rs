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

/// The same in the first pass: 16 MiB. What the guest says is free helps for the ranges alone that are not re-armed yet; and where nothing was armed
/// before, it is here that pages are protected, which costs the guest a fault for each that it writes between that and its sending.
const FIRST_REARM_FRAMES: u64 = 4 << 10;

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
    /// The pages to send, at least one, in this order: set by set, each ascending. No page is in two of them.
    ///
    /// A range is re-armed for a set when its turn comes, and for the pages of that set alone. With the log, those of a later set stay writable until
    /// then: what is written to them before costs the guest nothing, and is sent along. (The ring, and disks, are re-armed when they are asked.)
    pub(crate) sets: Vec<PageSet>,
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
    /// Whose turn it is among the sets.
    turn: usize,
    region: usize,
    /// Frames of the region before this one were given out, as far as they are in the set.
    offset: u64,
    /// Frames of the region before this one were re-armed, as far as they are in the set.
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
        let remaining = round.sets.iter().map(PageSet::count).sum::<u64>();
        let chunk_pages = (remaining / (2 * self.streams)).clamp(MIN_CHUNK_PAGES, MAX_DATA_PAGES);
        let open = OpenRound {
            round,
            chunk_pages,
            remaining,
            under_way: 0,
            turn: 0,
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
        let open = self.lock().open.take()?;
        let all = |mut all: PageSet, set: PageSet| {
            all.union_with(&set);
            all
        };
        Some(Finished {
            set: open.round.sets.into_iter().reduce(all)?,
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

    /// Takes the next pages of a set, a frame's worth at most. A frame's runs ascend, so it ends with the set.
    fn take(&mut self, runs: &mut Vec<FrameRun>, most: u64) -> Result<(), GuestError> {
        runs.clear();
        let mut wanted = self.chunk_pages.min(most).min(self.remaining);
        while let Some(set) = self
            .round
            .sets
            .get(self.turn)
            .filter(|_| wanted > 0 && runs.len() < MAX_RUNS)
        {
            if self.region == set.regions() {
                if !runs.is_empty() {
                    break;
                }
                (self.turn, self.region) = (self.turn + 1, 0);
                continue;
            }
            let region = set.region(self.region);
            let Some((first, count)) = next_run(set.words(self.region), self.offset, region.frames) else {
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
        let set = &mut self.round.sets[self.turn];
        // Whatever of the set lies before this was re-armed. Regions ascend.
        let from = set.region(self.region).start_frame + self.armed.max(self.offset);
        let mut count = 0;
        for run in &self.said {
            let first = run.first.max(from);
            let run = FrameRun {
                first,
                count: run.first.saturating_add(run.count).saturating_sub(first),
            };
            let left_out = self.left_out.get_or_insert_with(|| set.emptied());
            count += set.move_to(run, left_out);
        }
        self.remaining -= count;
        self.left_out_pages += count;
        count > 0
    }

    /// Re-arms the set's pages of the range that holds frame `offset` of the current region, unless that was done.
    fn rearm_up_to(&mut self, offset: u64) -> Result<(), GuestError> {
        let Some(clearer) = &self.round.clearer else {
            return Ok(());
        };
        if offset < self.armed {
            return Ok(());
        }
        let set = &self.round.sets[self.turn];
        let region = set.region(self.region);
        let most = match self.round.free.is_some() || self.round.number == 1 {
            true => FIRST_REARM_FRAMES,
            false => REARM_FRAMES,
        };
        let start = offset - offset % most;
        let end = (start + most).min(region.frames);
        let words = &set.words(self.region)[word_of(start)..word_of(end.next_multiple_of(64))];
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
mod tests;
