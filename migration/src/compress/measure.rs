//! What one frame tells of the link and of the ways to compress.

use std::time::Duration;

use super::Method;

/// A part of a frame that was compressed and not sent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sampled {
    pub(crate) method: Method,
    /// Bytes of pages.
    pub(crate) bytes: u64,
    /// What they became; no more than they were.
    pub(crate) packed: u64,
    pub(crate) took: Duration,
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
    /// How long compressing took.
    pub(crate) compressing: Duration,
    /// How long the connection took them, and the wait for what the user's cap allows.
    pub(crate) sending: Duration,
    pub(crate) sampled: Option<Sampled>,
}
