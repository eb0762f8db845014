//! The saved form of the balloon: schema "ferry.virtio-balloon", version 1, and 2 once its driver has taken hints.
//!
//! What a driver was asked is not saved, but for the last id: whoever asked is not where the guest goes.

use ferry_proto::state::v1 as saved;
use prost::Message;

use super::super::super::DeviceStateError;

pub(super) fn to_saved(wanted: u32, actual: u32, last_hint_id: u32) -> Vec<u8> {
    saved::VirtioBalloon {
        wanted_pages: wanted,
        actual_pages: actual,
        last_hint_id,
    }
    .encode_to_vec()
}

pub(super) fn from_saved(bytes: &[u8]) -> Result<(u32, u32, u32), DeviceStateError> {
    let saved::VirtioBalloon {
        wanted_pages,
        actual_pages,
        last_hint_id,
    } = saved::VirtioBalloon::decode(bytes).map_err(|_| DeviceStateError::Undecodable("the balloon"))?;
    Ok((wanted_pages, actual_pages, last_hint_id))
}
