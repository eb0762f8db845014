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

mod memory;
mod shape;

use std::error::Error;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::PageSet;
pub use memory::{AbsentPages, GuestMemory};
pub use shape::{FRAME_SIZE, FRAMES_PER_HUGE_PAGE, FrameRun, MemoryShape, Population, Region, ShapeError};

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

    /// Begins to track writes. Called before [`SourceGuest::populated`], so that no write falls between. What is populated need not be tracked
    /// before it is re-armed: it counts as written until then, and each of these frames is re-armed before it is read first.
    ///
    /// # Errors
    /// If the host cannot track.
    fn start_tracking(&mut self) -> Result<(), GuestError>;

    /// Asks the guest which of its pages are free; what it answers is taken while it is copied, and nobody waits for it. Called right after
    /// [`SourceGuest::start_tracking`], so that whatever is written to a page after it was named is tracked. None if nobody can be asked, or if
    /// what is populated is not tracked yet: then it would be sent all the same.
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
