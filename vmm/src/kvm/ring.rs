//! The dirty ring of one vCPU: memory in which the kernel names the pages that this vCPU wrote (`api.rst`, KVM_CAP_DIRTY_LOG_RING).

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicU32, Ordering};

use kvm_bindings::{KVM_DIRTY_LOG_PAGE_OFFSET, kvm_dirty_gfn};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::memory::PAGE_SIZE;

/// Set by the kernel: the entry names a page.
const ENTRY_DIRTY: u32 = 1;

/// Set by us: the entry was read, its page may be protected again and the entry reused.
const ENTRY_HARVESTED: u32 = 2;

/// One vCPU's ring. Harvested by one thread at a time (`&mut self`); the kernel writes at the other end.
///
/// KVM puts a vCPU out of the guest when its ring is nearly full. Where it does not in time (kvm-pvm makes an entry for every write that it
/// emulates, and looks for room only after a burst of them) the kernel overwrites entries, and from then on does not agree
/// with us about where things are:
///
/// ```text
///   InStep ── every entry in use, or a reset stuck ──► Lost ── found again: `settle`, `regain` ──► Gap ── first new entry ──► InStep
/// ```
#[derive(Debug)]
pub(super) struct DirtyRing {
    entries: NonNull<kvm_dirty_gfn>,
    count: usize,
    /// Where to go on reading; wraps at `count`, a power of two.
    next: usize,
    place: Place,
    /// Counts what may have made room in the ring.
    relieved: u64,
    /// What `relieved` was when the vCPU was last put out of the guest for want of room.
    full_at: Option<u64>,
}

/// How our place in the ring relates to the kernel's two: where it resets next, and where it writes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// We read where the kernel resets next, and all from there to where it writes is new.
    InStep,
    /// Nothing is known.
    Lost,
    /// We read where the kernel resets next; what it wrote is further on, behind entries that are not in use.
    Gap,
}

/// What a look at the ring found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Harvest {
    /// So many entries, and none was lost.
    Complete(usize),
    /// Entries were overwritten before they were read.
    Overrun,
}

/// Half of a ring's entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Half {
    First,
    Second,
}

// SAFETY: the mapping belongs to this value, and `harvest` takes it mutably, so one thread at a time reads it.
unsafe impl Send for DirtyRing {}

impl DirtyRing {
    /// Maps the ring of a vCPU of a VM for which rings of `bytes` bytes were enabled.
    pub(super) fn new(vcpu: BorrowedFd<'_>, bytes: usize) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let address = unsafe {
            mmap(
                null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                vcpu,
                u64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE_SIZE,
            )
        }?;
        Ok(Self {
            entries: NonNull::new(address.cast()).ok_or(io::ErrorKind::OutOfMemory)?,
            count: bytes / size_of::<kvm_dirty_gfn>(),
            next: 0,
            place: Place::InStep,
            relieved: 0,
            full_at: None,
        })
    }

    /// How many entries it has.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// Hands each new entry (slot, page within the slot) to `found` and marks it harvested.
    ///
    /// The pages are protected again, and writes to them noticed again, only after KVM_RESET_DIRTY_RINGS: read no page before that.
    pub(super) fn harvest(&mut self, mut found: impl FnMut(u32, u64)) -> Harvest {
        if self.place == Place::Gap {
            self.cross_gap();
        }
        if self.place == Place::Lost {
            return Harvest::Overrun;
        }
        let mut harvested = 0;
        // At most once around: a guest that dirties as fast as we read must not keep us here.
        while harvested < self.count && self.is_dirty(self.next) {
            let entry = self.entry(self.next);
            // SAFETY: in the mapping; the kernel leaves an entry alone from setting DIRTY until we mark it harvested.
            let (slot, page) = unsafe { ((*entry).slot, (*entry).offset) };
            found(slot, page);
            self.set(self.next, ENTRY_HARVESTED);
            self.next = self.next.wrapping_add(1);
            harvested += 1;
        }
        self.relieved += u64::from(harvested > 0);
        if harvested == self.count {
            self.place = Place::Lost;
            return Harvest::Overrun;
        }
        Harvest::Complete(harvested)
    }

    /// After the reset that followed a harvest: whether it went past everything that was harvested. If not, the kernel had overwritten an
    /// entry after it was read, and pages of the others are not protected again.
    pub(super) fn was_reset(&mut self) -> bool {
        let done = self.flags(self.next.wrapping_sub(1)).load(Ordering::Acquire) & ENTRY_HARVESTED == 0;
        if !done {
            self.place = Place::Lost;
        }
        done
    }

    /// After the reset that followed an overrun: whether it emptied the whole ring and the kernel has written nothing since. Then it
    /// resets next where we read next.
    pub(super) fn settle(&mut self) -> bool {
        let settled = (0..self.count).all(|index| self.flags(index).load(Ordering::Acquire) == 0);
        if settled {
            self.place = Place::Gap;
        }
        settled
    }

    /// Notes that the vCPU was put out of the guest for want of room, and says whether it was so before and nothing has made room since:
    /// the kernel counts entries that we do not see.
    ///
    /// Once is not enough: another thread may have harvested between the exit and this call.
    pub(super) fn is_stuck(&mut self) -> bool {
        self.full_at.replace(self.relieved) == Some(self.relieved)
    }

    /// Begins to find the place again: forgets all entries, then marks half of them harvested.
    ///
    /// Only on the thread of a vCPU that was put out of the guest because its ring is full and [`is_stuck`](Self::is_stuck): the
    /// kernel then writes nothing, and counts more than half of the entries as in use. So a reset, which begins where
    /// the kernel's count does and ends with the half, does not go past what was written.
    pub(super) fn give_up_half(&mut self, half: Half) {
        (0..self.count).for_each(|index| self.set(index, 0));
        self.half(half).for_each(|index| self.set(index, ENTRY_HARVESTED));
    }

    /// After the reset that followed [`give_up_half`](Self::give_up_half): whether the kernel's count was in that half. It is at the
    /// half's end now, and so are we.
    pub(super) fn regain(&mut self, half: Half) -> bool {
        let range = self.half(half);
        let found = self.flags(range.end - 1).load(Ordering::Acquire) & ENTRY_HARVESTED == 0;
        range.clone().for_each(|index| self.set(index, 0));
        if found {
            self.next = range.end;
            self.place = Place::Gap;
            self.relieved += 1;
        }
        found
    }

    /// Goes to the first new entry and has what lies before it reset with the next harvest (which protects pages that old entries name
    /// once more, and that does no harm).
    fn cross_gap(&mut self) {
        // The kernel has come around to us from behind: what it wrote first is overwritten.
        if self.is_dirty(self.next.wrapping_sub(1)) {
            self.place = Place::Lost;
            return;
        }
        let Some(gap) = (0..self.count).find(|ahead| self.is_dirty(self.next.wrapping_add(*ahead))) else {
            return;
        };
        (0..gap).for_each(|ahead| self.set(self.next.wrapping_add(ahead), ENTRY_HARVESTED));
        self.next = self.next.wrapping_add(gap);
        self.place = Place::InStep;
    }

    fn half(&self, half: Half) -> Range<usize> {
        match half {
            Half::First => 0..self.count / 2,
            Half::Second => self.count / 2..self.count,
        }
    }

    fn is_dirty(&self, index: usize) -> bool {
        self.flags(index).load(Ordering::Acquire) & ENTRY_DIRTY != 0
    }

    fn set(&self, index: usize, flags: u32) {
        self.flags(index).store(flags, Ordering::Release);
    }

    fn entry(&self, index: usize) -> *mut kvm_dirty_gfn {
        self.entries.as_ptr().wrapping_add(index & (self.count - 1))
    }

    fn flags(&self, index: usize) -> &AtomicU32 {
        // SAFETY: the entry lies in the mapping, which lives as long as `self`; the kernel changes this word concurrently, hence an atomic.
        unsafe { AtomicU32::from_ptr(&raw mut (*self.entry(index)).flags) }
    }
}

impl Drop for DirtyRing {
    fn drop(&mut self) {
        let bytes = self.count * size_of::<kvm_dirty_gfn>();
        // SAFETY: the mapping is ours alone, and nothing borrowed from it outlives `harvest`.
        let _ = unsafe { munmap(self.entries.as_ptr().cast(), bytes) };
    }
}
