//! A driver for tests: sets a device up through its registers and gives it chains, as a guest would, sound ones or not.

use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::device::Device;
use super::mmio::MmioDevice;
use super::registers::{VERSION_1, offset, status};
use crate::memory::{GuestMemory, MemoryOptions, Span};
use crate::threads::ThreadHook;

/// A device under test and its driver's side of the queues.
pub(super) struct Driver {
    pub(super) device: MmioDevice,
    pub(super) memory: GuestMemory,
    rings: Vec<Ring>,
}

#[derive(Clone, Copy)]
struct Ring {
    base: u64,
    size: u16,
    next_available: u16,
    next_used: u16,
    next_descriptor: u16,
}

/// A descriptor as a guest writes it.
#[derive(Clone, Copy)]
pub(super) struct Raw {
    pub(super) span: Span,
    pub(super) flags: u16,
    pub(super) next: u16,
}

pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;

/// Rings are from here on, 64 KiB for each queue; buffers of tests are below.
const RINGS: u64 = 2 << 20;
const AVAILABLE: u64 = 0x8000;
const USED: u64 = 0xc000;

/// How long a device may take: a machine that runs tests is a busy one.
const PATIENCE: Duration = Duration::from_secs(20);

impl Driver {
    /// A device that was not set up.
    pub(super) fn new(device: Box<dyn Device>) -> Self {
        let memory = GuestMemory::new(MemoryOptions {
            bytes: 4 << 20,
            hugetlb: false,
            expect_incoming: false,
        })
        .expect("memory");
        Self::in_memory(device, memory)
    }

    /// The same in memory that is there.
    pub(super) fn in_memory(device: Box<dyn Device>, memory: GuestMemory) -> Self {
        let sizes = device.queue_sizes();
        let interrupt = EventFd::new(libc::EFD_NONBLOCK).expect("descriptor");
        let device = MmioDevice::new(
            "test".to_owned(),
            device,
            interrupt,
            memory.clone(),
            &ThreadHook::default(),
        );
        let device = device.expect("device");
        let ring = |(index, &size): (usize, &u16)| Ring {
            base: RINGS + index as u64 * 0x1_0000,
            size,
            next_available: 0,
            next_used: 0,
            next_descriptor: 0,
        };
        Self {
            device,
            memory,
            rings: sizes.iter().enumerate().map(ring).collect(),
        }
    }

    pub(super) fn write(&self, at: u64, value: u32) {
        self.device.write(at, &value.to_le_bytes());
    }

    pub(super) fn read(&self, at: u64) -> u32 {
        let mut data = [0; 4];
        self.device.read(at, &mut data);
        u32::from_le_bytes(data)
    }

    /// Sets the device up with these features and lets it work.
    pub(super) fn set_up(&mut self, features: u64) {
        self.set_up_with(features, USED);
    }

    /// The same with these queues alone.
    pub(super) fn set_up_queues(&mut self, features: u64, queues: &[usize]) {
        self.set_up_some(features, USED, |index| queues.contains(&index));
    }

    fn set_up_with(&mut self, features: u64, used: u64) {
        self.set_up_some(features, used, |_| true);
    }

    fn set_up_some(&mut self, features: u64, used: u64, wants: impl Fn(usize) -> bool) {
        self.write(offset::STATUS, 0);
        for ring in &mut self.rings {
            (ring.next_available, ring.next_used, ring.next_descriptor) = (0, 0, 0);
            for index in [ring.base + AVAILABLE + 2, ring.base + USED + 2] {
                self.memory
                    .tracked()
                    .write_obj(0u16, GuestAddress(index))
                    .expect("index");
            }
        }
        self.write(offset::STATUS, 3);
        for half in 0..2 {
            self.write(offset::DRIVER_FEATURES_SELECT, half);
            self.write(offset::DRIVER_FEATURES, ((features | VERSION_1) >> (32 * half)) as u32);
        }
        self.write(offset::STATUS, 3 | status::FEATURES_OK);
        assert!(
            self.read(offset::STATUS) & status::FEATURES_OK != 0,
            "features are not taken"
        );
        for (index, ring) in self.rings.iter().enumerate().filter(|&(index, _)| wants(index)) {
            self.write(offset::QUEUE_SELECT, index as u32);
            self.write(offset::QUEUE_SIZE, ring.size.into());
            self.write(offset::QUEUE_DESCRIPTORS, ring.base as u32);
            self.write(offset::QUEUE_DRIVER, (ring.base + AVAILABLE) as u32);
            self.write(offset::QUEUE_DEVICE, (ring.base + used) as u32);
            self.write(offset::QUEUE_READY, 1);
        }
        self.write(offset::STATUS, 3 | status::FEATURES_OK | status::DRIVER_OK);
        self.device.go_on();
    }

    /// Sets the device up again with each used ring where the available one is.
    pub(super) fn lay_used_over_available(&mut self) {
        self.set_up_with(0, AVAILABLE);
    }

    /// Gives a chain: buffers with whether the device writes them.
    pub(super) fn give(&mut self, queue: usize, buffers: &[(Span, bool)]) {
        let first = self.rings[queue].next_descriptor;
        let raw: Vec<Raw> = (0u16..)
            .zip(buffers)
            .map(|(index, &(span, writes))| {
                let more = usize::from(index) + 1 < buffers.len();
                Raw {
                    span,
                    flags: if writes { WRITE } else { 0 } | if more { NEXT } else { 0 },
                    next: (first + index + 1) % self.rings[queue].size,
                }
            })
            .collect();
        self.give_raw(queue, &raw);
    }

    /// Gives descriptors as they are.
    pub(super) fn give_raw(&mut self, queue: usize, descriptors: &[Raw]) {
        let head = self.rings[queue].next_descriptor;
        let memory = self.memory.tracked();
        let ring = &mut self.rings[queue];
        for raw in descriptors {
            let at = ring.base + 16 * u64::from(ring.next_descriptor);
            memory.write_obj(raw.span.address, GuestAddress(at)).expect("address");
            memory.write_obj(raw.span.len, GuestAddress(at + 8)).expect("length");
            memory.write_obj(raw.flags, GuestAddress(at + 12)).expect("flags");
            memory.write_obj(raw.next, GuestAddress(at + 14)).expect("next");
            ring.next_descriptor = (ring.next_descriptor + 1) % ring.size;
        }
        let slot = ring.base + AVAILABLE + 4 + 2 * u64::from(ring.next_available % ring.size);
        memory.write_obj(head, GuestAddress(slot)).expect("head");
        ring.next_available = ring.next_available.wrapping_add(1);
        let index = ring.next_available;
        self.set_available(queue, index);
    }

    /// Claims that so many chains were given, and rings.
    pub(super) fn set_available(&self, queue: usize, index: u16) {
        let at = GuestAddress(self.rings[queue].base + AVAILABLE + 2);
        self.memory.tracked().write_obj(index, at).expect("index");
        self.write(offset::QUEUE_NOTIFY, queue as u32);
    }

    /// The next used buffer: how many bytes the device wrote. `None` if none comes.
    pub(super) fn used(&mut self, queue: usize) -> Option<u32> {
        let memory = self.memory.tracked().clone();
        let ring = &mut self.rings[queue];
        let at = ring.base + USED;
        wait(|| {
            let index: u16 = memory.read_obj(GuestAddress(at + 2)).expect("index");
            index != ring.next_used
        })
        .then(|| {
            let slot = at + 4 + 8 * u64::from(ring.next_used % ring.size);
            ring.next_used = ring.next_used.wrapping_add(1);
            memory.read_obj(GuestAddress(slot + 4)).expect("length")
        })
    }

    /// Whether there is a used buffer now.
    pub(super) fn has_used(&self, queue: usize) -> bool {
        let at = self.rings[queue].base + USED + 2;
        let index: u16 = self.memory.tracked().read_obj(GuestAddress(at)).expect("index");
        index != self.rings[queue].next_used
    }

    /// Whether the register comes to hold this.
    pub(super) fn comes_to_read(&self, at: u64, value: u32) -> bool {
        wait(|| self.read(at) == value)
    }

    /// Whether the device interrupts for used buffers.
    pub(super) fn is_interrupted(&self) -> bool {
        wait(|| self.read(offset::INTERRUPT_STATUS) & 1 != 0)
    }

    /// Whether the device says that it must be reset.
    pub(super) fn breaks(&self) -> bool {
        wait(|| self.read(offset::STATUS) & status::NEEDS_RESET != 0)
    }

    /// Has it rest.
    pub(super) fn rest(&self) -> bool {
        self.device.rest(Instant::now() + PATIENCE)
    }

    /// The other end of a move: the same driver with another device in the same memory.
    pub(super) fn moved_to(&self, device: Box<dyn Device>) -> Self {
        let other = Self::in_memory(device, self.memory.clone());
        other.device.restore(&self.device.save()).expect("own state");
        Self {
            rings: self.rings.clone(),
            ..other
        }
    }

    pub(super) fn put(&self, address: u64, bytes: &[u8]) {
        self.memory
            .tracked()
            .write_slice(bytes, GuestAddress(address))
            .expect("memory");
    }

    pub(super) fn look(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .tracked()
            .read_slice(&mut bytes, GuestAddress(address))
            .expect("memory");
        bytes
    }
}

fn wait(condition: impl Fn() -> bool) -> bool {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    true
}
