//! Where huge pages are wanted, and backing them ahead of the data.
//!
//! Advising everything would turn scattered pages into gigabytes; backing page by page is what makes receiving slow. So
//! a huge page is wanted only where the source has one or at least half of it is populated, and those are populated in
//! large pieces by a thread or two that keep a bounded way ahead of what arrives, on other processors than the threads that receive it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::thread::sched_getcpu;

use crate::PageSet;
use crate::guest::{FRAMES_PER_HUGE_PAGE, FrameRun, GuestError, GuestMemory, MemoryShape, Population};
use crate::placement::{Place, Placement};

/// Frames backed by one call: 2 MiB.
const PIECE_FRAMES: u64 = FRAMES_PER_HUGE_PAGE;

/// A rest after each piece, of which one takes 250 to 500 us: filling huge pages with zeroes never waits for anything, so a vCPU on the same processor
/// would get it back at the scheduler's next tick only, 4 ms later. Measured on two processors of which a guest keeps one busy, moves of 1 GiB
/// in 7 or 8 runs each. Wherever the scheduler put it, this thread stayed beside the receiving ones: 530 to 545 ms, and the guest's largest gap 5.9 to
/// 6.5 ms. Kept off their processors with a rest of 20 us: 481 ms and 5.7 ms; with this rest: 452 ms and 3.5 ms; with a rest of 500 us after each 8 MiB:
/// 515 ms and 3.4 ms.
const BETWEEN_PIECES: Duration = Duration::from_micros(200);

/// How far ahead of the data memory is backed, in frames: 256 MiB.
const LEAD_FRAMES: u64 = 64 << 10;

/// The runs below which huge pages are wanted: whole huge pages, ascending, neighbours merged.
pub(super) fn wanted_huge(population: &Population, shape: &MemoryShape) -> Vec<FrameRun> {
    let mut populated = PageSet::new(shape);
    population.populated.iter().for_each(|&run| populated.insert(run));
    let mut huge = PageSet::new(shape);
    population.huge.iter().for_each(|&run| huge.insert(run));

    let mut wanted: Vec<FrameRun> = Vec::new();
    for (index, region) in shape.regions().iter().enumerate() {
        let first = region.start_frame.next_multiple_of(FRAMES_PER_HUGE_PAGE);
        let whole = |first: &u64| first + FRAMES_PER_HUGE_PAGE <= region.run().end();
        let starts = std::iter::successors(Some(first), |first| Some(first + FRAMES_PER_HUGE_PAGE)).take_while(whole);
        for start in starts {
            let offset = start - region.start_frame;
            let half = FRAMES_PER_HUGE_PAGE / 2;
            if populated.count_in(index, offset, FRAMES_PER_HUGE_PAGE) < half
                && huge.count_in(index, offset, FRAMES_PER_HUGE_PAGE) < half
            {
                continue;
            }
            match wanted.last_mut() {
                Some(last) if last.end() == start && start != region.start_frame => last.count += FRAMES_PER_HUGE_PAGE,
                _ => wanted.push(FrameRun {
                    first: start,
                    count: FRAMES_PER_HUGE_PAGE,
                }),
            }
        }
    }
    wanted
}

/// The populating threads' plan, and how far the data has come.
#[derive(Default)]
pub(super) struct Ahead {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// What is still to be backed: ascending, the next one last.
    pieces: Vec<FrameRun>,
    /// Given out and not yet reached by the data: ascending.
    ahead: VecDeque<FrameRun>,
    /// The data has reached this frame.
    reached: u64,
    /// The processor on which each stream was received last.
    receivers: BTreeMap<u16, usize>,
    closed: bool,
}

impl State {
    /// The next piece, unless enough is backed ahead of the data.
    fn next(&mut self) -> Option<FrameRun> {
        let reached = self.reached;
        while self.ahead.front().is_some_and(|piece| piece.end() <= reached) {
            self.ahead.pop_front();
        }
        while self.pieces.last().is_some_and(|piece| piece.end() <= reached) {
            self.pieces.pop();
        }
        let lead: u64 = self.ahead.iter().map(|piece| piece.count).sum();
        let piece = self.pieces.pop_if(|_| lead < LEAD_FRAMES)?;
        self.ahead.push_back(piece);
        Some(piece)
    }
}

impl Ahead {
    /// Gives the threads their plan.
    pub(super) fn plan(&self, wanted: &[FrameRun]) {
        let pieces_of = |run: &FrameRun| {
            let run = *run;
            (0..run.count.div_ceil(PIECE_FRAMES)).map(move |index| {
                let first = run.first + index * PIECE_FRAMES;
                FrameRun {
                    first,
                    count: PIECE_FRAMES.min(run.end() - first),
                }
            })
        };
        let mut pieces: Vec<FrameRun> = wanted.iter().flat_map(pieces_of).collect();
        pieces.reverse();
        self.lock().pieces = pieces;
        self.changed.notify_all();
    }

    /// Notes that data up to `frame` arrived on this stream. Called by the thread that receives it.
    pub(super) fn reached(&self, frame: u64, stream: u16) {
        let mut state = self.lock();
        state.receivers.insert(stream, sched_getcpu());
        if frame > state.reached {
            state.reached = frame;
            if !state.pieces.is_empty() {
                drop(state);
                self.changed.notify_all();
            }
        }
    }

    /// Ends the threads.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    /// Backs memory ahead of the data until closed.
    ///
    /// # Errors
    /// If the host has no memory; the receiving threads would learn the same by faulting.
    pub(super) fn populate(&self, memory: &impl GuestMemory) -> Result<(), GuestError> {
        // Receiving and filling are two halves of the same work: on one processor neither is ahead of the other.
        let receivers = Placement::default();
        let mut place = Place::new(&receivers);
        while let Some((piece, processors)) = self.next() {
            receivers.taken(processors);
            place.set(true);
            memory.populate(piece)?;
            thread::sleep(BETWEEN_PIECES);
        }
        Ok(())
    }

    /// Waits for the next piece within the lead, and says where the receiving threads are; what the data has passed already backs itself.
    fn next(&self) -> Option<(FrameRun, Vec<usize>)> {
        let mut state = self.lock();
        loop {
            if state.closed {
                return None;
            }
            if let Some(piece) = state.next() {
                let mut processors: Vec<usize> = state.receivers.values().copied().collect();
                processors.sort_unstable();
                processors.dedup();
                return Some((piece, processors));
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::Region;

    fn shape() -> MemoryShape {
        let regions = vec![
            Region {
                start_frame: 0,
                frames: 1 << 20,
            },
            Region {
                start_frame: 1 << 21,
                frames: 1 << 20,
            },
        ];
        MemoryShape::new(regions).unwrap()
    }

    fn run(first: u64, count: u64) -> FrameRun {
        FrameRun { first, count }
    }

    #[test]
    fn huge_pages_are_wanted_where_half_is_populated_or_the_source_has_one() {
        let population = Population {
            populated: vec![run(0, 256), run(512, 255), run(1024, 600), run(2048, 512)],
            huge: vec![run(4096, 512)],
        };
        assert_eq!(
            wanted_huge(&population, &shape()),
            [run(0, 512), run(1024, 512), run(2048, 512), run(4096, 512)]
        );
    }

    #[test]
    fn neighbours_are_merged_but_never_across_regions() {
        let shape = MemoryShape::new(vec![
            Region {
                start_frame: 0,
                frames: 1024,
            },
            Region {
                start_frame: 1024,
                frames: 1000,
            },
        ])
        .unwrap();
        let population = Population {
            populated: vec![run(0, 1024), run(1024, 1000)],
            huge: Vec::new(),
        };
        assert_eq!(wanted_huge(&population, &shape), [run(0, 1024), run(1024, 512)]);
    }

    #[test]
    fn backing_keeps_a_bounded_lead_and_leaps_over_holes() {
        let ahead = Ahead::default();
        ahead.plan(&[run(0, LEAD_FRAMES), run(1 << 21, 2 * PIECE_FRAMES)]);
        let mut state = ahead.lock();
        let lead = std::iter::from_fn(|| state.next())
            .map(|piece| piece.count)
            .sum::<u64>();
        assert_eq!(lead, LEAD_FRAMES);
        drop(state);
        ahead.reached(PIECE_FRAMES, 0);
        assert_eq!(ahead.lock().next(), Some(run(1 << 21, PIECE_FRAMES)));
        assert_eq!(ahead.lock().next(), None);
    }

    #[test]
    fn what_the_data_has_passed_is_not_backed_any_more() {
        let ahead = Ahead::default();
        ahead.plan(&[run(0, 4 * PIECE_FRAMES)]);
        ahead.reached(3 * PIECE_FRAMES, 0);
        let (piece, _) = ahead.next().unwrap();
        assert_eq!(piece, run(3 * PIECE_FRAMES, PIECE_FRAMES));
        ahead.close();
        assert_eq!(ahead.next(), None);
    }

    #[test]
    fn where_the_data_is_received_is_known_with_each_piece() {
        let ahead = Ahead::default();
        ahead.plan(&[run(0, 4 * PIECE_FRAMES)]);
        assert_eq!(ahead.next().unwrap().1, []);
        ahead.reached(1, 0);
        ahead.reached(1, 1);
        let allowed = rustix::thread::sched_getaffinity(None).unwrap();
        let processors = ahead.next().unwrap().1;
        // This thread may have been moved between the two.
        assert!((1..=2).contains(&processors.len()), "{processors:?}");
        assert!(
            processors.iter().all(|&processor| allowed.is_set(processor)),
            "{processors:?}"
        );
    }
}
