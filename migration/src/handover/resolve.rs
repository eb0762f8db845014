//! `resolve`: a person ends a migration of which nobody knows who has the guest.
//!
//! The other host is silent and may be so for ever. What this agent cannot know, a person may: that the other host is off.
//! The copy that was stopped here is never resumed: the guest may have run elsewhere since, and written its disks.
//!
//! | | `--run-here` | `--discard-here` |
//! | --- | --- | --- |
//! | at the source | boots the guest anew under max(known) + 1; e + 1 counts as known since ARM | removes the copy |
//! | at the destination | boots the guest anew, which ran and crashed with its host, under an epoch that the source cannot come to | removes it |
//!
//! Whoever comes back later asks, learns the higher epoch and destroys what it has ([`super::heard`]).

use super::{Decision, Epoch};

/// What a person wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Wish {
    /// The guest is to run on this host.
    RunHere,
    /// The guest is the other host's, or lost: nothing is to be left of it here.
    DiscardHere,
}

impl Wish {
    /// The word that users, messages and journals use.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::RunHere => "run-here",
            Self::DiscardHere => "discard-here",
        }
    }

    /// Reads the word that [`Self::as_str`] writes.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        [Self::RunHere, Self::DiscardHere]
            .into_iter()
            .find(|wish| wish.as_str() == word)
    }
}

/// This host's part in the migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// The source, with what D said to it so far.
    Source(Option<Decision>),
    /// The destination. Its D is RUNNING, else it would know.
    Destination,
}

/// Whether the other agent answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Peer {
    /// It does, be it with a refusal.
    Answers,
    /// It did not within the time of a call.
    Silent,
}

/// An instance and its migration when a person wants to end the doubt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Doubt {
    /// This host's part.
    pub side: Side,
    /// Whether the instance is `indeterminate` here.
    pub is_indeterminate: bool,
    /// The highest epoch that this host knows of.
    pub known: Epoch,
    /// The other agent.
    pub peer: Peer,
}

/// Why it is not ended so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum NotResolved {
    /// There is nothing to end.
    #[error("it is not indeterminate here")]
    NoDoubt,
    /// The other agent knows, or will.
    #[error("the other host answers, and settles it by itself")]
    PeerAnswers,
    /// D is known: what follows from it is being done.
    #[error("it is decided: {0}")]
    Decided(Decision),
}

impl Doubt {
    /// Rule 9. `Ok` holds the epoch under which the guest is booted anew, none for a copy that is to be discarded.
    ///
    /// # Errors
    /// It is not for a person to end.
    pub fn resolve(&self, wish: Wish) -> Result<Option<Epoch>, NotResolved> {
        if !self.is_indeterminate {
            return Err(NotResolved::NoDoubt);
        }
        if let Side::Source(Some(said @ (Decision::Source | Decision::Running))) = self.side {
            return Err(NotResolved::Decided(said));
        }
        if self.peer == Peer::Answers {
            return Err(NotResolved::PeerAnswers);
        }
        Ok(match (wish, self.side) {
            (Wish::RunHere, Side::Source(_)) => Some(self.known.next()),
            (Wish::RunHere, Side::Destination) => Some(Epoch(self.known.0.saturating_add(SOURCES_RIGHTS))),
            (Wish::DiscardHere, _) => None,
        })
    }
}

/// How many rights the silent source may take meanwhile from what it knows: one by a `resolve` of its own, which it cannot be asked
/// about, and one each time that its guest is started again. The destination leaves all of them out, so that no epoch is there twice.
const SOURCES_RIGHTS: u64 = 1 << 16;

#[cfg(test)]
mod tests {
    use super::*;

    const DOUBT: Doubt = Doubt {
        side: Side::Source(None),
        is_indeterminate: true,
        known: Epoch(5),
        peer: Peer::Silent,
    };

    #[test]
    fn the_guest_boots_under_an_epoch_that_the_destination_never_had() {
        assert_eq!(DOUBT.resolve(Wish::RunHere), Ok(Some(Epoch(6))));
        let claimed = Doubt {
            side: Side::Source(Some(Decision::Claimed)),
            ..DOUBT
        };
        assert_eq!(claimed.resolve(Wish::RunHere), Ok(Some(Epoch(6))));
    }

    #[test]
    fn two_persons_who_resolve_on_both_hosts_take_different_epochs() {
        let arrived = Doubt {
            side: Side::Destination,
            ..DOUBT
        };
        // The source knows e + 1 since ARM, as the destination does since CLAIMED, and starts its guest again and again.
        let mut source = DOUBT.resolve(Wish::RunHere).unwrap().unwrap();
        let destination = arrived.resolve(Wish::RunHere).unwrap().unwrap();
        for _ in 0..1000 {
            assert!(source < destination);
            source = source.next();
        }
    }

    #[test]
    fn a_discarded_copy_takes_no_epoch() {
        assert_eq!(DOUBT.resolve(Wish::DiscardHere), Ok(None));
    }

    #[test]
    fn while_the_other_agent_answers_nobody_decides_beside_it() {
        let answered = Doubt {
            peer: Peer::Answers,
            ..DOUBT
        };
        assert_eq!(answered.resolve(Wish::RunHere), Err(NotResolved::PeerAnswers));
        assert_eq!(answered.resolve(Wish::DiscardHere), Err(NotResolved::PeerAnswers));
    }

    #[test]
    fn what_is_decided_or_was_never_in_doubt_is_left_alone() {
        for said in [Decision::Source, Decision::Running] {
            let decided = Doubt {
                side: Side::Source(Some(said)),
                ..DOUBT
            };
            assert_eq!(decided.resolve(Wish::RunHere), Err(NotResolved::Decided(said)));
        }
        let certain = Doubt {
            is_indeterminate: false,
            ..DOUBT
        };
        assert_eq!(certain.resolve(Wish::DiscardHere), Err(NotResolved::NoDoubt));
    }

    #[test]
    fn words_are_read_back() {
        for wish in [Wish::RunHere, Wish::DiscardHere] {
            assert_eq!(Wish::parse(wish.as_str()), Some(wish));
        }
        assert_eq!(Wish::parse(""), None);
    }
}
