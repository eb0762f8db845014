//! What a migration asks of a guest.
//!
//! The engine knows guest memory only as runs of 4 KiB frames and saved state only as bytes, so a fake guest drives
//! all of it and the bytes of a page never pass through its hands: they go from guest memory into a socket and back.
//!
//! Who may call what, and when, at the source:
//!
//! ```text
//! start_tracking ─► ask_for_free_pages ─► populated ─► { fetch_dirty ─► rearm range ─► zero_pages, send }* ─► stop ─► export ─► fetch_dirty ─► send ─► release_disks ─► GO
//!                                                           ▲                           settle_disks           │
//!                                                           └──────────────────── resume ◄─────────────────────┘  (called off before GO)
//! end_free_pages: before the first fetch_dirty, and on every way out
//! ```

use std::error::Error;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::PageSet;

/// Bytes in a frame: the unit in which memory is tracked and sent.
pub const FRAME_SIZE: u64 = 4096;

/// Frames in a huge page of 2 MiB.
pub const FRAMES_PER_HUGE_PAGE: u64 = 512;

/// Consecutive guest frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FrameRun {
    /// Guest frame number of the first one.
    pub first: u64,
    /// How many frames.
    pub count: u64,
}

impl FrameRun {
    /// The frame after the last one.
    #[must_use]
    pub fn end(self) -> u64 {
        self.first + self.count
    }

    /// Whether it is whole units of so many frames, from a multiple of that on.
    #[must_use]
    pub fn is_of_whole(self, unit: u64) -> bool {
        self.first.is_multiple_of(unit) && self.count.is_multiple_of(unit)
    }

    /// The size in bytes.
    #[must_use]
    pub fn bytes(self) -> u64 {
        self.count * FRAME_SIZE
    }
}

/// One stretch of guest memory without holes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Guest frame number of its first frame.
    pub start_frame: u64,
    /// How many frames it has.
    pub frames: u64,
}

impl Region {
    /// The region as a run.
    #[must_use]
    pub fn run(self) -> FrameRun {
        FrameRun {
            first: self.start_frame,
            count: self.frames,
        }
    }
}

/// Why regions do not describe a guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ShapeError {
    /// There is no memory at all.
    #[error("the guest has no memory")]
    Empty,
    /// A region has no frames, or ends beyond the last frame that an address can name.
    #[error("memory region {0} is empty or too long")]
    Size(usize),
    /// A region begins before the end of the one before it.
    #[error("memory region {0} overlaps or precedes the one before it")]
    Order(usize),
}

/// Where a guest has memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryShape {
    regions: Vec<Region>,
}

impl MemoryShape {
    /// A shape of these regions, ascending and apart from each other.
    ///
    /// # Errors
    /// Names the first region that is empty, too long, or out of order.
    pub fn new(regions: Vec<Region>) -> Result<Self, ShapeError> {
        if regions.is_empty() {
            return Err(ShapeError::Empty);
        }
        let mut end = 0;
        for (index, region) in regions.iter().enumerate() {
            let limit = u64::MAX / FRAME_SIZE;
            if region.frames == 0 || region.start_frame > limit || region.frames > limit - region.start_frame {
                return Err(ShapeError::Size(index));
            }
            if region.start_frame < end {
                return Err(ShapeError::Order(index));
            }
            end = region.start_frame + region.frames;
        }
        Ok(Self { regions })
    }

    /// The regions, ascending.
    #[must_use]
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// How many frames there are in all.
    #[must_use]
    pub fn frames(&self) -> u64 {
        self.regions.iter().map(|region| region.frames).sum()
    }

    /// Whether all of `run` lies inside one region. Any numbers may be asked for.
    #[must_use]
    pub fn contains(&self, run: FrameRun) -> bool {
        run.count > 0
            && self
                .locate(run.first)
                .is_some_and(|(region, offset)| run.count <= self.regions[region].frames - offset)
    }

    /// The index of the region that holds `frame`, and the frame's offset in it.
    #[must_use]
    pub fn locate(&self, frame: u64) -> Option<(usize, u64)> {
        let after = self.regions.partition_point(|region| region.start_frame <= frame);
        let index = after.checked_sub(1)?;
        let offset = frame - self.regions[index].start_frame;
        (offset < self.regions[index].frames).then_some((index, offset))
    }
}

/// What the source host has ever populated of a guest's memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Population {
    /// Frames that hold something: present or swapped out, not the shared zero page. Ascending, inside regions.
    pub populated: Vec<FrameRun>,
    /// Frames that huge pages back. Ascending, inside regions.
    pub huge: Vec<FrameRun>,
}

/// Something that the guest's own side failed to do. The message is the cause's.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct GuestError(Box<dyn Error + Send + Sync>);

impl GuestError {
    /// Wraps the cause.
    pub fn new(cause: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self(cause.into())
    }

    /// What [`GuestMemory::send`] and [`GuestMemory::receive`] fail with when it is the guest's side that failed, and not the socket:
    /// another connection would be no help.
    #[must_use]
    pub fn in_transfer(self) -> io::Error {
        io::Error::other(self)
    }

    /// Takes apart what a transfer failed with: the guest's side, or else the socket.
    pub(crate) fn of_transfer(error: io::Error) -> Result<Self, io::Error> {
        error.downcast()
    }
}

/// How a guest ended by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestEnd {
    /// It switched itself off.
    PoweredOff,
    /// It announced a panic.
    Panicked,
    /// It cannot run on: a triple fault, an error inside KVM, a vCPU thread that failed. In words.
    Crashed(String),
}

/// What a look at the running guest found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestCondition {
    /// It runs (or is paused by its user). A reset is carried out by the guest's side, and what it loads is dirty.
    Alive,
    /// It ended.
    Ended(GuestEnd),
}

/// What [`SourceGuest::resume`] returns the guest to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestWas {
    /// Its vCPUs ran.
    Running,
    /// Its user had paused it: vCPUs stay stopped.
    PausedByUser,
}

/// How long the parts of a stop took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StopTimes {
    /// Until every vCPU stood still with its pending exit finished.
    pub pause: Duration,
    /// Until the devices had no request in flight.
    pub drain: Duration,
}

/// How long what the guest wrote to disks that are copied waited, so that the copy got ahead of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskWaits {
    /// Writes that did, those behind them not counted.
    pub count: u64,
    /// The longest.
    pub longest: Duration,
    /// All of them together.
    pub total: Duration,
}

/// Whether what the guest wrote to its disks is where its destination will read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskCondition {
    /// All of it but what [`SourceGuest::stop`] can bring there within a few milliseconds.
    Settled,
    /// Some of it is on the way.
    Settling,
}

/// Which vCPUs are kept from running, so that the guest writes less.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Throttled {
    /// None.
    None,
    /// All of them: nothing tells which of them write.
    All,
    /// Those that write, so many.
    Writers(usize),
}

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

    /// Writes `prefix` and then the bytes of `runs` to a blocking stream socket, all of it.
    ///
    /// # Errors
    /// The socket's error, or [`GuestError::in_transfer`].
    fn send(&self, socket: BorrowedFd<'_>, prefix: &[u8], runs: &[FrameRun]) -> io::Result<()>;

    /// These pages of a round were sent, or told to be zero: of disks, that makes room for further writes.
    ///
    /// [`SourceGuest::hold_back_disk_writes`] tells how much.
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

/// Re-arms tracking range by range; each sending thread may call it.
pub trait DirtyClearer: Clone + Send {
    /// Makes the frames of `run` that are set in `dirty` be reported again when they are next written.
    ///
    /// `run` begins a multiple of 64 frames into its region and is a multiple of 64 long or ends with the region; bit
    /// `i % 64` of word `i / 64` is frame `run.first + i`. Called right before these frames are read.
    ///
    /// # Errors
    /// If tracking fails; the migration ends.
    fn rearm(&self, run: FrameRun, dirty: &[u64]) -> Result<(), GuestError>;
}

/// Pages that a running guest says are free, in its own time.
pub trait FreePages: Send + Sync {
    /// Appends what it said since this was called last. Each of these frames was free at some time after [`SourceGuest::ask_for_free_pages`] was
    /// called; it may be in use again. Any numbers may come, and frames several times.
    fn take(&self, found: &mut Vec<FrameRun>);
}

/// A guest that may leave this host.
pub trait SourceGuest: Send {
    /// Its memory.
    type Memory: GuestMemory;
    /// Its tracking, range by range.
    type Clearer: DirtyClearer;

    /// Its memory, for the sending threads.
    fn memory(&self) -> Arc<Self::Memory>;

    /// What a destination must offer (CPUID, TSC, devices …), encoded for [`DestinationGuest::check`].
    fn profile(&self) -> Vec<u8>;

    /// Begins to track writes. Called before [`SourceGuest::populated`], so that no write falls between.
    ///
    /// # Errors
    /// If the host cannot track.
    fn start_tracking(&mut self) -> Result<(), GuestError>;

    /// Asks the guest which of its pages are free; what it answers is taken while it is copied, and nobody waits for it. Called right after
    /// [`SourceGuest::start_tracking`], so that whatever is written to a page after it was named is tracked. None if nobody can be asked.
    fn ask_for_free_pages(&mut self) -> Option<Arc<dyn FreePages>> {
        None
    }

    /// Nothing is asked any more: pages that the guest has kept unused for this are its own again. Called as often as one likes, whether it was
    /// asked or not; a guest that stands still learns of it when it runs again, here or at its destination.
    fn end_free_pages(&mut self) {}

    /// Looks up what the host has ever populated.
    ///
    /// # Errors
    /// If the host cannot tell.
    fn populated(&self) -> Result<Population, GuestError>;

    /// Adds every frame written since tracking began, or since it was last re-armed, to `dirty`. Fetching need not
    /// re-arm, and a frame fetched once need not be given again before it was re-armed and written.
    ///
    /// # Errors
    /// If tracking fails.
    fn fetch_dirty(&mut self, dirty: &mut PageSet) -> Result<(), GuestError>;

    /// How many pages each vCPU has been found to have written so far, pages that it wrote again counted again; none where nothing tells them
    /// apart.
    fn written_by_vcpu(&self) -> Option<Vec<u64>> {
        None
    }

    /// Has the guest's writes to disks that are copied wait where they would make more blocks dirty than are to be left: so many of all disks together with
    /// each fetch, and a share of what is [sent](GuestMemory::sent) meanwhile. A disk is slower then, and nothing else. `None`: nothing waits any more, as after
    /// [`SourceGuest::stop_tracking`].
    fn hold_back_disk_writes(&mut self, _blocks: Option<u64>) {}

    /// How long writes waited for that since tracking began.
    fn disk_waits(&self) -> DiskWaits {
        DiskWaits::default()
    }

    /// The handle with which senders re-arm.
    fn clearer(&self) -> Self::Clearer;

    /// Ends tracking, and leaves the vCPUs alone. Called once on every way out but GO.
    fn stop_tracking(&mut self);

    /// Keeps the vCPUs that write from running for so many percent of the time, 99 at most, in rests that are too short to be noticed as
    /// such. 0 leaves them alone. Called again while it lasts: which of them write may have changed, and a guest that was stopped is
    /// left alone from then on.
    ///
    /// # Errors
    /// If the host cannot; the migration goes on without.
    fn throttle(&mut self, percent: u32) -> Result<Throttled, GuestError>;

    /// Looks after the running guest: carries out a reset, notices its end. Called every 10 ms or more often while it runs,
    /// and once after [`SourceGuest::stop`].
    fn poll(&mut self) -> GuestCondition;

    /// Has this host's page cache of the guest's disks written, so that little of that is left for the blackout. Must not
    /// block: before a switchover is asked for it is called between rounds until the disks are settled, and again before the next.
    fn settle_disks(&mut self) -> DiskCondition {
        DiskCondition::Settled
    }

    /// Stops the vCPUs with their pending exits finished and drains the devices, until `deadline`. A guest whose user
    /// had paused it is drained only, and one that stands still already (a cold move stops it before its first page) stays so.
    ///
    /// # Errors
    /// If it does not stand still in time; [`SourceGuest::resume`] follows.
    fn stop(&mut self, deadline: Instant) -> Result<StopTimes, GuestError>;

    /// The saved state of the stopped guest: an encoded `ferry.state.v1.MachineState`.
    ///
    /// # Errors
    /// If some of it cannot be read; [`SourceGuest::resume`] follows.
    fn export(&mut self) -> Result<Vec<u8>, GuestError>;

    /// A digest of a state that [`SourceGuest::export`] gave, without what time alone changes; only asked for when verifying.
    ///
    /// # Errors
    /// If the state does not parse.
    fn state_digest(&self, state: &[u8]) -> Result<u128, GuestError>;

    /// Lets go of the guest's disks: its destination takes them when it hears GO. Called at most once, after the grant was
    /// traded for GO-sent and before GO is written; a guest that comes back takes them again before it runs.
    fn release_disks(&mut self) {}

    /// Undoes [`SourceGuest::stop`] after the switchover was called off: under the epoch it had, no new right.
    ///
    /// # Errors
    /// If the guest cannot run on: it crashed.
    fn resume(&mut self, was: GuestWas) -> Result<(), GuestError>;
}

/// A machine that waits for a guest.
pub trait DestinationGuest: Send {
    /// Its memory.
    type Memory: GuestMemory;
    /// The machine once restored, paused.
    type Restored: RestoredGuest;

    /// Its memory, never written before: all zero.
    fn memory(&self) -> Arc<Self::Memory>;

    /// Why the guest with this profile cannot run here, one reason by name each; empty if it can.
    fn check(&self, profile: &[u8]) -> Vec<String>;

    /// Builds the paused machine from the saved state; its memory is complete, or what is missing of it is awaited.
    ///
    /// # Errors
    /// If a unit is unknown, missing or does not fit. Half a machine never exists.
    fn restore(self, state: &[u8]) -> Result<Self::Restored, GuestError>;
}

/// A machine that holds the guest and has not run it yet.
pub trait RestoredGuest: Send {
    /// The digest of its state as it would be exported now, without what time alone changes; only asked for when verifying.
    ///
    /// # Errors
    /// If the state cannot be read.
    fn state_digest(&self) -> Result<u128, GuestError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(regions: &[(u64, u64)]) -> Result<MemoryShape, ShapeError> {
        MemoryShape::new(
            regions
                .iter()
                .map(|&(start_frame, frames)| Region { start_frame, frames })
                .collect(),
        )
    }

    #[test]
    fn a_run_lies_inside_one_region_or_outside_the_shape() {
        let shape = shape(&[(0, 100), (200, 50)]).unwrap();
        assert!(shape.contains(FrameRun { first: 0, count: 100 }));
        assert!(shape.contains(FrameRun { first: 249, count: 1 }));
        assert!(!shape.contains(FrameRun { first: 99, count: 2 }));
        assert!(!shape.contains(FrameRun { first: 150, count: 1 }));
        assert!(!shape.contains(FrameRun { first: 200, count: 0 }));
        assert!(!shape.contains(FrameRun {
            first: u64::MAX,
            count: u64::MAX
        }));
    }

    #[test]
    fn regions_out_of_order_or_too_long_are_named() {
        assert_eq!(shape(&[]), Err(ShapeError::Empty));
        assert_eq!(shape(&[(0, 10), (9, 1)]), Err(ShapeError::Order(1)));
        assert_eq!(shape(&[(0, 10), (u64::MAX, 1)]), Err(ShapeError::Size(1)));
        assert_eq!(shape(&[(0, 0)]), Err(ShapeError::Size(0)));
    }
}
