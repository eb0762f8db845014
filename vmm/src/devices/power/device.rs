//! The registers behind those ports.

use crate::arch::x86_64::layout::{
    KEYBOARD_COMMAND_PORT, PANIC_PORT, POWER_CONTROL_PORT, POWER_EVENT_PORT, POWER_EVENT_PORT_END, RESET_CONTROL_PORT,
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

/// What became of a press of the power button.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "a guest may have no ear for it"]
pub enum ButtonPress {
    /// The guest is told.
    Told,
    /// The guest has not enabled the button's event, for it has no ACPI, no driver for the button, or none yet: nothing happens, now or
    /// later.
    NobodyListens,
}

/// All ports that concern power. Three registers keep a value: the reset control, which events have happened, and which are enabled.
///
/// Events (ACPI 6.5, 4.8.3.1): what has happened stays in the status register until the guest writes a one to its bit; while a bit is
/// set in both registers, ACPI's interrupt line is raised.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct PowerControl {
    pub(super) reset_control: u8,
    /// The power button or none: nothing else happens.
    pub(super) pending_events: u16,
    /// All events that there are: a guest checks that what it enables stays enabled.
    pub(super) enabled_events: u16,
}

/// Where events are enabled; the two bytes before it say which have happened.
const EVENT_ENABLE_PORT: u16 = POWER_EVENT_PORT + 2;

/// The events that ACPI knows: timer, global lock, power button, sleep button, clock.
pub(super) const EVENTS: u16 = 1 << 0 | 1 << 5 | POWER_BUTTON | 1 << 9 | 1 << 10;

/// PWRBTN_STS and PWRBTN_EN, the only event that happens here.
pub(super) const POWER_BUTTON: u16 = 1 << 8;

/// Bit of the reset control register that carries out the reset; bits 1 and 3 say which kind and are only kept.
const RESET_NOW: u8 = 1 << 2;
const RESET_KIND: u8 = 1 << 1 | 1 << 3;

/// The keyboard controller's command that pulses the processor's reset line.
const PULSE_RESET: u8 = 0xfe;

/// Sleep enable in the power management control register.
const SLEEP_ENABLE: u16 = 1 << 13;

/// SCI_EN in the same register: the machine is in ACPI mode, always, so events raise ACPI's interrupt and no other.
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
            (POWER_EVENT_PORT..=POWER_EVENT_PORT_END, value) => {
                let registers = [self.pending_events.to_le_bytes(), self.enabled_events.to_le_bytes()].concat();
                copy(&registers[usize::from(port - POWER_EVENT_PORT)..], value);
            }
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
            (POWER_EVENT_PORT..=POWER_EVENT_PORT_END, value) => {
                for (port, byte) in (port..=POWER_EVENT_PORT_END).zip(value) {
                    self.write_event_byte(port, *byte);
                }
                None
            }
            _ => None,
        }
    }

    /// A guest may take the event registers in bytes, in words, or both at once.
    fn write_event_byte(&mut self, port: u16, byte: u8) {
        let shift = 8 * (port - POWER_EVENT_PORT) % 16;
        let bits = u16::from(byte) << shift;
        if port < EVENT_ENABLE_PORT {
            self.pending_events &= !bits;
        } else {
            self.enabled_events = (self.enabled_events & !(0xff << shift) | bits) & EVENTS;
        }
    }

    /// Presses the power button, if the guest listens. Left pending for one that does not, the press would be found whenever a guest
    /// comes to listen, perhaps long after whoever pressed was told that nothing came of it.
    pub(crate) fn press_button(&mut self) -> ButtonPress {
        if self.enabled_events & POWER_BUTTON == 0 {
            return ButtonPress::NobodyListens;
        }
        self.pending_events |= POWER_BUTTON;
        ButtonPress::Told
    }

    /// Whether ACPI's interrupt line is to be raised.
    pub(crate) fn interrupts(&self) -> bool {
        self.pending_events & self.enabled_events != 0
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

    /// Listens to the button, which is then pressed.
    fn pressed() -> PowerControl {
        let mut power = PowerControl::default();
        power.write(EVENT_ENABLE_PORT, &POWER_BUTTON.to_le_bytes());
        assert_eq!(power.press_button(), ButtonPress::Told);
        power
    }

    fn read<const N: usize>(power: &PowerControl, port: u16) -> [u8; N] {
        let mut value = [0xaa; N];
        power.read(port, &mut value);
        value
    }

    #[test]
    fn button_is_pressed_only_for_a_guest_that_listens() {
        let mut power = PowerControl::default();
        power.write(EVENT_ENABLE_PORT, &(EVENTS & !POWER_BUTTON).to_le_bytes());
        assert_eq!(power.press_button(), ButtonPress::NobodyListens);
        power.write(EVENT_ENABLE_PORT, &EVENTS.to_le_bytes());
        assert!(!power.interrupts(), "nothing of the press may be left");
    }

    #[test]
    fn pressed_button_is_seen_in_every_width() {
        let power = pressed();
        assert_eq!(read(&power, 0x600), [0, 1]);
        assert_eq!(read(&power, 0x601), [1]);
        assert_eq!(read(&power, 0x603), [1]);
        assert_eq!(read(&power, 0x600), [0, 1, 0, 1]);
        assert_eq!(
            read(&power, 0x602),
            [0, 1, 0xff, 0xff],
            "nothing is behind the registers"
        );
    }

    #[test]
    fn status_is_cleared_by_a_one_and_by_nothing_else() {
        let mut power = pressed();
        for zeroes in [&[0xff, 0xfe][..], &[0xff], &[0, 0]] {
            power.write(POWER_EVENT_PORT, zeroes);
            assert!(power.interrupts(), "{zeroes:?}");
        }
        power.write(POWER_EVENT_PORT, &[0, 1]);
        assert!(!power.interrupts());
        assert_eq!(read(&power, POWER_EVENT_PORT), [0, 0, 0, 1], "it stays enabled");
    }

    #[test]
    fn bytes_of_the_registers_are_written_one_by_one() {
        let mut power = pressed();
        power.write(0x602, &[0x20]);
        assert_eq!(read(&power, 0x602), [0x20, 1], "the other byte stays");
        power.write(0x601, &[1]);
        assert!(!power.interrupts());
        power.write(0x603, &[0]);
        assert_eq!(read(&power, 0x602), [0x20, 0]);
    }

    #[test]
    fn both_registers_are_written_at_once() {
        let mut power = pressed();
        power.write(POWER_EVENT_PORT, &[0, 1, 0x21, 0]);
        assert_eq!(read(&power, POWER_EVENT_PORT), [0, 0, 0x21, 0]);
    }

    #[test]
    fn event_that_is_not_enabled_waits_without_an_interrupt() {
        let mut power = pressed();
        power.write(EVENT_ENABLE_PORT, &[0, 0]);
        assert!(!power.interrupts());
        assert_eq!(read(&power, POWER_EVENT_PORT), [0, 1]);
        power.write(EVENT_ENABLE_PORT, &[0, 1]);
        assert!(power.interrupts());
    }

    #[test]
    fn machine_is_in_acpi_mode_whatever_the_guest_writes() {
        let mut power = PowerControl::default();
        assert_eq!(power.write(POWER_CONTROL_PORT, &[0, 0]), None);
        assert_eq!(read(&power, POWER_CONTROL_PORT), [1, 0]);
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
