//! Where a guest has memory: frames, runs of them, regions.

/// Bytes in a frame: the unit in which memory is tracked and sent.
pub const FRAME_SIZE: u64 = 4096;

/// Frames in a huge page of 2 MiB.
pub const FRAMES_PER_HUGE_PAGE: u64 = 512;

/// Consecutive guest frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FrameRun {
    /// Guest frame number of the first one.
    pub first: u64,
    /// How many frames.
    pub count: u64,
}

impl FrameRun {
    /// The frame after the last one.
    #[must_use]
    pub fn end(self) -> u64 {
        self.first + self.count
    }

    /// Whether it is whole units of so many frames, from a multiple of that on.
    #[must_use]
    pub fn is_of_whole(self, unit: u64) -> bool {
        self.first.is_multiple_of(unit) && self.count.is_multiple_of(unit)
    }

    /// The size in bytes.
    #[must_use]
    pub fn bytes(self) -> u64 {
        self.count * FRAME_SIZE
    }
}

/// One stretch of guest memory without holes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Guest frame number of its first frame.
    pub start_frame: u64,
    /// How many frames it has.
    pub frames: u64,
}

impl Region {
    /// The region as a run.
    #[must_use]
    pub fn run(self) -> FrameRun {
        FrameRun {
            first: self.start_frame,
            count: self.frames,
        }
    }
}

/// Why regions do not describe a guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ShapeError {
    /// There is no memory at all.
    #[error("the guest has no memory")]
    Empty,
    /// A region has no frames, or ends beyond the last frame that an address can name.
    #[error("memory region {0} is empty or too long")]
    Size(usize),
    /// A region begins before the end of the one before it.
    #[error("memory region {0} overlaps or precedes the one before it")]
    Order(usize),
}

/// Where a guest has memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryShape {
    regions: Vec<Region>,
}

impl MemoryShape {
    /// A shape of these regions, ascending and apart from each other.
    ///
    /// # Errors
    /// Names the first region that is empty, too long, or out of order.
    pub fn new(regions: Vec<Region>) -> Result<Self, ShapeError> {
        if regions.is_empty() {
            return Err(ShapeError::Empty);
        }
        let mut end = 0;
        for (index, region) in regions.iter().enumerate() {
            let limit = u64::MAX / FRAME_SIZE;
            if region.frames == 0 || region.start_frame > limit || region.frames > limit - region.start_frame {
                return Err(ShapeError::Size(index));
            }
            if region.start_frame < end {
                return Err(ShapeError::Order(index));
            }
            end = region.start_frame + region.frames;
        }
        Ok(Self { regions })
    }

    /// The regions, ascending.
    #[must_use]
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// How many frames there are in all.
    #[must_use]
    pub fn frames(&self) -> u64 {
        self.regions.iter().map(|region| region.frames).sum()
    }

    /// Whether all of `run` lies inside one region. Any numbers may be asked for.
    #[must_use]
    pub fn contains(&self, run: FrameRun) -> bool {
        run.count > 0
            && self
                .locate(run.first)
                .is_some_and(|(region, offset)| run.count <= self.regions[region].frames - offset)
    }

    /// The index of the region that holds `frame`, and the frame's offset in it.
    #[must_use]
    pub fn locate(&self, frame: u64) -> Option<(usize, u64)> {
        let after = self.regions.partition_point(|region| region.start_frame <= frame);
        let index = after.checked_sub(1)?;
        let offset = frame - self.regions[index].start_frame;
        (offset < self.regions[index].frames).then_some((index, offset))
    }
}

/// What the source host has ever populated of a guest's memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Population {
    /// Frames that hold something: present or swapped out, not the shared zero page. Ascending, inside regions.
    pub populated: Vec<FrameRun>,
    /// Frames that huge pages back. Ascending, inside regions.
    pub huge: Vec<FrameRun>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(regions: &[(u64, u64)]) -> Result<MemoryShape, ShapeError> {
        MemoryShape::new(
            regions
                .iter()
                .map(|&(start_frame, frames)| Region { start_frame, frames })
                .collect(),
        )
    }

    #[test]
    fn a_run_lies_inside_one_region_or_outside_the_shape() {
        let shape = shape(&[(0, 100), (200, 50)]).unwrap();
        assert!(shape.contains(FrameRun { first: 0, count: 100 }));
        assert!(shape.contains(FrameRun { first: 249, count: 1 }));
        assert!(!shape.contains(FrameRun { first: 99, count: 2 }));
        assert!(!shape.contains(FrameRun { first: 150, count: 1 }));
        assert!(!shape.contains(FrameRun { first: 200, count: 0 }));
        assert!(!shape.contains(FrameRun {
            first: u64::MAX,
            count: u64::MAX
        }));
    }

    #[test]
    fn regions_out_of_order_or_too_long_are_named() {
        assert_eq!(shape(&[]), Err(ShapeError::Empty));
        assert_eq!(shape(&[(0, 10), (9, 1)]), Err(ShapeError::Order(1)));
        assert_eq!(shape(&[(0, 10), (u64::MAX, 1)]), Err(ShapeError::Size(1)));
        assert_eq!(shape(&[(0, 0)]), Err(ShapeError::Size(0)));
    }
}
