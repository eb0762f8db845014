//! What the pages of one frame add up to: what pages that come late are checked by, before anybody sees them.

use crate::guest::{FRAME_SIZE, FrameRun, GuestError, GuestMemory};
use crate::verify::digests::{digest_of_zeroes, placed};

/// Adds up pages as a range's sum does: a page of zeroes adds nothing, the others what their digest and number make. The table that tells which pages
/// a frame has, and which of them are zero, has a checksum of its own.
pub(crate) struct FrameSum {
    zeroes: u64,
    digests: Vec<u64>,
}

impl Default for FrameSum {
    fn default() -> Self {
        Self {
            zeroes: digest_of_zeroes(),
            digests: Vec::new(),
        }
    }
}

impl FrameSum {
    /// Of pages as they are in memory, which nobody writes any more.
    ///
    /// # Errors
    /// If they cannot be read.
    pub(crate) fn of_memory(&mut self, memory: &impl GuestMemory, runs: &[FrameRun]) -> Result<u64, GuestError> {
        self.digests.clear();
        for &run in runs {
            memory.page_digests(run, &mut self.digests)?;
        }
        Ok(self.add_up(runs, self.digests.iter().copied()))
    }

    /// Of pages that came: the bytes of these runs, in their order.
    pub(crate) fn of_bytes(&self, runs: &[FrameRun], bytes: &[u8]) -> u64 {
        let pages = bytes.chunks_exact(FRAME_SIZE as usize);
        self.add_up(runs, pages.map(xxhash_rust::xxh3::xxh3_64))
    }

    fn add_up(&self, runs: &[FrameRun], digests: impl Iterator<Item = u64>) -> u64 {
        let frames = runs.iter().flat_map(|run| run.first..run.end());
        frames
            .zip(digests)
            .map(|(frame, digest)| placed(frame, digest ^ self.zeroes))
            .fold(0, u64::wrapping_add)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RUNS: [FrameRun; 2] = [FrameRun { first: 7, count: 2 }, FrameRun { first: 40, count: 1 }];

    fn pages(contents: [u8; 3]) -> Vec<u8> {
        contents.iter().flat_map(|&byte| [byte; FRAME_SIZE as usize]).collect()
    }

    proptest! {
        #[test]
        fn a_flipped_bit_is_noticed(bit in 0usize..3 * 8 * 4096) {
            let (sum, mut bytes) = (FrameSum::default(), pages([1, 2, 0]));
            let sent = sum.of_bytes(&RUNS, &bytes);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert_ne!(sum.of_bytes(&RUNS, &bytes), sent);
        }
    }

    #[test]
    fn pages_that_changed_places_are_noticed_and_zeroes_add_nothing() {
        let sum = FrameSum::default();
        let of = |contents| sum.of_bytes(&RUNS, &pages(contents));
        assert_ne!(of([1, 2, 0]), of([2, 1, 0]));
        assert_eq!(of([0, 0, 0]), 0);
        assert_eq!(of([1, 2, 0]), sum.of_bytes(&RUNS[..1], &pages([1, 2, 0])[..8192]));
    }
}
