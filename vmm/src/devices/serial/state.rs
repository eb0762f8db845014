//! The saved form of the serial port: schema "ferry.serial16550", version 1.

use ferry_proto::state::v1 as saved;
use vm_superio::SerialState;

use super::super::DeviceStateError;

/// Received bytes that the port has room for.
pub(super) const RECEIVE_LIMIT: usize = 64;

pub(super) fn to_saved(state: &SerialState) -> saved::Serial {
    let SerialState {
        baud_divisor_low,
        baud_divisor_high,
        interrupt_enable,
        interrupt_identification,
        line_control,
        line_status,
        modem_control,
        modem_status,
        scratch,
        in_buffer,
    } = state;
    saved::Serial {
        baud_divisor_low: u32::from(*baud_divisor_low),
        baud_divisor_high: u32::from(*baud_divisor_high),
        interrupt_enable: u32::from(*interrupt_enable),
        interrupt_identification: u32::from(*interrupt_identification),
        line_control: u32::from(*line_control),
        line_status: u32::from(*line_status),
        modem_control: u32::from(*modem_control),
        modem_status: u32::from(*modem_status),
        scratch: u32::from(*scratch),
        received: in_buffer.clone(),
    }
}

pub(super) fn from_saved(saved: &saved::Serial) -> Result<SerialState, DeviceStateError> {
    let saved::Serial {
        baud_divisor_low,
        baud_divisor_high,
        interrupt_enable,
        interrupt_identification,
        line_control,
        line_status,
        modem_control,
        modem_status,
        scratch,
        received,
    } = saved;
    if received.len() > RECEIVE_LIMIT {
        return Err(DeviceStateError::above(
            "number of received bytes",
            received.len() as u64,
            RECEIVE_LIMIT as u64,
        ));
    }
    let byte = |field, value: u32| u8::try_from(value).map_err(|_| DeviceStateError::above(field, value, 255u64));
    Ok(SerialState {
        baud_divisor_low: byte("baud_divisor_low", *baud_divisor_low)?,
        baud_divisor_high: byte("baud_divisor_high", *baud_divisor_high)?,
        interrupt_enable: byte("interrupt_enable", *interrupt_enable)?,
        interrupt_identification: byte("interrupt_identification", *interrupt_identification)?,
        line_control: byte("line_control", *line_control)?,
        line_status: byte("line_status", *line_status)?,
        modem_control: byte("modem_control", *modem_control)?,
        modem_status: byte("modem_status", *modem_status)?,
        scratch: byte("scratch", *scratch)?,
        in_buffer: received.clone(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn register_wider_than_a_byte_is_refused() {
        let wrong = saved::Serial {
            line_control: 256,
            ..to_saved(&SerialState::default())
        };
        let error = from_saved(&wrong).expect_err("too wide");
        assert!(error.to_string().starts_with("line_control"), "{error}");
    }

    #[test]
    fn more_input_than_fits_is_refused() {
        let wrong = saved::Serial {
            received: vec![0; 65],
            ..to_saved(&SerialState::default())
        };
        assert!(from_saved(&wrong).is_err());
    }
}
