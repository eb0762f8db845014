//! How an agent and a VMM talk: frames over a Unix socket, with descriptors.
//!
//! A frame is a length (u32, little-endian) and a protobuf message of that length. Descriptors travel with the first
//! byte of a frame (SCM_RIGHTS), so that they cannot be taken for another frame's.

mod frame;
mod versions;

pub(crate) use frame::{ChannelError, MAX_MESSAGE, receive, send};
pub(crate) use versions::brought_by;
