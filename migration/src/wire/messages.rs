//! Conversions between what travels and what the engine works with; hostile numbers end here.

use ferry_proto::stream::v1;
use uuid::Uuid;

use crate::guest::{FrameRun, MemoryShape, Population};
use crate::handover::{Attempt, Epoch};

/// Runs in one part of the population map, or of a table of late pages: at most a megabyte on the wire.
pub(crate) const RUNS_PER_PART: usize = 32 << 10;

/// What page streams carried since they were opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StreamTotals {
    /// Frames, the opening one left out.
    pub frames: u64,
    /// Pages whose bytes were sent.
    pub pages: u64,
    /// Pages told to be zero.
    pub zero_pages: u64,
    /// Bytes, headers and tables too.
    pub bytes: u64,
}

impl StreamTotals {
    /// Both together.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            frames: self.frames + other.frames,
            pages: self.pages + other.pages,
            zero_pages: self.zero_pages + other.zero_pages,
            bytes: self.bytes + other.bytes,
        }
    }
}

impl From<StreamTotals> for v1::StreamTotals {
    fn from(totals: StreamTotals) -> Self {
        let StreamTotals {
            frames,
            pages,
            zero_pages,
            bytes,
        } = totals;
        Self {
            frames,
            pages,
            zero_pages,
            bytes,
        }
    }
}

impl From<v1::StreamTotals> for StreamTotals {
    fn from(totals: v1::StreamTotals) -> Self {
        let v1::StreamTotals {
            frames,
            pages,
            zero_pages,
            bytes,
        } = totals;
        Self {
            frames,
            pages,
            zero_pages,
            bytes,
        }
    }
}

/// An attempt as it travels.
pub(crate) fn attempt_to_wire(attempt: Attempt) -> v1::Attempt {
    v1::Attempt {
        instance: attempt.instance.as_bytes().to_vec(),
        migration: attempt.migration.as_bytes().to_vec(),
        attempt: attempt.attempt,
        epoch: attempt.epoch.0,
    }
}

/// An attempt as it came.
///
/// # Errors
/// If it is absent or its identities are not UUIDs.
pub(crate) fn attempt_from_wire(attempt: Option<v1::Attempt>) -> Result<Attempt, String> {
    let attempt = attempt.ok_or("no attempt is named")?;
    let uuid = |bytes: &[u8]| Uuid::from_slice(bytes).map_err(|_| "an attempt's identity is not a UUID".to_owned());
    Ok(Attempt {
        instance: uuid(&attempt.instance)?,
        migration: uuid(&attempt.migration)?,
        attempt: attempt.attempt,
        epoch: Epoch(attempt.epoch),
    })
}

/// A digest as it came.
///
/// # Errors
/// Names `what` if it is not 16 bytes.
pub(crate) fn digest_from_wire(bytes: &[u8], what: &str) -> Result<u128, String> {
    let bytes = bytes
        .try_into()
        .map_err(|_| format!("{what} has {} bytes, not 16", bytes.len()))?;
    Ok(u128::from_le_bytes(bytes))
}

/// The population map in parts that travel one by one, the last one marked; at least one.
pub(crate) fn population_to_wire(population: &Population) -> Vec<v1::Population> {
    let populated = population.populated.chunks(RUNS_PER_PART);
    let huge = population.huge.chunks(RUNS_PER_PART);
    let part = |populated, huge| v1::Population {
        populated,
        huge,
        last: false,
    };
    let mut parts: Vec<_> = huge.map(|runs| part(Vec::new(), gaps_and_lengths(runs))).collect();
    parts.extend(populated.map(|runs| part(gaps_and_lengths(runs), Vec::new())));
    match parts.last_mut() {
        Some(last) => last.last = true,
        None => parts.push(v1::Population {
            last: true,
            ..v1::Population::default()
        }),
    }
    parts
}

/// The runs of one list of a part of the population map.
///
/// # Errors
/// If a run is not inside the guest's memory.
pub(crate) fn runs_from_wire(numbers: &[u64], shape: &MemoryShape) -> Result<Vec<FrameRun>, String> {
    let mut end = 0u64;
    let run = |pair: &[u64]| {
        let &[gap, count] = pair else {
            return Err("a run has no length".to_owned());
        };
        let first = end.checked_add(gap).ok_or("a run is beyond all memory")?;
        let run = FrameRun { first, count };
        if !shape.contains(run) {
            return Err(format!("{count} pages from page {first:#x} on are not guest memory"));
        }
        end = run.end();
        Ok(run)
    };
    numbers.chunks(2).map(run).collect()
}

/// Runs as pairs of numbers: the gap since the end of the one before it, and the length.
pub(crate) fn gaps_and_lengths(runs: &[FrameRun]) -> Vec<u64> {
    let mut end = 0;
    let pair = |run: &FrameRun| {
        let gap = run.first - end;
        end = run.end();
        [gap, run.count]
    };
    runs.iter().flat_map(pair).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::guest::Region;

    fn shape() -> MemoryShape {
        MemoryShape::new(vec![Region {
            start_frame: 4,
            frames: 1 << 20,
        }])
        .unwrap()
    }

    proptest! {
        #[test]
        fn a_population_map_comes_out_as_it_went_in(steps in prop::collection::vec((0u64..5, 1u64..5), 0..200)) {
            let mut end = 4;
            let place = |(gap, count)| {
                let run = FrameRun { first: end + gap, count };
                end = run.end();
                run
            };
            let populated: Vec<FrameRun> = steps.into_iter().map(place).collect();
            let parts = population_to_wire(&Population { populated: populated.clone(), huge: Vec::new() });
            prop_assert!(parts.iter().rev().skip(1).all(|part| !part.last));
            prop_assert!(parts.last().is_some_and(|part| part.last));
            let read = |part: &v1::Population| runs_from_wire(&part.populated, &shape()).unwrap();
            prop_assert_eq!(parts.iter().flat_map(read).collect::<Vec<_>>(), populated);
        }

        #[test]
        fn hostile_maps_never_leave_guest_memory(numbers in prop::collection::vec(any::<u64>(), 0..9)) {
            if let Ok(runs) = runs_from_wire(&numbers, &shape()) {
                prop_assert!(runs.into_iter().all(|run| shape().contains(run)));
            }
        }
    }

    #[test]
    fn large_maps_travel_in_parts() {
        let populated: Vec<FrameRun> = (0..100_000)
            .map(|index| FrameRun {
                first: 4 + 2 * index,
                count: 1,
            })
            .collect();
        let parts = population_to_wire(&Population {
            populated,
            huge: vec![FrameRun { first: 512, count: 512 }],
        });
        assert_eq!(parts.len(), 5);
        assert_eq!(
            parts.iter().map(|part| part.populated.len() / 2).sum::<usize>(),
            100_000
        );
    }

    #[test]
    fn a_broken_attempt_is_named() {
        assert!(attempt_from_wire(None).is_err());
        assert!(
            attempt_from_wire(Some(v1::Attempt {
                instance: vec![1],
                ..v1::Attempt::default()
            }))
            .is_err()
        );
    }
}
