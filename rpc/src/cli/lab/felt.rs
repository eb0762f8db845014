//! What a guest felt of its move, by its own word: its largest gaps, and how much it got done, before, meanwhile and after.

use serde::Serialize;

use super::record::Record;

/// What a guest felt of a move.
#[derive(Debug, Clone, Copy, Serialize)]
pub(in crate::cli) struct Felt {
    /// The last while before the order.
    pub(in crate::cli) before: Stretch,
    /// From the last heartbeat before the order to the second one at the destination: the copy and the switchover.
    pub(in crate::cli) during: Stretch,
    /// From there on, as long as it was listened to.
    pub(in crate::cli) after: Stretch,
    /// The part of its work that the guest did not get done while it was moved, compared with before; not below 0. Unknown of a guest that writes nothing.
    pub(in crate::cli) slowdown: Option<f64>,
}

/// Some time in a guest's life.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(in crate::cli) struct Stretch {
    /// Pages written a second, by the guest's clock.
    pub(in crate::cli) page_writes_per_s: f64,
    /// The largest gap between two looks at its clock.
    pub(in crate::cli) guest_gap_ms: f64,
}

impl Felt {
    /// Of a move that was ordered after one heartbeat and had brought the guest to its destination with another one.
    pub(super) fn of(record: &Record, ordered: u64, arrived: u64) -> Option<Self> {
        let [before, during, after] = [
            (ordered.saturating_sub(BEATS_BEFORE), ordered),
            (ordered, arrived),
            (arrived, record.last()?.heartbeat.seq),
        ]
        .map(|(from, to)| Stretch::of(record, from, to));
        let (before, during) = (before?, during?);
        Some(Self {
            before,
            during,
            after: after?,
            slowdown: slowdown(before.page_writes_per_s, during.page_writes_per_s),
        })
    }
}

impl Stretch {
    fn of(record: &Record, from: u64, to: u64) -> Option<Self> {
        let span = record.span(from, to)?;
        Some(Self {
            page_writes_per_s: span.write_rate,
            guest_gap_ms: span.guest_gap.as_secs_f64() * 1e3,
        })
    }
}

fn slowdown(before: f64, during: f64) -> Option<f64> {
    (before > 0.0).then(|| (1.0 - during / before).max(0.0))
}

/// Half a second of heartbeats, each 20 ms: what is done to prepare a move lies before them.
const BEATS_BEFORE: u64 = 25;

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use ferry_probe::report::{Heartbeat, Line};

    use super::*;

    /// A heartbeat each millisecond; 10 writes from one to the next, and from the 30th to the 40th one.
    fn lived() -> Record {
        let mut record = Record::default();
        let ready = "READY tsc_khz=1000 tsc_from=pit mem_mib=1 cpus=1 fill_mib=0 work_mib=1\n";
        record.feed(0, ready.as_bytes(), Instant::now());
        for seq in 0..60_u64 {
            let slow = seq.clamp(30, 40) - 30;
            let heartbeat = Heartbeat {
                seq,
                tsc: seq * 1000,
                gap_ns: 1000 * seq,
                writes: seq * 10 - slow * 9,
                ..Default::default()
            };
            let host = usize::from(seq >= 35);
            record.feed(
                host,
                format!("{}\n", Line::Heartbeat(heartbeat)).as_bytes(),
                Instant::now(),
            );
        }
        record
    }

    #[test]
    fn each_part_counts_its_own() {
        let felt = Felt::of(&lived(), 30, 40).unwrap();
        let rates = [felt.before, felt.during, felt.after].map(|stretch| stretch.page_writes_per_s.round());
        assert_eq!(rates, [10_000.0, 1000.0, 10_000.0]);
        assert!((felt.slowdown.unwrap() - 0.9).abs() < 1e-9, "{felt:?}");
        assert!((felt.during.guest_gap_ms - 0.04).abs() < 1e-9, "{felt:?}");
    }

    #[test]
    fn a_guest_that_does_nothing_is_not_slowed_and_one_that_catches_up_is_not_hastened() {
        assert_eq!(slowdown(0.0, 0.0), None);
        assert_eq!(slowdown(100.0, 110.0), Some(0.0));
    }
}
