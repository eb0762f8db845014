//! The saved form of the disk: schema "ferry.virtio-blk", version 1. The disk itself is not in it, only what it must be like.

use ferry_proto::state::v1 as saved;
use prost::Message;

use super::super::super::DeviceStateError;
use crate::machine::DiskAccess;

pub(super) fn to_saved(sectors: u64, access: DiskAccess, serial: &str) -> Vec<u8> {
    saved::VirtioBlock {
        sectors,
        readonly: access == DiskAccess::ReadOnly,
        serial: serial.to_owned(),
    }
    .encode_to_vec()
}

/// Whether the saved disk fits the one that is here; gives its sectors and its serial number, which stay the guest's. An image that was made larger
/// while its guest ran holds the disk that the guest knows.
pub(super) fn check(bytes: &[u8], sectors: u64, access: DiskAccess) -> Result<(u64, String), DeviceStateError> {
    let Ok(saved::VirtioBlock {
        sectors: saved,
        readonly,
        serial,
    }) = saved::VirtioBlock::decode(bytes)
    else {
        return Err(DeviceStateError::Undecodable("the disk"));
    };
    if saved == 0 || saved > sectors {
        return Err(DeviceStateError::above("number of the disk's sectors", saved, sectors));
    }
    let writable = access == DiskAccess::ReadWrite;
    if readonly == writable {
        return Err(DeviceStateError::differs(
            "whether the disk may be written",
            !readonly,
            writable,
        ));
    }
    Ok((saved, serial))
}
