//! The saved form of the power control: schema "ferry.power", version 1.

use ferry_proto::state::v1 as saved;

use super::super::DeviceStateError;
use super::device::PowerControl;

impl PowerControl {
    /// The registers.
    pub(crate) fn save(&self) -> saved::Power {
        let Self { reset_control } = self;
        saved::Power {
            reset_control: u32::from(*reset_control),
        }
    }
}

impl TryFrom<&saved::Power> for PowerControl {
    type Error = DeviceStateError;

    fn try_from(saved: &saved::Power) -> Result<Self, DeviceStateError> {
        let saved::Power { reset_control } = saved;
        let reset_control = u8::try_from(*reset_control).map_err(|_| DeviceStateError::above("reset_control", u64::from(*reset_control), 255u64))?;
        Ok(Self { reset_control })
    }
}
