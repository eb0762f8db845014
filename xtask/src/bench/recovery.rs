//! When a guest whose pages came late got as much done again as before its move.

use std::time::Instant;

use ferry_probe::console::write_rate;

use super::console::Beat;

/// A guest is back once it writes this part of the pages a second that it wrote before.
pub(super) const BACK: f64 = 0.9;

/// When the guest was back: the end of the first [`WINDOW_MS`] at the destination in which it wrote [`BACK`] of its usual pages a second.
/// So a guest that was never slowed is back a window after its start. `None` if it was not back before it was last heard.
pub(super) fn back_at(at_destination: &[Beat], usual: f64, tsc_khz: u64) -> Option<Instant> {
    let ticks = (WINDOW_MS * tsc_khz as f64) as u64;
    let mut first = 0;
    for last in at_destination {
        let span = |from: &Beat| last.heartbeat.tsc.saturating_sub(from.heartbeat.tsc);
        // The shortest window that is long enough.
        while at_destination.get(first + 1).is_some_and(|next| span(next) >= ticks) {
            first += 1;
        }
        let from = &at_destination[first];
        let rate = write_rate(&from.heartbeat, &last.heartbeat, tsc_khz);
        if span(from) >= ticks && rate.is_some_and(|rate| rate >= BACK * usual) {
            return Some(last.read_at);
        }
    }
    None
}

/// Five heartbeats: a guest makes up for 10 ms.
pub(super) const WINDOW_MS: f64 = 100.0;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use ferry_probe::report::Heartbeat;

    use super::*;

    /// A beat each 20 ms with so many writes since the one before.
    fn beats(start: Instant, writes: &[u64]) -> Vec<Beat> {
        let mut sum = 0;
        let lived = writes.iter().zip(1..);
        lived
            .map(|(&more, seq)| {
                sum += more;
                let heartbeat = Heartbeat {
                    seq,
                    tsc: seq * 20_000,
                    writes: sum,
                    ..Heartbeat::default()
                };
                let read_at = start + Duration::from_millis(seq * 20);
                Beat { heartbeat, read_at }
            })
            .collect()
    }

    #[test]
    fn it_is_back_with_the_first_window_that_has_nearly_all_of_its_work() {
        let start = Instant::now();
        let mut writes = vec![20; 10];
        writes.extend([100; 10]);
        // After the tenth beat: four windows with some of the slow ones in them, and one with 100 each.
        let back = back_at(&beats(start, &writes), 5000.0, 1000).unwrap();
        assert_eq!(back - start, Duration::from_millis(15 * 20));
    }

    #[test]
    fn it_is_not_slow_for_longer_than_a_window_if_it_never_was() {
        let start = Instant::now();
        let back = back_at(&beats(start, &[100; 20]), 5000.0, 1000).unwrap();
        assert_eq!(back - start, Duration::from_millis(6 * 20));
    }

    #[test]
    fn it_is_not_back_while_it_is_slow_or_not_heard_for_long_enough() {
        let start = Instant::now();
        assert_eq!(back_at(&beats(start, &[80; 50]), 5000.0, 1000), None);
        assert_eq!(back_at(&beats(start, &[100; 5]), 5000.0, 1000), None);
        assert_eq!(back_at(&[], 5000.0, 1000), None);
    }
}
