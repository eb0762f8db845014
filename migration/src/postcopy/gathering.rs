//! Huge pages again, where a guest's pages came late and so one by one.
//!
//! As long as pages are missing, each comes into a small page of its own. Below a block that is whole the kernel can put a huge page again,
//! by copying it: that is done once nobody waits for a page any more, block by block, by a thread that does what nobody waits for. A vCPU
//! that touches memory for the first time may wait for the copy of one block, so the thread rests as long as it worked.

use std::thread;
use std::time::{Duration, Instant};

use crate::PageSet;
use crate::guest::{AbsentPages, FRAMES_PER_HUGE_PAGE, FrameRun, GuestError};
use crate::yielding::stand_back;

/// What became of the blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Gathered {
    /// Huge pages now.
    pub(super) huge: u64,
    /// As they were: the host had no huge page for them, or somebody held one of their pages.
    pub(super) left: u64,
    /// How long it took.
    pub(super) took: Duration,
}

/// The blocks below which huge pages are wanted and pages are missing; `wanted` are whole huge pages.
pub(super) fn blocks(wanted: &[FrameRun], missing: &PageSet) -> Vec<FrameRun> {
    let blocks = wanted.iter().flat_map(|run| {
        let starts = (run.first..run.end()).step_by(FRAMES_PER_HUGE_PAGE as usize);
        starts.map(|first| FrameRun {
            first,
            count: FRAMES_PER_HUGE_PAGE,
        })
    });
    let has_missing = |block: &FrameRun| {
        let place = missing.locate(block.first);
        place.is_some_and(|(region, offset)| missing.count_in(region, offset, block.count) > 0)
    };
    blocks.filter(has_missing).collect()
}

/// Has huge pages put below these blocks. The calling thread gives way to all others, for good.
///
/// # Errors
/// The host cannot do that: nothing is lost by it.
pub(super) fn gather(pages: &dyn AbsentPages, blocks: &[FrameRun]) -> Result<Gathered, GuestError> {
    if !blocks.is_empty() {
        stand_back();
    }
    let (mut gathered, whole) = (Gathered::default(), Instant::now());
    for &block in blocks {
        let began = Instant::now();
        if pages.make_huge(block)? {
            gathered.huge += 1;
        } else {
            gathered.left += 1;
        }
        thread::sleep(began.elapsed());
    }
    gathered.took = whole.elapsed();
    Ok(gathered)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::{MemoryShape, Region};

    #[test]
    fn only_blocks_that_lack_pages_are_gathered() {
        let run = |first, count| FrameRun { first, count };
        let region = |start_frame, frames| Region { start_frame, frames };
        let mut missing = PageSet::new(&MemoryShape::new(vec![region(0, 4096), region(8192, 1024)]).unwrap());
        [run(600, 1), run(1023, 2), run(9000, 10)]
            .into_iter()
            .for_each(|run| missing.insert(run));
        assert_eq!(
            blocks(&[run(0, 2048), run(8192, 1024)], &missing),
            [run(512, 512), run(1024, 512), run(8704, 512)]
        );
        assert_eq!(blocks(&[run(0, 512)], &missing), []);
    }
}
