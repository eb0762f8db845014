//! Guest memory filled with hostile bytes, and a device's work on them without its thread.

use std::sync::atomic::AtomicBool;

use virtio_queue::QueueState;

use super::super::device::{Doorbells, Turn, Wake};
use super::super::interrupt::{Interrupt, InterruptFd};
use super::super::queue::DeviceQueue;
use super::guest::{EVENT_IDX, device, memory};

/// Descriptors of each queue.
const SIZE: u16 = 16;
/// From one queue's rings to the next one's, and from descriptors to available and used ring.
const QUEUE: u64 = 0x400;
const AVAILABLE: u64 = 0x100;
const USED: u64 = 0x200;

/// After the first byte: descriptors, available and used ring of each queue, one after the other, and then buffers.
pub(crate) fn work_on(bytes: &[u8]) {
    let Some((&which, bytes)) = bytes.split_first() else {
        return;
    };
    let memory = &memory(bytes);
    let mut device = device(which);
    device.activate(device.features());
    let queue = |(index, &max_size): (usize, &u16)| {
        let base = index as u64 * QUEUE;
        let state = QueueState {
            max_size,
            size: SIZE,
            ready: true,
            event_idx_enabled: which & EVENT_IDX != 0,
            desc_table: base,
            avail_ring: base + AVAILABLE,
            used_ring: base + USED,
            ..QueueState::default()
        };
        DeviceQueue::new(state).expect("a queue")
    };
    let mut queues: Vec<DeviceQueue> = device.queue_sizes().iter().enumerate().map(queue).collect();
    queues.iter_mut().for_each(DeviceQueue::begin_turn);
    let rest = AtomicBool::new(false);
    let interrupt = Interrupt::new(InterruptFd::new(libc::EFD_NONBLOCK).expect("descriptors"));
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
    for queue in &mut queues {
        let _ = queue.wants_interrupt(memory);
    }
}

#[cfg(test)]
pub(super) mod tests {
    use ferry_fuzz_inputs::feed;

    use super::super::guest::half_at;
    use super::*;

    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    const INDIRECT: u16 = 4;

    /// Memory as a driver lays it out, in the bytes of an input.
    pub(in super::super) struct Layout {
        bytes: Vec<u8>,
        /// Of each queue: descriptors and chains so far.
        used: [(u16, u16); 5],
    }

    impl Layout {
        pub(in super::super) fn new(which: u8) -> Self {
            let (bytes, used) = (vec![which], [(0, 0); 5]);
            Self { bytes, used }
        }

        fn put(mut self, address: u64, bytes: &[u8]) -> Self {
            let at = address as usize + 1;
            self.bytes.resize(self.bytes.len().max(at + bytes.len()), 0);
            self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
            self
        }

        fn descriptor(self, at: u64, (address, len, flags): (u64, u32, u16), next: u16) -> Self {
            self.put(at, &address.to_le_bytes())
                .put(at + 8, &len.to_le_bytes())
                .put(at + 12, &flags.to_le_bytes())
                .put(at + 14, &next.to_le_bytes())
        }

        /// A chain of buffers: address, length, flags without NEXT.
        fn chain(mut self, queue: usize, buffers: &[(u64, u32, u16)]) -> Self {
            let (base, (first, chains)) = (queue as u64 * QUEUE, self.used[queue]);
            let mut descriptor = first;
            for (index, &(address, len, flags)) in buffers.iter().enumerate() {
                let more = if index + 1 < buffers.len() { NEXT } else { 0 };
                let at = base + 16 * u64::from(descriptor);
                descriptor += 1;
                self = self.descriptor(at, (address, len, flags | more), descriptor);
            }
            self.used[queue] = (descriptor, chains + 1);
            let available = base + AVAILABLE;
            self.put(available + 4 + 2 * u64::from(chains), &first.to_le_bytes())
                .put(available + 2, &(chains + 1).to_le_bytes())
        }

        fn request(self, at: u64, kind: u32, sector: u64) -> Self {
            self.put(at, &kind.to_le_bytes()).put(at + 8, &sector.to_le_bytes())
        }
    }

    /// A read, a write, a flush, the serial number, and a discard, one of them by an indirect table.
    fn disk(which: u8) -> Layout {
        let status = |at: u64| (at + 16, 1, WRITE);
        let table = Layout::new(which)
            .request(0x2000, 0, 1)
            .request(0x2040, 1, 2)
            .request(0x2080, 4, 0)
            .request(0x20c0, 8, 0)
            .request(0x2100, 11, 0)
            .put(0x2180, &8u64.to_le_bytes())
            .put(0x2188, &8u32.to_le_bytes());
        table
            .chain(0, &[(0x2000, 16, 0), (0x3000, 512, WRITE), status(0x2000)])
            .chain(0, &[(0x2040, 16, 0), (0x3200, 1024, 0), status(0x2040)])
            .chain(0, &[(0x2080, 16, 0), status(0x2080)])
            .descriptor(0x2200, (0x20c0, 16, NEXT), 1)
            .descriptor(0x2210, (0x3600, 20, NEXT | WRITE), 2)
            .descriptor(0x2220, (0x20d0, 1, WRITE), 0)
            .chain(0, &[(0x2200, 48, INDIRECT)])
            .chain(0, &[(0x2100, 16, 0), (0x2180, 16, 0), status(0x2100)])
    }

    fn card(which: u8) -> Layout {
        Layout::new(which)
            .chain(0, &[(0x4000, 64, WRITE)])
            .chain(0, &[(0x1_0000, 0x1_2000, WRITE)])
            .chain(1, &[(0x2000, 12, 0), (0x2100, 60, 0)])
            .put(0x3000, &[3, 0])
            .chain(2, &[(0x3000, 2, 0), (0x3010, 1, WRITE)])
    }

    fn balloon(which: u8) -> Layout {
        let pages = [32u32, 33, 34, 40].map(u32::to_le_bytes).concat();
        Layout::new(which)
            .put(0x2000, &pages)
            .chain(0, &[(0x2000, 16, 0)])
            .chain(1, &[(0x2000, 8, 0)])
            .put(0x2040, &2u32.to_le_bytes())
            .chain(2, &[(0x2040, 4, 0)])
            .chain(2, &[(0x8000, 0x4000, WRITE)])
            .chain(2, &[(0x2044, 4, 0)])
            .chain(3, &[(0x8000, 0x4000, WRITE), (0x10000, 0x1000, WRITE)])
    }

    fn entropy(which: u8) -> Layout {
        Layout::new(which).chain(0, &[(0x2000, 64, WRITE), (0x3000, 7, WRITE)])
    }

    /// What a sound driver lays out, for each device, without events and with them.
    pub(in super::super) fn samples() -> Vec<Vec<u8>> {
        let plain = [disk(0), card(1), balloon(2), entropy(3)];
        let events = [
            disk(EVENT_IDX),
            card(EVENT_IDX + 1),
            balloon(EVENT_IDX + 2),
            entropy(EVENT_IDX + 3),
        ];
        plain.into_iter().chain(events).map(|layout| layout.bytes).collect()
    }

    /// Or what is made of them would not get far either.
    #[test]
    fn devices_do_what_samples_ask_for() {
        let asked: [&[u16]; 4] = [&[5], &[2, 1, 1], &[1, 1, 3, 1], &[1]];
        for (sample, asked) in samples().iter().zip(asked.iter().cycle()) {
            work_on(sample);
            let used = (0..asked.len() as u64).map(|queue| half_at(queue * QUEUE + USED + 2));
            assert_eq!(used.collect::<Vec<_>>(), **asked, "of device {}", sample[0]);
        }
    }

    #[test]
    fn no_ring_harms_the_host() {
        feed("virtio", &samples(), work_on);
    }
}
