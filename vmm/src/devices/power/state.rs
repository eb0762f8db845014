//! The saved form of the power control: schema "ferry.power", version 1.

use ferry_proto::state::v1 as saved;

use super::super::DeviceStateError;
use super::device::{EVENTS, POWER_BUTTON, PowerControl};

impl PowerControl {
    /// The registers.
    pub(crate) fn save(&self) -> saved::Power {
        let Self {
            reset_control,
            pending_events,
            enabled_events,
        } = self;
        saved::Power {
            reset_control: u32::from(*reset_control),
            enabled_events: u32::from(*enabled_events),
            pending_events: u32::from(*pending_events),
        }
    }
}

impl TryFrom<&saved::Power> for PowerControl {
    type Error = DeviceStateError;

    fn try_from(saved: &saved::Power) -> Result<Self, DeviceStateError> {
        let saved::Power {
            reset_control,
            enabled_events,
            pending_events,
        } = saved;
        let reset_control = u8::try_from(*reset_control)
            .map_err(|_| DeviceStateError::above("reset_control", *reset_control, 255u64))?;
        Ok(Self {
            reset_control,
            pending_events: events("pending_events", *pending_events, POWER_BUTTON)?,
            enabled_events: events("enabled_events", *enabled_events, EVENTS)?,
        })
    }
}

/// Events, of which only these can be.
fn events(field: &'static str, saved: u32, possible: u16) -> Result<u16, DeviceStateError> {
    u16::try_from(saved)
        .ok()
        .filter(|events| events & !possible == 0)
        .ok_or_else(|| DeviceStateError::above(field, saved, possible))
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;

    /// States of version 1, which restore for ever: of a guest that asked for a kind of reset and enabled the global lock's event
    /// when there was no power button, and of one whose button is pressed.
    const VERSION_1: [&[u8]; 2] = [
        &[0x08, 0x02, 0x10, 0x20],
        &[0x08, 0x02, 0x10, 0xa0, 0x02, 0x18, 0x80, 0x02],
    ];

    #[test]
    fn states_of_version_1_restore_and_are_saved_as_they_were() {
        for golden in VERSION_1 {
            let saved = saved::Power::decode(golden).expect("of the schema");
            let power = PowerControl::try_from(&saved).expect("possible");
            assert_eq!(power.save().encode_to_vec(), golden);
        }
    }

    #[test]
    fn state_without_a_button_is_of_one_that_is_not_pressed() {
        let saved = saved::Power::decode(VERSION_1[0]).expect("of the schema");
        let power = PowerControl::try_from(&saved).expect("possible");
        assert_eq!((power.pending_events, power.interrupts()), (0, false));
    }

    #[test]
    fn event_that_never_happens_is_refused() {
        for pending_events in [1, 1 << 8 | 1 << 5, 1 << 16, u32::MAX] {
            let saved = saved::Power {
                pending_events,
                ..Default::default()
            };
            let error = PowerControl::try_from(&saved).expect_err("impossible");
            assert!(error.to_string().starts_with("pending_events"), "{error}");
        }
    }
}
