//! A hostile guest's memory, and the devices that it gets to see.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::{Bytes, GuestAddress};

use super::super::device::Device;
use super::super::interrupt::InterruptFd;
use super::super::mmio::MmioDevice;
use super::super::{Balloon, Block, Entropy, Net};
use crate::machine::{DiskAccess, DiskBackend, NicBackend};
use crate::memory::{GuestMemory, MemoryOptions};
use crate::threads::ThreadHook;

/// Bytes of guest memory.
pub(super) const MEMORY: u64 = 256 << 10;

/// Sectors of the disk.
pub(super) const SECTORS: u64 = 64;

/// The feature flag of an input's first byte: the driver took RING_EVENT_IDX.
pub(super) const EVENT_IDX: u8 = 0x10;

/// A device may take so long to come to rest: it does in microseconds, on a machine with nothing else to do.
const PATIENCE: Duration = Duration::from_secs(20);

thread_local! {
    static GUEST: GuestMemory = GuestMemory::new(MemoryOptions {
        bytes: MEMORY,
        hugetlb: false,
        expect_incoming: true,
    })
    .expect("memory");
}

/// The thread's guest memory: these bytes, and then zeroes.
pub(super) fn memory(bytes: &[u8]) -> GuestMemory {
    let memory = GUEST.with(GuestMemory::clone);
    let mut filling = vec![0; MEMORY as usize];
    let len = bytes.len().min(filling.len());
    filling[..len].copy_from_slice(&bytes[..len]);
    memory
        .tracked()
        .write_slice(&filling, GuestAddress(0))
        .expect("memory is as large as that");
    memory
}

/// What the last input left at an address of the thread's guest memory.
#[cfg(test)]
pub(super) fn half_at(address: u64) -> u16 {
    GUEST.with(|memory| {
        memory
            .tracked()
            .read_obj(GuestAddress(address))
            .expect("it lies in memory")
    })
}

/// The device that the first byte of an input names, on a backend of its own.
pub(super) fn device(which: u8) -> Box<dyn Device> {
    match which % 4 {
        0 => {
            let backend = DiskBackend {
                file: image(),
                access: DiskAccess::ReadWrite,
                serial: "fuzz".to_owned(),
                losses: Default::default(),
            };
            Box::new(Block::of_size(backend, SECTORS).expect("descriptors"))
        }
        1 => {
            let (tap, wire) = UnixDatagram::pair().expect("descriptors");
            tap.set_nonblocking(true).expect("a socket");
            let _ = wire.send(&[7; 100]);
            Box::new(Net::new(NicBackend {
                tap: OwnedFd::from(tap),
                mac: [2; 6],
                rate: None,
            }))
        }
        2 => Box::new(Balloon::asked()),
        _ => Box::new(Entropy),
    }
}

/// A disk's image that is gone with its last descriptor.
fn image() -> File {
    let image = File::from(memfd_create("image", MemfdFlags::CLOEXEC).expect("descriptors"));
    image.set_len(SECTORS * 512).expect("memory");
    image
}

/// The same with its registers and its thread, at rest.
pub(super) fn with_registers(which: u8, memory: &GuestMemory) -> MmioDevice {
    let interrupt = InterruptFd::new(libc::EFD_NONBLOCK).expect("descriptors");
    let (name, threads) = ("fuzz".to_owned(), ThreadHook::default());
    MmioDevice::new(name, device(which), interrupt, memory.clone(), &threads).expect("descriptors and threads")
}

/// Has it rest: whatever its guest does, a device comes to rest.
pub(super) fn rest(device: &MmioDevice) {
    assert!(device.rest(Instant::now() + PATIENCE), "the device does not rest");
}

/// What a device says of itself another one of its kind takes, and says the same: no guest can make a state that does not move.
pub(super) fn moved(device: &MmioDevice, which: u8, memory: &GuestMemory) -> MmioDevice {
    rest(device);
    let state = device.save();
    let other = with_registers(which, memory);
    let restored = other.restore(&state);
    assert!(restored.is_ok(), "{restored:?} of {state:?}");
    assert_eq!(other.save(), state);
    other
}

/// Reads an input from its beginning on.
pub(super) struct Reader<'a>(pub(super) &'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn byte(&mut self) -> Option<u8> {
        self.take(1)?.first().copied()
    }

    pub(super) fn half(&mut self) -> Option<u16> {
        Some(u16::from_le_bytes(self.take(2)?.try_into().ok()?))
    }

    pub(super) fn word(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }

    pub(super) fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }
}
