//! How a running guest moves from one host to another.
//!
//! [`source::run`] and [`destination::run`] are the two ends of one migration: blocking calls over sockets that their
//! agents opened and authenticated. What they ask of a guest is in [`guest`]; who decides is in [`handover`].

#![forbid(unsafe_code)]

mod compress;
pub mod destination;
mod digest;
mod error_chain;
#[cfg(any(fuzzing, test))]
pub mod fuzz;
pub mod guest;
pub mod handover;
mod link;
pub mod policy;
pub mod postcopy;
mod precopy;
pub mod source;
mod verify;
mod wire;
mod yielding;

pub use compress::{
    Codec, Compression, Method, ParseCompressionError, Tally, foresee, foresee_deltas, most_copies, try_out,
};
pub use compress::{Packed, Sampled as SampledWay, Watched};
pub use error_chain::error_chain;
pub use link::{Link, Liveness};
pub use precopy::PageSet;
pub use wire::{ControlError, FrameError, OLDEST_PROTOCOL, PROTOCOL, StreamTotals, shorten};
