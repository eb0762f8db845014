//! Which failures the log is told of: neither a guest that does the same again and again nor a disk of which a part is gone fills it.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The least time from one that is told to the next.
const PAUSE: Duration = Duration::from_secs(10);

/// The failures of one device.
#[derive(Debug, Default)]
pub(super) struct Failures(Mutex<Count>);

#[derive(Debug, Default)]
struct Count {
    told: Option<Instant>,
    untold: u64,
}

impl Failures {
    /// One more, now. If it is to be told: how many were not since the last one that was.
    pub(super) fn add(&self, now: Instant) -> Option<u64> {
        let mut count = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if count
            .told
            .is_some_and(|told| now.saturating_duration_since(told) < PAUSE)
        {
            count.untold += 1;
            return None;
        }
        count.told = Some(now);
        Some(std::mem::take(&mut count.untold))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_is_told_now_and_then_and_the_others_are_counted() {
        let (failures, now) = (Failures::default(), Instant::now());
        assert_eq!(failures.add(now), Some(0));
        assert_eq!(failures.add(now), None);
        assert_eq!(failures.add(now + PAUSE / 2), None);
        assert_eq!(failures.add(now + PAUSE), Some(2));
        assert_eq!(failures.add(now + PAUSE * 3), Some(0));
    }
}
