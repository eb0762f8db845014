//! Which failed requests the log is told of: neither a guest that asks again and again nor a disk of which a part is gone fills it.

use std::cell::Cell;
use std::time::{Duration, Instant};

/// The least time from one that is told to the next.
const PAUSE: Duration = Duration::from_secs(10);

/// The failed requests of one disk.
#[derive(Debug, Default)]
pub(super) struct Failures(Cell<Count>);

#[derive(Debug, Clone, Copy, Default)]
struct Count {
    told: Option<Instant>,
    untold: u64,
}

impl Failures {
    /// One more, now. If it is to be told: how many were not since the last one that was.
    pub(super) fn add(&self, now: Instant) -> Option<u64> {
        let Count { told, untold } = self.0.get();
        if told.is_some_and(|told| now.saturating_duration_since(told) < PAUSE) {
            let untold = untold + 1;
            self.0.set(Count { told, untold });
            return None;
        }
        self.0.set(Count {
            told: Some(now),
            untold: 0,
        });
        Some(untold)
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
