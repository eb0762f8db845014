//! The saved form of the card: schema "ferry.virtio-net", version 1.

use ferry_proto::state::v1 as saved;
use prost::Message;

use super::super::super::DeviceStateError;

pub(super) fn to_saved(mac: [u8; 6], announce: bool) -> Vec<u8> {
    saved::VirtioNet {
        mac: mac.to_vec(),
        announce,
    }
    .encode_to_vec()
}

pub(super) fn from_saved(bytes: &[u8]) -> Result<([u8; 6], bool), DeviceStateError> {
    let saved::VirtioNet { mac, announce } =
        saved::VirtioNet::decode(bytes).map_err(|_| DeviceStateError::Undecodable("the network card"))?;
    let mac = <[u8; 6]>::try_from(mac.as_slice())
        .map_err(|_| DeviceStateError::differs("length of the card's address", mac.len(), 6))?;
    Ok((mac, announce))
}

/// The saved card with another address. What it was to announce, it would have announced under the one that it had.
pub(in super::super) fn with_mac(bytes: &[u8], mac: [u8; 6]) -> Result<Vec<u8>, DeviceStateError> {
    from_saved(bytes)?;
    Ok(to_saved(mac, false))
}
