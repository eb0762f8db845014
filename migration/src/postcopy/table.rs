//! The table of pages that come late, as it travels: in parts, bounded, and with a checksum in GO's manifest.

use ferry_proto::stream::v1;
use xxhash_rust::xxh3::Xxh3;

use crate::PageSet;
use crate::guest::{FrameRun, GuestMemory, MemoryShape, Region};
use crate::handover::Attempt;
use crate::wire::{RUNS_PER_PART, attempt_to_wire, gaps_and_lengths, runs_from_wire};

/// The table in parts, the last one marked; at least one.
pub(crate) fn parts(set: &PageSet, attempt: Attempt) -> Vec<v1::Missing> {
    let runs: Vec<FrameRun> = set.runs().collect();
    let attempt = Some(attempt_to_wire(attempt));
    let part = |runs: &[FrameRun]| v1::Missing {
        attempt: attempt.clone(),
        runs: gaps_and_lengths(runs),
        last: false,
    };
    let mut parts: Vec<_> = runs.chunks(RUNS_PER_PART).map(part).collect();
    if parts.is_empty() {
        parts.push(part(&[]));
    }
    if let Some(last) = parts.last_mut() {
        last.last = true;
    }
    parts
}

/// What both sides compare: over the words of each region in turn, little-endian.
pub(crate) fn checksum(set: &PageSet) -> u128 {
    let mut hasher = Xxh3::new();
    for index in 0..set.regions() {
        for word in set.words(index) {
            hasher.update(&word.to_le_bytes());
        }
    }
    hasher.digest128()
}

/// A table as its parts come in.
#[derive(Debug)]
pub(crate) struct Table {
    set: PageSet,
    end: u64,
    whole: bool,
}

impl Table {
    pub(crate) fn new(shape: &MemoryShape) -> Self {
        Self {
            set: PageSet::new(shape),
            end: 0,
            whole: false,
        }
    }

    /// Takes a part in. Runs ascend over all parts, so there are never more of them than memory has pages.
    ///
    /// # Errors
    /// What is wrong with it: pages that are no memory, or of a disk, or out of order; parts after the last one, or without end.
    pub(crate) fn take(&mut self, part: &v1::Missing, memory: &impl GuestMemory) -> Result<(), String> {
        self.take_of(part, memory.shape(), memory.late_unit(), |region| {
            memory.is_disk(region)
        })
    }

    /// The same of memory of this shape, of which `unit` pages come at a time.
    ///
    /// # Errors
    /// As [`Table::take`].
    pub(crate) fn take_of(
        &mut self,
        part: &v1::Missing,
        shape: &MemoryShape,
        unit: u64,
        is_disk: impl Fn(Region) -> bool,
    ) -> Result<(), String> {
        if self.whole {
            return Err("a part of the table of missing pages came after its last one".to_owned());
        }
        if part.runs.is_empty() && !part.last {
            return Err("a part of the table of missing pages is empty".to_owned());
        }
        for run in runs_from_wire(&part.runs, shape)? {
            if run.first < self.end {
                return Err(format!(
                    "the missing pages from page {:#x} on overlap or precede those before them",
                    run.first
                ));
            }
            if !run.is_of_whole(unit) {
                return Err(format!(
                    "{} pages from page {:#x} on are missing, and pages come late {unit} at a time",
                    run.count, run.first
                ));
            }
            let region = shape.locate(run.first).map(|(region, _)| shape.regions()[region]);
            if region.is_some_and(&is_disk) {
                return Err(format!("page {:#x} is of a disk, which cannot come late", run.first));
            }
            self.end = run.end();
            self.set.insert(run);
        }
        self.whole = part.last;
        Ok(())
    }

    /// The pages, once the last part is here.
    pub(crate) fn as_whole(&self) -> Option<&PageSet> {
        self.whole.then_some(&self.set)
    }

    /// The same, given away.
    pub(crate) fn whole(self) -> Option<PageSet> {
        self.whole.then_some(self.set)
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::os::fd::BorrowedFd;

    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;
    use crate::guest::GuestError;
    use crate::handover::Epoch;

    /// Only a shape: its last region is a disk.
    struct Shape(MemoryShape);

    impl GuestMemory for Shape {
        fn shape(&self) -> &MemoryShape {
            &self.0
        }
        fn is_disk(&self, region: Region) -> bool {
            region.start_frame == 1 << 20
        }
        fn send(&self, _: BorrowedFd<'_>, _: &[u8], _: &[FrameRun]) -> io::Result<()> {
            Err(io::ErrorKind::Unsupported.into())
        }
        fn receive(&self, _: BorrowedFd<'_>, _: &[FrameRun]) -> io::Result<()> {
            Err(io::ErrorKind::Unsupported.into())
        }
        fn read_pages(&self, _: &[FrameRun], _: &mut [u8]) -> Result<(), GuestError> {
            Ok(())
        }
        fn write_pages(&self, _: &[FrameRun], _: &[u8]) -> Result<(), GuestError> {
            Ok(())
        }
        fn zero_pages(&self, _: FrameRun, _: &mut Vec<FrameRun>) -> Result<(), GuestError> {
            Ok(())
        }
        fn write_zeroes(&self, _: FrameRun) -> Result<(), GuestError> {
            Ok(())
        }
        fn digest(&self, _: FrameRun) -> Result<u128, GuestError> {
            Ok(0)
        }
        fn page_digests(&self, _: FrameRun, _: &mut Vec<u64>) -> Result<(), GuestError> {
            Ok(())
        }
        fn advise_huge(&self, _: FrameRun) -> Result<(), GuestError> {
            Ok(())
        }
        fn populate(&self, _: FrameRun) -> Result<(), GuestError> {
            Ok(())
        }
    }

    fn memory() -> Shape {
        let region = |start_frame, frames| Region { start_frame, frames };
        Shape(MemoryShape::new(vec![region(0, 200_000), region(1 << 20, 64)]).unwrap())
    }

    fn attempt() -> Attempt {
        Attempt {
            instance: Uuid::from_u128(1),
            migration: Uuid::from_u128(2),
            attempt: 3,
            epoch: Epoch(4),
        }
    }

    fn read(parts: &[v1::Missing]) -> Result<Option<PageSet>, String> {
        let memory = memory();
        let mut table = Table::new(memory.shape());
        parts.iter().try_for_each(|part| table.take(part, &memory))?;
        Ok(table.whole())
    }

    fn part(runs: &[u64], last: bool) -> v1::Missing {
        v1::Missing {
            attempt: None,
            runs: runs.to_vec(),
            last,
        }
    }

    proptest! {
        #[test]
        fn a_table_comes_out_as_it_went_in(steps in prop::collection::vec((0u64..200_000, 1u64..300), 0..60)) {
            let mut set = PageSet::new(memory().shape());
            steps.into_iter().for_each(|(first, count)| set.insert(FrameRun { first, count }));
            let found = read(&parts(&set, attempt())).unwrap().unwrap();
            prop_assert_eq!(checksum(&found), checksum(&set));
            prop_assert_eq!(found, set);
        }

        #[test]
        fn hostile_parts_never_panic(numbers in prop::collection::vec(any::<u64>(), 0..9), last: bool) {
            let _ = read(&[part(&numbers, last), part(&numbers, true)]);
        }
    }

    #[test]
    fn a_large_table_travels_in_parts() {
        let mut set = PageSet::new(memory().shape());
        (0..100_000).for_each(|index| {
            set.insert(FrameRun {
                first: 2 * index,
                count: 1,
            })
        });
        let parts = parts(&set, attempt());
        assert_eq!(parts.len(), 4);
        assert_eq!(read(&parts).unwrap(), Some(set));
        assert_eq!(read(&parts[..3]), Ok(None));
    }

    #[test]
    fn what_is_wrong_with_a_part_is_named() {
        let says = |parts: &[v1::Missing], word| {
            let error = read(parts).unwrap_err();
            assert!(error.contains(word), "{error}");
        };
        says(&[part(&[1 << 20, 1], true)], "disk");
        says(&[part(&[199_999, 2], true)], "not guest memory");
        says(&[part(&[10, 5], false), part(&[12, 1], true)], "precede");
        says(&[part(&[], false)], "empty");
        says(&[part(&[], true), part(&[], true)], "after its last");
        says(&[part(&[5], true)], "no length");
    }
}
