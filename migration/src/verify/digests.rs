//! One side's digests of a guest's pages, and the sums of its ranges.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use crate::PageSet;
use crate::guest::{FRAME_SIZE, FRAMES_PER_HUGE_PAGE, FrameRun, GuestError, GuestMemory, MemoryShape};
use crate::verify::Ranges;

/// The digests of pages that were sent or received, and the sum of each range, which follows them. Threads note pages at the same time.
///
/// What is kept of a page is what it adds to its range's sum: its digest mixed with its number, so that two pages that changed places are noticed. Sums are
/// over 64 bits: two ranges that differ in any way add up to the same with a chance of one to 2^64.
///
/// Relaxed is enough: a page travels at most once in a round, and what tells that a round is sent, or that it is here, orders the rest. Of a peer that
/// sends a page twice at once the sums are still those of what is noted, for each value is exchanged whole.
pub(crate) struct PageDigests {
    shape: MemoryShape,
    ranges: Ranges,
    /// Of each region, its pages in blocks that are there once a page of them was noted.
    blocks: Vec<Vec<Block>>,
    sums: Vec<AtomicU64>,
    /// Pages that hold something.
    pages: AtomicU64,
    /// XXH3 of a page of zeroes.
    zeroes: u64,
}

type Block = OnceLock<Box<[AtomicU64]>>;

/// Blocks that are freed at once: those of 16 MiB.
const FREED_AT_ONCE: usize = 8;

/// More of them are freed after this: by then the guest runs somewhere.
const A_WHILE: Duration = Duration::from_secs(1);

/// Where a guest is handed over they are dropped while it stands still: of 8 GiB freeing them kept a processor busy for milliseconds, which those who hand it over
/// waited for. Nobody waits for the thread that does it later; a process that ends takes it along.
impl Drop for PageDigests {
    fn drop(&mut self) {
        let kept = self.blocks.iter().flatten().filter(|block| block.get().is_some());
        if kept.count() <= FREED_AT_ONCE {
            return;
        }
        let blocks = std::mem::take(&mut self.blocks);
        let free = move || {
            thread::sleep(A_WHILE);
            drop(blocks);
        };
        // Without a thread they are freed at once.
        let _ = thread::Builder::new().name("ferry-free".into()).spawn(free);
    }
}

impl PageDigests {
    /// All memory is zero.
    pub(crate) fn new(shape: &MemoryShape) -> Self {
        let ranges = Ranges::new(shape);
        let blocks = |frames: u64| (0..frames.div_ceil(BLOCK)).map(|_| Block::new()).collect();
        Self {
            blocks: shape.regions().iter().map(|region| blocks(region.frames)).collect(),
            sums: (0..ranges.count()).map(|_| AtomicU64::new(0)).collect(),
            pages: AtomicU64::new(0),
            zeroes: digest_of_zeroes(),
            shape: shape.clone(),
            ranges,
        }
    }

    /// How memory is cut.
    pub(crate) fn ranges(&self) -> &Ranges {
        &self.ranges
    }

    /// Digests the pages of these runs as they are in memory now. `scratch` is kept by the caller to save allocations.
    ///
    /// # Errors
    /// If they cannot be read.
    pub(crate) fn take(
        &self,
        memory: &impl GuestMemory,
        runs: &[FrameRun],
        scratch: &mut Vec<u64>,
    ) -> Result<(), GuestError> {
        for &run in runs {
            scratch.clear();
            memory.page_digests(run, scratch)?;
            self.note(run, scratch);
        }
        Ok(())
    }

    /// Notes the XXH3 of each page of a run inside one region.
    fn note(&self, run: FrameRun, digests: &[u64]) {
        let Some((region, offset)) = self.shape.locate(run.first) else {
            return;
        };
        let frames = (run.first..run.end()).zip(offset..);
        let mut changes = Changes::default();
        for ((frame, offset), &digest) in frames.zip(digests) {
            let block = &self.blocks[region][(offset / BLOCK) as usize];
            let kept = &block.get_or_init(empty_block)[(offset % BLOCK) as usize];
            let now = placed(frame, digest ^ self.zeroes);
            let was = kept.swap(now, Ordering::Relaxed);
            self.change(&mut changes, self.ranges.of(region, offset), was, now);
        }
        self.apply(&changes);
    }

    /// Notes that the pages of a run inside one region are zero.
    pub(crate) fn note_zero(&self, run: FrameRun) {
        let Some((region, offset)) = self.shape.locate(run.first) else {
            return;
        };
        let mut changes = Changes::default();
        let (mut offset, end) = (offset, offset + run.count);
        while offset < end {
            let after = (offset / BLOCK + 1) * BLOCK;
            // Where there is no block they are zero as it is.
            if let Some(block) = self.blocks[region][(offset / BLOCK) as usize].get() {
                for offset in offset..after.min(end) {
                    let was = block[(offset % BLOCK) as usize].swap(0, Ordering::Relaxed);
                    self.change(&mut changes, self.ranges.of(region, offset), was, 0);
                }
            }
            offset = after;
        }
        self.apply(&changes);
    }

    /// Forgets pages that come late: those that were sent of them before are not what they are, and are checked when they come.
    pub(crate) fn leave_out(&self, late: &PageSet) {
        late.runs().for_each(|run| self.note_zero(run));
    }

    /// The sum of each range.
    pub(crate) fn sums(&self) -> Vec<u64> {
        self.sums.iter().map(|sum| sum.load(Ordering::Relaxed)).collect()
    }

    /// How many pages hold something.
    pub(crate) fn pages(&self) -> u64 {
        self.pages.load(Ordering::Relaxed)
    }

    fn change(&self, changes: &mut Changes, range: usize, was: u64, now: u64) {
        if changes.range != range {
            self.apply(changes);
            *changes = Changes {
                range,
                ..Changes::default()
            };
        }
        changes.sum = changes.sum.wrapping_add(now).wrapping_sub(was);
        changes.pages = changes
            .pages
            .wrapping_add(u64::from(now != 0))
            .wrapping_sub(u64::from(was != 0));
    }

    /// Both counters wrap: what is added may stand for what is taken away.
    fn apply(&self, changes: &Changes) {
        if changes.sum != 0 {
            self.sums[changes.range].fetch_add(changes.sum, Ordering::Relaxed);
        }
        if changes.pages != 0 {
            self.pages.fetch_add(changes.pages, Ordering::Relaxed);
        }
    }
}

/// What a run changes in one range: a shared counter is touched once for many pages.
#[derive(Default)]
struct Changes {
    range: usize,
    sum: u64,
    pages: u64,
}

/// Pages in a block: their digests take 4 KiB.
const BLOCK: u64 = FRAMES_PER_HUGE_PAGE;

fn empty_block() -> Box<[AtomicU64]> {
    (0..BLOCK).map(|_| AtomicU64::new(0)).collect()
}

/// XXH3 of a page of zeroes.
pub(super) fn digest_of_zeroes() -> u64 {
    xxhash_rust::xxh3::xxh3_64(&[0; FRAME_SIZE as usize])
}

/// What a page adds to its range's sum; nothing if it is zero. The mixing is that of SplitMix64, which maps 64 bits one to one.
pub(super) fn placed(frame: u64, digest: u64) -> u64 {
    if digest == 0 {
        return 0;
    }
    let mut mixed = digest ^ frame.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::guest::Region;

    const SECOND: u64 = 10_000;

    fn shape() -> MemoryShape {
        let region = |start_frame, frames| Region { start_frame, frames };
        MemoryShape::new(vec![region(5, 3000), region(SECOND, 600)]).unwrap()
    }

    /// What was noted, one page after the other.
    fn noted(pages: &[(u64, u64)]) -> PageDigests {
        let digests = PageDigests::new(&shape());
        for &(frame, content) in pages {
            let page = FrameRun { first: frame, count: 1 };
            match content {
                0 => digests.note_zero(page),
                content => digests.note(page, &[content]),
            }
        }
        digests
    }

    fn frames() -> impl Strategy<Value = u64> {
        prop_oneof![5u64..3005, SECOND..SECOND + 600]
    }

    proptest! {
        #[test]
        fn sums_are_those_of_what_was_noted_last(pages in prop::collection::vec((frames(), 0u64..4), 0..200)) {
            let last: BTreeMap<u64, u64> = pages.iter().copied().collect();
            let once: Vec<(u64, u64)> = last.iter().map(|(&frame, &content)| (frame, content)).collect();
            let (digests, expected) = (noted(&pages), noted(&once));
            prop_assert_eq!(digests.sums(), expected.sums());
            prop_assert_eq!(digests.pages(), once.iter().filter(|(_, content)| *content != 0).count() as u64);
        }

        #[test]
        fn one_page_that_differs_is_in_its_range_and_in_no_other(
            pages in prop::collection::vec((frames(), 1u64..4), 0..50),
            frame in frames(),
        ) {
            let without: Vec<_> = pages.iter().copied().filter(|page| page.0 != frame).collect();
            let with = [without.clone(), vec![(frame, 9)]].concat();
            let (ours, theirs) = (noted(&without), noted(&with));
            let sums = ours.sums().into_iter().zip(theirs.sums());
            let differ: Vec<usize> = sums.enumerate().filter(|(_, (ours, theirs))| ours != theirs).map(|(at, _)| at).collect();
            let (region, offset) = shape().locate(frame).unwrap();
            prop_assert_eq!(differ, [ours.ranges().of(region, offset)]);
        }
    }

    #[test]
    fn two_pages_that_changed_places_are_noticed() {
        assert_ne!(noted(&[(7, 1), (8, 2)]).sums(), noted(&[(7, 2), (8, 1)]).sums());
    }

    #[test]
    fn a_page_of_zeroes_is_as_one_that_nobody_wrote() {
        let zeroes = xxhash_rust::xxh3::xxh3_64(&[0; 4096]);
        let digests = noted(&[(7, 1), (7, zeroes)]);
        assert_eq!((digests.sums(), digests.pages()), (noted(&[]).sums(), 0));
    }

    #[test]
    fn a_run_over_several_ranges_is_as_its_pages() {
        let (whole, single) = (PageDigests::new(&shape()), PageDigests::new(&shape()));
        let contents: Vec<u64> = (1..=2000).collect();
        whole.note(
            FrameRun {
                first: 105,
                count: 2000,
            },
            &contents,
        );
        (105..)
            .zip(&contents)
            .for_each(|(first, &content)| single.note(FrameRun { first, count: 1 }, &[content]));
        assert_eq!(whole.sums(), single.sums());
        whole.note_zero(FrameRun { first: 5, count: 3000 });
        assert_eq!((whole.sums(), whole.pages()), (noted(&[]).sums(), 0));
    }

    #[test]
    fn threads_that_note_the_same_pages_at_once_leave_sums_of_what_is_there() {
        let digests = PageDigests::new(&shape());
        let all = FrameRun { first: 5, count: 3000 };
        std::thread::scope(|scope| {
            for content in 1..=4u64 {
                let digests = &digests;
                scope.spawn(move || (0..20).for_each(|_| digests.note(all, &[content; 3000])));
            }
        });
        digests.note(all, &[7; 3000]);
        let expected = PageDigests::new(&shape());
        expected.note(all, &[7; 3000]);
        assert_eq!((digests.sums(), digests.pages()), (expected.sums(), 3000));
    }
}
