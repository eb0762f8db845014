//! The devices that are emulated here and not by KVM, and the ports at which they answer.
//!
//! A device knows its registers, guest memory, an interrupt and its backend: nothing about KVM or about who moves the machine. Standing still
//! means that no input is accepted any more and no request is in flight.

mod power;
mod serial;
mod virtio;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use ferry_proto::state::v1 as saved;
use thiserror::Error;

pub use self::power::ButtonPress;
pub(crate) use self::power::{PowerControl, PowerRequest};
pub(crate) use self::serial::SerialPort;
pub(crate) use self::virtio::{
    Balloon, Block, Device, Entropy, HintDesk, InterruptFd, MmioDevice, Net, newest_version, schema_of, set_macs,
    version_of_saved,
};
pub use self::virtio::{BalloonLevel, CardTraffic, FreePageHints, WriteWaits, WrittenBlocks};
#[cfg(any(fuzzing, test))]
pub(crate) use self::virtio::{program_hostile_registers, restore_hostile_state, work_on_hostile_memory};
use crate::arch::x86_64::layout::{
    KEYBOARD_COMMAND_PORT, PANIC_PORT, POWER_CONTROL_PORT, POWER_EVENT_PORT, POWER_EVENT_PORT_END, RESET_CONTROL_PORT,
    SERIAL_PORT, VIRTIO_SLOT_BYTES, virtio_slot,
};

/// Where the guest's console output goes.
pub trait ConsoleOutput: Send {
    /// Takes what the guest wrote. Called on a vCPU thread with the device locked: it must not block.
    fn write(&mut self, bytes: &[u8]);
}

/// An interrupt line that a device raises.
///
/// Both happen before they return: what follows may save the interrupt controller.
pub(crate) trait InterruptLine: Send + Sync {
    /// Raises the line, if it is not raised.
    fn raise(&self);

    /// Lowers the line, if it is not low.
    fn lower(&self);

    /// One edge.
    fn pulse(&self) {
        self.raise();
        self.lower();
    }
}

/// The lines of those devices that are always there.
pub(crate) struct Lines {
    /// Edge-triggered.
    pub(crate) serial: Arc<dyn InterruptLine>,
    /// ACPI's, level-triggered.
    pub(crate) power: Arc<dyn InterruptLine>,
}

/// Why saved state is not a device's.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(crate) enum DeviceStateError {
    /// A number that is too large.
    #[error("{field} is {value}, at most {limit} is possible")]
    Above {
        /// Of what.
        field: &'static str,
        /// As saved.
        value: u64,
        /// The largest that can be.
        limit: u64,
    },
    /// Something that is not as it is here.
    #[error("{field} is {value}, here it is {wanted}")]
    Differs {
        /// What.
        field: &'static str,
        /// As saved.
        value: String,
        /// As it must be.
        wanted: String,
    },
    /// Bytes that say nothing.
    #[error("{0} does not parse")]
    Undecodable(&'static str),
}

impl DeviceStateError {
    pub(crate) fn above(field: &'static str, value: impl Into<u64>, limit: impl Into<u64>) -> Self {
        Self::Above {
            field,
            value: value.into(),
            limit: limit.into(),
        }
    }

    pub(crate) fn differs(field: &'static str, value: impl ToString, wanted: impl ToString) -> Self {
        Self::Differs {
            field,
            value: value.to_string(),
            wanted: wanted.to_string(),
        }
    }
}

/// The console's output, shared by each serial port that a reset or a restore builds anew.
pub(crate) type SharedOutput = Arc<Mutex<Box<dyn ConsoleOutput>>>;

/// All devices of a machine. Any vCPU thread may call; each device has a lock of its own, held for one access.
pub(crate) struct Devices {
    serial: Mutex<SerialPort>,
    power: Mutex<PowerControl>,
    /// The device of each slot, from the first on.
    virtio: Vec<MmioDevice>,
    output: SharedOutput,
    lines: Lines,
    /// While set, nothing comes in from outside: the vCPUs stand still and state may be saved.
    quiet: AtomicBool,
    /// The state is of a machine that ran elsewhere, and this one has not run yet.
    arrived: AtomicBool,
    /// A panic is told once, or a guest could fill the owner's channel.
    panic_told: AtomicBool,
}

/// The saved state of all devices.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct DevicesState {
    pub(crate) serial: saved::Serial,
    pub(crate) power: saved::Power,
    /// By name, in the order of the slots.
    pub(crate) virtio: Vec<(String, saved::VirtioDevice)>,
}

/// A device did not come to rest in time: its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Restless(pub(crate) String);

impl Devices {
    /// Devices as after power-on; quiet, for the machine does not run yet.
    pub(crate) fn new(output: Box<dyn ConsoleOutput>, lines: Lines, virtio: Vec<MmioDevice>) -> Self {
        let output: SharedOutput = Arc::new(Mutex::new(output));
        Self {
            serial: Mutex::new(SerialPort::new(output.clone(), lines.serial.clone())),
            power: Mutex::new(PowerControl::default()),
            virtio,
            output,
            lines,
            quiet: AtomicBool::new(true),
            arrived: AtomicBool::new(false),
            panic_told: AtomicBool::new(false),
        }
    }

    /// Answers `data.len() / size` reads of a port; where no device is, all bits are one.
    pub(crate) fn read_port(&self, port: u16, size: usize, data: &mut [u8]) {
        for value in data.chunks_exact_mut(size.max(1)) {
            match port {
                SERIAL_PORT..=SERIAL_PORT_END if size == 1 => {
                    value[0] = lock(&self.serial).read((port - SERIAL_PORT) as u8);
                }
                POWER_EVENT_PORT..=POWER_EVENT_PORT_END
                | PANIC_PORT
                | POWER_CONTROL_PORT
                | RESET_CONTROL_PORT
                | KEYBOARD_COMMAND_PORT => lock(&self.power).read(port, value),
                _ => value.fill(0xff),
            }
        }
    }

    /// Carries out `data.len() / size` writes to a port; where no device is, nothing happens. Stops at the first that asks for something.
    pub(crate) fn write_port(&self, port: u16, size: usize, data: &[u8]) -> Option<PowerRequest> {
        for value in data.chunks_exact(size.max(1)) {
            match port {
                SERIAL_PORT..=SERIAL_PORT_END if size == 1 => {
                    lock(&self.serial).write((port - SERIAL_PORT) as u8, value[0]);
                }
                POWER_EVENT_PORT..=POWER_EVENT_PORT_END
                | PANIC_PORT
                | POWER_CONTROL_PORT
                | RESET_CONTROL_PORT
                | KEYBOARD_COMMAND_PORT => {
                    let request = self.change_power(|power| power.write(port, value));
                    if let Some(request) = request.filter(|request| self.is_news(*request)) {
                        return Some(request);
                    }
                }
                _ => {}
            }
        }
        None
    }

    /// Answers a read of an address where no memory is; where no device is either, all bits are one.
    pub(crate) fn read_address(&self, address: u64, data: &mut [u8]) {
        match self.device_at(address) {
            Some((device, offset)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Carries out a write to an address where no memory is; where no device is either, nothing happens.
    pub(crate) fn write_address(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.device_at(address) {
            device.write(offset, data);
        }
    }

    fn device_at(&self, address: u64) -> Option<(&MmioDevice, u64)> {
        let offset = address.checked_sub(virtio_slot(0).address)?;
        let device = self.virtio.get(usize::try_from(offset / VIRTIO_SLOT_BYTES).ok()?)?;
        Some((device, offset % VIRTIO_SLOT_BYTES))
    }

    /// Names of the virtio devices, in the order of the slots.
    pub(crate) fn virtio_names(&self) -> Vec<&str> {
        self.virtio.iter().map(MmioDevice::name).collect()
    }

    /// The virtio devices' names, with the versions in which their states would be saved now.
    pub(crate) fn virtio_versions(&self) -> Vec<(&str, u32)> {
        let version = |device| (MmioDevice::name(device), MmioDevice::state_version(device));
        self.virtio.iter().map(version).collect()
    }

    /// Sectors of each disk as the guest reads them, in the order of the slots.
    pub(crate) fn disk_sectors(&self) -> Vec<u64> {
        self.virtio.iter().filter_map(MmioDevice::disk_sectors).collect()
    }

    /// Gives the console input, as much as the port has room for; returns how many bytes it took. None while quiet.
    pub(crate) fn push_input(&self, bytes: &[u8]) -> usize {
        let mut serial = lock(&self.serial);
        // Under the lock: who made the devices quiet and then took the lock once knows that nothing follows.
        if self.quiet.load(Ordering::Acquire) {
            return 0;
        }
        serial.push_input(bytes)
    }

    /// Presses the power button of a machine that runs: its owner asks, so it is not being paused meanwhile.
    pub(crate) fn press_power_button(&self) -> ButtonPress {
        self.change_power(PowerControl::press_button)
    }

    /// Changes the power registers, and the interrupt line as they say. All under their lock: of two changes, the later one has the
    /// last word about the line.
    fn change_power<T>(&self, change: impl FnOnce(&mut PowerControl) -> T) -> T {
        let mut power = lock(&self.power);
        let before = power.interrupts();
        let result = change(&mut power);
        match (before, power.interrupts()) {
            (false, true) => self.lines.power.raise(),
            (true, false) => self.lines.power.lower(),
            _ => {}
        }
        result
    }

    /// The device with this name.
    pub(crate) fn virtio(&self, name: &str) -> Option<&MmioDevice> {
        self.virtio.iter().find(|device| device.name() == name)
    }

    /// Lets nothing in from outside any more and finishes what is in flight. When this returns, nothing is on its way.
    ///
    /// # Errors
    /// The device that has not come to rest by the deadline; the others rest. [`make_live`](Self::make_live) follows.
    pub(crate) fn make_quiet(&self, deadline: Instant) -> Result<(), Restless> {
        self.quiet.store(true, Ordering::Release);
        drop(lock(&self.serial));
        // All are asked before the first is waited for.
        self.virtio.iter().for_each(MmioDevice::ask_to_rest);
        match self.virtio.iter().find(|device| !device.rest(deadline)) {
            Some(device) => Err(Restless(device.name().to_owned())),
            None => Ok(()),
        }
    }

    /// Lets input in again.
    pub(crate) fn make_live(&self) {
        if self.arrived.swap(false, Ordering::AcqRel) {
            self.virtio.iter().for_each(MmioDevice::arrived);
        }
        self.virtio.iter().for_each(MmioDevice::go_on);
        self.quiet.store(false, Ordering::Release);
    }

    /// Has nothing announced: the machine is not the one whose state was restored, which may run where it was.
    pub(crate) fn stay_silent(&self) {
        self.arrived.store(false, Ordering::Release);
    }

    /// The state of all devices, which must be quiet, with the vCPUs standing still.
    pub(crate) fn save(&self) -> DevicesState {
        DevicesState {
            serial: lock(&self.serial).save(),
            power: lock(&self.power).save(),
            virtio: self
                .virtio
                .iter()
                .map(|device| (device.name().to_owned(), device.save()))
                .collect(),
        }
    }

    /// Replaces every device by one built from saved state. If any of it is wrong the machine is of no more use.
    ///
    /// An interrupt may be raised on the way: set the interrupt controllers after this.
    pub(crate) fn restore(&self, state: &DevicesState) -> Result<(), DeviceStateError> {
        let DevicesState { serial, power, virtio } = state;
        let (saved, ours): (Vec<_>, _) = (
            virtio.iter().map(|(name, _)| name.as_str()).collect(),
            self.virtio_names(),
        );
        if saved != ours {
            return Err(DeviceStateError::differs(
                "list of devices",
                saved.join(", "),
                ours.join(", "),
            ));
        }
        let serial = SerialPort::restore(serial, self.output.clone(), self.lines.serial.clone())?;
        let power = PowerControl::try_from(power)?;
        *lock(&self.serial) = serial;
        self.change_power(|current| *current = power);
        for (device, (_, state)) in self.virtio.iter().zip(virtio) {
            device.restore(state)?;
        }
        self.arrived.store(true, Ordering::Release);
        Ok(())
    }

    /// Sets every device back to power-on.
    pub(crate) fn reset(&self) {
        *lock(&self.serial) = SerialPort::new(self.output.clone(), self.lines.serial.clone());
        self.change_power(|power| *power = PowerControl::default());
        self.virtio.iter().for_each(MmioDevice::reset);
        self.panic_told.store(false, Ordering::Relaxed);
    }

    fn is_news(&self, request: PowerRequest) -> bool {
        request != PowerRequest::Panicked || !self.panic_told.swap(true, Ordering::Relaxed)
    }
}

impl std::fmt::Debug for Devices {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Devices")
            .field("quiet", &self.quiet)
            .finish_non_exhaustive()
    }
}

const SERIAL_PORT_END: u16 = SERIAL_PORT + 7;

/// A device is never left half changed by a panic: each access is one assignment after another of plain registers.
fn lock<T>(device: &Mutex<T>) -> MutexGuard<'_, T> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    struct Silence;

    impl ConsoleOutput for Silence {
        fn write(&mut self, _: &[u8]) {}
    }

    impl InterruptLine for Silence {
        fn raise(&self) {}

        fn lower(&self) {}
    }

    /// A line that can be looked at.
    #[derive(Default)]
    struct Level(AtomicBool);

    impl InterruptLine for Level {
        fn raise(&self) {
            self.0.store(true, Ordering::Relaxed);
        }

        fn lower(&self) {
            self.0.store(false, Ordering::Relaxed);
        }
    }

    fn devices() -> Devices {
        devices_with(Arc::new(Silence))
    }

    fn devices_with(power: Arc<dyn InterruptLine>) -> Devices {
        let serial = Arc::new(Silence);
        Devices::new(Box::new(Silence), Lines { serial, power }, Vec::new())
    }

    const POWER_ENABLE_PORT: u16 = POWER_EVENT_PORT + 2;
    const POWER_BUTTON: [u8; 2] = [0, 1];

    #[test]
    fn button_raises_the_line_until_the_guest_has_seen_to_it() {
        let level = Arc::new(Level::default());
        let devices = devices_with(level.clone());
        let mut seen = Vec::new();
        let mut look = || seen.push(level.0.load(Ordering::Relaxed));

        devices.write_port(POWER_ENABLE_PORT, 2, &POWER_BUTTON);
        look();
        assert_eq!(devices.press_power_button(), ButtonPress::Told);
        look();
        devices.write_port(POWER_ENABLE_PORT, 2, &[0, 0]);
        look();
        devices.write_port(POWER_ENABLE_PORT, 2, &POWER_BUTTON);
        look();
        devices.write_port(POWER_EVENT_PORT, 2, &POWER_BUTTON);
        look();

        assert_eq!(seen, [false, true, false, true, false]);
    }

    #[test]
    fn line_is_as_the_restored_state_says_and_low_after_a_reset() {
        let pressed = devices();
        pressed.write_port(POWER_ENABLE_PORT, 2, &POWER_BUTTON);
        assert_eq!(pressed.press_power_button(), ButtonPress::Told);
        let level = Arc::new(Level::default());
        let devices = devices_with(level.clone());

        devices.restore(&pressed.save()).expect("a machine's state");
        assert!(level.0.load(Ordering::Relaxed));
        devices.reset();
        assert!(!level.0.load(Ordering::Relaxed));
    }

    #[test]
    fn unknown_ports_read_all_ones() {
        let mut data = [0; 6];
        devices().read_port(0x1234, 2, &mut data);
        assert_eq!(data, [0xff; 6]);
    }

    #[test]
    fn quiet_devices_take_no_input() {
        let devices = devices();
        assert_eq!(devices.push_input(b"abc"), 0);
        devices.make_live();
        assert_eq!(devices.push_input(b"abc"), 3);
        devices.make_quiet(Instant::now()).expect("nothing in flight");
        assert_eq!(devices.push_input(b"d"), 0);
        assert_eq!(devices.save().serial.received, b"abc");
    }

    #[test]
    fn panic_is_told_once_until_a_reset() {
        let devices = devices();
        assert_eq!(devices.write_port(PANIC_PORT, 1, &[1]), Some(PowerRequest::Panicked));
        assert_eq!(devices.write_port(PANIC_PORT, 1, &[1]), None);
        devices.reset();
        assert_eq!(devices.write_port(PANIC_PORT, 1, &[1]), Some(PowerRequest::Panicked));
    }

    #[test]
    fn wrong_state_changes_no_device() {
        let devices = devices();
        devices.write_port(SERIAL_PORT + 7, 1, &[0x5a]);
        let before = devices.save();
        let mut wrong = before.clone();
        wrong.serial.scratch = 1;
        wrong.power.reset_control = 256;
        assert!(devices.restore(&wrong).is_err());
        assert_eq!(devices.save(), before);
    }

    proptest! {
        /// The law of every device: save, restore, save again gives the same.
        #[test]
        fn saved_state_survives_a_restore(
            writes in proptest::collection::vec((0usize..14, any::<u8>()), 0..40),
            presses in 0usize..2,
            input in proptest::collection::vec(any::<u8>(), 0..80),
        ) {
            let ports: Vec<u16> = (SERIAL_PORT..=SERIAL_PORT_END).chain([PANIC_PORT, POWER_CONTROL_PORT, RESET_CONTROL_PORT, KEYBOARD_COMMAND_PORT, POWER_EVENT_PORT, POWER_ENABLE_PORT]).collect();
            let devices = devices();
            devices.make_live();
            for (port, value) in writes {
                let size = if (POWER_EVENT_PORT..=POWER_CONTROL_PORT).contains(&ports[port]) { 2 } else { 1 };
                let _ = devices.write_port(ports[port], size, &[value; 2][..size]);
            }
            for _ in 0..presses {
                let _ = devices.press_power_button();
            }
            let _ = devices.push_input(&input);
            devices.make_quiet(Instant::now()).expect("nothing in flight");
            let state = devices.save();
            let other = self::devices();
            other.restore(&state).expect("own state");
            prop_assert_eq!(other.save(), state);
        }
    }
}
