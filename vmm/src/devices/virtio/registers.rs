//! The registers of a virtio-mmio device (virtio 1.2, 4.2.2), as plain data: what the guest has set up so far.

use virtio_queue::QueueState;

/// Feature bits of every device here (virtio 1.2, 6).
pub(super) const RING_INDIRECT_DESC: u64 = 1 << 28;
pub(super) const RING_EVENT_IDX: u64 = 1 << 29;
pub(super) const VERSION_1: u64 = 1 << 32;

/// What every device here offers.
pub(super) const COMMON_FEATURES: u64 = RING_INDIRECT_DESC | RING_EVENT_IDX | VERSION_1;

/// Device status (virtio 1.2, 2.1).
pub(super) mod status {
    pub(in super::super) const DRIVER_OK: u32 = 4;
    pub(in super::super) const FEATURES_OK: u32 = 8;
    pub(in super::super) const NEEDS_RESET: u32 = 64;
    /// Every bit there is.
    pub(in super::super) const ALL: u32 = 0xff;
}

/// Offsets.
pub(super) mod offset {
    pub(in super::super) const MAGIC: u64 = 0x00;
    pub(in super::super) const VERSION: u64 = 0x04;
    pub(in super::super) const DEVICE_ID: u64 = 0x08;
    pub(in super::super) const VENDOR_ID: u64 = 0x0c;
    pub(in super::super) const DEVICE_FEATURES: u64 = 0x10;
    pub(in super::super) const DEVICE_FEATURES_SELECT: u64 = 0x14;
    pub(in super::super) const DRIVER_FEATURES: u64 = 0x20;
    pub(in super::super) const DRIVER_FEATURES_SELECT: u64 = 0x24;
    pub(in super::super) const QUEUE_SELECT: u64 = 0x30;
    pub(in super::super) const QUEUE_SIZE_MAX: u64 = 0x34;
    pub(in super::super) const QUEUE_SIZE: u64 = 0x38;
    pub(in super::super) const QUEUE_READY: u64 = 0x44;
    pub(in super::super) const QUEUE_NOTIFY: u64 = 0x50;
    pub(in super::super) const INTERRUPT_STATUS: u64 = 0x60;
    pub(in super::super) const INTERRUPT_ACK: u64 = 0x64;
    pub(in super::super) const STATUS: u64 = 0x70;
    pub(in super::super) const QUEUE_DESCRIPTORS: u64 = 0x80;
    pub(in super::super) const QUEUE_DRIVER: u64 = 0x90;
    pub(in super::super) const QUEUE_DEVICE: u64 = 0xa0;
    pub(in super::super) const CONFIG_GENERATION: u64 = 0xfc;
    pub(in super::super) const CONFIG: u64 = 0x100;
}

/// "virt", little-endian.
pub(super) const MAGIC: u32 = 0x7472_6976;
/// The version without legacy.
pub(super) const VERSION: u32 = 2;
/// "FRRY": drivers only show it.
pub(super) const VENDOR: u32 = 0x5952_5246;

/// What the guest has set up.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Registers {
    pub(super) status: u32,
    pub(super) device_features_select: u32,
    pub(super) driver_features: u64,
    pub(super) driver_features_select: u32,
    pub(super) queue_select: u32,
    pub(super) config_generation: u32,
    /// As set up; once the driver is ready the worker's queues are what counts.
    pub(super) queues: Vec<QueueState>,
}

impl Registers {
    /// Registers as after power-on, of a device whose queues have these sizes at most.
    pub(super) fn new(sizes: &[u16]) -> Self {
        let queue = |&max_size: &u16| QueueState {
            max_size,
            size: max_size,
            ..Default::default()
        };
        Self {
            queues: sizes.iter().map(queue).collect(),
            ..Self::default()
        }
    }

    /// Whether the driver is ready and the device not broken.
    pub(super) fn is_live(&self) -> bool {
        self.status & status::DRIVER_OK != 0 && self.status & status::NEEDS_RESET == 0
    }

    /// Whether the driver may still negotiate features.
    fn negotiates(&self) -> bool {
        self.status & status::FEATURES_OK == 0
    }

    /// Takes a write to a register that only sets something up. Writes that make no sense now are ignored, as the specification lets
    /// a device do with what a driver must not.
    pub(super) fn set_up(&mut self, offset: u64, value: u32) {
        let live = self.status & status::DRIVER_OK != 0;
        match offset {
            offset::DEVICE_FEATURES_SELECT => self.device_features_select = value,
            offset::DRIVER_FEATURES_SELECT => self.driver_features_select = value,
            offset::DRIVER_FEATURES if self.negotiates() => match self.driver_features_select {
                0 => self.driver_features = self.driver_features & !0xffff_ffff | u64::from(value),
                1 => self.driver_features = self.driver_features & 0xffff_ffff | u64::from(value) << 32,
                _ => {}
            },
            offset::QUEUE_SELECT => self.queue_select = value,
            _ if live => {}
            _ => self.set_up_queue(offset, value),
        }
    }

    fn set_up_queue(&mut self, offset: u64, value: u32) {
        let Some(queue) = self.queues.get_mut(self.queue_select as usize) else {
            return;
        };
        let low = |address: &mut u64| *address = *address & !0xffff_ffff | u64::from(value);
        let high = |address: &mut u64| *address = *address & 0xffff_ffff | u64::from(value) << 32;
        match offset {
            offset::QUEUE_SIZE => queue.size = u16::try_from(value).unwrap_or(0),
            offset::QUEUE_READY => queue.ready = value == 1,
            offset::QUEUE_DESCRIPTORS => low(&mut queue.desc_table),
            QUEUE_DESCRIPTORS_HIGH => high(&mut queue.desc_table),
            offset::QUEUE_DRIVER => low(&mut queue.avail_ring),
            QUEUE_DRIVER_HIGH => high(&mut queue.avail_ring),
            offset::QUEUE_DEVICE => low(&mut queue.used_ring),
            QUEUE_DEVICE_HIGH => high(&mut queue.used_ring),
            _ => {}
        }
    }

    /// What the register holds, for those that say what was set up.
    pub(super) fn value(&self, offset: u64) -> u32 {
        let queue = self.queues.get(self.queue_select as usize);
        match offset {
            offset::QUEUE_SIZE_MAX => queue.map_or(0, |queue| queue.max_size.into()),
            offset::QUEUE_READY => queue.map_or(0, |queue| queue.ready.into()),
            offset::STATUS => self.status,
            offset::CONFIG_GENERATION => self.config_generation,
            _ => 0,
        }
    }
}

const QUEUE_DESCRIPTORS_HIGH: u64 = offset::QUEUE_DESCRIPTORS + 4;
const QUEUE_DRIVER_HIGH: u64 = offset::QUEUE_DRIVER + 4;
const QUEUE_DEVICE_HIGH: u64 = offset::QUEUE_DEVICE + 4;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_written_in_halves_until_they_are_settled() {
        let mut registers = Registers::new(&[256]);
        registers.set_up(offset::DRIVER_FEATURES, 0x2000_0000);
        registers.set_up(offset::DRIVER_FEATURES_SELECT, 1);
        registers.set_up(offset::DRIVER_FEATURES, 1);
        assert_eq!(registers.driver_features, RING_EVENT_IDX | VERSION_1);
        registers.status = status::FEATURES_OK;
        registers.set_up(offset::DRIVER_FEATURES, 0);
        assert_eq!(registers.driver_features, RING_EVENT_IDX | VERSION_1);
    }

    #[test]
    fn queues_are_set_up_one_by_one_and_not_once_the_driver_is_ready() {
        let mut registers = Registers::new(&[256, 64]);
        registers.set_up(offset::QUEUE_SELECT, 1);
        assert_eq!(registers.value(offset::QUEUE_SIZE_MAX), 64);
        registers.set_up(offset::QUEUE_SIZE, 32);
        registers.set_up(QUEUE_DRIVER_HIGH, 1);
        registers.set_up(offset::QUEUE_DRIVER, 0x1000);
        registers.set_up(offset::QUEUE_READY, 1);
        let set_up = registers.queues[1];
        assert_eq!(
            (set_up.size, set_up.avail_ring, set_up.ready),
            (32, 0x1_0000_1000, true)
        );
        registers.status = status::DRIVER_OK;
        registers.set_up(offset::QUEUE_READY, 0);
        assert_eq!(registers.queues[1], set_up);
        registers.set_up(offset::QUEUE_SELECT, 2);
        assert_eq!(registers.value(offset::QUEUE_SIZE_MAX), 0);
    }
}
