//! When the rest of a copy is left for after GO. Pure.

/// Whether pages may come late, and when that is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Lateness {
    /// All of them come before GO.
    #[default]
    Never,
    /// None comes before: the guest is handed over at once.
    AtOnce,
    /// Those that rounds do not bring within the budget, or when it must be completed.
    WhenItPays,
    /// Those that are left when it must be completed: its time is up, or its user wants it so.
    WhenItMustEnd,
}

/// The first round brings what the guest does not write; the ones after it say what comes of that.
const TELLING_ROUNDS: usize = 3;

/// What the rounds so far left, as far as it tells whether the rest is to come late.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Shrinking {
    rounds: usize,
    before: u64,
    last: u64,
}

impl Shrinking {
    /// Takes in what another round left.
    pub(crate) fn left(&mut self, dirty_pages: u64) {
        self.rounds += 1;
        (self.before, self.last) = (self.last, dirty_pages);
    }

    /// Whether rounds bring the guest no nearer to its budget: as the last two went, the dirty set does not shrink by a quarter. Asked of
    /// rounds after which the guest cannot be handed over. The reason, in words.
    pub(crate) fn stalls(self) -> Option<String> {
        let shrinks = self.last.saturating_mul(4) <= self.before.saturating_mul(3);
        (self.rounds >= TELLING_ROUNDS && !shrinks).then(|| {
            format!(
                "rounds do not bring it within the budget ({} dirty pages, {} after the round before)",
                self.last, self.before
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stalls(dirty: &[u64]) -> Option<String> {
        let mut shrinking = Shrinking::default();
        dirty.iter().for_each(|&pages| shrinking.left(pages));
        shrinking.stalls()
    }

    #[test]
    fn a_dirty_set_that_shrinks_is_waited_for() {
        assert_eq!(stalls(&[100_000, 60_000, 30_000]), None);
        assert_eq!(stalls(&[100_000, 100, 75]), None);
    }

    #[test]
    fn one_that_does_not_comes_late_once_that_is_known() {
        assert_eq!(stalls(&[]), None);
        assert_eq!(stalls(&[50_000, 50_000]), None);
        assert!(stalls(&[50_000; 3]).unwrap().contains("50000 dirty pages"));
        assert!(stalls(&[10, 1000, 760]).is_some());
    }
}
