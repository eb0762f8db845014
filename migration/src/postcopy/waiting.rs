//! Which pages a guest lacks that runs without all of its memory, and who waits for them; at the destination.
//!
//! The thread that hears which pages are touched, those that take frames in, and the one that begins and ends sessions share it. A page
//! leaves the set of missing ones after it was supplied, never before: one that is touched and not in it is filled with zeroes.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use ferry_proto::stream::v1;

use super::asking::{Asking, Wishes};
use super::destination::LateOutcome;
use super::{Latency, parts};
use crate::PageSet;
use crate::guest::{AbsentPages, FrameRun, GuestError, MemoryShape};
use crate::handover::Attempt;
use crate::wire::{Pages, Sums, Wish};

/// How long the thread that hears which pages are touched waits at most before it looks at what it was told.
const TICK: Duration = Duration::from_millis(20);

/// So often a page may come damaged, in all sessions: then the guest is given up, for it cannot have the page.
const MOST_DAMAGED: u32 = 8;

/// So many pages may be damaged and not have come right yet: a source that damages everything is not remembered page by page for ever.
const MOST_DAMAGED_AT_ONCE: usize = 1 << 16;

/// A page that is touched brings its neighbours along, those of the same 64 KiB, and those that come with it anyway.
const NEIGHBOURHOOD: u64 = 16;

/// What the threads share.
pub(super) struct Shared {
    pub(super) pages: Box<dyn AbsentPages>,
    pub(super) shape: MemoryShape,
    /// How many pages come together.
    pub(super) unit: u64,
    state: Mutex<State>,
    total: u64,
    /// Whether a page is compared with what the source has before it is supplied.
    is_verified: bool,
    began: Instant,
    /// Nobody is to hear any more which pages are touched.
    over: AtomicBool,
    /// Why no page can be taken in any more.
    failure: OnceLock<String>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Shared")
            .field("total", &self.total)
            .finish_non_exhaustive()
    }
}

struct State {
    missing: PageSet,
    /// How many there are.
    left: u64,
    /// Asked for in this session.
    asked: PageSet,
    /// Touched and missing, each by the first page of its unit, and since when.
    waiting: HashMap<u64, Instant>,
    /// Came damaged and were asked for again: how often, unit by unit.
    damaged: HashMap<u64, u32>,
    /// How many pages were asked for again, however often.
    sent_again: u64,
    latency: Latency,
    /// As last measured.
    round_trip: Option<Duration>,
    /// Where to ask; none between sessions.
    asking: Option<Asking>,
    outcome: Option<LateOutcome>,
}

impl Shared {
    /// These pages of memory of this shape are missing.
    pub(super) fn new(
        pages: Box<dyn AbsentPages>,
        missing: PageSet,
        (shape, unit): (MemoryShape, u64),
        sums: Sums,
    ) -> Self {
        let left = missing.count();
        Self {
            pages,
            state: Mutex::new(State {
                asked: PageSet::new(&shape),
                missing,
                left,
                waiting: HashMap::new(),
                damaged: HashMap::new(),
                sent_again: 0,
                latency: Latency::default(),
                round_trip: None,
                asking: None,
                outcome: None,
            }),
            shape,
            unit,
            total: left,
            is_verified: sums == Sums::Told,
            began: Instant::now(),
            over: AtomicBool::new(false),
            failure: OnceLock::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is missing now, as a new session tells it.
    pub(super) fn tell_missing(&self, attempt: Attempt) -> Vec<v1::Missing> {
        parts(&self.lock().missing, attempt)
    }

    /// Asks for what is waited for, and from now on for what is touched.
    pub(super) fn ask_on(&self, asking: Asking) {
        let mut state = self.lock();
        let state = &mut *state;
        state.asked.clear();
        state.asking = Some(asking);
        let mut table = Wishes::default();
        let waiting: Vec<u64> = state.waiting.keys().copied().collect();
        for frame in waiting {
            state.wish(frame, (&self.shape, self.unit), &mut table);
        }
        if let Some(asking) = &mut state.asking
            && !table.is_empty()
        {
            asking.ask(&table.sorted());
        }
    }

    /// The session is over: nothing is asked for until the next one.
    pub(super) fn end_session(&self) {
        self.lock().asking = None;
    }

    /// The round trip as it was measured last.
    pub(super) fn note_round_trip(&self, round_trip: Duration) {
        self.lock().round_trip = Some(round_trip);
    }

    /// How it came out, once every page is here.
    pub(super) fn outcome(&self) -> Option<LateOutcome> {
        self.lock().outcome.clone()
    }

    /// Why no page can be taken in any more.
    pub(super) fn failure(&self) -> Option<&String> {
        self.failure.get()
    }

    /// Whether nobody is to hear any more which pages are touched.
    pub(super) fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    /// Nobody is to hear any more which pages are touched.
    pub(super) fn stop(&self) {
        self.over.store(true, Ordering::Release);
    }

    /// The thread that hears which pages are touched.
    pub(super) fn watch(&self) -> Result<(), GuestError> {
        let mut frames = Vec::new();
        while !self.over.load(Ordering::Acquire) {
            frames.clear();
            self.pages.touched(TICK, &mut frames)?;
            if let Some(asking) = &mut self.lock().asking {
                asking.go_on();
            }
            if !frames.is_empty() {
                frames.iter_mut().for_each(|frame| *frame -= *frame % self.unit);
                frames.sort_unstable();
                frames.dedup();
                self.take_touched(&frames)?;
            }
        }
        Ok(())
    }

    /// Zeroes for pages that are not missing; the others are asked for, once in a session.
    fn take_touched(&self, frames: &[u64]) -> Result<(), GuestError> {
        let now = Instant::now();
        let mut zero = Vec::new();
        let mut state = self.lock();
        let mut table = Wishes::default();
        for &frame in frames {
            if state.missing.contains(frame) {
                state.waiting.entry(frame).or_insert(now);
                state.wish(frame, (&self.shape, self.unit), &mut table);
            } else {
                zero.push(frame);
            }
        }
        if let Some(asking) = &mut state.asking
            && !table.is_empty()
        {
            asking.ask(&table.sorted());
        }
        drop(state);
        for first in zero {
            let count = self.unit;
            self.pages.supply_zeroes(FrameRun { first, count })?;
        }
        Ok(())
    }

    /// These pages are there now.
    pub(super) fn supplied(&self, runs: &[FrameRun]) {
        let mut guard = self.lock();
        let state = &mut *guard;
        for &run in runs {
            let Some((region, offset)) = state.missing.locate(run.first) else {
                continue;
            };
            state.left -= state.missing.count_in(region, offset, run.count);
            state.missing.remove(run);
        }
        if !state.damaged.is_empty() {
            state
                .damaged
                .retain(|&frame, _| !runs.iter().any(|run| (run.first..run.end()).contains(&frame)));
        }
        let latency = &mut state.latency;
        state.waiting.retain(|&frame, since| {
            let is_here = runs.iter().any(|run| (run.first..run.end()).contains(&frame));
            if is_here {
                latency.add(since.elapsed());
            }
            !is_here
        });
    }

    /// A frame's pages are not what was sent. The source has them as they were: those that are missing are asked for again, whether anybody
    /// waits for them or not, for the source does not send them a second time of its own accord.
    ///
    /// # Errors
    /// They came damaged too often: the guest must not have them, and cannot go on without.
    pub(super) fn damaged(&self, pages: &Pages<'_>) -> Result<(), GuestError> {
        let mut guard = self.lock();
        let state = &mut *guard;
        let mut table = Wishes::default();
        let (mut first, mut count) = (None, 0);
        let (runs, unit) = (pages.data.iter().chain(pages.zero), self.unit);
        for frame in runs.flat_map(|run| (run.first..run.end()).step_by(unit as usize)) {
            if !state.missing.contains(frame) {
                continue;
            }
            (first, count) = (first.or(Some(frame)), count + unit);
            // Before another one is remembered: one frame may name all of memory.
            if state.damaged.len() >= MOST_DAMAGED_AT_ONCE && !state.damaged.contains_key(&frame) {
                return Err(GuestError::new(format!(
                    "more than {MOST_DAMAGED_AT_ONCE} late pages were damaged on their way and have not come right since"
                )));
            }
            let times = state.damaged.entry(frame).or_default();
            *times += 1;
            if *times >= MOST_DAMAGED {
                return Err(GuestError::new(format!(
                    "page {frame:#x} was damaged on its way {times} times, or one that was sent with it"
                )));
            }
            let page = FrameRun {
                first: frame,
                count: unit,
            };
            state.asked.insert(page);
            let is_waited_for = state.waiting.contains_key(&frame);
            table.add(page, if is_waited_for { Wish::Touched } else { Wish::Beside });
        }
        let Some(first) = first else { return Ok(()) };
        tracing::warn!(
            first,
            count,
            "what came late is not what was sent, and is asked for again"
        );
        state.sent_again += count;
        // Between sessions there is nobody to ask: the next one begins with all that is missing.
        if let Some(asking) = &mut state.asking {
            asking.ask(&table.sorted());
        }
        Ok(())
    }

    /// How many pages are missing.
    pub(super) fn left(&self) -> u64 {
        self.lock().left
    }

    /// The last page is here: nobody waits for one any more.
    pub(super) fn finish(&self) -> Result<(), GuestError> {
        // Before it: a page that is touched from here on is zero, as in any memory.
        self.over.store(true, Ordering::Release);
        self.pages.end()?;
        let mut state = self.lock();
        state.outcome = Some(LateOutcome {
            pages: self.total,
            latency: state.latency.clone(),
            round_trip: state.round_trip,
            verified: self.is_verified.then_some(self.total),
            sent_again: state.sent_again,
            took: self.began.elapsed(),
        });
        Ok(())
    }

    pub(super) fn fail(&self, reason: String) {
        tracing::error!(reason, "late pages cannot be taken in any more");
        self.over.store(true, Ordering::Release);
        // The first reason is the one that counts.
        let _ = self.failure.set(reason);
        if let Some(asking) = self.lock().asking.take() {
            asking.sockets.cut();
        }
    }
}

impl State {
    /// Adds a page that somebody waits for, and its neighbours, unless they were asked for.
    fn wish(&mut self, frame: u64, (shape, unit): (&MemoryShape, u64), table: &mut Wishes) {
        if self.asking.is_none() {
            // The next session begins with all that is waited for.
            return;
        }
        let Some((region, _)) = shape.locate(frame) else { return };
        let region = shape.regions()[region].run();
        let near = NEIGHBOURHOOD.max(unit);
        let first = (frame - frame % near).max(region.first);
        let end = (frame - frame % near + near).min(region.end());
        for near in (first..end).step_by(unit as usize) {
            let page = FrameRun {
                first: near,
                count: unit,
            };
            let is_touched = near == frame;
            // What came along with another is on its way; what was pushed may be far behind.
            if self.missing.contains(near) && !self.asked.contains(near) {
                self.asked.insert(page);
                table.add(page, if is_touched { Wish::Touched } else { Wish::Beside });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::Region;

    /// Memory that nobody looks at.
    struct Untouched;

    impl AbsentPages for Untouched {
        fn touched(&self, _: Duration, _: &mut Vec<u64>) -> Result<(), GuestError> {
            Ok(())
        }
        fn supply(&self, _: &[FrameRun], _: &[u8]) -> Result<(), GuestError> {
            Ok(())
        }
        fn supply_zeroes(&self, _: FrameRun) -> Result<(), GuestError> {
            Ok(())
        }
        fn end(&self) -> Result<(), GuestError> {
            Ok(())
        }
        fn make_huge(&self, _: FrameRun) -> Result<bool, GuestError> {
            Ok(false)
        }
    }

    #[test]
    fn a_damaged_frame_of_all_memory_is_not_remembered_page_by_page() {
        let all = FrameRun {
            first: 0,
            count: 1 << 20,
        };
        let shape = MemoryShape::new(vec![Region {
            start_frame: all.first,
            frames: all.count,
        }])
        .unwrap();
        let mut missing = PageSet::new(&shape);
        missing.insert(all);
        let shared = Shared::new(Box::new(Untouched), missing, (shape, 1), Sums::Told);
        let frame = Pages {
            round: 0,
            data: &[],
            delta: &[],
            zero: &[all],
            overhead: 0,
            payload: 0,
            block: None,
            sum: Some(1),
        };
        assert!(shared.damaged(&frame).is_err());
        assert_eq!(shared.lock().damaged.len(), MOST_DAMAGED_AT_ONCE);
    }
}
