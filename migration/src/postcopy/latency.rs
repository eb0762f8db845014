//! How long pages were waited for.

use std::time::Duration;

/// A histogram in powers of two of microseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Latency {
    buckets: Vec<u64>,
    longest: Duration,
}

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
    }
}
