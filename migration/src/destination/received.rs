//! Sets of frames that the receiving threads add to: those that may hold something, because a page told to be zero is written only if it may
//! hold something else; and those of the open round that came whole.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::PageSet;
use crate::guest::{FrameRun, MemoryShape};
use crate::precopy::{for_each_word, word_of, words_for};

/// One bit for each frame, set by the receiving threads.
///
/// Relaxed is enough: a frame travels at most once in a round, and the barrier between two rounds orders them.
pub(super) struct Received {
    shape: MemoryShape,
    parts: Vec<Vec<AtomicU64>>,
}

impl Received {
    pub(super) fn new(shape: &MemoryShape) -> Self {
        let part = |frames| (0..words_for(frames)).map(|_| AtomicU64::new(0)).collect();
        let parts = shape.regions().iter().map(|region| part(region.frames)).collect();
        Self {
            shape: shape.clone(),
            parts,
        }
    }

    /// Notes that the frames of `run`, inside one region, hold something.
    pub(super) fn insert(&self, run: FrameRun) {
        let Some((part, offset)) = self.shape.locate(run.first) else {
            return;
        };
        let words = &self.parts[part];
        for_each_word(offset, offset + run.count, |index, mask| {
            words[index].fetch_or(mask, Ordering::Relaxed);
        });
    }

    /// Whether all of `run`, inside one region, is in it.
    pub(super) fn contains(&self, run: FrameRun) -> bool {
        let Some((part, offset)) = self.shape.locate(run.first) else {
            return false;
        };
        let (words, mut all) = (&self.parts[part], true);
        for_each_word(offset, offset + run.count, |index, mask| {
            all &= words[index].load(Ordering::Relaxed) & mask == mask;
        });
        all
    }

    /// Takes every frame out. No receiving thread is at work.
    pub(super) fn clear(&self) {
        let words = self.parts.iter().flatten();
        words.for_each(|word| word.store(0, Ordering::Relaxed));
    }

    /// The frames as they are now.
    pub(super) fn to_set(&self) -> PageSet {
        let mut set = PageSet::new(&self.shape);
        for (index, part) in self.parts.iter().enumerate() {
            let words: Vec<u64> = part.iter().map(|word| word.load(Ordering::Relaxed)).collect();
            set.insert_words(index, &words);
        }
        set
    }

    /// Calls `each` with the longest runs of received frames inside `run`, which lies inside one region.
    pub(super) fn runs_in<E>(&self, run: FrameRun, mut each: impl FnMut(FrameRun) -> Result<(), E>) -> Result<(), E> {
        let Some((part, offset)) = self.shape.locate(run.first) else {
            return Ok(());
        };
        let words = &self.parts[part];
        let is_set = |frame: u64| {
            let offset = offset + (frame - run.first);
            words[word_of(offset)].load(Ordering::Relaxed) >> (offset % 64) & 1 == 1
        };
        let mut frame = run.first;
        while frame < run.end() {
            let first = frame;
            let found = is_set(first);
            while frame < run.end() && is_set(frame) == found {
                frame += 1;
            }
            if found {
                each(FrameRun {
                    first,
                    count: frame - first,
                })?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;
    use crate::guest::Region;

    fn run(first: u64, count: u64) -> FrameRun {
        FrameRun { first, count }
    }

    fn found(received: &Received, within: FrameRun) -> Vec<FrameRun> {
        let mut runs = Vec::new();
        let Ok(()) = received.runs_in(within, |run| {
            runs.push(run);
            Ok::<(), Infallible>(())
        });
        runs
    }

    #[test]
    fn runs_of_received_frames_are_found_inside_a_window() {
        let regions = vec![
            Region {
                start_frame: 10,
                frames: 200,
            },
            Region {
                start_frame: 1000,
                frames: 70,
            },
        ];
        let received = Received::new(&MemoryShape::new(regions).unwrap());
        received.insert(run(60, 100));
        received.insert(run(1069, 1));
        assert_eq!(found(&received, run(10, 200)), [run(60, 100)]);
        assert!(received.contains(run(60, 100)) && received.contains(run(1069, 1)));
        assert!(!received.contains(run(59, 2)) && !received.contains(run(100, 61)) && !received.contains(run(1068, 2)));
        assert_eq!(found(&received, run(50, 20)), [run(60, 10)]);
        assert_eq!(found(&received, run(1000, 70)), [run(1069, 1)]);
        assert_eq!(found(&received, run(170, 20)), []);
        assert_eq!(
            received.to_set().runs().collect::<Vec<_>>(),
            [run(60, 100), run(1069, 1)]
        );
        received.clear();
        assert!(received.to_set().is_empty());
    }
}
