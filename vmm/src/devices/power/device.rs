//! The registers behind those ports.

use crate::arch::x86_64::layout::{KEYBOARD_COMMAND_PORT, PANIC_PORT, POWER_CONTROL_PORT, RESET_CONTROL_PORT};

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

/// All ports that concern power. The only register that keeps a value is the reset control.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct PowerControl {
    pub(super) reset_control: u8,
}

/// Bit of the reset control register that carries out the reset; bits 1 and 3 say which kind and are only kept.
const RESET_NOW: u8 = 1 << 2;
const RESET_KIND: u8 = 1 << 1 | 1 << 3;

/// The keyboard controller's command that pulses the processor's reset line.
const PULSE_RESET: u8 = 0xfe;

/// Sleep enable in the power management control register.
const SLEEP_ENABLE: u16 = 1 << 13;

/// The panic device's one event, offered and reported with the same bit.
const PANICKED: u8 = 1;

impl PowerControl {
    /// Answers a read; bytes that no register covers are all ones.
    pub(crate) fn read(&self, port: u16, value: &mut [u8]) {
        value.fill(0xff);
        match (port, value) {
            (RESET_CONTROL_PORT, [first, ..]) => *first = self.reset_control,
            (PANIC_PORT, [first, ..]) => *first = PANICKED,
            (POWER_CONTROL_PORT, value) => value.fill(0),
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
            _ => None,
        }
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
    fn panic_port_offers_its_event() {
        let mut value = [0];
        PowerControl::default().read(PANIC_PORT, &mut value);
        assert_eq!(value, [1]);
    }
}
