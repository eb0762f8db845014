//! The dirty ring of one vCPU: memory in which the kernel names the pages that this vCPU wrote (`api.rst`, KVM_CAP_DIRTY_LOG_RING).

use std::io;
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
#[derive(Debug)]
pub(super) struct DirtyRing {
    entries: NonNull<kvm_dirty_gfn>,
    count: usize,
    /// Where to go on reading; wraps at `count`, a power of two.
    next: usize,
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
        })
    }

    /// Hands each new entry (slot, page within the slot) to `found` and marks it harvested; returns how many there were.
    ///
    /// The pages are protected again, and writes to them noticed again, only after KVM_RESET_DIRTY_RINGS: read no page before that.
    pub(super) fn harvest(&mut self, mut found: impl FnMut(u32, u64)) -> usize {
        let mut harvested = 0;
        // At most once around: a guest that dirties as fast as we read must not keep us here.
        while harvested < self.count {
            let entry = self.entries.as_ptr().wrapping_add(self.next & (self.count - 1));
            // SAFETY: `entry` lies in the mapping; the kernel changes this word concurrently, hence an atomic.
            let flags = unsafe { AtomicU32::from_ptr(&raw mut (*entry).flags) };
            if flags.load(Ordering::Acquire) & ENTRY_DIRTY == 0 {
                break;
            }
            // SAFETY: in the mapping; the kernel leaves an entry alone from setting DIRTY until we mark it harvested.
            let (slot, page) = unsafe { ((*entry).slot, (*entry).offset) };
            found(slot, page);
            flags.store(ENTRY_HARVESTED, Ordering::Release);
            self.next = self.next.wrapping_add(1);
            harvested += 1;
        }
        harvested
    }
}

impl Drop for DirtyRing {
    fn drop(&mut self) {
        let bytes = self.count * size_of::<kvm_dirty_gfn>();
        // SAFETY: the mapping is ours alone, and nothing borrowed from it outlives `harvest`.
        let _ = unsafe { munmap(self.entries.as_ptr().cast(), bytes) };
    }
}
