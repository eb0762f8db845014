//! Agent B's core: the owner of D(M,n).
//!
//! ```text
//!   Prepared ──Expect──► Expecting ──Ready──► Claimed ──Started──► Running
//!       │                    │                   │ (crashed there: Running too)
//!       └────────────────────┴───────────────────┴──► Refused (D = SRC, VMM B killed)
//! ```
//!
//! The driver carries effects out in order. When a [`DestinationEffect::Journal`] fails, it drops the rest of the
//! list and feeds [`DestinationEvent::JournalFailed`].

use super::{Decision, HandBack, Move};

/// What agent B knows of one incoming migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum State {
    Prepared,
    Expecting {
        attempt: u32,
    },
    /// CLAIMED is durable, and the permit was or may have been sent.
    Claimed {
        attempt: u32,
    },
    Running {
        attempt: u32,
        came: Came,
        durable: bool,
    },
    Refused {
        attempt: u32,
        durable: bool,
    },
}

/// How the guest came to this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Came {
    Alive,
    Crashed,
}

impl Came {
    fn adopt(self) -> DestinationEffect {
        match self {
            Self::Alive => DestinationEffect::Adopt,
            Self::Crashed => DestinationEffect::AdoptCrashed,
        }
    }
}

/// What happens to agent B.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DestinationEvent {
    /// Agent A asks to expect this attempt.
    Expect(u32),
    /// VMM B holds what GO's manifest of this attempt lists.
    Ready(u32),
    /// VMM B announced that the guest entered KVM_RUN, or that it took a user-paused guest's permit.
    Started,
    /// VMM B refused the manifest or failed to load. Its process may be alive.
    LoadFailed,
    /// VMM B is dead.
    VmmGone {
        /// It left its started mark.
        started: bool,
        /// The host has not rebooted since CLAIMED was written.
        same_boot: bool,
    },
    /// Agent A asks for D of this attempt, claiming SRC.
    Decide(u32),
    /// Agent A gave the migration up before GO, or nothing was heard from it for too long.
    GiveUp,
    /// This agent restarted and found VMM B alive.
    VmmFound,
    /// The last `Journal` effect did not become durable.
    JournalFailed,
}

/// What agent B must do, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DestinationEffect {
    /// Make this durable before anything that follows.
    Journal {
        /// Attempt n.
        attempt: u32,
        /// The new value of D(M,n).
        decision: Decision,
    },
    /// Answer the request with D.
    Answer(Decision),
    /// Answer that the request is refused: this migration is over here, or the attempt is stale.
    Refuse,
    /// Give VMM B the permit of epoch e+1.
    SendPermit,
    /// Kill VMM B and wait until it is dead.
    KillVmm,
    /// Tell agent A what D is now.
    TellSource(Decision),
    /// The guest is this host's from now on, running or user-paused.
    Adopt,
    /// The guest is this host's and crashed here.
    AdoptCrashed,
    /// Write the row again later and feed the outcome.
    JournalLater {
        /// Attempt n.
        attempt: u32,
        /// The value to write.
        decision: Decision,
    },
}

/// The core of one incoming migration at agent B.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DestinationAgent {
    state: State,
}

impl DestinationAgent {
    /// A migration that was just prepared.
    #[must_use]
    pub fn prepared() -> Self {
        Self { state: State::Prepared }
    }

    /// What the journal says after a restart of the agent: the newest attempt and its D, none if nothing was expected yet.
    #[must_use]
    pub fn recover(newest: Option<(u32, Decision)>) -> Self {
        let state = match newest {
            None => State::Prepared,
            Some((attempt, Decision::Open)) => State::Expecting { attempt },
            Some((attempt, Decision::Claimed)) => State::Claimed { attempt },
            Some((attempt, Decision::Running)) => State::Running {
                attempt,
                came: Came::Alive,
                durable: true,
            },
            Some((attempt, Decision::Source)) => State::Refused { attempt, durable: true },
        };
        Self { state }
    }

    /// The newest attempt that was expected; 0 if none was.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        match self.state {
            State::Prepared => 0,
            State::Expecting { attempt }
            | State::Claimed { attempt }
            | State::Running { attempt, .. }
            | State::Refused { attempt, .. } => attempt,
        }
    }

    /// Whether the guest stays with the source and that is durable: nothing is left to do but to clean up.
    #[must_use]
    pub fn is_refused(&self) -> bool {
        matches!(self.state, State::Refused { durable: true, .. })
    }

    /// D of the newest attempt.
    #[must_use]
    pub fn decision(&self) -> Option<Decision> {
        match self.state {
            State::Prepared => None,
            State::Expecting { .. } => Some(Decision::Open),
            State::Claimed { .. } => Some(Decision::Claimed),
            State::Running { .. } => Some(Decision::Running),
            State::Refused { .. } => Some(Decision::Source),
        }
    }

    /// Takes one event and says what to do.
    pub fn step(&mut self, event: DestinationEvent) -> Vec<DestinationEffect> {
        match event {
            DestinationEvent::Expect(attempt) => self.expect(attempt),
            DestinationEvent::Ready(attempt) => self.ready(attempt),
            DestinationEvent::Started => self.started(),
            DestinationEvent::LoadFailed | DestinationEvent::GiveUp => self.give_up(),
            DestinationEvent::VmmGone { started, same_boot } => self.vmm_gone(started, same_boot),
            DestinationEvent::Decide(attempt) => self.decide(attempt),
            DestinationEvent::VmmFound => self.vmm_found(),
            DestinationEvent::JournalFailed => self.journal_failed(),
        }
    }

    fn expect(&mut self, asked: u32) -> Vec<DestinationEffect> {
        let open = DestinationEffect::Journal {
            attempt: asked,
            decision: Decision::Open,
        };
        let answer = DestinationEffect::Answer(Decision::Open);
        match self.state {
            State::Prepared => {
                self.state = State::Expecting { attempt: asked };
                vec![open, answer]
            }
            State::Expecting { attempt } if asked == attempt => vec![answer],
            State::Expecting { attempt } if asked > attempt => {
                self.state = State::Expecting { attempt: asked };
                vec![
                    DestinationEffect::Journal {
                        attempt,
                        decision: Decision::Source,
                    },
                    open,
                    answer,
                ]
            }
            _ => vec![DestinationEffect::Refuse],
        }
    }

    fn ready(&mut self, asked: u32) -> Vec<DestinationEffect> {
        match self.state {
            State::Expecting { attempt } if attempt == asked => {
                debug_assert!(Move::Claim.apply(Some(Decision::Open)).is_ok());
                self.state = State::Claimed { attempt };
                vec![
                    DestinationEffect::Journal {
                        attempt,
                        decision: Decision::Claimed,
                    },
                    DestinationEffect::SendPermit,
                ]
            }
            // A VMM says it again to an agent that restarted.
            State::Claimed { attempt } if attempt == asked => {
                vec![DestinationEffect::SendPermit]
            }
            // A GO that nobody here expected cannot be claimed: there is no row.
            State::Prepared | State::Expecting { .. } => self.give_up(),
            _ => Vec::new(),
        }
    }

    fn started(&mut self) -> Vec<DestinationEffect> {
        match self.state {
            State::Claimed { attempt } => self.run(attempt, Came::Alive),
            State::Running {
                attempt,
                came,
                durable: false,
            } => self.run(attempt, came),
            State::Running { durable: true, .. } => vec![
                DestinationEffect::Adopt,
                DestinationEffect::TellSource(Decision::Running),
            ],
            _ => Vec::new(),
        }
    }

    /// To RUNNING, durably: only then is the guest, or what is left of it, this host's, and A told.
    fn run(&mut self, attempt: u32, came: Came) -> Vec<DestinationEffect> {
        self.state = State::Running {
            attempt,
            came,
            durable: true,
        };
        vec![
            DestinationEffect::Journal {
                attempt,
                decision: Decision::Running,
            },
            came.adopt(),
            DestinationEffect::TellSource(Decision::Running),
        ]
    }

    fn give_up(&mut self) -> Vec<DestinationEffect> {
        match self.state {
            State::Prepared => {
                self.state = State::Refused {
                    attempt: 0,
                    durable: true,
                };
                vec![
                    DestinationEffect::KillVmm,
                    DestinationEffect::TellSource(Decision::Source),
                ]
            }
            State::Expecting { attempt } => self.refuse(attempt, Vec::new()),
            _ => Vec::new(),
        }
    }

    fn vmm_gone(&mut self, started: bool, same_boot: bool) -> Vec<DestinationEffect> {
        match self.state {
            State::Prepared | State::Expecting { .. } => self.give_up(),
            State::Claimed { attempt } => {
                let never_ran = !started && same_boot;
                if never_ran {
                    debug_assert!(
                        Move::GiveBack(HandBack::DeadBeforeStart)
                            .apply(Some(Decision::Claimed))
                            .is_ok()
                    );
                    self.refuse(attempt, Vec::new())
                } else {
                    self.run(attempt, Came::Crashed)
                }
            }
            State::Running {
                attempt,
                durable: false,
                ..
            } => self.run(attempt, Came::Crashed),
            State::Running { durable: true, .. } => vec![DestinationEffect::AdoptCrashed],
            State::Refused { .. } => Vec::new(),
        }
    }

    fn decide(&mut self, asked: u32) -> Vec<DestinationEffect> {
        let answer = DestinationEffect::Answer;
        match self.state {
            State::Prepared => self.refuse(asked, vec![answer(Decision::Source)]),
            State::Expecting { attempt } if asked < attempt => vec![answer(Decision::Source)],
            State::Expecting { .. } => self.refuse(asked, vec![answer(Decision::Source)]),
            State::Claimed { attempt } | State::Running { attempt, .. } if asked < attempt => {
                vec![answer(Decision::Source)]
            }
            State::Claimed { .. } => vec![answer(Decision::Claimed)],
            State::Running { .. } => vec![answer(Decision::Running)],
            State::Refused { durable: true, .. } => vec![answer(Decision::Source)],
            // An answer waits for the row: the write is being tried again.
            State::Refused {
                attempt,
                durable: false,
            } => self.refuse(attempt, vec![answer(Decision::Source)]),
        }
    }

    fn vmm_found(&mut self) -> Vec<DestinationEffect> {
        match self.state {
            State::Claimed { .. } => vec![DestinationEffect::SendPermit],
            State::Running { .. } => self.started(),
            State::Refused { .. } => vec![DestinationEffect::KillVmm],
            State::Prepared | State::Expecting { .. } => Vec::new(),
        }
    }

    /// To SRC, durably, then `after`, then VMM B is killed and A told. Without VMM B no claim is possible, so it
    /// makes no difference for safety that the answer leaves before the kill.
    fn refuse(&mut self, attempt: u32, after: Vec<DestinationEffect>) -> Vec<DestinationEffect> {
        self.state = State::Refused { attempt, durable: true };
        let mut effects = vec![DestinationEffect::Journal {
            attempt,
            decision: Decision::Source,
        }];
        effects.extend(after);
        effects.extend([
            DestinationEffect::KillVmm,
            DestinationEffect::TellSource(Decision::Source),
        ]);
        effects
    }

    /// A row did not become durable. What it would have said decides what is still safe.
    fn journal_failed(&mut self) -> Vec<DestinationEffect> {
        match self.state {
            State::Prepared => Vec::new(),
            // EXPECTING was never answered: A does not switch over.
            State::Expecting { .. } => {
                self.state = State::Prepared;
                vec![DestinationEffect::Refuse]
            }
            // The list ended before the permit: this incarnation may hand back, once VMM B is dead and SRC is durable.
            State::Claimed { attempt } => {
                self.state = State::Refused { attempt, durable: true };
                vec![
                    DestinationEffect::KillVmm,
                    DestinationEffect::Journal {
                        attempt,
                        decision: Decision::Source,
                    },
                    DestinationEffect::TellSource(Decision::Source),
                ]
            }
            // The guest runs, or crashed, and its started mark says so: A is told once the row is written.
            State::Running { attempt, came, .. } => {
                self.state = State::Running {
                    attempt,
                    came,
                    durable: false,
                };
                vec![DestinationEffect::JournalLater {
                    attempt,
                    decision: Decision::Running,
                }]
            }
            State::Refused { attempt, .. } => {
                self.state = State::Refused {
                    attempt,
                    durable: false,
                };
                vec![
                    DestinationEffect::KillVmm,
                    DestinationEffect::JournalLater {
                        attempt,
                        decision: Decision::Source,
                    },
                ]
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use DestinationEffect::{
        Adopt, AdoptCrashed, Answer, Journal, JournalLater, KillVmm, Refuse, SendPermit, TellSource,
    };

    fn claimed() -> DestinationAgent {
        let mut agent = DestinationAgent::prepared();
        agent.step(DestinationEvent::Expect(1));
        agent.step(DestinationEvent::Ready(1));
        agent
    }

    #[test]
    fn the_permit_follows_the_claim_that_is_durable() {
        let mut agent = DestinationAgent::prepared();
        assert_eq!(
            agent.step(DestinationEvent::Expect(1)),
            [
                Journal {
                    attempt: 1,
                    decision: Decision::Open
                },
                Answer(Decision::Open)
            ]
        );
        assert_eq!(
            agent.step(DestinationEvent::Ready(1)),
            [
                Journal {
                    attempt: 1,
                    decision: Decision::Claimed
                },
                SendPermit
            ]
        );
        assert_eq!(
            agent.step(DestinationEvent::Started),
            [
                Journal {
                    attempt: 1,
                    decision: Decision::Running
                },
                Adopt,
                TellSource(Decision::Running)
            ]
        );
    }

    #[test]
    fn deciding_before_the_claim_keeps_the_guest_at_the_source_for_ever() {
        let mut agent = DestinationAgent::prepared();
        agent.step(DestinationEvent::Expect(1));
        let effects = agent.step(DestinationEvent::Decide(1));
        assert_eq!(
            effects[..2],
            [
                Journal {
                    attempt: 1,
                    decision: Decision::Source
                },
                Answer(Decision::Source)
            ]
        );
        assert!(effects.contains(&KillVmm));
        assert_eq!(agent.step(DestinationEvent::Ready(1)), []);
        assert_eq!(agent.step(DestinationEvent::Expect(2)), [Refuse]);
    }

    #[test]
    fn deciding_after_the_permit_does_not_take_the_claim_back() {
        let mut agent = claimed();
        assert_eq!(agent.step(DestinationEvent::Decide(1)), [Answer(Decision::Claimed)]);
    }

    #[test]
    fn a_vmm_that_died_unstarted_in_the_same_boot_is_handed_back() {
        let mut agent = claimed();
        let effects = agent.step(DestinationEvent::VmmGone {
            started: false,
            same_boot: true,
        });
        assert_eq!(
            effects[0],
            Journal {
                attempt: 1,
                decision: Decision::Source
            }
        );
        assert_eq!(agent.decision(), Some(Decision::Source));
    }

    #[test]
    fn a_vmm_that_may_have_started_crashed_here() {
        for (started, same_boot) in [(true, true), (true, false), (false, false)] {
            let mut agent = claimed();
            let effects = agent.step(DestinationEvent::VmmGone { started, same_boot });
            assert_eq!(
                effects,
                [
                    Journal {
                        attempt: 1,
                        decision: Decision::Running
                    },
                    AdoptCrashed,
                    TellSource(Decision::Running)
                ]
            );
        }
    }

    #[test]
    fn a_restarted_agent_sends_the_permit_again_and_does_not_hand_back() {
        let mut agent = DestinationAgent::recover(Some((1, Decision::Claimed)));
        assert_eq!(agent.step(DestinationEvent::Decide(1)), [Answer(Decision::Claimed)]);
        assert_eq!(agent.step(DestinationEvent::VmmFound), [SendPermit]);
    }

    #[test]
    fn a_claim_that_could_not_be_written_is_given_back_durably() {
        let mut agent = claimed();
        let source = Journal {
            attempt: 1,
            decision: Decision::Source,
        };
        assert_eq!(
            agent.step(DestinationEvent::JournalFailed),
            [KillVmm, source, TellSource(Decision::Source)]
        );
        // SRC cannot be written either: asked again, it is answered only after it is.
        agent.step(DestinationEvent::JournalFailed);
        assert!(!agent.is_refused());
        assert_eq!(
            agent.step(DestinationEvent::Decide(1))[..2],
            [source, Answer(Decision::Source)]
        );
    }

    #[test]
    fn a_guest_that_crashed_before_running_was_written_is_adopted_once_it_is() {
        let mut agent = claimed();
        agent.step(DestinationEvent::Started);
        let later = [JournalLater {
            attempt: 1,
            decision: Decision::Running,
        }];
        assert_eq!(agent.step(DestinationEvent::JournalFailed), later);
        let gone = DestinationEvent::VmmGone {
            started: true,
            same_boot: true,
        };
        let adopted = [
            Journal {
                attempt: 1,
                decision: Decision::Running,
            },
            AdoptCrashed,
            TellSource(Decision::Running),
        ];
        assert_eq!(agent.step(gone), adopted);
        assert_eq!(agent.step(DestinationEvent::JournalFailed), later);
        // Its process may be there all the same, and be found over a new connection: what crashed stays crashed.
        assert_eq!(agent.step(DestinationEvent::VmmFound), adopted);
        assert_eq!(agent.step(DestinationEvent::JournalFailed), later);
        assert_eq!(agent.step(DestinationEvent::Started), adopted);
        assert_eq!(agent.step(gone), [AdoptCrashed]);
    }

    #[test]
    fn a_new_attempt_closes_the_one_before_it() {
        let mut agent = DestinationAgent::prepared();
        agent.step(DestinationEvent::Expect(1));
        assert_eq!(
            agent.step(DestinationEvent::Expect(2)),
            [
                Journal {
                    attempt: 1,
                    decision: Decision::Source
                },
                Journal {
                    attempt: 2,
                    decision: Decision::Open
                },
                Answer(Decision::Open)
            ]
        );
        assert_eq!(agent.step(DestinationEvent::Decide(1)), [Answer(Decision::Source)]);
    }

    #[test]
    fn a_go_that_was_not_expected_is_not_claimed() {
        let mut agent = DestinationAgent::prepared();
        assert!(agent.step(DestinationEvent::Ready(1)).contains(&KillVmm));
    }
}
