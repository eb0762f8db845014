//! The guest clock's error over a move: how far its time stamp counter strays from the host's clock.
//!
//! Each heartbeat is a pair: what the guest's counter said when it was printed, and when it was read here. Reading is
//! late, by a different amount each time, but never early; so the earliest heartbeat of a stay tells the true offset
//! best. Between two stays the offset must not change: the blackout is part of guest time. The counter's frequency is what
//! the guest takes it for; a fit would not be better over a stay of a second.

/// One heartbeat: the guest's counter, and when it was read, in nanoseconds of the host's clock.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reading {
    pub(super) tsc: u64,
    pub(super) read_ns: f64,
}

/// How far the guest's clock ran ahead over one move, and how sure that is.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub(super) struct ClockError {
    /// Positive: the guest's clock is ahead of the host's afterwards, against before. In microseconds.
    pub(super) error_us: f64,
    /// The most by which the offset seemed to change within a stay, where it cannot have changed.
    pub(super) uncertainty_us: f64,
}

/// The errors over each move from stay to stay, the guest's counter running at `tsc_khz`; `None` where a stay has too few
/// heartbeats to tell.
pub(super) fn errors(stays: &[Vec<Reading>], tsc_khz: u64) -> Vec<Option<ClockError>> {
    let Some(base) = stays.iter().flatten().next().map(|reading| reading.tsc) else {
        return Vec::new();
    };
    // Counters are equal to within 2^53 ticks of each other: nothing is lost in a float.
    let guest_ns = |reading: &Reading| reading.tsc.wrapping_sub(base) as i64 as f64 * 1e6 / tsc_khz as f64;
    let late = |stay: &Vec<Reading>| {
        stay.iter()
            .map(|reading| reading.read_ns - guest_ns(reading))
            .collect::<Vec<f64>>()
    };
    let offsets: Vec<Option<Offset>> = stays.iter().map(|stay| offset(&late(stay))).collect();
    let change = |pair: &[Option<Offset>]| {
        let (before, after) = (pair[0]?, pair[1]?);
        Some(ClockError {
            error_us: (before.ns - after.ns) / 1000.0,
            uncertainty_us: before.spread_ns.max(after.spread_ns) / 1000.0,
        })
    };
    offsets.windows(2).map(change).collect()
}

/// When the heartbeats of a stay were read, against the counter in them.
#[derive(Debug, Clone, Copy)]
struct Offset {
    /// The earliest.
    ns: f64,
    /// By how much the halves of the stay differ in their earliest.
    spread_ns: f64,
}

fn offset(late_ns: &[f64]) -> Option<Offset> {
    if late_ns.len() < FEWEST {
        return None;
    }
    let earliest = |part: &[f64]| part.iter().copied().fold(f64::INFINITY, f64::min);
    let (first, second) = late_ns.split_at(late_ns.len() / 2);
    let (first, second) = (earliest(first), earliest(second));
    Some(Offset {
        ns: first.min(second),
        spread_ns: (first - second).abs(),
    })
}

/// Fewer heartbeats than this tell no offset.
const FEWEST: usize = 10;

#[cfg(test)]
mod tests {
    use super::*;

    const KHZ: u64 = 2_000_000;

    /// A stay of one second: a heartbeat each 10 ms at 2 ticks a nanosecond, read up to 300 µs late.
    fn stay(from_ns: u64, offset_ns: f64) -> Vec<Reading> {
        let reading = |at: u64| {
            let late = (at * 7919 % 31) as f64 * 10_000.0;
            let ns = from_ns + at * 10_000_000;
            Reading {
                tsc: u64::MAX / 2 + ns * 2,
                read_ns: ns as f64 + late - offset_ns,
            }
        };
        (0..100).map(reading).collect()
    }

    #[test]
    fn a_clock_that_keeps_time_has_no_error() {
        let errors = errors(&[stay(0, 0.0), stay(2_000_000_000, 0.0), stay(5_000_000_000, 0.0)], KHZ);
        assert_eq!(errors.len(), 2);
        let small = |error: ClockError| error.error_us.abs() < 20.0 && error.uncertainty_us < 20.0;
        assert!(errors.iter().all(|error| small(error.unwrap())), "{errors:?}");
    }

    #[test]
    fn time_that_a_move_loses_or_adds_is_seen() {
        let errors = errors(
            &[stay(0, 0.0), stay(2_000_000_000, -5e6), stay(4_000_000_000, 0.0)],
            KHZ,
        );
        assert!((errors[0].unwrap().error_us + 5000.0).abs() < 50.0, "{errors:?}");
        assert!((errors[1].unwrap().error_us - 5000.0).abs() < 50.0, "{errors:?}");
    }

    #[test]
    fn too_few_heartbeats_tell_nothing() {
        let short = stay(2_000_000_000, 0.0)[..3].to_vec();
        assert_eq!(errors(&[stay(0, 0.0), short], KHZ), [None]);
        assert!(errors(&[], KHZ).is_empty());
    }

    #[test]
    fn heartbeats_that_are_read_ever_later_make_it_unsure() {
        let mut lagging = stay(2_000_000_000, 0.0);
        for (at, reading) in lagging.iter_mut().enumerate() {
            reading.read_ns += at as f64 * 1e6;
        }
        let errors = errors(&[stay(0, 0.0), lagging], KHZ);
        assert!(errors[0].unwrap().uncertainty_us > 1000.0, "{errors:?}");
    }
}
