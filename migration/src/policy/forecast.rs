//! What a copy is expected to come to: rounds of which each leaves the same share of what it sent.
//!
//! A guest that writes the same pages again and again leaves less than that, one whose writes bunch up now and then more; the next round
//! corrects it.

use std::fmt::Write as _;
use std::time::Duration;

use super::{milliseconds, percent};
use crate::guest::FRAME_SIZE;

/// A round that leaves this share of what it sent, or more, brings the end no nearer: what it gains is less than what rounds vary by.
pub(super) const HOPELESS_SHARE: f64 = 0.95;

/// Pages that are compressed to more of themselves than this are not worth a word.
const NOT_COMPRESSED: f64 = 0.99;

/// What a copy is expected to come to if the guest goes on as it does. `None`: it is not known, or has no end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Forecast {
    /// Bytes of pages a second that the link carries, compressed or not, as learned so far.
    pub bytes_per_second: Option<u64>,
    /// Bytes a second in pages that the guest dirtied during the last round.
    pub dirty_bytes_per_second: Option<u64>,
    /// Rounds from here to the switchover.
    pub rounds: Option<u32>,
    /// The blackout then.
    pub blackout: Option<Duration>,
    /// The whole copy, from its begin to the guest's start at the destination.
    pub total: Option<Duration>,
    /// Bytes sent by then.
    pub bytes: Option<u64>,
}

impl Forecast {
    /// Adds what it comes to, for a person.
    pub(super) fn describe(&self, words: &mut String, compressed_to: f64) {
        let megabytes = |bytes: u64| bytes as f64 / 1e6;
        if let (Some(dirty), Some(sent)) = (self.dirty_bytes_per_second, self.bytes_per_second) {
            let (dirty, sent) = (megabytes(dirty), megabytes(sent));
            let _ = write!(
                words,
                "; the guest writes {dirty:.1} MB/s, the link carries {sent:.1} MB/s"
            );
            if compressed_to < NOT_COMPRESSED {
                let _ = write!(words, ", compressed to {} %", percent(compressed_to));
            }
        }
        let rounds = self.rounds.filter(|&rounds| rounds > 0);
        if let (Some(rounds), Some(blackout), Some(total), Some(bytes)) =
            (rounds, self.blackout, self.total, self.bytes)
        {
            let (blackout, total, megabytes) = (milliseconds(blackout), total.as_secs_f64(), megabytes(bytes));
            let _ = write!(
                words,
                "; expected: rounds to go {rounds}, a blackout of {blackout:.1} ms, {total:.1} s and {megabytes:.1} MB in all"
            );
        }
    }
}

/// Where a copy is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moment {
    /// Since it began.
    pub elapsed: Duration,
    /// Since it was ordered, with all that it waited for: of the time that its user gives it.
    pub since_order: Duration,
    /// Bytes put on the page streams by now.
    pub bytes: u64,
    /// The round trip of the control stream, if one was measured.
    pub round_trip: Option<Duration>,
    /// The round that ended sent pages whole, and from the next one on most are told by what they changed since.
    pub deltas_begin: bool,
}

/// The rounds that are still to come.
#[derive(Clone, Copy, Debug)]
pub(super) struct Course {
    /// Pages left now.
    pub(super) left: f64,
    /// What a round leaves of the pages that it sends.
    pub(super) share: f64,
}

impl Course {
    /// Rounds until no more pages than these are left; `None` if that never comes.
    pub(super) fn rounds_until(self, allowed: f64) -> Option<u32> {
        if self.left <= allowed {
            return Some(0);
        }
        if allowed < 1.0 || self.share >= HOPELESS_SHARE {
            return None;
        }
        // A share of nothing would have no logarithm; the count of rounds is small, and never negative.
        let rounds = (allowed / self.left).ln() / self.share.max(f64::MIN_POSITIVE).ln();
        Some((rounds.ceil() as u32).max(1))
    }

    /// Pages left after so many rounds.
    pub(super) fn left_after(self, rounds: u32) -> f64 {
        self.left * self.share.powf(f64::from(rounds))
    }

    /// Pages sent in so many rounds.
    pub(super) fn sent_in(self, rounds: u32) -> f64 {
        (0..rounds).map(|round| self.left_after(round)).sum()
    }
}

/// Bytes of so many pages.
pub(super) fn bytes_of(pages: f64) -> f64 {
    pages * FRAME_SIZE as f64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn halving_rounds_are_counted() {
        let course = Course {
            left: 800.0,
            share: 0.5,
        };
        assert_eq!(course.rounds_until(800.0), Some(0));
        assert_eq!(course.rounds_until(400.0), Some(1));
        assert_eq!(course.rounds_until(399.0), Some(2));
        assert_eq!(course.sent_in(3), 1400.0);
        assert_eq!(course.left_after(3), 100.0);
    }

    #[test]
    fn what_hardly_shrinks_has_no_end() {
        let course = |share| Course { left: 800.0, share };
        assert_eq!(course(0.95).rounds_until(700.0), None);
        assert_eq!(course(3.0).rounds_until(700.0), None);
        assert_eq!(course(0.5).rounds_until(0.5), None);
    }

    proptest! {
        #[test]
        fn after_the_rounds_that_are_told_no_more_is_left_than_allowed(
            left in 1.0f64..1e12,
            share in 0.0f64..2.0,
            allowed in 0.0f64..1e12,
        ) {
            let course = Course { left, share };
            if let Some(rounds) = course.rounds_until(allowed) {
                prop_assert!(course.left_after(rounds) <= allowed * 1.000_001);
                prop_assert!(rounds == 0 || course.left_after(rounds - 1) > allowed * 0.999_999);
                prop_assert!(course.sent_in(rounds).is_finite());
            }
        }
    }
}
