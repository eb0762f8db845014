//! What a relay does to what passes through it.

use std::ops::RangeInclusive;

use crate::messages::{Observer, Speaker};

/// What the relay does to what passes. It does it once and is honest from then on, unless it says otherwise.
#[derive(Clone)]
pub enum Tampering {
    /// Nothing.
    None,
    /// The caller's RPC version becomes one of another major number.
    RpcVersion,
    /// The request to prepare a guest is held back until [`Relay::release`](crate::Relay::release), and whatever the caller says after it.
    HoldPrepare,
    /// The answer to that request is held back until [`Relay::release`](crate::Relay::release), and whatever the peer says after it.
    HoldPrepared,
    /// The first message of a control stream that says this.
    Message {
        /// Which control stream: the index of the one of late pages, or none for the one of the first link.
        stream: Option<u16>,
        /// Who says it.
        by: Speaker,
        /// What it says, by the number of its field.
        field: u32,
        /// What becomes of it, without magic number and length; of equal length.
        change: fn(&mut [u8]),
    },
    /// Header and table of one frame of one page stream. Over gRPC, of the first one from there on that comes by in one piece.
    Frame {
        /// The stream's index.
        stream: u16,
        /// Frames of the stream before it.
        number: u64,
        /// What becomes of it, of equal length.
        change: fn(&mut [u8]),
    },
    /// The pages of frames of some page streams, where there are any.
    Pages {
        /// The streams' indexes. Those of late pages, and before them their control stream, come after the others.
        streams: RangeInclusive<u16>,
        /// Frames of each stream before the first one.
        number: u64,
        /// Of how many frames of each: the rest is honest. With none, of all.
        frames: Option<u64>,
        /// What becomes of a page, of equal length.
        change: fn(&mut [u8]),
    },
    /// Nothing, until this comes by on one stream: then streams are cut.
    CutsAt {
        /// The stream's index, as for [`Tampering::Pages`].
        stream: u16,
        /// What comes by.
        at: CutPoint,
        /// What is cut.
        cut: Cut,
    },
    /// Nothing. Page streams come by, and can be [cut](crate::Relay::cut).
    Cuts,
    /// Each message of the control stream is looked at, in both directions and as long as the relay lives.
    Messages(Observer),
}

/// What a relay waits for before it cuts.
#[derive(Clone, Copy, Debug)]
pub enum CutPoint {
    /// The destination asks for pages: its frame is not passed on.
    Asked,
    /// The source sent so many frames, the first one that opens the stream: the next one is not passed on.
    Frames(u64),
    /// The destination says this on a control stream, by the number of its field: it is not passed on.
    Said(u32),
}

/// What a relay cuts.
#[derive(Clone, Debug)]
pub enum Cut {
    /// Every stream, and no other is let through until [`Relay::heal`](crate::Relay::heal).
    All,
    /// These, by their indexes; others are let through.
    Streams(RangeInclusive<u16>),
}
