//! What rounds and switchovers told of the link and the hosts so far, and what sending pages costs by that.

use std::num::NonZeroU64;
use std::time::Duration;

use super::forecast::bytes_of;
use crate::guest::FRAME_SIZE;
use crate::source::{Overhead, RoundSummary};

/// A round below this many bytes measures latency, not throughput.
const TELLING_BYTES: u64 = 4 << 20;

/// What is assumed of a link on which no round has told anything yet: slow, so that a guess errs towards copying on.
const UNMEASURED_BYTES_PER_SECOND: f64 = 200e6;

/// By how much more each switchover that was called off makes last pages count.
const CAUTION: f64 = 1.5;

/// What is known of the way.
#[derive(Clone, Debug)]
pub(super) struct Learned {
    overhead: Overhead,
    round_trip: Duration,
    /// Bytes of pages, compressed or not.
    bytes_per_second: Option<f64>,
    /// What share of the bytes of pages was put on the link: 1 without compression.
    compressed_to: f64,
    disarmed: u32,
}

impl Learned {
    /// Before the first round.
    pub(super) fn new(overhead: Overhead) -> Self {
        Self {
            overhead,
            round_trip: Duration::ZERO,
            bytes_per_second: None,
            compressed_to: 1.0,
            disarmed: 0,
        }
    }

    /// Takes in what a round carried, and the control stream's round trip, if one was measured.
    pub(super) fn round(&mut self, round: &RoundSummary, round_trip: Option<Duration>) {
        self.round_trip = round_trip.unwrap_or(self.round_trip);
        let bytes = round.bytes + round.saved;
        if round.elapsed.is_zero() || bytes < TELLING_BYTES {
            return;
        }
        let measured = bytes as f64 / round.elapsed.as_secs_f64();
        let compressed_to = round.bytes as f64 / bytes as f64;
        (self.bytes_per_second, self.compressed_to) = match self.bytes_per_second {
            Some(before) => (
                Some((before + measured) / 2.0),
                (self.compressed_to + compressed_to) / 2.0,
            ),
            None => (Some(measured), compressed_to),
        };
    }

    /// The link has another cap from now on: what was learned under the one before is worth what that leaves of it.
    pub(super) fn capped(&mut self, was: Option<NonZeroU64>, is: Option<NonZeroU64>) {
        if was == is {
            return;
        }
        // The cap counts what is put on the link.
        let most = |cap: Option<NonZeroU64>| cap.map_or(f64::INFINITY, |cap| cap.get() as f64 / self.compressed_to);
        let (was, is) = (most(was), most(is));
        // Under a tighter cap it had been found to carry more; under a looser one it was never tried.
        self.bytes_per_second = self.bytes_per_second.filter(|_| is < was).map(|rate| rate.min(is));
    }

    /// Takes in how long stopping and exporting took. One slow stop weighs half, and never so much that no further one
    /// would be tried.
    pub(super) fn stopped(&mut self, took: Duration, max_downtime: Duration) {
        let learned = (self.overhead.stop + took) / 2;
        self.overhead.stop = self.overhead.stop.max(learned.min(max_downtime / 2));
    }

    /// Takes in that a switchover was called off: the same prediction is trusted less from now on.
    pub(super) fn disarmed(&mut self) {
        self.disarmed += 1;
    }

    /// Bytes of pages a second by the rounds that told something.
    pub(super) fn bytes_per_second(&self) -> Option<f64> {
        self.bytes_per_second
    }

    /// What share of the bytes of pages is put on the link.
    pub(super) fn compressed_to(&self) -> f64 {
        self.compressed_to
    }

    /// How long a guest stands still that is stopped with so many pages left.
    pub(super) fn blackout(&self, pages: u64) -> Duration {
        self.overhead.stop + self.after_stop(pages)
    }

    /// What of that is still to come once it was stopped.
    pub(super) fn after_stop(&self, pages: u64) -> Duration {
        self.last_pages(pages) + self.overhead.start + self.round_trip
    }

    /// The cost of sending this many pages while the guest stands still.
    pub(super) fn last_pages(&self, pages: u64) -> Duration {
        self.time_for(pages as f64 * self.caution())
    }

    /// The most pages that can be sent while the guest stands still for so long in all.
    pub(super) fn pages_in_blackout(&self, max_downtime: Duration) -> f64 {
        self.pages_in(max_downtime.saturating_sub(self.blackout(0)))
    }

    /// The most pages that last pages of this cost are.
    pub(super) fn pages_in(&self, time: Duration) -> f64 {
        time.as_secs_f64() * self.rate() / self.caution() / FRAME_SIZE as f64
    }

    /// How long the link takes for so many pages while the guest runs.
    pub(super) fn time_for(&self, pages: f64) -> Duration {
        Duration::try_from_secs_f64(bytes_of(pages) / self.rate()).unwrap_or(Duration::MAX / 4)
    }

    /// Bytes that so many pages come to on the link.
    pub(super) fn on_the_link(&self, pages: f64) -> u64 {
        (bytes_of(pages) * self.compressed_to) as u64
    }

    fn rate(&self) -> f64 {
        self.bytes_per_second.unwrap_or(UNMEASURED_BYTES_PER_SECOND).max(1.0)
    }

    fn caution(&self) -> f64 {
        CAUTION.powi(self.disarmed.min(8).cast_signed())
    }
}
