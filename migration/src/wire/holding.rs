//! The table of what a destination holds of the round that was cut, as it travels: in parts, and bounded, because what is not told is only
//! sent again.

use ferry_proto::stream::v1;

use super::messages::{RUNS_PER_PART, gaps_and_lengths, runs_from_wire};
use crate::PageSet;
use crate::guest::{FrameRun, MemoryShape};

/// The most parts of one table: a million runs, at most 32 MiB on the wire. Pages that are sent in their order make few and long runs.
const MOST_PARTS: usize = 32;

/// The table in parts, the last one marked; at least one. Of more runs than fit the last ones are left out.
pub(crate) fn holding_to_wire(held: &PageSet) -> Vec<v1::Holding> {
    let runs: Vec<FrameRun> = held.runs().take(MOST_PARTS * RUNS_PER_PART).collect();
    let part = |runs: &[FrameRun]| v1::Holding {
        runs: gaps_and_lengths(runs),
        last: false,
    };
    let mut parts: Vec<_> = runs.chunks(RUNS_PER_PART).map(part).collect();
    match parts.last_mut() {
        Some(last) => last.last = true,
        None => parts.push(v1::Holding {
            runs: Vec::new(),
            last: true,
        }),
    }
    parts
}

/// A table as its parts come in.
#[derive(Debug)]
pub(crate) struct Holdings {
    held: PageSet,
    parts: usize,
}

impl Holdings {
    pub(crate) fn new(shape: &MemoryShape) -> Self {
        Self {
            held: PageSet::new(shape),
            parts: 0,
        }
    }

    /// Takes a part in. True if it was the last one.
    ///
    /// # Errors
    /// Its runs are not guest memory, or there is no end of parts.
    pub(crate) fn take(&mut self, part: &v1::Holding, shape: &MemoryShape) -> Result<bool, String> {
        self.parts += 1;
        if self.parts > MOST_PARTS {
            return Err("the table of what it holds has no end".to_owned());
        }
        for run in runs_from_wire(&part.runs, shape)? {
            self.held.insert(run);
        }
        Ok(part.last)
    }

    /// The pages that are held.
    pub(crate) fn held(self) -> PageSet {
        self.held
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::guest::Region;

    fn shape() -> MemoryShape {
        let region = |start_frame, frames| Region { start_frame, frames };
        MemoryShape::new(vec![region(5, 4096), region(1 << 20, 1 << 22)]).unwrap()
    }

    fn arrived(parts: &[v1::Holding]) -> PageSet {
        let mut holdings = Holdings::new(&shape());
        let ends: Vec<bool> = parts
            .iter()
            .map(|part| holdings.take(part, &shape()).unwrap())
            .collect();
        let (last, before) = ends.split_last().unwrap();
        assert!(last & !before.contains(&true), "only the last part ends it");
        holdings.held()
    }

    proptest! {
        #[test]
        fn what_is_held_comes_out_as_it_went_in(runs in prop::collection::vec((0u64..5000, 1u64..700), 0..60)) {
            let mut held = PageSet::new(&shape());
            for (first, count) in runs {
                held.insert(FrameRun { first, count });
                held.insert(FrameRun { first: (1 << 20) + first * 7, count });
            }
            prop_assert_eq!(arrived(&holding_to_wire(&held)), held);
        }

        #[test]
        fn hostile_tables_are_refused_or_lie_in_guest_memory(numbers in prop::collection::vec(any::<u64>(), 0..9)) {
            let mut holdings = Holdings::new(&shape());
            let part = v1::Holding { runs: numbers, last: true };
            if holdings.take(&part, &shape()).is_ok() {
                prop_assert!(holdings.held().runs().all(|run| shape().contains(run)));
            }
        }
    }

    #[test]
    fn of_too_many_runs_only_as_many_are_told_as_are_taken() {
        let mut held = PageSet::new(&shape());
        let most = (MOST_PARTS * RUNS_PER_PART) as u64;
        for index in 0..most + 1000 {
            held.insert(FrameRun {
                first: (1 << 20) + 2 * index,
                count: 1,
            });
        }
        let told = arrived(&holding_to_wire(&held));
        assert_eq!(told.count(), most);
        assert!(told.runs().all(|run| held.contains(run.first)), "more than is held");
    }

    #[test]
    fn a_table_without_end_is_refused() {
        let mut holdings = Holdings::new(&shape());
        let part = v1::Holding::default();
        let taken: Vec<_> = (0..=MOST_PARTS).map(|_| holdings.take(&part, &shape())).collect();
        let (last, before) = taken.split_last().unwrap();
        assert!(before.iter().all(|taken| *taken == Ok(false)) && last.is_err());
    }
}
