//! How long pages were waited for.

use std::time::Duration;

/// A histogram in powers of two of microseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Latency {
    buckets: Vec<u64>,
    longest: Duration,
    /// The first waits, in microseconds.
    first: Vec<u32>,
}

/// So many waits are known to the microsecond: 256 KiB.
const KNOWN_WAITS: usize = 1 << 16;

impl Latency {
    /// Takes a wait in.
    pub fn add(&mut self, waited: Duration) {
        let micros = u64::try_from(waited.as_micros()).unwrap_or(u64::MAX);
        let bucket = (u64::BITS - micros.leading_zeros()) as usize;
        if self.buckets.len() <= bucket {
            self.buckets.resize(bucket + 1, 0);
        }
        self.buckets[bucket] += 1;
        self.longest = self.longest.max(waited);
        if self.first.len() < KNOWN_WAITS {
            self.first.push(u32::try_from(micros).unwrap_or(u32::MAX));
        }
    }

    /// The wait that half of them were no longer than, of the first 65,536; `None`: there were none.
    #[must_use]
    pub fn median(&self) -> Option<Duration> {
        let mut waits = self.first.clone();
        let middle = waits.len().checked_sub(1)? / 2;
        let (_, median, _) = waits.select_nth_unstable(middle);
        Some(Duration::from_micros(u64::from(*median)))
    }

    /// Waits of less than 1 µs, then of less than 2 µs, 4 µs and so on; it ends with the last one that there was.
    #[must_use]
    pub fn buckets(&self) -> &[u64] {
        &self.buckets
    }

    /// How many waits there were.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// The longest wait.
    #[must_use]
    pub fn longest(&self) -> Duration {
        self.longest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_is_counted_by_its_power_of_two() {
        let mut latency = Latency::default();
        for micros in [0, 1, 2, 3, 4, 1000] {
            latency.add(Duration::from_micros(micros));
        }
        assert_eq!(latency.buckets(), [1, 1, 2, 1, 0, 0, 0, 0, 0, 0, 1]);
        assert_eq!((latency.count(), latency.longest()), (6, Duration::from_millis(1)));
        latency.add(Duration::MAX);
        assert_eq!(latency.buckets().len(), 65);
        assert_eq!(latency.median(), Some(Duration::from_micros(3)));
    }

    #[test]
    fn of_no_wait_there_is_no_median() {
        assert_eq!(Latency::default().median(), None);
    }
}
