//! The transport around a device: registers for the vCPU threads, a worker for the queues, and the saved state of both.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use ferry_proto::state::v1 as saved;
use vmm_sys_util::eventfd::EventFd;

use super::super::DeviceStateError;
use super::block;
use super::device::Device;
use super::interrupt::{CONFIG_CHANGED, Interrupt, InterruptFd};
use super::queue::DeviceQueue;
use super::registers::{COMMON_FEATURES, MAGIC, RING_EVENT_IDX, Registers, VENDOR, VERSION, VERSION_1, offset, status};
use super::state;
use super::worker::{Shared, Worker};
use crate::memory::GuestMemory;
use crate::threads::ThreadHook;

/// A virtio device with its registers and its thread.
pub(crate) struct MmioDevice {
    kind: u32,
    features: u64,
    queue_sizes: &'static [u16],
    fewest_queues: usize,
    registers: Mutex<Registers>,
    shared: Arc<Shared>,
    // After everything else it is told to end and joined.
    _worker: Worker,
}

impl MmioDevice {
    /// A device as after power-on, at rest.
    ///
    /// # Errors
    /// The process has no descriptors or no threads left.
    pub(crate) fn new(
        name: String,
        device: Box<dyn Device>,
        interrupt: InterruptFd,
        memory: GuestMemory,
        threads: &ThreadHook,
    ) -> io::Result<Self> {
        let (kind, features, queue_sizes) = (device.kind(), device.features() | COMMON_FEATURES, device.queue_sizes());
        let fewest_queues = device.fewest_queues();
        let shared = Arc::new(Shared::new(name, device, Interrupt::new(interrupt), memory)?);
        let worker = Worker::start(Arc::clone(&shared), threads)?;
        Ok(Self {
            kind,
            features,
            queue_sizes,
            fewest_queues,
            registers: Mutex::new(Registers::new(queue_sizes)),
            shared,
            _worker: worker,
        })
    }

    /// Its name, which names its saved unit too.
    pub(crate) fn name(&self) -> &str {
        &self.shared.name
    }

    /// Of a disk its sectors, as the guest reads them.
    pub(crate) fn disk_sectors(&self) -> Option<u64> {
        let config = self.shared.config.lock().unwrap_or_else(PoisonError::into_inner);
        let sectors = config.0.first_chunk().filter(|_| self.kind == block::KIND)?;
        Some(u64::from_le_bytes(*sectors))
    }

    /// The version of its schema in which its state would be saved now.
    pub(crate) fn state_version(&self) -> u32 {
        let registers = self.registers();
        let queues = state::queues_to_save(&registers, self.fewest_queues);
        state::version_of(self.kind, registers.driver_features, queues)
    }

    /// What rings when the guest writes the queue's number to the register at [`DOORBELL`](Self::DOORBELL).
    pub(crate) fn doorbells(&self) -> &[EventFd] {
        &self.shared.doorbells.0
    }

    /// Offset of the QueueNotify register.
    pub(crate) const DOORBELL: u64 = offset::QUEUE_NOTIFY;

    /// A vCPU reads. Registers are read in one access of 4 bytes, as the specification demands; anything else reads zeroes.
    pub(crate) fn read(&self, at: u64, data: &mut [u8]) {
        data.fill(0);
        if at >= offset::CONFIG {
            let config = self.shared.config.lock().unwrap_or_else(PoisonError::into_inner);
            let from = usize::try_from(at - offset::CONFIG).unwrap_or(usize::MAX);
            if let Some(found) = config.0.get(from..) {
                let len = found.len().min(data.len());
                data[..len].copy_from_slice(&found[..len]);
            }
            return;
        }
        if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
            *data = self.register(at).to_le_bytes();
        }
    }

    /// A vCPU writes.
    pub(crate) fn write(&self, at: u64, data: &[u8]) {
        if at >= offset::CONFIG {
            let mut work = self.shared.work();
            work.device.write_config(at - offset::CONFIG, data);
            self.shared.config.lock().unwrap_or_else(PoisonError::into_inner).0 = work.device.config();
            return;
        }
        let Ok(data) = <[u8; 4]>::try_from(data) else { return };
        let value = u32::from_le_bytes(data);
        match at {
            offset::STATUS => self.write_status(value),
            offset::INTERRUPT_ACK => self.shared.interrupt.acknowledge(value),
            // Where KVM does not turn the write into an event.
            offset::QUEUE_NOTIFY => {
                if let Some(bell) = self.doorbells().get(value as usize) {
                    let _ = bell.write(1);
                }
            }
            _ => self.registers().set_up(at, value),
        }
    }

    /// Makes a change from outside that its configuration shows, while it rests: a guest can keep it busy for as long as it likes otherwise.
    /// The driver, if there is one, is told. False, and no change, if it does not rest by the deadline.
    pub(crate) fn change_by(&self, deadline: Instant, change: impl FnOnce()) -> bool {
        let rests = self.rest(deadline);
        if rests {
            change();
            self.tell_config();
        }
        self.shared.go_on();
        rests
    }

    /// The same in a machine that is paused: it rests.
    pub(crate) fn change(&self, change: impl FnOnce()) {
        change();
        self.tell_config();
    }

    /// Has the device look at what is asked of it, in its own time.
    pub(crate) fn look(&self) {
        self.shared.look();
    }

    fn tell_config(&self) {
        let work = self.shared.work();
        if work.queues.is_empty() {
            self.shared.config.lock().unwrap_or_else(PoisonError::into_inner).0 = work.device.config();
        } else {
            self.shared.publish_config(&work);
        }
    }

    /// Has the device begin no more work.
    pub(crate) fn ask_to_rest(&self) {
        self.shared.ask_to_rest();
    }

    /// Has the device finish what is in flight and rest. False if it does not by the deadline.
    pub(crate) fn rest(&self, deadline: Instant) -> bool {
        self.shared.rest(deadline)
    }

    /// Lets it work again, and tells the guest again what it may have missed.
    pub(crate) fn go_on(&self) {
        self.shared.interrupt.repeat();
        self.shared.go_on();
    }

    /// The guest runs on another host now. Called once after a restore, before [`go_on`](Self::go_on).
    pub(crate) fn arrived(&self) {
        let mut work = self.shared.work();
        if work.queues.is_empty() {
            return;
        }
        work.device.arrived();
        if work.device.take_config_change() {
            self.shared.publish_config(&work);
        }
    }

    /// As after power-on. Waits for what is in flight.
    pub(crate) fn reset(&self) {
        let mut work = self.shared.work();
        work.queues.clear();
        work.device.reset();
        *self.shared.config.lock().unwrap_or_else(PoisonError::into_inner) = (work.device.config(), 0);
        drop(work);
        *self.registers() = Registers::new(self.queue_sizes);
        self.shared.interrupt.set(0);
        self.shared.broken.store(false, Ordering::Release);
    }

    /// Its state. It must be at rest, with the vCPUs standing still.
    pub(crate) fn save(&self) -> saved::VirtioDevice {
        let work = self.shared.work();
        let mut registers = self.registers().clone();
        for (register, queue) in registers.queues.iter_mut().zip(&work.queues) {
            *register = queue.state();
        }
        registers.status = self.status(&registers);
        registers.config_generation = self.shared.config.lock().unwrap_or_else(PoisonError::into_inner).1;
        saved::VirtioDevice {
            kind: self.kind,
            transport: Some(state::to_saved(
                &registers,
                self.shared.interrupt.status(),
                self.fewest_queues,
            )),
            device: work.device.save(),
        }
    }

    /// Becomes the device whose state this is, still at rest. If any of it is wrong it stays what it is.
    ///
    /// # Errors
    /// Names what cannot be, or what does not fit this device's backend.
    pub(crate) fn restore(&self, saved: &saved::VirtioDevice) -> Result<(), DeviceStateError> {
        let saved::VirtioDevice {
            kind,
            transport,
            device,
        } = saved;
        if *kind != self.kind {
            return Err(DeviceStateError::differs("device type", *kind, self.kind));
        }
        let (mut registers, interrupt) =
            state::from_saved(transport.as_ref(), self.queue_sizes, self.fewest_queues, self.features)?;
        let broken = registers.status & status::NEEDS_RESET != 0;
        registers.status &= !status::NEEDS_RESET;
        let live = registers.is_live() && !broken;
        let queues = if live { queues_of(&registers) } else { Some(Vec::new()) };
        let Some(queues) = queues.filter(|queues| queues.iter().all(|queue| queue.is_sound(&self.shared.memory)))
        else {
            return Err(DeviceStateError::Undecodable("the set of queues"));
        };
        let mut work = self.shared.work();
        work.device.restore(device)?;
        if live {
            work.device.activate(registers.driver_features);
        }
        work.queues = queues;
        let mut config = self.shared.config.lock().unwrap_or_else(PoisonError::into_inner);
        *config = (work.device.config(), registers.config_generation);
        self.shared.interrupt.set(interrupt);
        self.shared.broken.store(broken, Ordering::Release);
        *self.registers() = registers;
        Ok(())
    }

    fn register(&self, at: u64) -> u32 {
        let registers = self.registers();
        match at {
            offset::MAGIC => MAGIC,
            offset::VERSION => VERSION,
            offset::DEVICE_ID => self.kind,
            offset::VENDOR_ID => VENDOR,
            offset::DEVICE_FEATURES => match registers.device_features_select {
                0 => self.features as u32,
                1 => (self.features >> 32) as u32,
                _ => 0,
            },
            offset::INTERRUPT_STATUS => self.shared.interrupt.status(),
            offset::STATUS => self.status(&registers),
            offset::CONFIG_GENERATION => self.shared.config.lock().unwrap_or_else(PoisonError::into_inner).1,
            other => registers.value(other),
        }
    }

    fn status(&self, registers: &Registers) -> u32 {
        let broken = self.shared.broken.load(Ordering::Acquire);
        registers.status | if broken { status::NEEDS_RESET } else { 0 }
    }

    fn write_status(&self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        let mut registers = self.registers();
        let before = registers.status;
        // A driver sets bits and clears none.
        registers.status |= value & status::ALL & !status::NEEDS_RESET;
        if before & status::FEATURES_OK == 0 && registers.status & status::FEATURES_OK != 0 {
            let foreign = registers.driver_features & !self.features != 0;
            if foreign || registers.driver_features & VERSION_1 == 0 {
                // Not taken: the driver reads the bit back as it must.
                registers.status &= !status::FEATURES_OK;
            }
        }
        let becomes_live = before & status::DRIVER_OK == 0 && registers.status & status::DRIVER_OK != 0;
        if !becomes_live {
            return;
        }
        let is_agreed = registers.status & status::FEATURES_OK != 0;
        let queues = if is_agreed { queues_of(&registers) } else { None };
        match queues.filter(|queues| queues.iter().all(|queue| queue.is_sound(&self.shared.memory))) {
            Some(queues) => {
                let mut work = self.shared.work();
                work.device.activate(registers.driver_features);
                work.queues = queues;
                drop((work, registers));
                self.shared.look();
            }
            None => {
                drop(registers);
                if let Some(untold) = self.shared.breaks.add(Instant::now()) {
                    tracing::info!(
                        device = self.name(),
                        untold,
                        "the guest set up queues that cannot be: it must reset the device"
                    );
                }
                self.shared.broken.store(true, Ordering::Release);
                // DRIVER_OK is set: whoever needs a reset then also says so (virtio 1.2, 2.1.2).
                self.shared.interrupt.raise(CONFIG_CHANGED);
            }
        }
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The queues as they were set up; none at all if one of them cannot be.
fn queues_of(registers: &Registers) -> Option<Vec<DeviceQueue>> {
    let event_idx_enabled = registers.driver_features & RING_EVENT_IDX != 0;
    let queue = |&state: &virtio_queue::QueueState| {
        DeviceQueue::new(virtio_queue::QueueState {
            event_idx_enabled,
            ..state
        })
    };
    registers.queues.iter().map(queue).collect::<Result<_, _>>().ok()
}
