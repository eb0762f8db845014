//! How a running guest moves from one host to another.
//!
//! [`source::run`] is the source's end of one migration: a blocking call over sockets that the agents opened and
//! authenticated. What it asks of a guest is in [`guest`]; who decides is in [`handover`].

#![forbid(unsafe_code)]

mod digest;
pub mod guest;
pub mod handover;
mod link;
pub mod policy;
mod precopy;
pub mod source;
mod wire;

pub use link::{Link, Liveness};
pub use precopy::PageSet;
pub use wire::{ControlError, FrameError, OLDEST_PROTOCOL, PROTOCOL, StreamTotals};
