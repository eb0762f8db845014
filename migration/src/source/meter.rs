//! How far the copy is: what there is to move, what was handed over, what is left, and one number that never runs backwards.
//!
//! The number is the source's and not its agent's: the process that copies outlives agents that restart, so nobody has to
//! remember what was told before.

use crate::PageSet;
use crate::guest::{FRAME_SIZE, GuestMemory, Region};

/// Bytes of one kind, memory or disks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Amounts {
    /// What the guest has of it, whether it was ever written or not.
    pub total: u64,
    /// Handed to the streams so far, told to be zero or left out as free included; what was dirtied again counts again.
    pub processed: u64,
    /// Known to be still due: of the round that is being sent, or what the guest had written when the last one ended.
    pub remaining: u64,
}

/// How far a copy is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Copied {
    /// The guest's memory.
    pub memory: Amounts,
    /// Its disks whose contents move with it.
    pub disk: Amounts,
    /// How much of the way is behind it, 0 to [`MOST_BEFORE_THE_END`]: that it is over is for others to say. Never smaller than it was.
    pub percent: u32,
}

/// The most that a copy says of itself.
pub const MOST_BEFORE_THE_END: u32 = 99;

/// What the first pass over everything counts; the rest is how little is left after a round.
const FIRST_PASS: u32 = 80;

/// Pages of each kind.
#[derive(Clone, Copy, Debug, Default)]
struct Pages {
    memory: u64,
    disk: u64,
}

impl Pages {
    fn all(self) -> u64 {
        self.memory + self.disk
    }
}

/// Keeps count of one copy.
#[derive(Debug)]
pub(super) struct Meter {
    /// Regions of disks, by index.
    disks: Vec<(usize, Region)>,
    /// What the first pass has to send.
    first: u64,
    is_first: bool,
    /// What the rounds before this one sent.
    sent: Pages,
    /// What this round is to send, in the order in which it goes.
    round: Vec<Pages>,
    copied: Copied,
}

impl Meter {
    /// Nothing was sent yet of `pending`, the first pass.
    pub(super) fn new(memory: &impl GuestMemory, pending: &PageSet) -> Self {
        let regions = memory.shape().regions().iter().copied().enumerate();
        let disks: Vec<_> = regions.filter(|&(_, region)| memory.is_disk(region)).collect();
        let disk_frames: u64 = disks.iter().map(|(_, region)| region.frames).sum();
        let mut copied = Copied::default();
        copied.memory.total = (memory.shape().frames() - disk_frames) * FRAME_SIZE;
        copied.disk.total = disk_frames * FRAME_SIZE;
        let mut meter = Self {
            disks,
            first: pending.count(),
            is_first: true,
            sent: Pages::default(),
            round: Vec::new(),
            copied,
        };
        let due = meter.split(pending, meter.first);
        meter.leaves(due);
        meter
    }

    pub(super) fn copied(&self) -> Copied {
        self.copied
    }

    /// A round of these sets, in this order, begins. Tells how many pages it has.
    pub(super) fn round_begins(&mut self, sets: &[PageSet]) -> u64 {
        self.round = sets.iter().map(|set| self.split(set, set.count())).collect();
        let pages = self.round().all();
        self.is_at(pages);
        pages
    }

    /// So many pages of the round were not given out yet. Within a set they ascend, and disks come after memory.
    pub(super) fn is_at(&mut self, left: u64) {
        let left = left.min(self.round().all());
        let (mut due, mut unseen) = (Pages::default(), left);
        for set in self.round.iter().rev() {
            let of_set = unseen.min(set.all());
            let disk = of_set.min(set.disk);
            due.memory += of_set - disk;
            due.disk += disk;
            unseen -= of_set;
        }
        self.leaves(due);
        if self.is_first && self.first > 0 {
            self.reaches(FIRST_PASS, self.first.saturating_sub(left));
        }
    }

    /// The round is at the destination, and the guest had dirtied this set, of so many pages, by then.
    pub(super) fn round_ends(&mut self, dirty: &PageSet, pages: u64) {
        let due = self.split(dirty, pages);
        self.ends(due);
    }

    /// The link was lost in the round: what was handed to it counts as processed, and what of that is sent again counts again.
    pub(super) fn round_is_cut(&mut self) {
        let left = |amounts: &Amounts| amounts.remaining / FRAME_SIZE;
        let (memory, disk) = (left(&self.copied.memory), left(&self.copied.disk));
        let round = self.round();
        self.sent.memory += round.memory.saturating_sub(memory);
        self.sent.disk += round.disk.saturating_sub(disk);
        self.round.clear();
    }

    /// The round that was sent while the guest stood still is over: nothing is due any more.
    pub(super) fn last_round_ends(&mut self) {
        self.ends(Pages::default());
    }

    fn ends(&mut self, due: Pages) {
        self.is_at(0);
        let round = self.round();
        self.sent.memory += round.memory;
        self.sent.disk += round.disk;
        self.round.clear();
        self.is_first = false;
        self.leaves(due);
        self.copied.percent = self.copied.percent.max(FIRST_PASS);
        self.reaches(MOST_BEFORE_THE_END, self.first.saturating_sub(due.all()));
    }

    /// So much of the first pass's size counts towards `whole`; before it, what the phases before this one came to.
    fn reaches(&mut self, whole: u32, pages: u64) {
        let from = if self.is_first { 0 } else { FIRST_PASS };
        let share = if self.first == 0 {
            1.0
        } else {
            pages as f64 / self.first as f64
        };
        let percent = from + (f64::from(whole - from) * share.min(1.0)) as u32;
        self.copied.percent = self.copied.percent.max(percent);
    }

    fn leaves(&mut self, due: Pages) {
        let sent = |sent: u64, round: u64, due: u64| (sent + round.saturating_sub(due)) * FRAME_SIZE;
        let round = self.round();
        let (memory, disk) = (&mut self.copied.memory, &mut self.copied.disk);
        memory.processed = sent(self.sent.memory, round.memory, due.memory);
        disk.processed = sent(self.sent.disk, round.disk, due.disk);
        (memory.remaining, disk.remaining) = (due.memory * FRAME_SIZE, due.disk * FRAME_SIZE);
    }

    /// What this round is to send.
    fn round(&self) -> Pages {
        let plus = |sum: Pages, set: &Pages| Pages {
            memory: sum.memory + set.memory,
            disk: sum.disk + set.disk,
        };
        self.round.iter().fold(Pages::default(), plus)
    }

    fn split(&self, set: &PageSet, pages: u64) -> Pages {
        let in_region = |&(index, region): &(usize, Region)| set.count_in(index, 0, region.frames);
        let disk = self.disks.iter().map(in_region).sum();
        Pages {
            memory: pages - disk,
            disk,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::os::fd::BorrowedFd;

    use proptest::prelude::*;

    use super::*;
    use crate::guest::{FrameRun, GuestError, MemoryShape};

    const MEMORY: u64 = 1024;
    const DISK: u64 = 512;

    /// A guest of which nothing but the shape is asked.
    struct Shape(MemoryShape);

    impl GuestMemory for Shape {
        fn shape(&self) -> &MemoryShape {
            &self.0
        }
        fn is_disk(&self, region: Region) -> bool {
            region.start_frame >= MEMORY
        }
        fn send(&self, _: BorrowedFd<'_>, _: &[u8], _: &[FrameRun]) -> io::Result<()> {
            Err(io::ErrorKind::Unsupported.into())
        }
        fn receive(&self, _: BorrowedFd<'_>, _: &[FrameRun]) -> io::Result<()> {
            Err(io::ErrorKind::Unsupported.into())
        }
        fn read_pages(&self, _: &[FrameRun], _: &mut [u8]) -> Result<(), GuestError> {
            Ok(())
        }
        fn write_pages(&self, _: &[FrameRun], _: &[u8]) -> Result<(), GuestError> {
            Ok(())
        }
        fn zero_pages(&self, _: FrameRun, _: &mut Vec<FrameRun>) -> Result<(), GuestError> {
            Ok(())
        }
        fn write_zeroes(&self, _: FrameRun) -> Result<(), GuestError> {
            Ok(())
        }
        fn digest(&self, _: FrameRun) -> Result<u128, GuestError> {
            Ok(0)
        }
        fn page_digests(&self, _: FrameRun, _: &mut Vec<u64>) -> Result<(), GuestError> {
            Ok(())
        }
        fn advise_huge(&self, _: FrameRun) -> Result<(), GuestError> {
            Ok(())
        }
        fn populate(&self, _: FrameRun) -> Result<(), GuestError> {
            Ok(())
        }
    }

    fn shape() -> Shape {
        let region = |start_frame, frames| Region { start_frame, frames };
        Shape(MemoryShape::new(vec![region(0, MEMORY), region(MEMORY, DISK)]).unwrap())
    }

    fn set(memory: u64, disk: u64) -> PageSet {
        let mut set = PageSet::new(shape().shape());
        set.insert(FrameRun {
            first: 0,
            count: memory,
        });
        set.insert(FrameRun {
            first: MEMORY,
            count: disk,
        });
        set
    }

    #[test]
    fn memory_and_disks_are_counted_apart() {
        let pending = set(100, 50);
        let mut meter = Meter::new(&shape(), &pending);
        assert_eq!(meter.copied().memory.total, MEMORY * FRAME_SIZE);
        assert_eq!(meter.copied().disk.total, DISK * FRAME_SIZE);
        meter.round_begins(std::slice::from_ref(&pending));
        meter.is_at(60);
        let copied = meter.copied();
        assert_eq!((copied.memory.processed, copied.memory.remaining), (90 << 12, 10 << 12));
        assert_eq!((copied.disk.processed, copied.disk.remaining), (0, 50 << 12));
        assert_eq!(copied.percent, 48);
        meter.round_ends(&set(30, 0), 30);
        let copied = meter.copied();
        assert_eq!(
            (copied.memory.processed, copied.memory.remaining),
            (100 << 12, 30 << 12)
        );
        assert_eq!((copied.disk.processed, copied.disk.remaining), (50 << 12, 0));
        assert_eq!(copied.percent, 95);
    }

    /// The same in two sets, the second half of each kind first.
    fn parted(memory: u64, disk: u64) -> Vec<PageSet> {
        let (mut first, mut last) = (set(memory, disk), set(0, 0));
        first.move_all_to(&set(memory / 2, disk / 2), &mut last);
        vec![first, last]
    }

    #[test]
    fn of_what_goes_last_memory_still_comes_before_disks() {
        let mut meter = Meter::new(&shape(), &set(100, 50));
        meter.round_begins(&parted(100, 50));
        // All of the first half, and of the second all but these: ten pages of memory, and the disk's.
        meter.is_at(35);
        let copied = meter.copied();
        assert_eq!((copied.memory.remaining, copied.disk.remaining), (10 << 12, 25 << 12));
        meter.is_at(80);
        let copied = meter.copied();
        assert_eq!((copied.memory.remaining, copied.disk.remaining), (50 << 12, 30 << 12));
    }

    #[test]
    fn a_guest_without_a_populated_page_is_there_after_its_first_round() {
        let mut meter = Meter::new(&shape(), &set(0, 0));
        assert_eq!(meter.copied().percent, 0);
        meter.round_ends(&set(0, 0), 0);
        assert_eq!(meter.copied().percent, MOST_BEFORE_THE_END);
    }

    proptest! {
        /// Whatever the guest writes, and whenever one looks.
        #[test]
        fn progress_never_runs_backwards_and_what_was_processed_is_what_was_due(
            rounds in prop::collection::vec((0..=MEMORY, 0..=DISK, prop::collection::vec(0..=MEMORY + DISK, 0..4)), 1..40),
        ) {
            let first = set(rounds[0].0, rounds[0].1);
            let mut meter = Meter::new(&shape(), &first);
            let mut percent = 0;
            let mut sent = 0;
            for (at, (memory, disk, looks)) in rounds.iter().enumerate() {
                let pages = memory + disk;
                meter.round_begins(&parted(*memory, *disk));
                let mut looks = looks.clone();
                looks.sort_unstable_by(|one, other| other.cmp(one));
                for left in looks {
                    meter.is_at(left);
                    let copied = meter.copied();
                    prop_assert!(copied.percent >= percent && copied.percent <= MOST_BEFORE_THE_END);
                    percent = copied.percent;
                    let processed = copied.memory.processed + copied.disk.processed;
                    let remaining = copied.memory.remaining + copied.disk.remaining;
                    prop_assert_eq!(processed + remaining, (sent + pages) * FRAME_SIZE);
                }
                let (memory, disk, _) = rounds.get(at + 1).cloned().unwrap_or_default();
                meter.round_ends(&set(memory, disk), memory + disk);
                sent += pages;
                let copied = meter.copied();
                prop_assert!(copied.percent >= percent.max(FIRST_PASS) && copied.percent <= MOST_BEFORE_THE_END);
                percent = copied.percent;
                prop_assert_eq!(copied.memory.remaining, memory * FRAME_SIZE);
                prop_assert_eq!(copied.disk.remaining, disk * FRAME_SIZE);
            }
        }
    }
}
