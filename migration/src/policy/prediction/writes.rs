//! How many different pages a guest writes within a time: not a rate, but a curve.
//!
//! A guest that writes the same pages again and again has written hardly more of them after a second than after a tenth of one. That is
//! why its rounds come to an end, and why one rate would foretell that they do not.

use std::time::Duration;

/// Different pages written by certain times.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Writes {
    /// Seconds and pages, both ascending.
    points: Vec<(f64, f64)>,
    /// There are no more pages than this.
    most: f64,
}

impl Writes {
    /// What was found after certain times from one instant on, of a guest that has so many pages. What cannot be, such as fewer pages after a
    /// longer time, is put right.
    #[must_use]
    pub fn new(mut found: Vec<(Duration, u64)>, most: u64) -> Self {
        found.sort_by_key(|&(after, _)| after);
        let most = most as f64;
        let mut points: Vec<(f64, f64)> = Vec::new();
        for (after, pages) in found {
            let (last_after, last_pages) = points.last().copied().unwrap_or_default();
            let pages = (pages as f64).min(most).max(last_pages);
            if after.as_secs_f64() > last_after {
                points.push((after.as_secs_f64(), pages));
            }
        }
        Self { points, most }
    }

    /// Different pages written within this time: between what was found as a straight line, from there on as it was last.
    #[must_use]
    pub fn within(&self, time: Duration) -> f64 {
        let time = time.as_secs_f64();
        let mut before = (0.0, 0.0);
        for &point in &self.points {
            if time <= point.0 {
                return before.1 + slope(before, point) * (time - before.0);
            }
            before = point;
        }
        let [.., earlier, last] = self.points[..] else {
            let only = self.points.first().copied().unwrap_or((1.0, 0.0));
            return (slope((0.0, 0.0), only) * time).min(self.most);
        };
        (last.1 + slope(earlier, last) * (time - last.0)).min(self.most)
    }

    /// The same of a guest that runs for this share of the time only.
    pub(super) fn within_share(&self, time: Duration, share: f64) -> f64 {
        self.within(time.mul_f64(share.clamp(0.0, 1.0)))
    }

    /// Different pages a second over all the time in which it was looked at; `None` if it never was.
    #[must_use]
    pub fn pages_per_second(&self) -> Option<f64> {
        self.points.last().map(|&(after, pages)| pages / after)
    }
}

fn slope(from: (f64, f64), to: (f64, f64)) -> f64 {
    (to.1 - from.1) / (to.0 - from.0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn what_was_found_is_told_and_what_lies_between_is_straight() {
        let writes = Writes::new(vec![(100 * MS, 500), (400 * MS, 800)], 1000);
        assert_eq!(writes.within(Duration::ZERO), 0.0);
        assert_eq!(writes.within(50 * MS), 250.0);
        assert_eq!(writes.within(250 * MS), 650.0);
        assert_eq!(writes.within(500 * MS), 900.0);
        assert_eq!(writes.within(Duration::from_secs(60)), 1000.0);
    }

    #[test]
    fn a_guest_of_which_nothing_was_found_writes_nothing() {
        assert_eq!(Writes::default().within(Duration::from_secs(9)), 0.0);
        assert_eq!(Writes::new(vec![(Duration::ZERO, 7)], 9).within(MS), 0.0);
        assert_eq!(Writes::new(vec![(MS, 7)], 100).within(2 * MS), 14.0);
    }

    #[test]
    fn fewer_pages_after_a_longer_time_are_put_right() {
        let writes = Writes::new(vec![(300 * MS, 50), (100 * MS, 90), (200 * MS, 2000)], 1000);
        assert_eq!(writes.within(100 * MS), 90.0);
        assert_eq!(writes.within(300 * MS), 1000.0);
    }

    proptest! {
        #[test]
        fn more_time_never_means_fewer_pages_nor_more_than_there_are(
            found in prop::collection::vec((0u64..5000, any::<u64>()), 0..8),
            most in any::<u32>(),
            times in (0u64..20_000, 0u64..20_000),
        ) {
            let found = found.into_iter().map(|(ms, pages)| (ms as u32 * MS, pages)).collect();
            let writes = Writes::new(found, most.into());
            let (less, more) = (times.0.min(times.1) as u32 * MS, times.0.max(times.1) as u32 * MS);
            let (few, many) = (writes.within(less), writes.within(more));
            prop_assert!(few <= many * 1.000_001 && many <= f64::from(most), "{few} then {many}");
        }
    }
}
