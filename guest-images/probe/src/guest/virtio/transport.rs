//! The registers of a device, and how it is found and started (virtio 1.2, 3.1 and 4.2.2).

use core::arch::asm;

use super::queue::Queue;
use crate::memory::Memory;

/// A device's registers.
#[derive(Clone, Copy)]
pub struct Transport {
    base: u64,
}

/// Where devices may be: the first one's registers, from one to the next, how many.
struct Window {
    first: u64,
    step: u64,
    count: u64,
}

/// Ferry's, and those of QEMU's microvm.
const WINDOWS: [Window; 2] = [
    Window {
        first: 0xd000_0000,
        step: 0x1000,
        count: 16,
    },
    Window {
        first: 0xfeb0_0000,
        step: 0x200,
        count: 24,
    },
];

mod register {
    pub const MAGIC: u64 = 0x00;
    pub const VERSION: u64 = 0x04;
    pub const DEVICE_ID: u64 = 0x08;
    pub const DEVICE_FEATURES: u64 = 0x10;
    pub const DEVICE_FEATURES_SELECT: u64 = 0x14;
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SELECT: u64 = 0x24;
    pub const QUEUE_SELECT: u64 = 0x30;
    pub const QUEUE_SIZE_MAX: u64 = 0x34;
    pub const QUEUE_SIZE: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const QUEUE_NOTIFY: u64 = 0x50;
    pub const STATUS: u64 = 0x70;
    pub const QUEUE_DESCRIPTORS: u64 = 0x80;
    pub const QUEUE_DRIVER: u64 = 0x90;
    pub const QUEUE_DEVICE: u64 = 0xa0;
    pub const CONFIG: u64 = 0x100;
}

/// "virt", and the version without legacy.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;

/// Device status (virtio 1.2, 2.1).
const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;

/// VIRTIO_F_VERSION_1.
const VERSION_1: u64 = 1 << 32;

impl Transport {
    /// The device at `told`, else the first of this kind; its registers are mapped for it.
    pub fn find(kind: u32, told: Option<u64>, memory: &mut Memory) -> Result<Self, &'static str> {
        let is_one = |device: &Self| {
            device.read(register::MAGIC) == MAGIC
                && device.read(register::VERSION) == VERSION
                && device.read(register::DEVICE_ID) == kind
        };
        if let Some(base) = told {
            memory.map_device(base)?;
            let device = Self { base };
            return Some(device)
                .filter(is_one)
                .ok_or("no modern virtio device of that kind at device=");
        }
        for window in &WINDOWS {
            memory.map_device(window.first)?;
            let mut devices = (0..window.count).map(|number| Self {
                base: window.first + number * window.step,
            });
            if let Some(device) = devices.find(is_one) {
                return Ok(device);
            }
        }
        Err("no modern virtio device of that kind in Ferry's places or in those of QEMU's microvm")
    }

    /// Resets the device and settles on those of the `wanted` features that it offers, which are returned.
    pub fn negotiate(self, wanted: u64) -> Result<u64, &'static str> {
        self.write(register::STATUS, 0);
        while self.read(register::STATUS) != 0 {}
        self.write(register::STATUS, ACKNOWLEDGE);
        self.write(register::STATUS, ACKNOWLEDGE | DRIVER);
        let half = |select: u32| {
            self.write(register::DEVICE_FEATURES_SELECT, select);
            u64::from(self.read(register::DEVICE_FEATURES))
        };
        let settled = (half(0) | half(1) << 32) & (wanted | VERSION_1);
        for select in [0, 1] {
            self.write(register::DRIVER_FEATURES_SELECT, select);
            self.write(register::DRIVER_FEATURES, (settled >> (32 * select)) as u32);
        }
        self.write(register::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        match self.read(register::STATUS) & FEATURES_OK {
            0 => Err("the device does not agree to a subset of its own features"),
            _ => Ok(settled),
        }
    }

    /// Sets a queue up, of so many entries at most.
    pub fn set_up_queue(self, index: u32, most: u16, memory: &mut Memory) -> Result<Queue, &'static str> {
        self.write(register::QUEUE_SELECT, index);
        let size = self.read(register::QUEUE_SIZE_MAX).min(most.into()) as u16;
        if size == 0 {
            return Err("the device lacks a queue that its kind has");
        }
        let queue = Queue::new(size, self.base + register::QUEUE_NOTIFY, index, memory)?;
        self.write(register::QUEUE_SIZE, size.into());
        for (at, address) in [
            (register::QUEUE_DESCRIPTORS, queue.descriptors()),
            (register::QUEUE_DRIVER, queue.available()),
            (register::QUEUE_DEVICE, queue.used()),
        ] {
            self.write(at, address as u32);
            self.write(at + 4, (address >> 32) as u32);
        }
        self.write(register::QUEUE_READY, 1);
        Ok(queue)
    }

    /// Tells the device that all is set up.
    pub fn start(self) {
        self.write(register::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    /// Four bytes of the configuration.
    pub fn config(self, at: u64) -> u32 {
        self.read(register::CONFIG + at)
    }

    fn read(self, register: u64) -> u32 {
        let value: u32;
        // SAFETY: `find` mapped the registers; reading one changes nothing that the guest relies on. In one plain move,
        // which every host's emulator knows.
        unsafe {
            asm!("mov {value:e}, dword ptr [{address}]", value = out(reg) value, address = in(reg) self.base + register,
                options(nostack, preserves_flags));
        }
        value
    }

    fn write(self, register: u64, value: u32) {
        write_register(self.base + register, value);
    }
}

/// Writes a register of a device that was found.
#[inline]
pub fn write_register(address: u64, value: u32) {
    // SAFETY: the device's registers are mapped, and what a device writes to memory is what its queues, set up in memory
    // that is nobody else's, offer it. Also a barrier for the compiler: what was stored before is in memory.
    unsafe {
        asm!("mov dword ptr [{address}], {value:e}", value = in(reg) value, address = in(reg) address,
            options(nostack, preserves_flags));
    }
}
