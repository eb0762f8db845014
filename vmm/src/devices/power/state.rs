//! The saved form of the power control: schema "ferry.power", version 1.

use ferry_proto::state::v1 as saved;

use super::super::DeviceStateError;
use super::device::{EVENTS, PowerControl};

impl PowerControl {
    /// The registers.
    pub(crate) fn save(&self) -> saved::Power {
        let Self {
            reset_control,
            enabled_events,
        } = self;
        saved::Power {
            reset_control: u32::from(*reset_control),
            enabled_events: u32::from(*enabled_events),
        }
    }
}

impl TryFrom<&saved::Power> for PowerControl {
    type Error = DeviceStateError;

    fn try_from(saved: &saved::Power) -> Result<Self, DeviceStateError> {
        let saved::Power {
            reset_control,
            enabled_events,
        } = saved;
        let reset_control = u8::try_from(*reset_control)
            .map_err(|_| DeviceStateError::above("reset_control", *reset_control, 255u64))?;
        let enabled_events = u16::try_from(*enabled_events)
            .ok()
            .filter(|events| events & !EVENTS == 0)
            .ok_or_else(|| DeviceStateError::above("enabled_events", *enabled_events, EVENTS))?;
        Ok(Self {
            reset_control,
            enabled_events,
        })
    }
}
