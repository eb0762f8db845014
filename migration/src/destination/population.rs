//! Where huge pages are wanted, and backing them right before their data.
//!
//! Advising everything would turn scattered pages into gigabytes; backing page by page is what makes receiving slow. So
//! a huge page is wanted only where the source has one or at least half of it is populated. The thread that receives the first data for it backs
//! it, whole, and then reads into it.
//!
//! Threads of their own that keep ahead of the data look faster and are not: what they fill with zeroes has left the processor's caches when the data
//! comes, so each page goes through memory once more. Measured with the system calls alone, 1 GiB over loopback, two processors of which somebody keeps
//! one busy: sending, backing and receiving cost 355 ms of processor time this way, 385 to 440 ms with a thread ahead.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::PageSet;
use crate::guest::{FRAMES_PER_HUGE_PAGE, FrameRun, MemoryShape, Population, Region};
use crate::precopy::{for_each_word, word_of, words_for};

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

/// The huge pages that are wanted and not yet backed: a bit each, taken by the receiving thread whose data comes first.
///
/// Relaxed is enough: backing a page twice is harmless, and the memory itself orders what is written there.
pub(super) struct Backing {
    shape: MemoryShape,
    wanted: Vec<Vec<AtomicU64>>,
}

impl Backing {
    /// Nothing is wanted yet.
    pub(super) fn new(shape: &MemoryShape) -> Self {
        let words =
            |region: &Region| (0..words_for(block_in(region, region.run().end() - 1) + 1)).map(|_| AtomicU64::new(0));
        Self {
            shape: shape.clone(),
            wanted: shape.regions().iter().map(|region| words(region).collect()).collect(),
        }
    }

    /// Wants what [`wanted_huge`] found.
    pub(super) fn want(&self, huge: &[FrameRun]) {
        for run in huge {
            if let Some((index, first, end)) = self.blocks(run) {
                for_each_word(first, end, |word, mask| {
                    self.wanted[index][word].fetch_or(mask, Ordering::Relaxed);
                });
            }
        }
    }

    /// Calls `back` with each huge page below `runs` that is wanted and was given to nobody yet. Before their data is read into them.
    ///
    /// # Errors
    /// The first that `back` has.
    pub(super) fn take<E>(&self, runs: &[FrameRun], mut back: impl FnMut(FrameRun) -> Result<(), E>) -> Result<(), E> {
        for run in runs {
            let Some((index, first, end)) = self.blocks(run) else {
                continue;
            };
            for block in first..end {
                let (word, bit) = (&self.wanted[index][word_of(block)], 1 << (block % 64));
                if word.load(Ordering::Relaxed) & bit != 0 && word.fetch_and(!bit, Ordering::Relaxed) & bit != 0 {
                    let region = &self.shape.regions()[index];
                    back(FrameRun {
                        first: (region.start_frame / FRAMES_PER_HUGE_PAGE + block) * FRAMES_PER_HUGE_PAGE,
                        count: FRAMES_PER_HUGE_PAGE,
                    })?;
                }
            }
        }
        Ok(())
    }

    /// The run's region, and the blocks of it that the run touches: from, and to without.
    fn blocks(&self, run: &FrameRun) -> Option<(usize, u64, u64)> {
        let (index, _) = self.shape.locate(run.first)?;
        let region = &self.shape.regions()[index];
        Some((index, block_in(region, run.first), block_in(region, run.end() - 1) + 1))
    }
}

/// In which block of 2 MiB, counted from the one in which its region begins, a frame is.
fn block_in(region: &Region, frame: u64) -> u64 {
    frame / FRAMES_PER_HUGE_PAGE - region.start_frame / FRAMES_PER_HUGE_PAGE
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

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

    fn taken(backing: &Backing, runs: &[FrameRun]) -> Vec<FrameRun> {
        let mut taken = Vec::new();
        let Ok(()) = backing.take(runs, |run| {
            taken.push(run);
            Ok::<(), Infallible>(())
        });
        taken
    }

    #[test]
    fn what_is_wanted_is_given_to_whose_data_comes_first_and_to_nobody_else() {
        let backing = Backing::new(&shape());
        backing.want(&[run(0, 1024), run(1 << 21, 512)]);
        assert_eq!(taken(&backing, &[run(500, 13)]), [run(0, 512), run(512, 512)]);
        assert_eq!(taken(&backing, &[run(0, 512)]), []);
        assert_eq!(
            taken(&backing, &[run(2000, 100), run((1 << 21) + 511, 600)]),
            [run(1 << 21, 512)]
        );
    }

    #[test]
    fn regions_may_begin_and_end_inside_a_huge_page() {
        let region = |start_frame, frames| Region { start_frame, frames };
        let backing = Backing::new(&MemoryShape::new(vec![region(100, 2000), region(5000, 1)]).unwrap());
        backing.want(&[run(512, 1024)]);
        assert_eq!(
            taken(&backing, &[run(100, 2000), run(5000, 1)]),
            [run(512, 512), run(1024, 512)]
        );
        assert_eq!(taken(&backing, &[run(2099, 1)]), []);
    }

    #[test]
    fn one_that_could_not_be_backed_ends_it() {
        let backing = Backing::new(&shape());
        backing.want(&[run(0, 1024)]);
        assert_eq!(backing.take(&[run(0, 1024)], Err), Err(run(0, 512)));
    }
}
