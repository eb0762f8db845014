//! The cap on what all page streams send together: a token bucket in bytes.

use std::num::NonZeroU64;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What may be sent at once after a pause, in time at the full rate.
const BURST: Duration = Duration::from_millis(50);

/// What may be owed for bytes that could not wait, in time at the full rate.
const MOST_OWED: Duration = Duration::from_secs(1);

/// A cap shared by the sending threads; each asks before it sends. It can be changed while they do.
#[derive(Debug)]
pub(crate) struct Bandwidth {
    bucket: Mutex<Bucket>,
    changed: Condvar,
}

#[derive(Debug)]
struct Bucket {
    /// None: no cap, and nothing is counted.
    bytes_per_second: Option<f64>,
    /// Bytes that may be sent; below zero while somebody's bytes are being paid for.
    credit: f64,
    counted: Instant,
    open: bool,
}

impl Bandwidth {
    /// A cap of so many bytes a second, or none.
    pub(crate) fn new(cap: Option<NonZeroU64>) -> Self {
        Self {
            bucket: Mutex::new(Bucket::new(cap, Instant::now())),
            changed: Condvar::new(),
        }
    }

    /// Another cap, or none, from now on, for those who wait already too.
    pub(crate) fn set(&self, cap: Option<NonZeroU64>) {
        self.lock().set(cap, Instant::now());
        self.changed.notify_all();
    }

    /// The cap, in bytes a second.
    pub(crate) fn cap(&self) -> Option<f64> {
        self.lock().bytes_per_second
    }

    /// Waits until `bytes` may be sent, or the migration is over.
    pub(crate) fn wait(&self, bytes: u64) {
        let mut bucket = self.lock();
        while let Some(pause) = bucket.pause(Instant::now()) {
            let waited = self.changed.wait_timeout(bucket, pause);
            bucket = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        bucket.take(bytes);
    }

    /// Counts `bytes` that are sent at once, because somebody waits for them: who can wait pays for them.
    pub(crate) fn spend(&self, bytes: u64) {
        self.lock().spend(bytes);
    }

    /// Lets everybody through from now on.
    pub(crate) fn close(&self) {
        self.lock().open = false;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Bucket> {
        self.bucket.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Bucket {
    fn new(cap: Option<NonZeroU64>, now: Instant) -> Self {
        Self {
            bytes_per_second: cap.map(|cap| cap.get() as f64),
            credit: 0.0,
            counted: now,
            open: true,
        }
    }

    fn set(&mut self, cap: Option<NonZeroU64>, now: Instant) {
        // What was earned so far was earned at the old rate.
        self.pause(now);
        self.bytes_per_second = cap.map(|cap| cap.get() as f64);
        self.counted = now;
        // Under the old cap more may have been saved up than the new one allows at once. What is owed stays owed, unless nobody counts.
        self.credit = match self.bytes_per_second {
            Some(rate) => self.credit.min(rate * BURST.as_secs_f64()),
            None => 0.0,
        };
    }

    /// How long to wait until debts are paid; `None` if bytes may be sent.
    fn pause(&mut self, now: Instant) -> Option<Duration> {
        let rate = self.bytes_per_second?;
        let earned = now.saturating_duration_since(self.counted).as_secs_f64() * rate;
        self.counted = now;
        self.credit = (self.credit + earned).min(rate * BURST.as_secs_f64());
        let owes = self.open && self.credit < 0.0;
        // A millisecond at least: shorter waits would only spin.
        owes.then(|| Duration::from_secs_f64((-self.credit / rate).clamp(0.001, 3600.0)))
    }

    /// More than [`MOST_OWED`] is not owed for what could not wait: who can wait would wait for ever beside a guest that touches page after page.
    fn spend(&mut self, bytes: u64) {
        if let Some(rate) = self.bytes_per_second {
            let most = rate * MOST_OWED.as_secs_f64();
            self.credit = self.credit.min((self.credit - bytes as f64).max(-most));
        }
    }

    fn take(&mut self, bytes: u64) {
        if self.bytes_per_second.is_some() {
            self.credit -= bytes as f64;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bucket(now: Instant) -> Bucket {
        Bucket::new(NonZeroU64::new(1_000_000), now)
    }

    #[test]
    fn what_was_sent_is_paid_for_in_time() {
        let now = Instant::now();
        let mut bucket = bucket(now);
        assert_eq!(bucket.pause(now), None);
        bucket.take(500_000);
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
    fn what_is_owed_under_one_cap_is_paid_under_the_next() {
        let now = Instant::now();
        let mut bucket = bucket(now);
        bucket.take(1_500_000);
        bucket.set(NonZeroU64::new(10_000_000), now + Duration::from_millis(500));
        let later = now + Duration::from_millis(500);
        assert_eq!(bucket.pause(later), Some(Duration::from_millis(100)));
        bucket.set(None, later);
        assert_eq!(bucket.pause(later), None);
    }

    #[test]
    fn what_could_not_wait_is_paid_for_by_what_can_for_a_while() {
        let now = Instant::now();
        let mut bucket = bucket(now);
        bucket.spend(500_000);
        assert_eq!(bucket.pause(now), Some(Duration::from_millis(500)));
        bucket.spend(50_000_000);
        assert_eq!(bucket.pause(now), Some(MOST_OWED));
        // Who waited once owes what it sent, however much that is.
        bucket.take(2_000_000);
        bucket.spend(1);
        assert_eq!(bucket.pause(now), Some(Duration::from_secs(3)));
    }

    #[test]
    fn a_closed_cap_lets_debtors_through() {
        let bandwidth = Bandwidth::new(NonZeroU64::new(1));
        bandwidth.wait(1_000_000_000);
        bandwidth.close();
        bandwidth.wait(1);
    }

    #[test]
    fn a_lifted_cap_lets_through_who_waits_already() {
        let bandwidth = Bandwidth::new(NonZeroU64::new(1));
        bandwidth.wait(1_000_000_000);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| bandwidth.wait(1));
            bandwidth.set(None);
            waiting.join().unwrap();
        });
    }

    proptest! {
        /// However frames and pauses come: what was sent is no more than what the cap allows in the time, a burst and the last frame.
        #[test]
        fn the_cap_holds(
            rate in 1_000_000u64..10_000_000_000,
            frames in prop::collection::vec((1u64..2 << 20, 0u64..100_000_000), 1..200),
        ) {
            let began = Instant::now();
            let (mut now, mut sent, mut last) = (began, 0, 0);
            let mut bucket = Bucket::new(NonZeroU64::new(rate), now);
            for (bytes, idle) in frames {
                now += Duration::from_nanos(idle);
                while let Some(pause) = bucket.pause(now) {
                    now += pause;
                }
                bucket.take(bytes);
                (sent, last) = (sent + bytes, bytes);
            }
            let allowed = (now - began + BURST).as_secs_f64() * rate as f64 + last as f64;
            prop_assert!(sent as f64 <= allowed * 1.000_001, "{sent} of {allowed}");
        }

        /// Whoever always has something to send and wakes late, by no more than a burst makes up for, sends all that the cap allows.
        #[test]
        fn the_cap_is_used(
            rate in 1_000_000u64..10_000_000_000,
            frames in prop::collection::vec((1u64..2 << 20, 0u64..49_000_000), 1..200),
        ) {
            let began = Instant::now();
            let (mut now, mut sent) = (began, 0);
            let mut bucket = Bucket::new(NonZeroU64::new(rate), now);
            for (bytes, late) in frames {
                while let Some(pause) = bucket.pause(now) {
                    now += pause + Duration::from_nanos(late);
                }
                bucket.take(bytes);
                sent += bytes;
            }
            let allowed = (now - began).saturating_sub(BURST).as_secs_f64() * rate as f64;
            prop_assert!(sent as f64 >= allowed * 0.999_999, "{sent} of {allowed}");
        }
    }
}
