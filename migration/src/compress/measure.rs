//! What one frame tells of the link and of the ways to compress.

use std::time::Duration;

use super::Method;

/// Pages that were compressed and not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sampled {
    /// How.
    pub method: Method,
    /// Bytes of pages.
    pub bytes: u64,
    /// What they became; no more than they were.
    pub packed: u64,
    /// The processor time that it took.
    pub took: Duration,
}

impl Sampled {
    /// Of this way nothing is known yet.
    pub(super) fn nothing(method: Method) -> Self {
        Self {
            method,
            bytes: 0,
            packed: 0,
            took: Duration::ZERO,
        }
    }

    pub(super) fn add(&mut self, other: &Self) {
        self.bytes += other.bytes;
        self.packed += other.packed;
        self.took += other.took;
    }
}

/// A frame that was sent while the guest may run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Measured {
    /// Bytes of pages that are not zero.
    pub(crate) bytes: u64,
    /// What was sent of them.
    pub(crate) sent: u64,
    /// How they were compressed, or were tried to be.
    pub(crate) method: Option<Method>,
    /// Pages of which there were copies, and those that were told by what they changed.
    pub(crate) copies: u64,
    pub(crate) deltas: u64,
    /// How long compressing took, and what of it was processor time. The rest is the host's, and no matter of the way.
    pub(crate) compressing: Duration,
    pub(crate) worked: Duration,
    /// How long the connection took them, and the wait for what the user's cap allows.
    pub(crate) sending: Duration,
    pub(crate) sampled: Option<Sampled>,
    /// How many streams there are.
    pub(crate) streams: u32,
    /// The user's cap on all of them, in bytes a second.
    pub(crate) cap: Option<f64>,
}
