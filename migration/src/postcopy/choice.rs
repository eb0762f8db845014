//! When the rest of a copy is left for after GO. Pure.

use crate::source::RoundSummary;

/// Whether pages may come late, and when that is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Lateness {
    /// All of them come before GO.
    #[default]
    Never,
    /// None comes before: the guest is handed over at once.
    AtOnce,
    /// Those that rounds do not bring within the budget, or when its user wants it completed.
    WhenItPays,
}

/// The first round brings what the guest does not write; the ones after it say what comes of that.
const TELLING_ROUNDS: usize = 3;

/// Whether rounds bring the guest no nearer to its budget: as the last two went, the dirty set does not shrink by a quarter. Asked of
/// rounds after which the guest cannot be handed over. The reason, in words.
pub(crate) fn pays(rounds: &[RoundSummary]) -> Option<String> {
    if rounds.len() < TELLING_ROUNDS {
        return None;
    }
    let [.., before, last] = rounds else { return None };
    let shrinks = last.dirty_pages.saturating_mul(4) <= before.dirty_pages.saturating_mul(3);
    (!shrinks).then(|| {
        format!(
            "rounds do not bring it within the budget ({} dirty pages, {} after the round before): the rest comes late",
            last.dirty_pages, before.dirty_pages
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rounds(dirty: &[u64]) -> Vec<RoundSummary> {
        let round = |&dirty_pages: &u64| RoundSummary {
            dirty_pages,
            ..RoundSummary::default()
        };
        dirty.iter().map(round).collect()
    }

    #[test]
    fn a_dirty_set_that_shrinks_is_waited_for() {
        assert_eq!(pays(&rounds(&[100_000, 60_000, 30_000])), None);
        assert_eq!(pays(&rounds(&[100_000, 100, 75])), None);
    }

    #[test]
    fn one_that_does_not_comes_late_once_that_is_known() {
        assert_eq!(pays(&rounds(&[])), None);
        assert_eq!(pays(&rounds(&[50_000, 50_000])), None);
        assert!(
            pays(&rounds(&[50_000, 50_000, 50_000]))
                .unwrap()
                .contains("50000 dirty pages")
        );
        assert!(pays(&rounds(&[10, 1000, 760])).is_some());
    }
}
