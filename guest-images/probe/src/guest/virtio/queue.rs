//! A split queue as its driver sees it (virtio 1.2, 2.7).

use core::ptr;
use core::sync::atomic::{Ordering, fence};

use super::transport::write_register;
use crate::memory::Memory;

/// The rings. Descriptors are the caller's to fill; an entry is offered by its first descriptor's number.
pub struct Queue {
    size: u16,
    index: u32,
    notify_register: u64,
    descriptors: u64,
    available: u64,
    used: u64,
    /// Entries offered, and entries that the device was told of.
    offered: u16,
    published: u16,
    /// Entries seen to be done.
    seen: u16,
}

/// A piece of a chain.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Descriptor {
    pub address: u64,
    pub bytes: u32,
    pub flags: u16,
    pub next: u16,
}

impl Descriptor {
    /// There is a `next`.
    pub const NEXT: u16 = 1;
    /// The device writes.
    pub const WRITE: u16 = 2;
}

/// VIRTQ_AVAIL_F_NO_INTERRUPT and VIRTQ_USED_F_NO_NOTIFY.
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;

/// Flags and index come before the entries of a ring.
const RING: u64 = 4;
const USED_ENTRY: u64 = 8;

impl Queue {
    pub fn new(size: u16, notify_register: u64, index: u32, memory: &mut Memory) -> Result<Self, &'static str> {
        let entries = u64::from(size);
        let mut take = |bytes| memory.take_zeroed(bytes).ok_or("no memory for a device's queue");
        let queue = Self {
            size,
            index,
            notify_register,
            descriptors: take(entries * size_of::<Descriptor>() as u64)?,
            available: take(RING + entries * 2 + 2)?,
            used: take(RING + entries * USED_ENTRY + 2)?,
            offered: 0,
            published: 0,
            seen: 0,
        };
        queue.store(queue.available, NO_INTERRUPT);
        Ok(queue)
    }

    pub fn size(&self) -> u16 {
        self.size
    }

    pub fn descriptors(&self) -> u64 {
        self.descriptors
    }

    pub fn available(&self) -> u64 {
        self.available
    }

    pub fn used(&self) -> u64 {
        self.used
    }

    /// Lays out descriptor `number`, which must be below the size and not offered.
    pub fn describe(&mut self, number: u16, descriptor: Descriptor) {
        assert!(number < self.size, "a descriptor beyond its table");
        let table = self.descriptors as *mut Descriptor;
        // SAFETY: the table has `size` descriptors, and the device reads none that is not offered.
        unsafe { table.add(number.into()).write_volatile(descriptor) };
    }

    /// Offers the chain that begins at descriptor `head`; the device is told by [`Queue::publish`].
    #[inline]
    pub fn offer(&mut self, head: u16) {
        let slot = u64::from(self.offered % self.size);
        self.store(self.available + RING + slot * 2, head);
        self.offered = self.offered.wrapping_add(1);
    }

    /// Tells the device of all that was offered since the last time; rings if it wants to hear.
    #[inline]
    pub fn publish(&mut self) {
        if self.published == self.offered {
            return;
        }
        self.published = self.offered;
        fence(Ordering::Release);
        self.store(self.available + 2, self.offered);
        // The index must be there before the flag is looked at: the device does the same the other way round.
        fence(Ordering::SeqCst);
        if self.load(self.used) & NO_NOTIFY == 0 {
            write_register(self.notify_register, self.index);
        }
    }

    /// The next chain that the device is done with: its first descriptor, and how many bytes it wrote.
    #[inline]
    pub fn take_done(&mut self) -> Option<(u16, u32)> {
        if self.load(self.used + 2) == self.seen {
            return None;
        }
        fence(Ordering::Acquire);
        let entry = self.used + RING + u64::from(self.seen % self.size) * USED_ENTRY;
        self.seen = self.seen.wrapping_add(1);
        // SAFETY: the entry lies in the used ring, which is this queue's; the device may write while it is read.
        let [head, bytes] = unsafe { ptr::read_volatile(entry as *const [u32; 2]) };
        assert!(head < self.size.into(), "a device is done with what it cannot have had");
        Some((head as u16, bytes))
    }

    #[inline]
    fn load(&self, address: u64) -> u16 {
        // SAFETY: callers give addresses in this queue's rings.
        unsafe { ptr::read_volatile(address as *const u16) }
    }

    #[inline]
    fn store(&self, address: u64, value: u16) {
        // SAFETY: callers give addresses in this queue's rings.
        unsafe { ptr::write_volatile(address as *mut u16, value) };
    }
}
