//! Which pages of a round go last.
//!
//! A page that the guest writes again after it went is dirty at the end of the round, so whatever it writes often is better sent late: less time is
//! left to write it. With the dirty log such pages also stay writable until their turn comes, so what was written before that goes with them and
//! costs the guest no fault. Pages that were in the round before as well are taken for those. The first round is of all that is populated and tells
//! nothing: what the second has of it goes as it is, and the third is parted.

use crate::PageSet;

/// What was sent last.
#[derive(Default)]
pub(super) struct Heat {
    before: Option<PageSet>,
}

impl Heat {
    /// Parts a round into what goes first and what goes last. None is empty, unless the round is.
    pub(super) fn part(&self, round: PageSet) -> Vec<PageSet> {
        let Some(before) = &self.before else {
            return vec![round];
        };
        let mut first = round;
        let mut last = first.emptied();
        first.move_all_to(before, &mut last);
        match (first.is_empty(), last.is_empty()) {
            (true, _) => vec![last],
            (false, true) => vec![first],
            (false, false) => vec![first, last],
        }
    }

    /// Notes what the round was that went. Gives back a set to clear and use again.
    pub(super) fn went(&mut self, round: PageSet) -> Option<PageSet> {
        self.before.replace(round)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::{FrameRun, MemoryShape, Region};

    fn set(runs: &[(u64, u64)]) -> PageSet {
        let whole = Region {
            start_frame: 0,
            frames: 1000,
        };
        let mut set = PageSet::new(&MemoryShape::new(vec![whole]).unwrap());
        runs.iter()
            .for_each(|&(first, count)| set.insert(FrameRun { first, count }));
        set
    }

    #[test]
    fn pages_that_were_in_the_round_before_as_well_go_last() {
        let mut heat = Heat::default();
        let everything = set(&[(0, 1000)]);
        assert_eq!(heat.part(everything.clone()), vec![everything.clone()]);
        assert_eq!(heat.went(everything.clone()), None);

        let second = set(&[(100, 50), (300, 50)]);
        assert_eq!(heat.part(second.clone()), vec![second.clone()]);
        assert_eq!(heat.went(second), Some(everything));

        let third = set(&[(120, 60), (310, 10), (500, 1)]);
        assert_eq!(
            heat.part(third.clone()),
            [set(&[(150, 30), (500, 1)]), set(&[(120, 30), (310, 10)])]
        );
        heat.went(third);

        let fourth = set(&[(700, 2)]);
        assert_eq!(heat.part(fourth.clone()), [fourth]);
    }
}
