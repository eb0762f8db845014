//! A bitmap over guest memory, in the layout of KVM's dirty log.

use super::shape::{FrameRun, MemoryShape, push_run};

/// Which pages were written: one bit per page, one word per 64 pages, one list of words per region.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirtyBitmap {
    regions: Vec<RegionBits>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct RegionBits {
    frames: FrameRun,
    /// Bit `n` of word `w` is frame `frames.first + 64 * w + n`; bits past the end of the region are zero.
    words: Vec<u64>,
}

impl DirtyBitmap {
    /// A bitmap over `shape` in which no page is marked.
    #[must_use]
    pub fn empty(shape: &MemoryShape) -> Self {
        let regions = shape
            .runs()
            .into_iter()
            .map(|frames| RegionBits {
                frames,
                words: vec![0; frames.count.div_ceil(64) as usize],
            })
            .collect();
        Self { regions }
    }

    /// Number of pages that are marked.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.regions
            .iter()
            .flat_map(|region| &region.words)
            .map(|word| u64::from(word.count_ones()))
            .sum()
    }

    /// Whether no page is marked.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.regions
            .iter()
            .all(|region| region.words.iter().all(|word| *word == 0))
    }

    /// Whether the page is marked; pages outside guest memory never are.
    #[must_use]
    pub fn contains(&self, frame: u64) -> bool {
        self.regions.iter().any(|region| {
            frame
                .checked_sub(region.frames.first)
                .filter(|offset| *offset < region.frames.count)
                .is_some_and(|offset| region.words[(offset / 64) as usize] >> (offset % 64) & 1 == 1)
        })
    }

    /// Marks all pages of the run that lie in guest memory.
    pub fn insert(&mut self, run: FrameRun) {
        self.change(run, |word, mask| *word |= mask);
    }

    /// Unmarks all pages of the run.
    pub fn remove(&mut self, run: FrameRun) {
        self.change(run, |word, mask| *word &= !mask);
    }

    /// Marks everything that is marked in `other`, which must be of the same shape.
    ///
    /// # Panics
    ///
    /// If the shapes differ: both sides are made from one machine's memory.
    pub fn merge(&mut self, other: &DirtyBitmap) {
        assert_eq!(self.regions.len(), other.regions.len(), "bitmaps of one machine");
        for (mine, theirs) in self.regions.iter_mut().zip(&other.regions) {
            assert_eq!(mine.frames, theirs.frames, "bitmaps of one machine");
            for (word, more) in mine.words.iter_mut().zip(&theirs.words) {
                *word |= more;
            }
        }
    }

    /// The marked pages as maximal runs in ascending order.
    #[must_use]
    pub fn runs(&self) -> Vec<FrameRun> {
        let mut runs = Vec::new();
        for region in &self.regions {
            region.collect(region.frames, &mut runs);
        }
        runs
    }

    /// The marked pages inside `window`, as maximal runs in ascending order.
    #[must_use]
    pub fn runs_in(&self, window: FrameRun) -> Vec<FrameRun> {
        let mut runs = Vec::new();
        for region in &self.regions {
            if let Some(part) = region.frames.intersection(window) {
                region.collect(part, &mut runs);
            }
        }
        runs
    }

    /// The words of one region, in KVM's layout: bit `i % 64` of word `i / 64` is the region's page `i`.
    ///
    /// # Panics
    ///
    /// If the memory has no such region.
    #[must_use]
    pub fn words(&self, region: usize) -> &[u64] {
        &self.regions[region].words
    }

    /// The words of one region, in KVM's layout, to be filled.
    pub(crate) fn words_mut(&mut self, region: usize) -> &mut [u64] {
        &mut self.regions[region].words
    }

    fn change(&mut self, run: FrameRun, apply: impl Fn(&mut u64, u64)) {
        for region in &mut self.regions {
            let Some(part) = region.frames.intersection(run) else {
                continue;
            };
            let start = part.first - region.frames.first;
            for word in start / 64..=(start + part.count - 1) / 64 {
                apply(
                    &mut region.words[word as usize],
                    word_mask(word, start, start + part.count),
                );
            }
        }
    }
}

impl RegionBits {
    /// Appends the marked runs of `part`, which lies inside this region.
    fn collect(&self, part: FrameRun, runs: &mut Vec<FrameRun>) {
        let start = part.first - self.frames.first;
        let end = start + part.count;
        for index in start / 64..end.div_ceil(64) {
            let mut word = self.words[index as usize] & word_mask(index, start, end);
            while word != 0 {
                let from = word.trailing_zeros();
                let count = (word >> from).trailing_ones();
                push_run(
                    runs,
                    FrameRun {
                        first: self.frames.first + index * 64 + u64::from(from),
                        count: u64::from(count),
                    },
                );
                // A shift by 64 would overflow; a run of 64 ends the word.
                word = match from + count {
                    64 => 0,
                    done => word >> done << done,
                };
            }
        }
    }
}

/// The bits of word `index` that lie in the pages `start..end`, which the word overlaps.
pub(crate) fn word_mask(index: u64, start: u64, end: u64) -> u64 {
    let base = index * 64;
    let low = start.saturating_sub(base).min(64);
    let high = end.saturating_sub(base).min(64);
    let below = |bits: u64| if bits == 64 { u64::MAX } else { (1 << bits) - 1 };
    below(high) & !below(low)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn run_of_a_whole_word_is_found() {
        let mut bitmap = DirtyBitmap::empty(&MemoryShape::from_size(1 << 20));
        bitmap.insert(FrameRun { first: 64, count: 64 });
        assert_eq!(bitmap.runs(), [FrameRun { first: 64, count: 64 }]);
    }

    #[test]
    fn runs_touch_no_page_outside_the_window() {
        let mut bitmap = DirtyBitmap::empty(&MemoryShape::from_size(1 << 20));
        bitmap.insert(FrameRun { first: 10, count: 100 });
        assert_eq!(
            bitmap.runs_in(FrameRun { first: 50, count: 20 }),
            [FrameRun { first: 50, count: 20 }]
        );
    }

    proptest! {
        #[test]
        fn behaves_as_a_set_of_pages(
            steps in proptest::collection::vec((any::<bool>(), 0u64..400, 0u64..200), 0..20),
            window in (0u64..400, 0u64..300),
        ) {
            let shape = MemoryShape::from_size(300 * 4096);
            let mut bitmap = DirtyBitmap::empty(&shape);
            let mut set = BTreeSet::new();
            for (insert, first, count) in steps {
                let run = FrameRun { first, count };
                let pages = (first..first + count).filter(|page| *page < 300);
                if insert {
                    bitmap.insert(run);
                    set.extend(pages);
                } else {
                    bitmap.remove(run);
                    pages.for_each(|page| { set.remove(&page); });
                }
            }
            prop_assert_eq!(bitmap.count(), set.len() as u64);
            prop_assert_eq!(bitmap.is_empty(), set.is_empty());
            prop_assert!((0..500).all(|page| bitmap.contains(page) == set.contains(&page)));
            let window = FrameRun { first: window.0, count: window.1 };
            let inside: Vec<u64> = set.iter().copied().filter(|page| *page >= window.first && *page < window.end()).collect();
            let found: Vec<u64> = bitmap.runs_in(window).iter().flat_map(|run| run.first..run.end()).collect();
            prop_assert_eq!(found, inside);
            let runs = bitmap.runs();
            prop_assert!(runs.windows(2).all(|pair| pair[0].end() < pair[1].first));
        }
    }
}
