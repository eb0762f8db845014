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

mod events;
#[cfg(test)]
mod tests;

use super::{Decision, HandBack, Move};

pub use events::{DestinationEffect, DestinationEvent};

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
