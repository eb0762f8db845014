//! Sets of guest frames: one bit each, per memory region.

use crate::guest::{FrameRun, MemoryShape, Region};

/// A set of frames of one guest: a bitmap per region, one word for 64 frames, bit 0 the lowest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageSet {
    parts: Vec<Part>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Part {
    region: Region,
    words: Vec<u64>,
}

impl PageSet {
    /// The empty set for a guest of this shape.
    #[must_use]
    pub fn new(shape: &MemoryShape) -> Self {
        let part = |&region: &Region| Part {
            region,
            words: vec![0; words_for(region.frames)],
        };
        Self {
            parts: shape.regions().iter().map(part).collect(),
        }
    }

    /// The empty set for the same guest.
    pub(crate) fn emptied(&self) -> Self {
        let part = |part: &Part| Part {
            region: part.region,
            words: vec![0; part.words.len()],
        };
        Self {
            parts: self.parts.iter().map(part).collect(),
        }
    }

    /// Adds a run. What lies outside the guest's memory is left out.
    pub fn insert(&mut self, run: FrameRun) {
        self.for_each_mask(run, |word, mask| *word |= mask);
    }

    /// Takes a run out.
    pub fn remove(&mut self, run: FrameRun) {
        self.for_each_mask(run, |word, mask| *word &= !mask);
    }

    /// Moves the frames of a run to `other`, a set of the same guest, and tells how many there were.
    pub(crate) fn move_to(&mut self, run: FrameRun, other: &mut Self) -> u64 {
        let mut moved = 0;
        let run_end = run.first.saturating_add(run.count);
        for (part, theirs) in self.parts.iter_mut().zip(&mut other.parts) {
            let Region { start_frame, frames } = part.region;
            let (from, to) = (run.first.max(start_frame), run_end.min(start_frame + frames));
            if from < to {
                for_each_word(from - start_frame, to - start_frame, |index, mask| {
                    let found = part.words[index] & mask;
                    part.words[index] &= !found;
                    theirs.words[index] |= found;
                    moved += u64::from(found.count_ones());
                });
            }
        }
        moved
    }

    /// Moves the frames that are in `which`, too, to `other`. All are sets of the same guest.
    pub(crate) fn move_all_to(&mut self, which: &Self, other: &mut Self) {
        for ((part, theirs), moved) in self.parts.iter_mut().zip(&which.parts).zip(&mut other.parts) {
            for ((word, which), moved) in part.words.iter_mut().zip(&theirs.words).zip(&mut moved.words) {
                *moved |= *word & which;
                *word &= !which;
            }
        }
    }

    /// Whether `frame` is in the set.
    #[must_use]
    pub fn contains(&self, frame: u64) -> bool {
        self.parts.iter().any(|part| {
            let Some(offset) = frame.checked_sub(part.region.start_frame) else {
                return false;
            };
            offset < part.region.frames && part.words[word_of(offset)] >> (offset % 64) & 1 == 1
        })
    }

    /// The index of the region that holds `frame`, and the frame's offset in it.
    pub(crate) fn locate(&self, frame: u64) -> Option<(usize, u64)> {
        self.parts.iter().enumerate().find_map(|(index, part)| {
            let offset = frame.checked_sub(part.region.start_frame)?;
            (offset < part.region.frames).then_some((index, offset))
        })
    }

    /// How many frames are in the set.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.parts
            .iter()
            .flat_map(|part| &part.words)
            .map(|word| u64::from(word.count_ones()))
            .sum()
    }

    /// How many of `frames` frames, from the one at `offset` into the region with this index on, are in the set.
    pub(crate) fn count_in(&self, index: usize, offset: u64, frames: u64) -> u64 {
        let words = &self.parts[index].words;
        let mut count = 0;
        for_each_word(offset, offset + frames, |word, mask| {
            count += u64::from((words[word] & mask).count_ones())
        });
        count
    }

    /// Of the parts of so many frames each, those with most frames in the set, and how many: the fullest first, so many parts at most.
    #[must_use]
    pub fn busiest(&self, frames: u64, most: usize) -> Vec<(FrameRun, u64)> {
        let in_region = |(index, part): (usize, &Part)| {
            let region = part.region;
            let parts = (0..region.frames.div_ceil(frames)).map(move |number| {
                let offset = number * frames;
                let count = frames.min(region.frames - offset);
                let run = FrameRun {
                    first: region.start_frame + offset,
                    count,
                };
                (run, self.count_in(index, offset, count))
            });
            parts.filter(|&(_, set)| set > 0).collect::<Vec<_>>()
        };
        let mut parts: Vec<_> = self.parts.iter().enumerate().flat_map(in_region).collect();
        parts.sort_by_key(|&(run, set)| (std::cmp::Reverse(set), run.first));
        parts.truncate(most);
        parts
    }

    /// Whether no frame is in the set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.parts.iter().flat_map(|part| &part.words).all(|&word| word == 0)
    }

    /// Takes every frame out.
    pub fn clear(&mut self) {
        self.parts.iter_mut().for_each(|part| part.words.fill(0));
    }

    /// Adds the frames of `other`, a set of the same guest.
    pub fn union_with(&mut self, other: &Self) {
        for (part, theirs) in self.parts.iter_mut().zip(&other.parts) {
            for (word, their_word) in part.words.iter_mut().zip(&theirs.words) {
                *word |= their_word;
            }
        }
    }

    /// Takes the frames of `other` out, a set of the same guest.
    pub fn subtract(&mut self, other: &Self) {
        for (part, theirs) in self.parts.iter_mut().zip(&other.parts) {
            for (word, their_word) in part.words.iter_mut().zip(&theirs.words) {
                *word &= !their_word;
            }
        }
    }

    /// Fills up every unit of so many frames, from a multiple of that on, of which a frame is in the set; as far as its region goes.
    pub(crate) fn round_out(&mut self, unit: u64) {
        if unit == 1 {
            return;
        }
        for part in &mut self.parts {
            let Region { start_frame, frames } = part.region;
            let mut offset = 0;
            while let Some((first, count)) = next_run(&part.words, offset, frames) {
                let before = (start_frame + first) % unit;
                let end = (start_frame + first + count).next_multiple_of(unit) - start_frame;
                offset = end.min(frames);
                for_each_word(first.saturating_sub(before), offset, |index, mask| {
                    part.words[index] |= mask
                });
            }
        }
    }

    /// The runs of the set, ascending, as long as possible within a region.
    pub fn runs(&self) -> impl Iterator<Item = FrameRun> + '_ {
        self.parts.iter().flat_map(|part| {
            let mut offset = 0;
            std::iter::from_fn(move || {
                let (first, count) = next_run(&part.words, offset, part.region.frames)?;
                offset = first + count;
                Some(FrameRun {
                    first: part.region.start_frame + first,
                    count,
                })
            })
        })
    }

    /// How many regions there are.
    #[must_use]
    pub fn regions(&self) -> usize {
        self.parts.len()
    }

    /// The region with this index.
    ///
    /// # Panics
    /// If there is no such region.
    #[must_use]
    pub fn region(&self, index: usize) -> Region {
        self.parts[index].region
    }

    /// The words of the region with this index: bit `i % 64` of word `i / 64` is its frame `i`.
    ///
    /// # Panics
    /// If there is no such region.
    #[must_use]
    pub fn words(&self, index: usize) -> &[u64] {
        &self.parts[index].words
    }

    /// Adds the frames of a bitmap of the region with this index, laid out as [`PageSet::words`]. Bits beyond the region
    /// are left out.
    ///
    /// # Panics
    /// If there is no such region.
    pub fn insert_words(&mut self, index: usize, words: &[u64]) {
        let part = &mut self.parts[index];
        for (word, theirs) in part.words.iter_mut().zip(words) {
            *word |= theirs;
        }
        let tail = part.region.frames % 64;
        if tail != 0
            && let Some(last) = part.words.last_mut()
        {
            *last &= (1 << tail) - 1;
        }
    }

    fn for_each_mask(&mut self, run: FrameRun, mut apply: impl FnMut(&mut u64, u64)) {
        let run_end = run.first.saturating_add(run.count);
        for part in &mut self.parts {
            let region_end = part.region.start_frame + part.region.frames;
            let (from, to) = (run.first.max(part.region.start_frame), run_end.min(region_end));
            if from < to {
                let start = part.region.start_frame;
                for_each_word(from - start, to - start, |index, mask| {
                    apply(&mut part.words[index], mask)
                });
            }
        }
    }
}

/// The first run of set bits at or after `offset`: its offset and length.
pub(crate) fn next_run(words: &[u64], offset: u64, frames: u64) -> Option<(u64, u64)> {
    let first = next_bit(words, offset, frames, 0)?;
    let end = next_bit(words, first, frames, u64::MAX).unwrap_or(frames);
    Some((first, end - first))
}

/// The first bit at or after `offset` that is set once each word was xor-ed with `flip`.
fn next_bit(words: &[u64], offset: u64, frames: u64, flip: u64) -> Option<u64> {
    if offset >= frames {
        return None;
    }
    let start = word_of(offset);
    let mut word = (words[start] ^ flip) & (u64::MAX << (offset % 64));
    let mut index = start;
    while word == 0 {
        index += 1;
        word = words.get(index)? ^ flip;
    }
    let found = (index as u64) * 64 + u64::from(word.trailing_zeros());
    (found < frames).then_some(found)
}

/// Calls `apply` with each word index and the bits of `from..to` in it.
pub(crate) fn for_each_word(from: u64, to: u64, mut apply: impl FnMut(usize, u64)) {
    let mut offset = from;
    while offset < to {
        let bits = (64 - offset % 64).min(to - offset);
        let ones = if bits == 64 { u64::MAX } else { (1 << bits) - 1 };
        apply(word_of(offset), ones << (offset % 64));
        offset += bits;
    }
}

pub(crate) fn words_for(frames: u64) -> usize {
    word_of(frames.div_ceil(64) * 64)
}

pub(crate) fn word_of(offset: u64) -> usize {
    usize::try_from(offset / 64).expect("a bitmap of guest memory fits the address space")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn shape() -> MemoryShape {
        MemoryShape::new(vec![
            Region {
                start_frame: 3,
                frames: 130,
            },
            Region {
                start_frame: 200,
                frames: 77,
            },
        ])
        .unwrap()
    }

    fn runs() -> impl Strategy<Value = Vec<FrameRun>> {
        prop::collection::vec(
            (0u64..300, 0u64..90).prop_map(|(first, count)| FrameRun { first, count }),
            0..12,
        )
    }

    fn model(runs: &[FrameRun]) -> BTreeSet<u64> {
        let shape = shape();
        let inside = |frame: &u64| shape.locate(*frame).is_some();
        runs.iter()
            .flat_map(|run| run.first..run.end())
            .filter(inside)
            .collect()
    }

    fn set(runs: &[FrameRun]) -> PageSet {
        let mut set = PageSet::new(&shape());
        runs.iter().for_each(|&run| set.insert(run));
        set
    }

    fn frames(set: &PageSet) -> Vec<u64> {
        set.runs().flat_map(|run| run.first..run.end()).collect()
    }

    #[test]
    fn the_fullest_parts_come_first() {
        let run = |first, count| FrameRun { first, count };
        // Parts of 64 from each region's begin: 3 to 67, 67 to 131, the last two of the first region, and 200 to 264, 264 to 277.
        let set = set(&[run(3, 5), run(70, 20), run(200, 20), run(270, 1)]);
        let found = set.busiest(64, 3);
        assert_eq!(found, [(run(67, 64), 20), (run(200, 64), 20), (run(3, 64), 5)]);
        assert_eq!(PageSet::new(&shape()).busiest(64, 3), []);
    }

    proptest! {
        #[test]
        fn inserted_frames_come_out_once_and_ascending(runs in runs()) {
            let set = set(&runs);
            let expected = model(&runs);
            prop_assert_eq!(set.count(), expected.len() as u64);
            prop_assert_eq!(set.is_empty(), expected.is_empty());
            prop_assert!((0..320).all(|frame| set.contains(frame) == expected.contains(&frame)));
            prop_assert_eq!(frames(&set), expected.into_iter().collect::<Vec<_>>());
        }

        #[test]
        fn rounded_out_units_are_full_where_they_were_begun(runs in runs(), unit in prop_oneof![Just(1u64), Just(8), Just(64), Just(512)]) {
            let mut rounded = set(&runs);
            rounded.round_out(unit);
            let begun: BTreeSet<(usize, u64)> = model(&runs)
                .into_iter()
                .map(|frame| (shape().locate(frame).unwrap().0, frame / unit))
                .collect();
            for frame in 0..320 {
                let expected = shape().locate(frame).is_some_and(|(region, _)| begun.contains(&(region, frame / unit)));
                prop_assert_eq!(rounded.contains(frame), expected, "{}", frame);
            }
        }

        #[test]
        fn union_and_remove_are_those_of_sets(left in runs(), right in runs()) {
            let mut union = set(&left);
            union.union_with(&set(&right));
            let expected: Vec<u64> = model(&left).union(&model(&right)).copied().collect();
            prop_assert_eq!(frames(&union), expected);

            let (mut difference, mut at_once) = (set(&left), set(&left));
            right.iter().for_each(|&run| difference.remove(run));
            at_once.subtract(&set(&right));
            let expected: Vec<u64> = model(&left).difference(&model(&right)).copied().collect();
            prop_assert_eq!(frames(&difference), expected);
            prop_assert_eq!(at_once, difference);
        }

        #[test]
        fn moved_frames_are_in_the_other_set(left in runs(), right in runs()) {
            let (mut rest, mut moved) = (set(&left), set(&[]));
            let count: u64 = right.iter().map(|&run| rest.move_to(run, &mut moved)).sum();
            let expected: Vec<u64> = model(&left).intersection(&model(&right)).copied().collect();
            prop_assert_eq!(count, expected.len() as u64);
            prop_assert_eq!(frames(&moved), expected);
            let expected: Vec<u64> = model(&left).difference(&model(&right)).copied().collect();
            prop_assert_eq!(frames(&rest), expected);
        }

        #[test]
        fn words_carry_a_set_over(runs in runs()) {
            let original = set(&runs);
            let mut copy = PageSet::new(&shape());
            (0..original.regions()).for_each(|index| copy.insert_words(index, original.words(index)));
            prop_assert_eq!(copy, original);
        }
    }

    #[test]
    fn bits_beyond_a_region_are_left_out() {
        let mut set = PageSet::new(&shape());
        set.insert_words(0, &[u64::MAX; 3]);
        assert_eq!(set.count(), 130);
    }
}
