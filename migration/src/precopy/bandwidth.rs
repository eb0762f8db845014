//! The cap on what all page streams send together: a token bucket in bytes.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What may be sent at once after a pause, in time at the full rate.
const BURST: Duration = Duration::from_millis(50);

/// A cap shared by the sending threads; each asks before it sends.
#[derive(Debug)]
pub(crate) struct Bandwidth {
    bucket: Option<Mutex<Bucket>>,
    closed: Condvar,
}

#[derive(Debug)]
struct Bucket {
    bytes_per_second: f64,
    /// Bytes that may be sent; below zero while somebody's bytes are being paid for.
    credit: f64,
    counted: Instant,
    open: bool,
}

impl Bandwidth {
    /// A cap of so many bytes a second, or none.
    pub(crate) fn new(bytes_per_second: Option<u64>) -> Self {
        let bucket = |rate: u64| {
            let bytes_per_second = rate as f64;
            Mutex::new(Bucket {
                bytes_per_second,
                credit: 0.0,
                counted: Instant::now(),
                open: true,
            })
        };
        Self {
            bucket: bytes_per_second.map(bucket),
            closed: Condvar::new(),
        }
    }

    /// Waits until `bytes` may be sent, or the migration is over.
    pub(crate) fn wait(&self, bytes: u64) {
        let Some(bucket) = &self.bucket else { return };
        let mut bucket = bucket.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(pause) = bucket.pause(Instant::now()) {
            bucket = self
                .closed
                .wait_timeout(bucket, pause)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        bucket.credit -= bytes as f64;
    }

    /// Lets everybody through from now on.
    pub(crate) fn close(&self) {
        if let Some(bucket) = &self.bucket {
            bucket.lock().unwrap_or_else(PoisonError::into_inner).open = false;
            self.closed.notify_all();
        }
    }
}

impl Bucket {
    /// How long to wait until debts are paid; `None` if bytes may be sent.
    fn pause(&mut self, now: Instant) -> Option<Duration> {
        let earned = now.saturating_duration_since(self.counted).as_secs_f64() * self.bytes_per_second;
        self.counted = now;
        self.credit = (self.credit + earned).min(self.bytes_per_second * BURST.as_secs_f64());
        let seconds = -self.credit / self.bytes_per_second;
        let owes = self.open && self.credit < 0.0;
        // A millisecond at least: shorter waits would only spin.
        owes.then(|| Duration::from_secs_f64(seconds.clamp(0.001, 3600.0)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bucket(now: Instant) -> Bucket {
        Bucket {
            bytes_per_second: 1e6,
            credit: 0.0,
            counted: now,
            open: true,
        }
    }

    #[test]
    fn what_was_sent_is_paid_for_in_time() {
        let now = Instant::now();
        let mut bucket = bucket(now);
        assert_eq!(bucket.pause(now), None);
        bucket.credit -= 500_000.0;
        assert_eq!(bucket.pause(now), Some(Duration::from_millis(500)));
        assert_eq!(bucket.pause(now + Duration::from_millis(500)), None);
    }

    #[test]
    fn an_idle_link_saves_up_no_more_than_a_burst() {
        let now = Instant::now();
        let mut bucket = bucket(now);
        assert_eq!(bucket.pause(now + Duration::from_secs(100)), None);
        assert!(bucket.credit <= 50_000.0);
    }

    #[test]
    fn a_closed_cap_lets_debtors_through() {
        let bandwidth = Bandwidth::new(Some(1));
        bandwidth.wait(1_000_000_000);
        bandwidth.close();
        bandwidth.wait(1);
    }
}
