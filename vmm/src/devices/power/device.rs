//! The registers behind those ports.

use crate::arch::x86_64::layout::{
    KEYBOARD_COMMAND_PORT, PANIC_PORT, POWER_CONTROL_PORT, POWER_EVENT_PORT, RESET_CONTROL_PORT,
};

/// What the guest asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PowerRequest {
    /// Start again.
    Reset,
    /// Switch off.
    PowerOff,
    /// Nothing; it says that it panicked.
    Panicked,
}

/// All ports that concern power. Two registers keep a value: the reset control, and which events are enabled.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct PowerControl {
    pub(super) reset_control: u8,
    /// Nothing happens that could be told; a guest checks that what it enables stays enabled.
    pub(super) enabled_events: u16,
}

/// Where events are enabled; the two bytes before it say which have happened.
const EVENT_ENABLE_PORT: u16 = POWER_EVENT_PORT + 2;

/// The events that ACPI knows: timer, global lock, power button, sleep button, clock.
pub(super) const EVENTS: u16 = 1 << 0 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 10;

/// Bit of the reset control register that carries out the reset; bits 1 and 3 say which kind and are only kept.
const RESET_NOW: u8 = 1 << 2;
const RESET_KIND: u8 = 1 << 1 | 1 << 3;

/// The keyboard controller's command that pulses the processor's reset line.
const PULSE_RESET: u8 = 0xfe;

/// Sleep enable in the power management control register.
const SLEEP_ENABLE: u16 = 1 << 13;

/// In the same register: the machine is in ACPI mode, always.
const ACPI_MODE: u16 = 1 << 0;

/// The panic device's one event, offered and reported with the same bit.
const PANICKED: u8 = 1;

impl PowerControl {
    /// Answers a read; bytes that no register covers are all ones.
    pub(crate) fn read(&self, port: u16, value: &mut [u8]) {
        value.fill(0xff);
        match (port, value) {
            (RESET_CONTROL_PORT, [first, ..]) => *first = self.reset_control,
            (PANIC_PORT, [first, ..]) => *first = PANICKED,
            (POWER_CONTROL_PORT, value) => copy(&ACPI_MODE.to_le_bytes(), value),
            (POWER_EVENT_PORT, value) => {
                let [low, high] = self.enabled_events.to_le_bytes();
                copy(&[0, 0, low, high], value);
            }
            (EVENT_ENABLE_PORT, value) => copy(&self.enabled_events.to_le_bytes(), value),
            // Ready for a command: a guest that is to reset the machine by one waits for that.
            (KEYBOARD_COMMAND_PORT, [first, ..]) => *first = 0,
            _ => {}
        }
    }

    /// Carries out a write and says what the guest asked for by it.
    pub(crate) fn write(&mut self, port: u16, value: &[u8]) -> Option<PowerRequest> {
        match (port, value) {
            (RESET_CONTROL_PORT, [value]) => {
                self.reset_control = value & RESET_KIND;
                (value & RESET_NOW != 0).then_some(PowerRequest::Reset)
            }
            (KEYBOARD_COMMAND_PORT, [PULSE_RESET]) => Some(PowerRequest::Reset),
            (POWER_CONTROL_PORT, [low, high]) => {
                let value = u16::from_le_bytes([*low, *high]);
                (value & SLEEP_ENABLE != 0).then_some(PowerRequest::PowerOff)
            }
            (PANIC_PORT, [value]) => (value & PANICKED != 0).then_some(PowerRequest::Panicked),
            (EVENT_ENABLE_PORT, [low, high]) => {
                self.enabled_events = u16::from_le_bytes([*low, *high]) & EVENTS;
                None
            }
            _ => None,
        }
    }
}

/// As much of a register as was asked for.
fn copy(register: &[u8], value: &mut [u8]) {
    for (byte, register) in value.iter_mut().zip(register) {
        *byte = *register;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reset_needs_its_bit() {
        let mut power = PowerControl::default();
        assert_eq!(power.write(RESET_CONTROL_PORT, &[0x02]), None);
        assert_eq!(power.write(RESET_CONTROL_PORT, &[0x06]), Some(PowerRequest::Reset));
        assert_eq!(power.write(RESET_CONTROL_PORT, &[0x0e]), Some(PowerRequest::Reset));
        assert_eq!(power.write(KEYBOARD_COMMAND_PORT, &[0xfe]), Some(PowerRequest::Reset));
        assert_eq!(power.write(KEYBOARD_COMMAND_PORT, &[0xd1]), None);
    }

    #[test]
    fn switching_off_takes_a_word() {
        let mut power = PowerControl::default();
        assert_eq!(
            power.write(POWER_CONTROL_PORT, &[0x00, 0x20]),
            Some(PowerRequest::PowerOff)
        );
        assert_eq!(power.write(POWER_CONTROL_PORT, &[0x20]), None);
    }

    #[test]
    fn enabled_events_stay_enabled() {
        let mut power = PowerControl::default();
        assert_eq!(power.write(POWER_EVENT_PORT + 2, &[0x20, 0xff]), None);
        let (mut word, mut both) = ([0; 2], [0xff; 4]);
        power.read(POWER_EVENT_PORT + 2, &mut word);
        power.read(POWER_EVENT_PORT, &mut both);
        assert_eq!((word, both), ([0x20, 0x07], [0, 0, 0x20, 0x07]));
    }

    #[test]
    fn keyboard_controller_is_ready_for_the_reset() {
        let mut value = [0xff];
        PowerControl::default().read(KEYBOARD_COMMAND_PORT, &mut value);
        assert_eq!(value, [0]);
    }

    #[test]
    fn panic_port_offers_its_event() {
        let mut value = [0];
        PowerControl::default().read(PANIC_PORT, &mut value);
        assert_eq!(value, [1]);
    }
}
