//! The guest clock's error over a move: how far its time stamp counter strays from the host's clock.
//!
//! Each heartbeat is a pair: what the guest's counter said when it was printed, and when it was read here. Reading is
//! late, by a different amount each time, but never early; so the earliest heartbeats of a stay tell the true offset
//! best. Between two stays the offset must not change: the blackout is part of guest time.

/// One heartbeat: the guest's counter, and when it was read, in nanoseconds of the host's clock.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reading {
    pub(super) tsc: u64,
    pub(super) read_ns: f64,
}

/// The changes of the offset from each stay to the next in microseconds; positive where the guest's clock runs ahead
/// afterwards. `None` where a stay has too few heartbeats to tell.
pub(super) fn errors_us(stays: &[Vec<Reading>]) -> Vec<Option<f64>> {
    let Some(base) = stays.iter().flatten().next().map(|reading| reading.tsc) else {
        return Vec::new();
    };
    let stays: Vec<Vec<Point>> = stays.iter().map(|stay| points(stay, base)).collect();
    let Some(slope) = slope(&stays) else {
        return vec![None; stays.len().saturating_sub(1)];
    };
    let offsets: Vec<Option<f64>> = stays.iter().map(|stay| offset(stay, slope)).collect();
    let change = |pair: &[Option<f64>]| Some((pair[0]? - pair[1]?) / 1000.0);
    offsets.windows(2).map(change).collect()
}

#[derive(Debug, Clone, Copy)]
struct Point {
    ticks: f64,
    ns: f64,
}

fn points(stay: &[Reading], base: u64) -> Vec<Point> {
    // Counters are equal to within 2^53 ticks of each other: nothing is lost in a float.
    stay.iter()
        .map(|reading| Point {
            ticks: reading.tsc.wrapping_sub(base) as i64 as f64,
            ns: reading.read_ns,
        })
        .collect()
}

/// Nanoseconds per tick: the same in all stays, fitted within each, twice: the second time without the late half.
fn slope(stays: &[Vec<Point>]) -> Option<f64> {
    let rough = fit(stays)?;
    let early: Vec<Vec<Point>> = stays.iter().map(|stay| early_half(stay, rough)).collect();
    fit(&early)
}

/// Least squares over all stays, each with an offset of its own.
fn fit(stays: &[Vec<Point>]) -> Option<f64> {
    let (mut covariance, mut variance) = (0.0, 0.0);
    for stay in stays.iter().filter(|stay| stay.len() >= FEWEST) {
        let count = stay.len() as f64;
        let ticks = stay.iter().map(|point| point.ticks).sum::<f64>() / count;
        let ns = stay.iter().map(|point| point.ns).sum::<f64>() / count;
        covariance += stay
            .iter()
            .map(|point| (point.ticks - ticks) * (point.ns - ns))
            .sum::<f64>();
        variance += stay.iter().map(|point| (point.ticks - ticks).powi(2)).sum::<f64>();
    }
    (variance > 0.0).then(|| covariance / variance)
}

fn early_half(stay: &[Point], slope: f64) -> Vec<Point> {
    let late = |point: &Point| point.ns - slope * point.ticks;
    let mut sorted = stay.to_vec();
    sorted.sort_by(|one, other| late(one).total_cmp(&late(other)));
    sorted.truncate(stay.len().div_ceil(2));
    sorted
}

/// The earliest that a heartbeat of this stay was read, against its counter.
fn offset(stay: &[Point], slope: f64) -> Option<f64> {
    let offsets = stay.iter().map(|point| point.ns - slope * point.ticks);
    offsets.min_by(f64::total_cmp).filter(|_| stay.len() >= FEWEST)
}

/// Fewer heartbeats than this tell no offset.
const FEWEST: usize = 10;

#[cfg(test)]
mod tests {
    use super::*;

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
        let errors = errors_us(&[stay(0, 0.0), stay(2_000_000_000, 0.0), stay(5_000_000_000, 0.0)]);
        assert_eq!(errors.len(), 2);
        assert!(errors.iter().all(|error| error.unwrap().abs() < 20.0), "{errors:?}");
    }

    #[test]
    fn time_that_a_move_loses_or_adds_is_seen() {
        let errors = errors_us(&[stay(0, 0.0), stay(2_000_000_000, -5e6), stay(4_000_000_000, 0.0)]);
        assert!((errors[0].unwrap() + 5000.0).abs() < 50.0, "{errors:?}");
        assert!((errors[1].unwrap() - 5000.0).abs() < 50.0, "{errors:?}");
    }

    #[test]
    fn too_few_heartbeats_tell_nothing() {
        let errors = errors_us(&[stay(0, 0.0), stay(2_000_000_000, 0.0)[..3].to_vec()]);
        assert_eq!(errors, [None]);
        assert!(errors_us(&[]).is_empty());
    }
}
