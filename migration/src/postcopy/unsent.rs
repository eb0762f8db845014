//! Which pages the source has still to send of its own accord, and in which order.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::PageSet;
use crate::guest::{FrameRun, Region};
use crate::precopy::next_run;

/// Pages of one frame: 1 MiB, so that one that somebody waits for does not wait for long on the same link.
const CHUNK_PAGES: u64 = 256;

/// The most pages of one frame of memory of which so many come together: as many or one unit, so that a table with a run for each of them, or of one
/// unit, has room for their sum.
pub(super) fn chunk_pages(unit: u64) -> u64 {
    CHUNK_PAGES.max(unit)
}

/// What the pushing threads take from and the answering ones take out of.
#[derive(Debug)]
pub(crate) struct Unsent {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// Pages of one frame at most.
    chunk: u64,
    /// None until the destination said what is missing.
    set: Option<PageSet>,
    /// Where the next pages are looked for: region, and offset in it.
    at: (usize, u64),
    closed: bool,
}

impl Unsent {
    /// Nothing is known yet. Frames have so many pages at most.
    pub(crate) fn new(chunk: u64) -> Self {
        Self {
            state: Mutex::new(State {
                chunk,
                set: None,
                at: (0, 0),
                closed: false,
            }),
            changed: Condvar::new(),
        }
    }

    /// All of this set is to be sent, and nothing else.
    pub(crate) fn begin(&self, set: PageSet) {
        let mut state = self.lock();
        (state.set, state.at) = (Some(set), (0, 0));
        self.changed.notify_all();
    }

    /// Sends the pushing threads home.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    /// How many pages were not sent or asked for yet.
    pub(crate) fn left(&self) -> Option<u64> {
        self.lock().set.as_ref().map(PageSet::count)
    }

    /// These were asked for, and are sent by who was asked. The next ones are those behind them: whoever reads one reads on.
    pub(crate) fn asked(&self, runs: &[FrameRun]) {
        let mut state = self.lock();
        let State { set: Some(set), at, .. } = &mut *state else {
            return;
        };
        for &run in runs {
            set.remove(run);
            if let Some((region, offset)) = set.locate(run.first) {
                *at = (region, offset + run.count);
            }
        }
    }

    /// Waits for pages to push, a frame's worth at most, and puts them into `runs`. False once closed.
    pub(crate) fn next(&self, runs: &mut Vec<FrameRun>) -> bool {
        let mut state = self.lock();
        loop {
            if state.closed {
                return false;
            }
            state.take(runs);
            if !runs.is_empty() {
                return true;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The next pages from where it is, round and round; runs of one frame ascend.
    fn take(&mut self, runs: &mut Vec<FrameRun>) {
        runs.clear();
        let Some(set) = &mut self.set else { return };
        let (mut wanted, mut wrapped) = (self.chunk, false);
        loop {
            let (region, mut offset) = self.at;
            if region >= set.regions() {
                self.at = (0, 0);
                if wrapped || !runs.is_empty() {
                    return;
                }
                wrapped = true;
                continue;
            }
            let Region { start_frame, frames } = set.region(region);
            while wanted > 0
                && let Some((first, count)) = next_run(set.words(region), offset, frames)
            {
                let run = FrameRun {
                    first: start_frame + first,
                    count: count.min(wanted),
                };
                set.remove(run);
                runs.push(run);
                wanted -= run.count;
                offset = first + run.count;
            }
            if wanted == 0 {
                self.at = (region, offset);
                return;
            }
            self.at = (region + 1, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::guest::MemoryShape;

    fn set(runs: &[FrameRun]) -> PageSet {
        let region = |start_frame, frames| Region { start_frame, frames };
        let mut set = PageSet::new(&MemoryShape::new(vec![region(0, 3000), region(5000, 3000)]).unwrap());
        runs.iter().for_each(|&run| set.insert(run));
        set
    }

    proptest! {
        #[test]
        fn every_page_is_pushed_once_unless_it_was_asked_for(
            missing in prop::collection::vec((0u64..8000, 1u64..400), 1..12),
            asked in prop::collection::vec((0u64..8000, 1u64..20), 0..12),
        ) {
            let to_runs = |runs: Vec<(u64, u64)>| -> Vec<FrameRun> {
                runs.into_iter().map(|(first, count)| FrameRun { first, count }).collect()
            };
            let (missing, asked) = (set(&to_runs(missing)), to_runs(asked));
            let unsent = Unsent::new(CHUNK_PAGES);
            unsent.begin(missing.clone());
            let (mut pushed, mut awaited) = (set(&[]), set(&[]));
            for run in asked {
                unsent.asked(&[run]);
                awaited.insert(run);
                let mut runs = Vec::new();
                unsent.lock().take(&mut runs);
                prop_assert!(runs.windows(2).all(|pair| pair[0].end() <= pair[1].first));
                prop_assert!(runs.iter().map(|run| run.count).sum::<u64>() <= CHUNK_PAGES);
                runs.iter().for_each(|&run| pushed.insert(run));
            }
            loop {
                let mut runs = Vec::new();
                unsent.lock().take(&mut runs);
                if runs.is_empty() {
                    break;
                }
                for run in runs {
                    prop_assert!((run.first..run.end()).all(|frame| !pushed.contains(frame)));
                    pushed.insert(run);
                }
            }
            for frame in 0..8000 {
                let (is_missing, is_pushed) = (missing.contains(frame), pushed.contains(frame));
                prop_assert!(is_missing || !is_pushed, "{frame} is not missing");
                prop_assert!(!is_missing || is_pushed || awaited.contains(frame), "{frame} never comes");
            }
            prop_assert_eq!(unsent.left(), Some(0));
        }
    }

    #[test]
    fn what_lies_behind_a_page_that_was_asked_for_comes_next() {
        let unsent = Unsent::new(CHUNK_PAGES);
        unsent.begin(set(&[FrameRun { first: 0, count: 3000 }]));
        unsent.asked(&[FrameRun { first: 2000, count: 16 }]);
        let mut runs = Vec::new();
        assert!(unsent.next(&mut runs));
        assert_eq!(runs[0].first, 2016);
    }

    #[test]
    fn nothing_is_pushed_before_it_is_known_or_after_the_end() {
        let unsent = Unsent::new(CHUNK_PAGES);
        assert_eq!(unsent.left(), None);
        unsent.close();
        unsent.begin(set(&[FrameRun { first: 0, count: 1 }]));
        assert!(!unsent.next(&mut Vec::new()));
    }
}
