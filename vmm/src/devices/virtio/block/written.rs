//! Which blocks of a disk its guest has written, for whoever copies the disk meanwhile.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use super::holding_back::{HoldingBack, WriteWaits};
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
    held_back: HoldingBack,
}

impl WrittenBlocks {
    /// None written, nothing tracked, of a disk of so many bytes.
    ///
    /// # Errors
    /// The process has no descriptors left.
    pub(crate) fn new(bytes: u64) -> io::Result<Self> {
        Ok(Self(Arc::new(Inner {
            blocks: bytes.div_ceil(BLOCK),
            tracking: AtomicBool::new(false),
            words: OnceLock::new(),
            held_back: HoldingBack::new()?,
        })))
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
        self.0.held_back.begin();
    }

    /// Ends it, and holds nothing back any more.
    pub fn stop(&self) {
        self.hold_back(None);
        self.0.tracking.store(false, Ordering::SeqCst);
    }

    /// Has requests that make further blocks dirty wait once so many were since they were taken last, and half as many as were
    /// [`sent`](Self::sent) meanwhile; or none. What waits is still in the guest's queue.
    pub fn hold_back(&self, blocks: Option<u64>) {
        self.0.held_back.allow(blocks, Instant::now());
    }

    /// So many blocks of this disk were sent, and so many pages of anything else.
    pub fn sent(&self, own: u64, others: u64) {
        self.0.held_back.sent(own, others, Instant::now());
    }

    /// How long requests have waited since tracking began.
    #[must_use]
    pub fn waits(&self) -> WriteWaits {
        self.0.held_back.waits(Instant::now())
    }

    /// Takes what was marked since the last call: bit `i % 64` of word `i / 64` is block `i`.
    #[must_use]
    pub fn take(&self) -> Vec<u64> {
        let take = |word: &AtomicU64| match word.load(Ordering::Acquire) {
            0 => 0,
            _ => word.swap(0, Ordering::AcqRel),
        };
        let taken = self.words().iter().map(take).collect();
        self.0.held_back.fetched(Instant::now());
        taken
    }

    /// Whether a request to write these bytes, of which it has any, may be carried out now. If not, it is asked again when the
    /// [bell](Self::bell) rings, or at [`until`](Self::until).
    pub(super) fn admits(&self, mut extents: impl Iterator<Item = (u64, u64)>) -> bool {
        if !self.0.held_back.is_on() {
            return true;
        }
        let blocks = extents.try_fold(0u64, |sum, (offset, len)| {
            sum.checked_add(self.clean_blocks(offset, len))
        });
        self.0.held_back.admits(blocks.unwrap_or(u64::MAX), Instant::now())
    }

    /// What waited is not there any more.
    pub(super) fn nobody_waits(&self) {
        self.0.held_back.nobody_waits(Instant::now());
    }

    /// Readable once what waits may be asked for again.
    pub(super) fn bell(&self) -> BorrowedFd<'_> {
        self.0.held_back.bell()
    }

    /// The bell was heard.
    pub(super) fn heard(&self) {
        self.0.held_back.heard();
    }

    /// Until when what waits does at most.
    pub(super) fn until(&self) -> Option<Instant> {
        self.0.held_back.until()
    }

    /// How many blocks of these bytes are not marked.
    fn clean_blocks(&self, offset: u64, len: u64) -> u64 {
        let (start, end) = (offset / BLOCK, (offset + len).div_ceil(BLOCK));
        let clean = |index: u64| {
            let words = self.words().get(index as usize);
            let marked = words.map_or(u64::MAX, |word| word.load(Ordering::Relaxed));
            u64::from((word_mask(index, start, end) & !marked).count_ones())
        };
        if len == 0 {
            return 0;
        }
        (start / 64..end.div_ceil(64)).map(clean).sum()
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
        let written = WrittenBlocks::new(100 * BLOCK + 512).expect("descriptor");
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
