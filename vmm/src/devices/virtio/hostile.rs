//! What fuzzing does with a device: guest memory filled with hostile bytes, and a device's work on them without its thread.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::OnceLock;
use std::sync::atomic::AtomicBool;

use virtio_queue::QueueState;
use vm_memory::{Bytes, GuestAddress};

use super::device::{Device, Doorbells, Turn, Wake};
use super::interrupt::{Interrupt, InterruptFd};
use super::queue::DeviceQueue;
use super::{Balloon, Block, Entropy, Net};
use crate::machine::{DiskAccess, DiskBackend, NicBackend};
use crate::memory::{GuestMemory, MemoryOptions};

const MEMORY: u64 = 1 << 20;

/// Descriptors, available and used ring of each queue, one after the other, and then buffers, are these bytes.
pub(crate) fn work_on(bytes: &[u8]) {
    let Some((&which, bytes)) = bytes.split_first() else {
        return;
    };
    static GUEST: OnceLock<GuestMemory> = OnceLock::new();
    let options = MemoryOptions {
        bytes: MEMORY,
        hugetlb: false,
        expect_incoming: true,
    };
    let memory = GUEST.get_or_init(|| GuestMemory::new(options).expect("memory"));
    let filling = &bytes[..bytes.len().min(MEMORY as usize)];
    memory.tracked().write_slice(filling, GuestAddress(0)).expect("memory");

    let mut device = device(which);
    device.activate(device.features());
    let queue = |(index, &max_size): (usize, &u16)| {
        let base = index as u64 * 0x400;
        let state = QueueState {
            max_size,
            size: 16,
            ready: true,
            event_idx_enabled: which & 0x10 != 0,
            desc_table: base,
            avail_ring: base + 0x100,
            used_ring: base + 0x200,
            ..QueueState::default()
        };
        DeviceQueue::new(state).expect("a queue")
    };
    let mut queues: Vec<DeviceQueue> = device.queue_sizes().iter().enumerate().map(queue).collect();
    queues.iter_mut().for_each(DeviceQueue::begin_turn);
    let rest = AtomicBool::new(false);
    let interrupt = Interrupt::new(InterruptFd::new(libc::EFD_NONBLOCK).expect("descriptor"));
    let doorbells = Doorbells::new(queues.len()).expect("descriptors");
    let turn = Turn {
        memory,
        rest: &rest,
        interrupt: &interrupt,
        doorbells: &doorbells,
    };
    for wake in (0..queues.len()).map(Wake::Queue).chain([Wake::Backend, Wake::Timer]) {
        if device.wake(wake, &mut queues, &turn).is_err() {
            return;
        }
    }
}

fn device(which: u8) -> Box<dyn Device> {
    let null = || {
        File::options()
            .read(true)
            .write(true)
            .open("/dev/zero")
            .expect("/dev/zero")
    };
    match which % 4 {
        0 => Box::new(Block::of_size(
            DiskBackend {
                file: null(),
                access: DiskAccess::ReadWrite,
                serial: "fuzz".to_owned(),
                lost: Default::default(),
            },
            64,
        )),
        1 => {
            let (tap, wire) = UnixDatagram::pair().expect("pair");
            tap.set_nonblocking(true).expect("socket");
            let _ = wire.send(&[7; 100]);
            Box::new(Net::new(NicBackend {
                tap: OwnedFd::from(tap),
                mac: [2; 6],
                rate: None,
            }))
        }
        2 => Box::<Balloon>::default(),
        _ => Box::new(Entropy),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_ring_harms_the_host(which: u8, bytes in prop::collection::vec(any::<u8>(), 0..4096)) {
            let mut all = vec![which];
            all.extend(bytes);
            work_on(&all);
        }
    }
}
