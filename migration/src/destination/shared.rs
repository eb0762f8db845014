//! What the script of a destination shares with its threads.

use std::sync::OnceLock;
use std::sync::atomic::AtomicU32;

use super::population::Backing;
use super::received::Received;
use super::receiver::Delivered;
use crate::guest::GuestMemory;
use crate::link::{Link, Sockets};
use crate::verify::PageDigests;
use crate::wire::StreamTotals;

/// What the script shares with its threads.
pub(super) struct Shared {
    /// Frames that may hold something.
    pub(super) received: Received,
    /// Frames of the open round that came whole, in the session that is kept with them.
    pub(super) whole: Received,
    pub(super) backing: Backing,
    /// Of what is received, if the source wants to compare: set with the handshake.
    pub(super) digests: OnceLock<PageDigests>,
    pub(super) delivered: Vec<Delivered>,
    pub(super) round: AtomicU32,
    /// What came over links before this one.
    pub(super) before: StreamTotals,
    /// Page streams for pages that come late.
    pub(super) late_streams: u32,
}

impl Shared {
    pub(super) fn new(memory: &impl GuestMemory) -> Self {
        let shape = memory.shape();
        let received = Received::new(shape);
        let regions = shape.regions().iter().filter(|&&region| !memory.is_blank(region));
        regions.for_each(|region| received.insert(region.run()));
        Self {
            received,
            whole: Received::new(shape),
            backing: Backing::new(shape),
            digests: OnceLock::new(),
            delivered: Vec::new(),
            round: AtomicU32::new(1),
            before: StreamTotals::default(),
            late_streams: 0,
        }
    }

    /// Counts what comes over another link.
    pub(super) fn begin_session(&mut self, sockets: &Sockets, late: Option<&Link>) {
        self.before = self.sum();
        self.delivered = sockets.pages.iter().map(|_| Delivered::default()).collect();
        self.late_streams = late.map_or(0, |late| late.pages.len() as u32);
    }

    /// What came over all links.
    pub(super) fn sum(&self) -> StreamTotals {
        self.delivered
            .iter()
            .map(Delivered::totals)
            .fold(self.before, StreamTotals::plus)
    }
}
