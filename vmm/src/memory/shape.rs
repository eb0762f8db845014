//! Where guest memory lies in guest physical addresses, and runs of its frames.

/// Size of a guest page in bytes, the unit in which memory is tracked and moved.
pub const PAGE_SIZE: u64 = 4096;

/// Size of a huge page of the host in bytes.
pub const HUGE_PAGE_SIZE: u64 = 2 << 20;

/// Start of the hole for devices (local APICs, the I/O APIC, KVM's own pages) below 4 GiB.
const HOLE_START: u64 = 3 << 30;

/// Where memory goes on after the hole.
const HOLE_END: u64 = 4 << 30;

/// One stretch of guest memory without holes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MemoryRegion {
    /// Guest physical address of its first byte, a multiple of [`PAGE_SIZE`].
    pub start: u64,
    /// Length in bytes, a multiple of [`PAGE_SIZE`].
    pub len: u64,
}

impl MemoryRegion {
    /// The frames of the region.
    #[must_use]
    pub fn run(&self) -> FrameRun {
        FrameRun {
            first: self.start / PAGE_SIZE,
            count: self.len / PAGE_SIZE,
        }
    }
}

/// The regions of a guest's memory, ascending, with a gap between any two.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct MemoryShape {
    /// The regions in ascending order of address.
    pub regions: Vec<MemoryRegion>,
}

impl MemoryShape {
    /// Lays out `bytes` (a multiple of [`PAGE_SIZE`]) of memory: from 0 up to 3 GiB, and what is left from 4 GiB on.
    #[must_use]
    pub fn from_size(bytes: u64) -> Self {
        let low = bytes.min(HOLE_START);
        let mut regions = vec![MemoryRegion { start: 0, len: low }];
        if bytes > low {
            regions.push(MemoryRegion {
                start: HOLE_END,
                len: bytes - low,
            });
        }
        Self { regions }
    }

    /// Size of all regions together in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.regions.iter().map(|region| region.len).sum()
    }

    /// Number of pages in all regions together.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.bytes() / PAGE_SIZE
    }

    /// One run per region, ascending.
    #[must_use]
    pub fn runs(&self) -> Vec<FrameRun> {
        self.regions.iter().map(MemoryRegion::run).collect()
    }

    /// Whether the run is not empty and lies wholly inside one region.
    #[must_use]
    pub fn contains(&self, run: FrameRun) -> bool {
        self.locate(run).is_some()
    }

    /// Finds the region that holds the whole run: its index, and the run's first page within it.
    pub(crate) fn locate(&self, run: FrameRun) -> Option<(usize, u64)> {
        let end = run.first.checked_add(run.count)?;
        if run.count == 0 {
            return None;
        }
        self.regions.iter().enumerate().find_map(|(index, region)| {
            let frames = region.run();
            (run.first >= frames.first && end <= frames.first + frames.count).then(|| (index, run.first - frames.first))
        })
    }
}

/// Consecutive guest frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FrameRun {
    /// Guest frame number (guest physical address divided by [`PAGE_SIZE`]) of the first page.
    pub first: u64,
    /// Number of pages.
    pub count: u64,
}

impl FrameRun {
    /// The frame after the last one; saturates, so that a hostile run stays merely out of bounds.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.first.saturating_add(self.count)
    }

    /// Length in bytes; saturates.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.count.saturating_mul(PAGE_SIZE)
    }

    /// What two runs have in common, or `None` if that is nothing.
    #[must_use]
    pub fn intersection(&self, other: FrameRun) -> Option<FrameRun> {
        let first = self.first.max(other.first);
        let end = self.end().min(other.end());
        (first < end).then(|| FrameRun {
            first,
            count: end - first,
        })
    }
}

/// Appends `run` to an ascending list, as part of the last entry where they touch.
pub(super) fn push_run(runs: &mut Vec<FrameRun>, run: FrameRun) {
    match runs.last_mut() {
        Some(last) if last.end() == run.first => last.count += run.count,
        _ => runs.push(run),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn small_memory_is_one_region() {
        let shape = MemoryShape::from_size(512 << 20);
        assert_eq!(
            shape.regions,
            [MemoryRegion {
                start: 0,
                len: 512 << 20
            }]
        );
    }

    #[test]
    fn large_memory_leaves_the_hole_free() {
        let shape = MemoryShape::from_size(12 << 30);
        assert_eq!(
            shape.regions,
            [
                MemoryRegion { start: 0, len: 3 << 30 },
                MemoryRegion {
                    start: 4 << 30,
                    len: 9 << 30
                }
            ]
        );
        assert_eq!(shape.bytes(), 12 << 30);
    }

    #[test]
    fn run_across_the_hole_is_not_contained() {
        let shape = MemoryShape::from_size(4 << 30);
        let last_low = (3 << 30) / PAGE_SIZE - 1;
        assert!(shape.contains(FrameRun {
            first: last_low,
            count: 1
        }));
        assert!(!shape.contains(FrameRun {
            first: last_low,
            count: 2
        }));
    }

    proptest! {
        #[test]
        fn contained_runs_never_leave_a_region(first: u64, count: u64, mib in 1u64..20_000) {
            let shape = MemoryShape::from_size(mib << 20);
            let run = FrameRun { first, count };
            let inside = shape.regions.iter().any(|region| {
                let end = u128::from(first) + u128::from(count);
                count > 0
                    && first >= region.start / PAGE_SIZE
                    && end <= u128::from((region.start + region.len) / PAGE_SIZE)
            });
            prop_assert_eq!(shape.contains(run), inside);
        }
    }
}
