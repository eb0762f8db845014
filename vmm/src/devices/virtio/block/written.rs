//! Which blocks of a disk its guest has written, for whoever copies the disk meanwhile.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use crate::memory::word_mask;

/// Bytes of a block: one frame, so that disks and memory are counted alike.
const BLOCK: u64 = 4096;

/// A bitmap of written blocks. Clones are handles of the same bitmap.
///
/// A block is marked once its write is done, successful or not: whoever takes the mark and then reads finds what was written. A write
/// that is under way when tracking starts is marked too.
#[derive(Debug, Clone)]
pub struct WrittenBlocks(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    blocks: u64,
    tracking: AtomicBool,
    /// Made when it is first needed: most disks are never copied.
    words: OnceLock<Vec<AtomicU64>>,
}

impl WrittenBlocks {
    /// None written, nothing tracked, of a disk of so many bytes.
    pub(crate) fn new(bytes: u64) -> Self {
        Self(Arc::new(Inner {
            blocks: bytes.div_ceil(BLOCK),
            tracking: AtomicBool::new(false),
            words: OnceLock::new(),
        }))
    }

    /// How many blocks of 4 KiB the disk has, the last one perhaps not whole.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.0.blocks
    }

    /// Begins to track. What is read of the disk from now on is as it is, or marked.
    pub fn start(&self) {
        let words = self.words();
        words.iter().for_each(|word| word.store(0, Ordering::Relaxed));
        self.0.tracking.store(true, Ordering::SeqCst);
    }

    /// Ends it.
    pub fn stop(&self) {
        self.0.tracking.store(false, Ordering::SeqCst);
    }

    /// Takes what was marked since the last call: bit `i % 64` of word `i / 64` is block `i`.
    #[must_use]
    pub fn take(&self) -> Vec<u64> {
        let take = |word: &AtomicU64| match word.load(Ordering::Acquire) {
            0 => 0,
            _ => word.swap(0, Ordering::AcqRel),
        };
        self.words().iter().map(take).collect()
    }

    /// Notes that these bytes were written.
    pub(super) fn mark(&self, offset: u64, len: u64) {
        if len == 0 || !self.0.tracking.load(Ordering::SeqCst) {
            return;
        }
        let (start, end) = (offset / BLOCK, (offset + len).div_ceil(BLOCK));
        for index in start / 64..end.div_ceil(64) {
            if let Some(word) = self.words().get(index as usize) {
                word.fetch_or(word_mask(index, start, end), Ordering::AcqRel);
            }
        }
    }

    fn words(&self) -> &[AtomicU64] {
        let words = || (0..self.0.blocks.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        self.0.words.get_or_init(words)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_marked_whole_and_taken_once() {
        let written = WrittenBlocks::new(100 * BLOCK + 512);
        written.mark(0, BLOCK);
        written.start();
        written.mark(63 * BLOCK + 4095, 2);
        written.mark(100 * BLOCK, 512);
        assert_eq!(written.take(), [1 << 63, 1 | 1 << 36]);
        assert_eq!(written.take(), [0, 0]);
        written.stop();
        written.mark(0, 1);
        assert_eq!(written.take(), [0, 0]);
    }
}
