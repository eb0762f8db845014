//! Who may start a guest again that has no VMM any more: its restart policy, or its user.
//!
//! Starting again is resuming: it takes an epoch that nobody had, and it is certain first that nobody else has the guest.
//!
//! ```text
//!   the VMM is gone ── an attempt was ARMED, D unknown ──► ask D       RUNNING ──► it is the destination's
//!        │
//!        └─ it came by a migration whose source has not acknowledged RUNNING ──► ask the source
//!                                                            │ no answer: indeterminate
//!                                                            │ it has a higher epoch: this copy is stale
//!                                                            ▼
//!                                            policy or user wants it ──► start under max(known) + 1
//! ```
//!
//! Pure: what journal, VMM and peer said goes in, a verdict comes out. Nothing is remembered here.

use std::time::Duration;

use super::{Decision, Epoch};

/// What an instance wants when its guest has ended without its user.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum RestartPolicy {
    /// It stays down, said loudly.
    #[default]
    Never,
    /// It is started again after a crash: its VMM's, its own, or its host's.
    OnCrash,
    /// Also after it switched itself off.
    Always,
}

impl RestartPolicy {
    /// The word that users and journals use.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Never => "never",
            Self::OnCrash => "on-crash",
            Self::Always => "always",
        }
    }

    /// Reads the word that [`Self::as_str`] writes. No word at all, as from a peer that knows of no policy, is `never`.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        if word.is_empty() {
            return Some(Self::Never);
        }
        [Self::Never, Self::OnCrash, Self::Always]
            .into_iter()
            .find(|policy| policy.as_str() == word)
    }

    /// Whether a guest that ended like this is to be started again.
    #[must_use]
    pub fn wants(self, ended: Ended) -> bool {
        match (self, ended) {
            (Self::Never, _) | (_, Ended::ByUser) => false,
            (Self::OnCrash, Ended::PoweredOff) => false,
            (Self::OnCrash | Self::Always, Ended::Crashed) | (Self::Always, Ended::PoweredOff) => true,
        }
    }
}

/// How a guest ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ended {
    /// It panicked, it triple-faulted, its VMM died, or its host went down.
    Crashed,
    /// It switched itself off, and nobody had asked it to.
    PoweredOff,
    /// Its user stopped it, or had asked it to switch off.
    ByUser,
}

/// Who wants the guest to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Wanted {
    /// Its restart policy, if it wants that after such an end.
    ByPolicy(RestartPolicy, Ended),
    /// Its user, now.
    ByUser,
}

/// The last migration out of here, as far as it matters to a guest whose VMM is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Leaving {
    /// None is in flight, or its attempt was called off: no attempt is ARMED.
    No,
    /// An attempt is ARMED; what D said, none if it was not heard yet.
    Armed(Option<Decision>),
}

/// The migration that brought the guest here, if its source may still think that the guest is its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Origin {
    /// The guest was made here, or its source acknowledged RUNNING: it never starts the guest again by itself.
    Settled,
    /// The source did not acknowledge RUNNING, and was not asked yet.
    Unasked,
    /// It was asked and did not answer.
    Silent,
    /// It answered.
    Says(PeerCopy),
}

/// What the source of a migration says that it has of a guest whose D is RUNNING.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PeerCopy {
    /// It only now hears that D is RUNNING, and has not destroyed its copy yet.
    Pending,
    /// Nothing: RUNNING is in its journal and its copy is gone.
    Nothing,
    /// The guest, under this epoch: somebody resolved the migration there.
    Holds(Epoch),
}

/// A guest without a VMM, with all that is known of it on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Fallen {
    /// Who wants it to run.
    pub wanted: Wanted,
    /// The epoch under which it ran here.
    pub had: Epoch,
    /// The highest epoch that this host knows of: from ARM on at least one above `had`.
    pub known: Epoch,
    /// A migration out of here.
    pub leaving: Leaving,
    /// The migration into here.
    pub origin: Origin,
}

/// What becomes of a guest without a VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// It is started under this epoch, once that is journalled.
    Start(Epoch),
    /// It stays down.
    StayDown,
    /// Ask D of the ARMED attempt first, for as long as it takes.
    AskDecision,
    /// Ask the host that it came from first.
    AskOrigin,
    /// Nobody knows who has it: its user must say, or the host that it came from.
    Indeterminate,
    /// It runs, or ran, elsewhere under this higher epoch: what is here is destroyed before anything else.
    Superseded(Epoch),
    /// D is RUNNING: it is the destination's.
    Departed,
}

impl Fallen {
    /// The verdict.
    ///
    /// The source of the last migration is asked for as long as it has not acknowledged RUNNING, also when this host did
    /// not go down meanwhile. Until then it may come to take an epoch of its own by `resolve`, from what *it* knows; a guest
    /// that was started again here under max(known) + 1 could have the very same one.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        match self.leaving {
            Leaving::No | Leaving::Armed(Some(Decision::Source)) => {}
            Leaving::Armed(Some(Decision::Running)) => return Verdict::Departed,
            Leaving::Armed(None | Some(Decision::Open | Decision::Claimed)) => return Verdict::AskDecision,
        }
        if let Origin::Says(copy) = self.origin
            && let Heard::Superseded(epoch) = heard(self.had, copy)
        {
            return Verdict::Superseded(epoch);
        }
        if let Wanted::ByPolicy(policy, ended) = self.wanted
            && !policy.wants(ended)
        {
            return Verdict::StayDown;
        }
        match self.origin {
            Origin::Settled | Origin::Says(PeerCopy::Nothing) => Verdict::Start(self.known.max(self.had).next()),
            Origin::Unasked | Origin::Says(PeerCopy::Pending) => Verdict::AskOrigin,
            Origin::Silent | Origin::Says(PeerCopy::Holds(_)) => Verdict::Indeterminate,
        }
    }
}

/// What the source's answer means to a copy, running or not, that this host has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Heard {
    /// The source is to be asked again.
    NotYet,
    /// The source acknowledged: it need never be asked again.
    Settled,
    /// Rule 5: this host's copy is killed and removed.
    Superseded(Epoch),
    /// The source has it under an epoch that is not higher: two persons resolved one migration. A person must look.
    Conflict(Epoch),
}

/// What the source of the migration that brought a guest here means by its answer to RUNNING. `had` is the epoch of the
/// copy that is here.
#[must_use]
pub fn heard(had: Epoch, copy: PeerCopy) -> Heard {
    match copy {
        PeerCopy::Pending => Heard::NotYet,
        PeerCopy::Nothing => Heard::Settled,
        PeerCopy::Holds(epoch) if epoch > had => Heard::Superseded(epoch),
        PeerCopy::Holds(epoch) => Heard::Conflict(epoch),
    }
}

/// How often a guest was started again in a row, and how long the next start waits: a guest that crashes at once must not
/// keep its host busy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct BackOff {
    /// Starts by the policy since the guest last ran for [`BackOff::SETTLED`].
    pub restarts: u32,
}

impl BackOff {
    /// A guest that ran this long is not in a crash loop.
    pub const SETTLED: Duration = Duration::from_secs(600);
    /// The longest pause before a start.
    pub const LONGEST: Duration = Duration::from_secs(300);

    /// After a guest that ran for `ran`: the new count, and how long its next start waits. The first one does not.
    #[must_use]
    pub fn after(self, ran: Duration) -> (Self, Duration) {
        let before = if ran >= Self::SETTLED { 0 } else { self.restarts };
        let pause = match before {
            0 => Duration::ZERO,
            more => Duration::from_secs(1)
                .saturating_mul(1 << (more - 1).min(16))
                .min(Self::LONGEST),
        };
        let restarts = before.saturating_add(1);
        (Self { restarts }, pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CRASHED: Fallen = Fallen {
        wanted: Wanted::ByPolicy(RestartPolicy::OnCrash, Ended::Crashed),
        had: Epoch(4),
        known: Epoch(4),
        leaving: Leaving::No,
        origin: Origin::Settled,
    };

    #[test]
    fn a_crashed_guest_starts_under_an_epoch_that_nobody_had() {
        assert_eq!(CRASHED.verdict(), Verdict::Start(Epoch(5)));
        let armed = Fallen {
            known: Epoch(5),
            leaving: Leaving::Armed(Some(Decision::Source)),
            ..CRASHED
        };
        assert_eq!(armed.verdict(), Verdict::Start(Epoch(6)));
    }

    #[test]
    fn each_policy_wants_what_its_name_says() {
        let wants =
            |policy: RestartPolicy| [Ended::Crashed, Ended::PoweredOff, Ended::ByUser].map(|end| policy.wants(end));
        assert_eq!(wants(RestartPolicy::Never), [false, false, false]);
        assert_eq!(wants(RestartPolicy::OnCrash), [true, false, false]);
        assert_eq!(wants(RestartPolicy::Always), [true, true, false]);
    }

    #[test]
    fn an_armed_guest_asks_for_the_decision_whatever_its_policy_is() {
        for policy in [RestartPolicy::Never, RestartPolicy::Always] {
            for said in [None, Some(Decision::Open), Some(Decision::Claimed)] {
                let armed = Fallen {
                    wanted: Wanted::ByPolicy(policy, Ended::Crashed),
                    leaving: Leaving::Armed(said),
                    ..CRASHED
                };
                assert_eq!(armed.verdict(), Verdict::AskDecision);
            }
        }
    }

    #[test]
    fn a_guest_that_runs_at_the_destination_is_not_started_here() {
        let gone = Fallen {
            wanted: Wanted::ByUser,
            leaving: Leaving::Armed(Some(Decision::Running)),
            ..CRASHED
        };
        assert_eq!(gone.verdict(), Verdict::Departed);
    }

    #[test]
    fn the_host_that_it_came_from_is_asked_before_anybody_starts_it() {
        for wanted in [CRASHED.wanted, Wanted::ByUser] {
            let verdict = |origin| {
                Fallen {
                    wanted,
                    origin,
                    ..CRASHED
                }
                .verdict()
            };
            assert_eq!(verdict(Origin::Unasked), Verdict::AskOrigin);
            assert_eq!(verdict(Origin::Says(PeerCopy::Pending)), Verdict::AskOrigin);
            assert_eq!(verdict(Origin::Silent), Verdict::Indeterminate);
            assert_eq!(verdict(Origin::Says(PeerCopy::Nothing)), Verdict::Start(Epoch(5)));
        }
    }

    #[test]
    fn a_copy_of_a_lower_epoch_is_destroyed_also_if_it_would_not_be_started() {
        let stale = Fallen {
            wanted: Wanted::ByPolicy(RestartPolicy::Never, Ended::Crashed),
            origin: Origin::Says(PeerCopy::Holds(Epoch(5))),
            ..CRASHED
        };
        assert_eq!(stale.verdict(), Verdict::Superseded(Epoch(5)));
    }

    #[test]
    fn of_two_copies_with_one_epoch_neither_is_started_or_destroyed() {
        let both = Fallen {
            origin: Origin::Says(PeerCopy::Holds(Epoch(4))),
            ..CRASHED
        };
        assert_eq!(both.verdict(), Verdict::Indeterminate);
        assert_eq!(heard(Epoch(4), PeerCopy::Holds(Epoch(4))), Heard::Conflict(Epoch(4)));
    }

    #[test]
    fn nobody_is_asked_for_a_guest_that_stays_down() {
        let down = Fallen {
            wanted: Wanted::ByPolicy(RestartPolicy::Never, Ended::Crashed),
            origin: Origin::Unasked,
            ..CRASHED
        };
        assert_eq!(down.verdict(), Verdict::StayDown);
    }

    #[test]
    fn a_crash_loop_slows_down_and_a_guest_that_ran_long_is_forgiven() {
        let mut back_off = BackOff::default();
        let mut pauses = Vec::new();
        for _ in 0..11 {
            let (next, pause) = back_off.after(Duration::from_secs(1));
            back_off = next;
            pauses.push(pause.as_secs());
        }
        assert_eq!(pauses, [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 300]);
        assert_eq!(
            back_off.after(BackOff::SETTLED),
            (BackOff { restarts: 1 }, Duration::ZERO)
        );
        let endless = BackOff { restarts: u32::MAX };
        assert_eq!(endless.after(Duration::ZERO), (endless, BackOff::LONGEST));
    }

    #[test]
    fn words_are_read_back() {
        for policy in [RestartPolicy::Never, RestartPolicy::OnCrash, RestartPolicy::Always] {
            assert_eq!(RestartPolicy::parse(policy.as_str()), Some(policy));
        }
        assert_eq!(RestartPolicy::parse(""), Some(RestartPolicy::Never));
        assert_eq!(RestartPolicy::parse("sometimes"), None);
    }
}
