//! What a migration asks of guest memory.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use rustix::thread::sched_yield;

use super::{FrameRun, GuestError, MemoryShape, Region};
use crate::PageSet;

/// Guest memory, shared by every thread of a migration. Runs lie inside one region each; callers check that before.
pub trait GuestMemory: Send + Sync + 'static {
    /// Where there is memory.
    fn shape(&self) -> &MemoryShape;

    /// Whether this region stands for the blocks of a disk, which is told of apart. Such regions come after all memory.
    fn is_disk(&self, _region: Region) -> bool {
        false
    }

    /// The first frame that stands for a disk's block; beyond all frames where there is no disk.
    fn disks_begin(&self) -> u64 {
        let regions = self.shape().regions().iter();
        let mut disks = regions.filter(|&&region| self.is_disk(region));
        disks.next().map_or(u64::MAX, |region| region.start_frame)
    }

    /// Whether this region reads as zero before anything is written to it; if not, what is told to be zero is written in any case.
    fn is_blank(&self, _region: Region) -> bool {
        true
    }

    /// Has the scheduler give the calling thread turns of this length, or its usual ones again: how long somebody who shares its processor waits for it.
    /// False where the host's kernel has only its usual ones.
    ///
    /// # Errors
    /// The system call's.
    fn set_turns(&self, _length: Option<Duration>) -> io::Result<bool> {
        Ok(false)
    }

    /// Lets somebody else have the calling thread's processor who waits for it.
    fn give_way(&self) {
        sched_yield();
    }

    /// Writes `prefix` and then the bytes of `runs` to a blocking stream socket, all of it.
    ///
    /// # Errors
    /// The socket's error, or [`GuestError::in_transfer`].
    fn send(&self, socket: BorrowedFd<'_>, prefix: &[u8], runs: &[FrameRun]) -> io::Result<()>;

    /// These pages of a round were sent, or told to be zero: of disks, that makes room for further writes.
    ///
    /// [`SourceGuest::hold_back_disk_writes`](super::SourceGuest::hold_back_disk_writes) tells how much.
    fn sent(&self, _runs: &[FrameRun]) {}

    /// Reads the bytes of `runs` from a blocking stream socket, all of them.
    ///
    /// # Errors
    /// The socket's error; [`io::ErrorKind::UnexpectedEof`] if it ended before; or [`GuestError::in_transfer`].
    fn receive(&self, socket: BorrowedFd<'_>, runs: &[FrameRun]) -> io::Result<()>;

    /// Copies the bytes of `runs` into `bytes`, which has just room for them, in this order.
    ///
    /// # Errors
    /// If they cannot be read.
    fn read_pages(&self, runs: &[FrameRun], bytes: &mut [u8]) -> Result<(), GuestError>;

    /// Puts `bytes` into the pages of `runs`, all of them in this order, as [`GuestMemory::receive`] does.
    ///
    /// # Errors
    /// If they cannot be written.
    fn write_pages(&self, runs: &[FrameRun], bytes: &[u8]) -> Result<(), GuestError>;

    /// Appends the longest runs of all-zero frames inside `run` to `found`, ascending.
    ///
    /// # Errors
    /// If the memory cannot be read.
    fn zero_pages(&self, run: FrameRun, found: &mut Vec<FrameRun>) -> Result<(), GuestError>;

    /// Makes `run` all zero.
    ///
    /// # Errors
    /// If the memory cannot be written.
    fn write_zeroes(&self, run: FrameRun) -> Result<(), GuestError>;

    /// A digest of the contents of `run`; absent frames count as zero.
    ///
    /// # Errors
    /// If the memory cannot be read.
    fn digest(&self, run: FrameRun) -> Result<u128, GuestError>;

    /// Appends the XXH3 of the bytes of each page of `run` to `digests`: 64 bits, without a seed. All of them are read.
    ///
    /// # Errors
    /// If the memory cannot be read.
    fn page_digests(&self, run: FrameRun, digests: &mut Vec<u64>) -> Result<(), GuestError>;

    /// Asks for huge pages below `run`, which begins and ends on huge page boundaries where its region does.
    ///
    /// # Errors
    /// If the host refuses; memory works all the same.
    fn advise_huge(&self, run: FrameRun) -> Result<(), GuestError>;

    /// Backs `run` with memory without changing its contents.
    ///
    /// # Errors
    /// If the host has no memory left.
    fn populate(&self, run: FrameRun) -> Result<(), GuestError>;

    /// Makes what was received as durable as the guest thinks it is: frames may stand for the blocks of a disk, and what its guest has
    /// flushed at the source must outlast a crash of this host too. Called at each barrier, before it is acknowledged.
    ///
    /// # Errors
    /// If a disk does not take it.
    fn make_durable(&self) -> Result<(), GuestError> {
        Ok(())
    }

    /// Whether its pages could come late: after the machine was restored, when they are touched.
    ///
    /// # Errors
    /// Why not, for a person.
    fn check_late(&self) -> Result<(), GuestError> {
        Err(GuestError::new("its memory cannot be filled while it is in use"))
    }

    /// How many frames of memory can only come late together, from a multiple of that on: those of one page of the host's. Regions of memory begin
    /// and end at such multiples.
    fn late_unit(&self) -> u64 {
        1
    }

    /// Gives up what is in the pages of `missing`, which are whole [units](Self::late_unit); from now on whoever touches one waits until it is supplied. A page that is absent and
    /// not in `missing` is zero, and whoever touches it waits all the same. Nobody else uses the memory yet.
    ///
    /// # Errors
    /// If the host cannot do it.
    fn await_late(&self, _missing: &PageSet) -> Result<Box<dyn AbsentPages>, GuestError> {
        Err(GuestError::new("its memory cannot be filled while it is in use"))
    }
}

/// Memory with pages that whoever touches waits for.
pub trait AbsentPages: Send + Sync {
    /// Waits until pages are touched, `patience` at most, and adds their frames to `frames`: one may come several times.
    ///
    /// # Errors
    /// If the host does not tell: nobody who waits can be helped any more.
    fn touched(&self, patience: Duration, frames: &mut Vec<u64>) -> Result<(), GuestError>;

    /// Supplies the pages of `runs`, whole [units](GuestMemory::late_unit), with `contents`, all of them in this order; those that are there already are left as they are. Contents
    /// are copied, because whoever waits must see all of a page or nothing.
    ///
    /// # Errors
    /// If the host has no memory left.
    fn supply(&self, runs: &[FrameRun], contents: &[u8]) -> Result<(), GuestError>;

    /// Supplies the pages of `run` as zeroes; those that are there already are left as they are.
    ///
    /// # Errors
    /// If the host has no memory left.
    fn supply_zeroes(&self, run: FrameRun) -> Result<(), GuestError>;

    /// Every page that was missing is there: nobody waits for any page from now on.
    ///
    /// # Errors
    /// If the host refuses.
    fn end(&self) -> Result<(), GuestError>;

    /// Has a huge page put below `block`, which is one, after the end: contents stay what they are, and whoever uses them meanwhile may
    /// wait. False where the host has none for it now, somebody holds one of its pages, or most of them are not there any more.
    ///
    /// # Errors
    /// If the host says what it should not.
    fn make_huge(&self, block: FrameRun) -> Result<bool, GuestError>;
}
