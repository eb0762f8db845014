//! Pages travel compressed where that pays.
//!
//! Each frame says for itself whether its pages are compressed and how (`docs/wire.md`). What its user wants is a [`Compression`]; whether, and how, the next
//! frame is compressed where that is left to Ferry is the [`controller::Controller`]'s decision, a pure function over what was measured. Pages are copied out of guest
//! memory before: no library may be handed bytes that the guest writes meanwhile. What is sent again is told by what it changed, where that is less ([`delta`]).

mod codec;
mod controller;
mod delta;
mod measure;
mod packing;
mod unpack;
mod ways;
mod worth;

pub(crate) use codec::{COMPRESSED_SUM_BYTES, Codecs, Compressor, How, OF_DELTAS, PackedFrame};
pub use codec::{Codec, Compression, Method, ParseCompressionError};
pub(crate) use controller::Plan;
pub use delta::most_copies;
pub(crate) use delta::{Extent, SentPages, apply_delta};
pub(crate) use measure::Measured;
pub use measure::Sampled;
pub use packing::Tally;
pub(crate) use packing::{GuestIs, Packing};
pub(crate) use unpack::{Block, Decompressor};
pub use ways::{Packed, Watched, foresee, foresee_deltas, try_out};
