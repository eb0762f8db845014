//! Pages that are sent again travel as what they have changed since they were sent last.
//!
//! The source keeps copies of pages as it sent them, from the second time on: most pages travel once, and a copy of each would be a second guest. What
//! is sent of such a page the next time is the page xor its copy. That is mostly zeroes, of which a compressor leaves next to nothing. The
//! destination has that copy in the guest's memory.
//!
//! For this to be right, a copy is what the destination holds, to the bit. So what goes into the copies is what is sent, and not what the guest's memory
//! holds a moment later; a page that is told to be zero has none; and where it is not known what is there (a link was lost, what arrived
//! differs) all are forgotten. The barrier between two rounds has a page arrive before what is told of it next.
//!
//! The idea is XBZRLE's (P. Svärd et al., "Evaluation of Delta Compression Techniques for Efficient Live Migration of Large Virtual Machines", VEE'11);
//! instead of a code of its own for stretches of zeroes it has the formats that are here anyway.

use std::collections::HashMap;
use std::ops::RangeInclusive;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::GuestIs;
use crate::guest::{FRAME_SIZE, FrameRun, GuestMemory};

/// Bytes of a page.
pub(super) const PAGE: usize = FRAME_SIZE as usize;

/// A page of which more words changed than this is sent as it is: a half of 512.
const NEAR_WORDS: usize = 256;

/// Copies are kept for a quarter of the guest's memory, within these bounds, in pages: 64 to 256 MiB. A host that has no such memory to spare has none for
/// the guest's next one either.
const SHARE: u64 = 4;
const BOUNDS: RangeInclusive<u64> = (64 << 20) / FRAME_SIZE..=(256 << 20) / FRAME_SIZE;

/// Parts that threads do not wait for each other in; each has pages that follow each other by this many.
const SHARDS: u64 = 64;

/// A copy of a page that was in none of so many rounds makes room for another one. Small rounds of a guest that writes everywhere have a page rarely, and what
/// is given up for another one is wanted next.
const STALE_AFTER: u32 = 32;

/// Stale ones are looked for in one of so many rounds.
const SWEPT_EVERY: u32 = 8;

/// How much memory a guest has, and where: its disks, of whose blocks no copies are kept, come after that.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Extent {
    pub(crate) pages: u64,
    pub(crate) end: u64,
}

impl Extent {
    pub(crate) fn of(memory: &impl GuestMemory) -> Self {
        let end = memory.disks_begin();
        let regions = memory.shape().regions().iter();
        let regions = regions.filter(|region| region.start_frame < end);
        Self {
            pages: regions.map(|region| region.frames).sum(),
            end,
        }
    }
}

/// Of how many pages copies are kept at most, of a guest with so many.
#[must_use]
pub fn most_copies(pages: u64) -> u64 {
    (pages / SHARE).clamp(*BOUNDS.start(), *BOUNDS.end())
}

/// Copies of pages as they were sent last. Shared by the sending threads of a migration: a page is in one frame of a round.
#[derive(Debug)]
pub(crate) struct SentPages {
    shards: Vec<Mutex<Shard>>,
    /// Pages of a shard.
    most: usize,
    /// The first page of which no copy is kept.
    end: u64,
}

/// Copies lie in blocks of so many pages, 128 KiB: what the allocator gets back is not in the smallest pieces, and goes back to the host in large ones.
const BLOCK: usize = 32;

#[derive(Debug, Default)]
struct Shard {
    copies: HashMap<u64, Copy>,
    blocks: Vec<Box<[u8]>>,
    /// Places in them that are not taken.
    free: Vec<usize>,
    /// The round in which stale ones were looked for last.
    swept: u32,
}

/// Of one page.
#[derive(Clone, Copy, Debug)]
struct Copy {
    /// In which it was sent last.
    round: u32,
    place: usize,
}

impl SentPages {
    /// None yet.
    pub(super) fn new(memory: Extent) -> Self {
        let most = most_copies(memory.pages);
        Self {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            most: most.div_ceil(SHARDS) as usize,
            end: memory.end,
        }
    }

    /// Makes of the pages of `runs`, whose bytes these are, what they have changed where that is little, and keeps copies of all of them. Which of them
    /// are told by what they changed is added to `told`, in runs. Gives back of how many there were copies.
    ///
    /// While the guest stands still there is hardly a next time, and it waits: pages that have no copy get none.
    pub(super) fn take(
        &self,
        runs: &[FrameRun],
        (round, guest): (u32, GuestIs),
        bytes: &mut [u8],
        told: &mut Vec<FrameRun>,
    ) -> u64 {
        let room = (guest == GuestIs::NotWaiting).then_some(self.most);
        let (mut copies, mut pages) = (0, bytes.chunks_exact_mut(PAGE));
        for run in runs.iter().take_while(|run| self.keeps(run.first)) {
            for (page, bytes) in (run.first..run.end()).zip(&mut pages) {
                let taken = self.shard(page).take(page, round, room, bytes);
                copies += u64::from(taken != Taken::New);
                if taken != Taken::Changes {
                    continue;
                }
                match told.last_mut() {
                    // Two runs of a frame may be side by side, where regions are.
                    Some(told) if told.end() == page && page > run.first => told.count += 1,
                    _ => told.push(FrameRun { first: page, count: 1 }),
                }
            }
        }
        copies
    }

    /// Of how many pages copies are kept at most.
    pub(super) fn most(&self) -> u64 {
        self.most as u64 * SHARDS
    }

    /// Whether copies are kept of pages from this one on.
    pub(crate) fn keeps(&self, first: u64) -> bool {
        first < self.end
    }

    /// Makes whole pages of `runs` again, whose bytes these are, of those that were told by what they changed: they are sent as they are after all.
    pub(super) fn put_back(&self, runs: &[FrameRun], bytes: &mut [u8], told: &[FrameRun]) {
        for (page, bytes) in pages(runs).zip(bytes.chunks_exact_mut(PAGE)) {
            if told.iter().any(|run| (run.first..run.end()).contains(&page)) {
                self.shard(page).put_back(page, bytes);
            }
        }
    }

    /// These pages were told to be zero.
    pub(crate) fn forget(&self, run: FrameRun) {
        if !self.keeps(run.first) {
            return;
        }
        for page in pages(&[run]) {
            self.shard(page).forget(page);
        }
    }

    /// Nothing is known of what the destination holds.
    pub(super) fn forget_all(&self) {
        for shard in &self.shards {
            *lock(shard) = Shard::default();
        }
    }

    fn shard(&self, page: u64) -> MutexGuard<'_, Shard> {
        lock(&self.shards[(page % SHARDS) as usize])
    }
}

/// What became of the bytes of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Taken {
    /// There was no copy; they are as they were.
    New,
    /// They are as they were: too much of them is another.
    Whole,
    /// They are what the page changed.
    Changes,
}

impl Shard {
    fn take(&mut self, page: u64, round: u32, room: Option<usize>, bytes: &mut [u8]) -> Taken {
        let Some(copy) = self.copies.get_mut(&page) else {
            if let Some(most) = room {
                self.add(page, round, most, bytes);
            }
            return Taken::New;
        };
        copy.round = round;
        let place = copy.place;
        let before = self.at(place);
        if is_near(before, bytes) {
            swap_for_changes(before, bytes);
            return Taken::Changes;
        }
        before.copy_from_slice(bytes);
        Taken::Whole
    }

    /// Keeps a copy of a page that has none, if there is room for it.
    fn add(&mut self, page: u64, round: u32, most: usize, bytes: &[u8]) {
        if self.copies.len() >= most && self.swept + SWEPT_EVERY <= round {
            self.swept = round;
            self.copies.retain(|_, copy| {
                let is_kept = copy.round + STALE_AFTER > round;
                if !is_kept {
                    self.free.push(copy.place);
                }
                is_kept
            });
        }
        if self.copies.len() >= most {
            return;
        }
        let place = self.free.pop().unwrap_or_else(|| {
            let first = self.blocks.len() * BLOCK;
            self.blocks.push(vec![0; BLOCK * PAGE].into());
            self.free.extend((first + 1..first + BLOCK).rev());
            first
        });
        self.at(place).copy_from_slice(bytes);
        self.copies.insert(page, Copy { round, place });
    }

    fn put_back(&mut self, page: u64, bytes: &mut [u8]) {
        // What was told by its changes has one, and what was sent in this round is neither stale nor forgotten.
        let copy = self
            .copies
            .get(&page)
            .expect("a page that was told by what it changed has a copy");
        let place = copy.place;
        bytes.copy_from_slice(self.at(place));
    }

    fn forget(&mut self, page: u64) {
        if let Some(copy) = self.copies.remove(&page) {
            self.free.push(copy.place);
        }
    }

    fn at(&mut self, place: usize) -> &mut [u8] {
        &mut self.blocks[place / BLOCK][place % BLOCK * PAGE..][..PAGE]
    }
}

/// Whether so few words changed that they are worth telling.
pub(super) fn is_near(before: &[u8], now: &[u8]) -> bool {
    let (before, now) = (before.as_chunks::<8>().0, now.as_chunks::<8>().0);
    let changed = before.iter().zip(now).filter(|(before, now)| before != now).count();
    changed <= NEAR_WORDS
}

/// The copy becomes what is now, and what is now what changed.
fn swap_for_changes(copy: &mut [u8], now: &mut [u8]) {
    for (copy, now) in copy.iter_mut().zip(now) {
        (*copy, *now) = (*now, *copy ^ *now);
    }
}

/// Makes a page of what it was and what changed of it.
pub(crate) fn apply_delta(before: &[u8], changes: &mut [u8]) {
    for (before, changes) in before.iter().zip(changes) {
        *changes ^= before;
    }
}

fn pages(runs: &[FrameRun]) -> impl Iterator<Item = u64> {
    runs.iter().flat_map(|run| run.first..run.end())
}

fn lock(shard: &Mutex<Shard>) -> MutexGuard<'_, Shard> {
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn none() -> SentPages {
        SentPages::new(Extent { pages: 1, end: 1 << 40 })
    }

    fn run(first: u64, count: u64) -> FrameRun {
        FrameRun { first, count }
    }

    fn take(sent: &SentPages, runs: &[FrameRun], round: u32, bytes: &mut [u8]) -> Vec<FrameRun> {
        let mut told = Vec::new();
        sent.take(runs, (round, GuestIs::NotWaiting), bytes, &mut told);
        told
    }

    #[test]
    fn while_the_guest_waits_no_page_gets_a_copy_and_those_that_are_there_go_on() {
        let (sent, runs) = (none(), [run(7, 2)]);
        take(&sent, &[run(7, 1)], 2, &mut [1; PAGE]);
        let mut told = Vec::new();
        let copies = sent.take(&runs, (3, GuestIs::Waiting), &mut [2; 2 * PAGE], &mut told);
        // All of the first one is another, and its copy is what was sent.
        assert_eq!((copies, &told[..]), (1, &[][..]));
        // It was called off.
        assert_eq!(take(&sent, &runs, 4, &mut [2; 2 * PAGE]), [run(7, 1)]);
        assert_eq!(take(&sent, &runs, 5, &mut [2; 2 * PAGE]), runs);
    }

    #[test]
    fn a_page_that_changed_little_is_told_by_that_and_one_that_did_not_is_whole() {
        let sent = none();
        let runs = [run(7, 2), run(100, 1)];
        let mut bytes = vec![1; 3 * PAGE];
        assert_eq!(take(&sent, &runs, 2, &mut bytes), []);
        assert_eq!(bytes, vec![1; 3 * PAGE]);

        // One byte of page 7, a word too many of page 8, nothing of page 100.
        bytes[5] = 3;
        bytes[PAGE..PAGE + 8 * (NEAR_WORDS + 1)].fill(9);
        let whole = bytes.clone();
        assert_eq!(take(&sent, &runs, 3, &mut bytes), [run(7, 1), run(100, 1)]);
        let mut changes = vec![0; 3 * PAGE];
        changes[5] = 2;
        changes[PAGE..2 * PAGE].copy_from_slice(&whole[PAGE..2 * PAGE]);
        assert!(bytes == changes);

        // They are sent as they are after all, and that is what is here.
        sent.put_back(&runs, &mut bytes, &[run(7, 1), run(100, 1)]);
        assert!(bytes == whole);
        assert_eq!(take(&sent, &runs, 4, &mut bytes), [run(7, 2), run(100, 1)]);
        assert!(bytes.iter().all(|&byte| byte == 0));
    }

    #[test]
    fn a_page_that_was_told_to_be_zero_is_told_whole() {
        let sent = none();
        take(&sent, &[run(7, 2)], 2, &mut [1; 2 * PAGE]);
        sent.forget(run(8, 1));
        assert_eq!(take(&sent, &[run(7, 2)], 3, &mut [1; 2 * PAGE]), [run(7, 1)]);
        sent.forget_all();
        assert_eq!(take(&sent, &[run(7, 2)], 4, &mut [1; 2 * PAGE]), []);
    }

    #[test]
    fn of_blocks_of_disks_no_copies_are_kept() {
        let (sent, runs) = (none(), [run((1 << 40) - 1, 1), run(1 << 40, 2)]);
        for told in [&[][..], &runs[..1]] {
            assert_eq!(take(&sent, &runs, 2, &mut [1; 3 * PAGE]), told);
        }
    }

    #[test]
    fn runs_that_are_side_by_side_stay_two() {
        let sent = none();
        let runs = [run(7, 2), run(9, 2)];
        take(&sent, &runs, 2, &mut [1; 4 * PAGE]);
        assert_eq!(take(&sent, &runs, 3, &mut [1; 4 * PAGE]), runs);
    }

    #[test]
    fn there_are_no_more_copies_than_the_bound_and_those_of_hot_pages_stay() {
        let sent = none();
        let (most, kept) = (*BOUNDS.start(), || -> u64 {
            sent.shards.iter().map(|shard| lock(shard).copies.len() as u64).sum()
        });
        let mut page = vec![1; PAGE];
        for number in 0..2 * most {
            take(&sent, &[run(number, 1)], 2, &mut page);
        }
        assert_eq!(kept(), most);
        // Those that were there stay as long as they are written.
        for round in 3..44 {
            for number in [0, 1, 2 * most] {
                let told = take(&sent, &[run(number, 1)], round, &mut vec![1; PAGE]);
                let is_kept = number < 2 || round > 40;
                assert_eq!(!told.is_empty(), is_kept, "page {number} in round {round}");
            }
        }
        assert!(kept() <= most);
    }

    proptest! {
        #[test]
        fn what_is_told_makes_what_was_meant(
            rounds in prop::collection::vec(prop::collection::vec((0usize..3 * PAGE, any::<u8>()), 0..400), 1..8)
        ) {
            let (sent, runs) = (none(), [run(5, 3)]);
            let (mut memory, mut there) = (vec![7; 3 * PAGE], vec![0; 3 * PAGE]);
            for (round, writes) in (2..).zip(rounds) {
                writes.into_iter().for_each(|(at, byte)| memory[at] = byte);
                let mut bytes = memory.clone();
                let told = take(&sent, &runs, round, &mut bytes);
                for (page, (bytes, there)) in (5..).zip(bytes.chunks_mut(PAGE).zip(there.chunks_mut(PAGE))) {
                    if told.iter().any(|run| (run.first..run.end()).contains(&page)) {
                        apply_delta(there, bytes);
                    }
                    there.copy_from_slice(bytes);
                }
                prop_assert!(there == memory);
            }
        }
    }
}
