//! How fast a card may be: a token bucket for each way.
//!
//! A frame passes while anything is in the bucket, whatever its length, and its bytes are taken out; what a long frame takes too much is
//! owed, and nothing passes until it is paid back. So the length of a frame need not be known before it is read from the tap, no frame is
//! too long to pass, and over time exactly the rate passes. What does not pass stays where it is: in the guest's ring, or in the tap's
//! queue, whose end drops what it has no room for, as any slow link does.

use std::num::NonZeroU64;
use std::time::{Duration, Instant};

use super::{HEADER_BYTES, LONGEST_FRAME};

/// What a card that was idle may send or receive at once is the rate of this span.
const BURST: Duration = Duration::from_millis(100);

/// An empty bucket stays shut at least so long: opening it for each frame would wake the device thousands of times a second.
const SHORTEST_PAUSE: Duration = Duration::from_millis(4);

const NANOSECONDS: i128 = 1_000_000_000;

/// A bucket of bytes that fills at a rate. Time is an argument.
#[derive(Debug, Clone)]
pub(super) struct Bucket {
    /// Bytes a second, and billionths of a byte a nanosecond.
    rate: i128,
    /// In billionths of a byte, as all that is counted here: nothing is lost by rounding, however often it is asked.
    most: i128,
    /// Below zero: owed.
    content: i128,
    filled: Instant,
    /// Until then nothing passes.
    shut: Option<Instant>,
}

impl Bucket {
    /// A full bucket for so many bytes a second.
    pub(super) fn new(rate: NonZeroU64, now: Instant) -> Self {
        let rate = i128::from(rate.get());
        let burst = rate * BURST.as_nanos() as i128;
        let most = burst.max(i128::from(LONGEST_FRAME) * NANOSECONDS);
        Self {
            rate,
            most,
            content: most,
            filled: now,
            shut: None,
        }
    }

    /// Whether a frame may pass now. If not, [`opens`](Self::opens) says when to ask again.
    pub(super) fn is_open(&mut self, now: Instant) -> bool {
        let elapsed = now.saturating_duration_since(self.filled);
        self.filled = self.filled.max(now);
        let gained = i128::try_from(elapsed.as_nanos()).unwrap_or(i128::MAX);
        self.content = self
            .content
            .saturating_add(gained.saturating_mul(self.rate))
            .min(self.most);
        if self.shut.is_some_and(|until| now < until) {
            return false;
        }
        self.shut = None;
        if self.content > 0 {
            return true;
        }
        let owed = (self.rate - self.content) / self.rate;
        let pause = Duration::from_nanos(u64::try_from(owed).unwrap_or(u64::MAX));
        self.shut = now.checked_add(pause.max(SHORTEST_PAUSE));
        false
    }

    /// Takes out what passed: a frame with the header that is not sent over any wire.
    pub(super) fn take(&mut self, bytes: u64) {
        self.content -= i128::from(bytes.saturating_sub(HEADER_BYTES)) * NANOSECONDS;
    }

    /// When it is open again, if it is shut.
    pub(super) fn opens(&self) -> Option<Instant> {
        self.shut
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bucket(rate: u64, now: Instant) -> Bucket {
        Bucket::new(NonZeroU64::new(rate).expect("a rate"), now)
    }

    /// Passes frames of this length until the bucket is shut; how many bytes passed.
    fn drain(bucket: &mut Bucket, frame: u64, now: Instant) -> u64 {
        let mut passed = 0;
        while bucket.is_open(now) {
            bucket.take(frame + HEADER_BYTES);
            passed += frame;
        }
        passed
    }

    #[test]
    fn a_burst_is_a_tenth_of_a_second() {
        let now = Instant::now();
        assert_eq!(drain(&mut bucket(10_000_000, now), 1000, now), 1_000_000);
    }

    #[test]
    fn a_burst_is_the_longest_frame_at_least() {
        let now = Instant::now();
        let mut bucket = bucket(8_000, now);
        assert!(bucket.is_open(now));
        bucket.take(LONGEST_FRAME);
        // What was left is less than the header that the frame does not count.
        assert!(bucket.content <= i128::from(HEADER_BYTES) * NANOSECONDS);
    }

    #[test]
    fn over_time_exactly_the_rate_passes() {
        let start = Instant::now();
        let mut bucket = bucket(1_000_000, start);
        let burst = drain(&mut bucket, 1500, start);
        let mut now = start;
        let mut passed = 0;
        for _ in 0..2500 {
            now = bucket.opens().expect("shut");
            passed += drain(&mut bucket, 1500, now);
        }
        let seconds = (now - start).as_secs_f64();
        assert!(seconds >= 10.0, "{seconds}");
        let rate = passed as f64 / seconds;
        assert!((rate - 1e6).abs() < 1e6 * 0.001, "{rate} bytes a second");
        assert!((100_000..=101_500).contains(&burst), "{burst}");
    }

    #[test]
    fn asking_often_loses_nothing_to_rounding() {
        let start = Instant::now();
        let mut bucket = bucket(8_000, start);
        bucket.take(LONGEST_FRAME + HEADER_BYTES + 8_000);
        let opens =
            |bucket: &mut Bucket| (1..).find(|step| bucket.is_open(start + Duration::from_nanos(step * 1_000_001)));
        let steps = opens(&mut bucket).expect("it opens");
        // A second for what was owed and a little for the first byte.
        assert!((1000..1010).contains(&steps), "{steps} milliseconds");
    }

    #[test]
    fn an_empty_bucket_stays_shut_for_a_while() {
        let now = Instant::now();
        let mut bucket = bucket(125_000_000, now);
        drain(&mut bucket, 1500, now);
        let opens = bucket.opens().expect("shut");
        assert_eq!(opens - now, SHORTEST_PAUSE);
        assert!(!bucket.is_open(now + SHORTEST_PAUSE / 2));
        assert!(bucket.is_open(opens));
    }

    #[test]
    fn what_was_not_used_is_not_saved_beyond_the_burst() {
        let now = Instant::now();
        let mut bucket = bucket(10_000_000, now);
        let later = now + Duration::from_secs(3600);
        assert_eq!(drain(&mut bucket, 1000, later), 1_000_000);
    }

    #[test]
    fn the_extremes_do_not_overflow() {
        let now = Instant::now();
        let later = now + Duration::from_secs(1 << 32);
        let mut fast = bucket(u64::MAX, now);
        assert!(fast.is_open(later));
        let mut slow = bucket(1, now);
        slow.take(u64::MAX);
        assert!(!slow.is_open(later));
        assert!(slow.opens().is_none_or(|opens| opens > later));
    }
}
