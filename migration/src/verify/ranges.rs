//! How memory is cut into ranges whose sums are compared. Both sides cut alike, by the shape that the handshake settled.

use crate::guest::{FRAMES_PER_HUGE_PAGE, FrameRun, MemoryShape, Region};

/// The most ranges of one region. Those of 2 MiB reach to 8 GiB of it.
const MOST_RANGES: u64 = 4096;

/// The ranges of a guest's memory, numbered through all regions: ascending, each of a power of two of pages, or up to its region's end.
#[derive(Debug)]
pub(crate) struct Ranges {
    regions: Vec<Cut>,
    count: usize,
}

/// One region, cut.
#[derive(Debug)]
struct Cut {
    region: Region,
    /// Pages of a range.
    frames: u64,
    /// The number of its first range.
    first: usize,
}

impl Ranges {
    /// Cuts memory of this shape.
    pub(crate) fn new(shape: &MemoryShape) -> Self {
        let mut count = 0;
        let cut = |&region: &Region| {
            let frames = pages_of_a_range(region);
            let first = count;
            count += usize::try_from(region.frames.div_ceil(frames)).expect("there are 4096 at most");
            Cut { region, frames, first }
        };
        let regions = shape.regions().iter().map(cut).collect();
        Self { regions, count }
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// The range of the page at this offset into the region with this index.
    pub(crate) fn of(&self, region: usize, offset: u64) -> usize {
        let Cut { frames, first, .. } = self.regions[region];
        first + (offset / frames) as usize
    }

    /// Its pages; none if there is no range of this number.
    pub(crate) fn run(&self, number: usize) -> Option<FrameRun> {
        let after = self.regions.partition_point(|cut| cut.first <= number);
        let Cut { region, frames, first } = self.regions.get(after.checked_sub(1)?)?;
        let offset = (number - first) as u64 * frames;
        (offset < region.frames).then(|| FrameRun {
            first: region.start_frame + offset,
            count: (*frames).min(region.frames - offset),
        })
    }

    /// Whether these are numbers of ranges, ascending: what a peer may say of some of them.
    pub(crate) fn are_some(&self, numbers: &[u32]) -> bool {
        let ascend = numbers.windows(2).all(|pair| pair[0] < pair[1]);
        ascend && numbers.last().is_none_or(|&last| self.run(last as usize).is_some())
    }
}

fn pages_of_a_range(region: Region) -> u64 {
    region
        .frames
        .div_ceil(MOST_RANGES)
        .max(FRAMES_PER_HUGE_PAGE)
        .next_power_of_two()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn shape(sizes: &[u64]) -> MemoryShape {
        let mut end = 3;
        let region = |&frames: &u64| {
            let start_frame = end + 100;
            end = start_frame + frames;
            Region { start_frame, frames }
        };
        MemoryShape::new(sizes.iter().map(region).collect()).unwrap()
    }

    proptest! {
        #[test]
        fn ranges_cover_every_page_once(sizes in prop::collection::vec(1u64..20_000_000, 1..6)) {
            let shape = shape(&sizes);
            let ranges = Ranges::new(&shape);
            let runs: Vec<FrameRun> = (0..ranges.count()).map(|number| ranges.run(number).unwrap()).collect();
            prop_assert_eq!(ranges.run(ranges.count()), None);
            prop_assert!(runs.len() as u64 <= MOST_RANGES * sizes.len() as u64);
            prop_assert!(runs.iter().all(|&run| shape.contains(run)));
            prop_assert!(runs.windows(2).all(|pair| pair[0].end() <= pair[1].first));
            prop_assert_eq!(runs.iter().map(|run| run.count).sum::<u64>(), shape.frames());
            for (number, run) in runs.iter().enumerate() {
                for frame in [run.first, run.end() - 1] {
                    let (region, offset) = shape.locate(frame).unwrap();
                    prop_assert_eq!(ranges.of(region, offset), number);
                }
            }
        }
    }

    #[test]
    fn what_a_peer_says_of_ranges_ascends_and_exists() {
        let ranges = Ranges::new(&shape(&[1024, 512]));
        assert!(ranges.are_some(&[]) && ranges.are_some(&[0, 2]));
        assert!(!ranges.are_some(&[0, 3]) && !ranges.are_some(&[1, 1]) && !ranges.are_some(&[2, 0]));
    }

    #[test]
    fn a_range_has_2_mib_up_to_8_gib_and_grows_from_there_on() {
        let pages = |gib: u64| Ranges::new(&shape(&[gib << 18])).run(0).unwrap().count;
        assert_eq!([pages(1), pages(8), pages(9), pages(64)], [512, 512, 1024, 4096]);
    }
}
