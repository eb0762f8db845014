//! The sending threads of all page streams, seen from the script.

use std::num::NonZeroU64;
use std::sync::{Arc, Mutex, PoisonError};

use crate::compress::Packing;
use crate::guest::DirtyClearer;
use crate::precopy::bandwidth::Bandwidth;
use crate::precopy::feed::Feed;
use crate::verify::PageDigests;
use crate::wire::StreamTotals;

/// What the script shares with its sending threads.
pub(crate) struct Streams<C> {
    pub(crate) feed: Feed<C>,
    pub(crate) bandwidth: Bandwidth,
    pub(crate) totals: Vec<Mutex<StreamTotals>>,
    /// Of what is sent, where both sides compare.
    pub(crate) digests: Option<Arc<PageDigests>>,
    pub(crate) packing: Arc<Packing>,
}

impl<C: DirtyClearer> Streams<C> {
    pub(crate) fn new(
        streams: u32,
        cap: Option<NonZeroU64>,
        digests: Option<Arc<PageDigests>>,
        packing: Arc<Packing>,
    ) -> Self {
        Self {
            feed: Feed::new(streams),
            bandwidth: Bandwidth::new(cap),
            totals: (0..streams).map(|_| Mutex::default()).collect(),
            digests,
            packing,
        }
    }

    /// What each stream carried so far; exact between rounds.
    pub(crate) fn each(&self) -> Vec<StreamTotals> {
        self.totals
            .iter()
            .map(|totals| *totals.lock().unwrap_or_else(PoisonError::into_inner))
            .collect()
    }

    /// What all streams carried so far.
    pub(crate) fn sum(&self) -> StreamTotals {
        self.each()
            .into_iter()
            .fold(StreamTotals::default(), StreamTotals::plus)
    }

    /// Sends the threads home, those that wait for pages and those that wait for bandwidth.
    pub(crate) fn close(&self) {
        self.feed.close();
        self.bandwidth.close();
    }
}
