//! Agent A's core: when to arm, when to ask for the decision, when to resume or destroy.
//!
//! ```text
//!   Copying ──Converged──► Arming ──Expecting──► Granted ──GO sent──► Asking ──RUNNING──► Ended(Arrived)
//!      ▲  │                  │                     │  │                  │ SRC
//!      │  └────abort─────────┴──────► Trading ◄────┘  │                  └──► Resuming ──► Ended(Stayed)
//!      └───────────────disarmed──────────────────────-┘
//! ```
//!
//! Asking ends by D alone, or by a person's `resolve`, which never resumes the copy.
//!
//! Whatever agent A saw before ("it still runs") proves nothing: it has aborted only once its VMM answered CANCELLED,
//! or D = SRC. The driver carries effects out in order; a journal write that fails ends the list and comes back as
//! [`SourceEvent::JournalFailed`].

mod events;
#[cfg(test)]
mod tests;

use std::time::Duration;

use super::{Decision, Epoch, Traded, Wish};

pub use events::{SourceEffect, SourceEvent};

/// Where the switchover stands, as agent A knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceState {
    /// Pre-copy; no attempt is armed.
    Copying,
    /// ARMED is journalled and agent B was asked to expect the attempt.
    Arming {
        /// Attempt n.
        attempt: u32,
    },
    /// The VMM was, or may have been, given the grant.
    Granted {
        /// Attempt n.
        attempt: u32,
    },
    /// The VMM was asked to call the attempt off and to end the migration.
    Trading {
        /// Attempt n; 0 if none was armed.
        attempt: u32,
    },
    /// What became of the grant is not known (this agent restarted, or the VMM refused it): the VMM was asked to call the
    /// attempt off, but to go on copying.
    Recalling {
        /// Attempt n.
        attempt: u32,
        /// The VMM said meanwhile that a later attempt may be armed; it does not say it twice.
        converged: bool,
    },
    /// GO was sent, or VMM A is gone: only D tells.
    Asking {
        /// Attempt n.
        attempt: u32,
        /// Whether the stopped copy is still there.
        copy: Copy,
    },
    /// D = SRC, and RESUMED with a new epoch is journalled: the VMM is given that permit.
    Resuming {
        /// Attempt n.
        attempt: u32,
        /// The new right to run.
        epoch: Epoch,
    },
    /// Nothing is left to decide.
    Ended(Ending),
}

/// The copy at the source after GO.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Copy {
    /// VMM A holds it, paused.
    Held,
    /// VMM A is dead.
    Gone,
}

/// How it came out, for the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ending {
    /// The guest is the destination's.
    Arrived,
    /// The guest runs on here (or is paused, as its user wanted).
    Stayed,
    /// VMM A died and the guest with it.
    Crashed,
    /// The guest ended by itself (powered off, panicked, triple fault) before GO.
    GuestStopped,
    /// A person ended the doubt; the copy that GO stopped is not resumed.
    Resolved(Wish),
}

/// How long agent A pauses before it asks for D again, after so many questions in a row without a final answer.
#[must_use]
pub fn pause_before_asking_again(questions: u32) -> Duration {
    let pause = Duration::from_millis(250).saturating_mul(1 << questions.min(8));
    pause.min(LONGEST_PAUSE)
}

/// How long agent A waits for RUNNING before it asks.
const WAIT_FOR_RUNNING: Duration = Duration::from_secs(5);
/// Longest pause between two questions.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// The core of one outgoing migration at agent A.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SourceAgent {
    epoch: Epoch,
    newest_attempt: u32,
    state: SourceState,
    /// What D said, once that is final. A journal that does not take it has it taken again, and nobody is asked: B may be gone by then.
    final_word: Option<Decision>,
}

impl SourceAgent {
    /// A migration of a guest that runs here under `epoch`.
    #[must_use]
    pub fn copying(epoch: Epoch) -> Self {
        Self {
            epoch,
            newest_attempt: 0,
            state: SourceState::Copying,
            final_word: None,
        }
    }

    /// After a restart of the agent: the newest attempt that the journal calls ARMED (none: 0), and whether VMM A lives.
    /// Says what to do first: with an armed attempt, ask the VMM what became of its grant; without a VMM, ask for D.
    #[must_use]
    pub fn recover(epoch: Epoch, newest_attempt: u32, copy: Copy) -> (Self, Vec<SourceEffect>) {
        let attempt = newest_attempt;
        let mut agent = Self {
            epoch,
            newest_attempt,
            state: SourceState::Copying,
            final_word: None,
        };
        let effects = match (copy, attempt) {
            (Copy::Gone, 0) => agent.finish(Ending::Crashed),
            (Copy::Gone, _) => agent.ask(attempt, Copy::Gone, Duration::ZERO),
            (Copy::Held, 0) => Vec::new(),
            (Copy::Held, _) => {
                agent.state = SourceState::Recalling {
                    attempt,
                    converged: false,
                };
                vec![SourceEffect::AskRecall(attempt)]
            }
        };
        (agent, effects)
    }

    /// After a restart, when the journal says RESUMED under this epoch and the permit may not have been taken.
    #[must_use]
    pub fn recover_resuming(epoch: Epoch, attempt: u32, resumed: Epoch) -> (Self, Vec<SourceEffect>) {
        let state = SourceState::Resuming {
            attempt,
            epoch: resumed,
        };
        (
            Self {
                epoch,
                newest_attempt: attempt,
                state,
                final_word: Some(Decision::Source),
            },
            vec![SourceEffect::SendPermit(resumed)],
        )
    }

    /// After a restart, when the journal has what D said of this attempt and not, for SRC, that the guest resumes here: nobody is asked again. GO was sent, or the
    /// VMM was gone, before D was asked for.
    #[must_use]
    pub fn recover_decided(epoch: Epoch, attempt: u32, copy: Copy, decision: Decision) -> (Self, Vec<SourceEffect>) {
        let mut agent = Self {
            epoch,
            newest_attempt: attempt,
            state: SourceState::Asking { attempt, copy },
            final_word: None,
        };
        let effects = agent.decided(attempt, copy, decision);
        (agent, effects)
    }

    /// Where it stands.
    #[must_use]
    pub fn state(&self) -> SourceState {
        self.state
    }

    /// Takes one event and says what to do.
    pub fn step(&mut self, event: SourceEvent) -> Vec<SourceEffect> {
        use SourceState::{Arming, Asking, Copying, Ended, Granted, Recalling, Resuming, Trading};
        match (self.state, event) {
            (Ended(_), _) => Vec::new(),

            (Copying, SourceEvent::Converged) => self.arm(),
            (Arming { attempt }, SourceEvent::Expecting(expected)) if attempt == expected => {
                self.state = Granted { attempt };
                vec![SourceEffect::GiveGrant(attempt)]
            }
            (Arming { attempt }, SourceEvent::ExpectFailed(failed)) if attempt == failed => self.trade(),
            (Granted { attempt }, SourceEvent::Disarmed(disarmed)) if attempt == disarmed => {
                self.state = Copying;
                Vec::new()
            }
            (Granted { attempt }, SourceEvent::GrantRefused(refused)) if attempt == refused => {
                self.state = Recalling {
                    attempt,
                    converged: false,
                };
                vec![SourceEffect::AskRecall(attempt)]
            }
            (Copying | Arming { .. } | Granted { .. } | Recalling { .. }, SourceEvent::Abort) => self.trade(),
            (Recalling { attempt, .. }, SourceEvent::Converged) => {
                self.state = Recalling {
                    attempt,
                    converged: true,
                };
                Vec::new()
            }
            (Recalling { converged, .. }, SourceEvent::Answered(Traded::Cancelled)) => {
                self.state = Copying;
                if converged { self.arm() } else { Vec::new() }
            }
            // An abort that comes after GO is too late, and one while trading changes nothing.
            (Granted { attempt } | Trading { attempt } | Recalling { attempt, .. }, SourceEvent::GoSent(sent))
                if sent == attempt =>
            {
                self.ask(attempt, Copy::Held, WAIT_FOR_RUNNING)
            }
            (Trading { attempt } | Recalling { attempt, .. }, SourceEvent::Answered(Traded::GoSent)) => {
                self.ask(attempt, Copy::Held, WAIT_FOR_RUNNING)
            }
            (Trading { .. }, SourceEvent::Answered(Traded::Cancelled)) => self.finish_rolled_back(Ending::Stayed),
            (Copying | Arming { .. } | Granted { .. } | Trading { .. } | Recalling { .. }, SourceEvent::CopyEnded) => {
                self.finish_rolled_back(Ending::Stayed)
            }
            (Copying | Arming { .. } | Granted { .. } | Trading { .. } | Recalling { .. }, SourceEvent::GuestEnded) => {
                self.finish_rolled_back(Ending::GuestStopped)
            }
            (Copying, SourceEvent::VmmGone) => self.finish_rolled_back(Ending::Crashed),
            (
                Arming { attempt } | Granted { attempt } | Trading { attempt } | Recalling { attempt, .. },
                SourceEvent::VmmGone,
            ) if attempt > 0 => self.ask(attempt, Copy::Gone, Duration::ZERO),
            (Trading { .. }, SourceEvent::VmmGone) => self.finish_rolled_back(Ending::Crashed),
            // ARMED did not become durable: agent B was not asked.
            (Arming { .. }, SourceEvent::JournalFailed) => self.trade(),

            (Asking { attempt, .. }, SourceEvent::VmmGone) => {
                self.state = Asking {
                    attempt,
                    copy: Copy::Gone,
                };
                Vec::new()
            }
            (Asking { attempt, copy }, SourceEvent::TimeToAsk) => match self.final_word {
                Some(decision) => self.decided(attempt, copy, decision),
                None => vec![SourceEffect::AskDecision(attempt)],
            },
            (Asking { attempt, copy, .. }, SourceEvent::Decided(decided, decision)) if decided == attempt => {
                self.decided(attempt, copy, decision)
            }
            // As with D, the state stays until the last effect is carried out.
            (Asking { .. }, SourceEvent::Resolved(wish)) => {
                let epoch = self.epoch_of_resume();
                vec![
                    SourceEffect::JournalResolved(wish, epoch),
                    SourceEffect::Finish(Ending::Resolved(wish)),
                ]
            }
            (Asking { .. }, SourceEvent::NoAnswer | SourceEvent::JournalFailed) => {
                vec![SourceEffect::SayIndeterminate, SourceEffect::AskAgain]
            }
            // RUNNING is final, and proves GO although the VMM has not said so yet.
            (
                Granted { attempt } | Trading { attempt } | Recalling { attempt, .. },
                SourceEvent::Decided(decided, Decision::Running),
            ) if decided == attempt => {
                self.state = Asking {
                    attempt,
                    copy: Copy::Held,
                };
                self.decided(attempt, Copy::Held, Decision::Running)
            }
            // B refused of its own accord (its VMM died, its user gave up): the VMM notices its dead streams by
            // itself, but need not be waited for.
            (Copying | Arming { .. } | Granted { .. }, SourceEvent::Decided(_, Decision::Source)) => self.trade(),

            (Resuming { attempt, .. }, SourceEvent::JournalFailed) => {
                let mut effects = vec![SourceEffect::SayIndeterminate];
                effects.extend(self.ask(attempt, Copy::Held, WAIT_FOR_RUNNING));
                effects
            }
            (Resuming { .. }, SourceEvent::Resumed) => self.finish(Ending::Stayed),
            (Resuming { .. }, SourceEvent::VmmGone) => self.finish(Ending::Crashed),

            _ => Vec::new(),
        }
    }

    fn arm(&mut self) -> Vec<SourceEffect> {
        self.newest_attempt += 1;
        let attempt = self.newest_attempt;
        self.state = SourceState::Arming { attempt };
        vec![SourceEffect::JournalArmed(attempt), SourceEffect::AskExpect(attempt)]
    }

    fn trade(&mut self) -> Vec<SourceEffect> {
        let attempt = self.newest_attempt;
        self.state = SourceState::Trading { attempt };
        vec![SourceEffect::AskTrade(attempt)]
    }

    fn ask(&mut self, attempt: u32, copy: Copy, after: Duration) -> Vec<SourceEffect> {
        self.state = SourceState::Asking { attempt, copy };
        vec![SourceEffect::AskAfter(after)]
    }

    fn decided(&mut self, attempt: u32, copy: Copy, decision: Decision) -> Vec<SourceEffect> {
        // The state stays Asking until the last effect is carried out: what cannot be journalled is tried again.
        let said = SourceEffect::JournalDecision(attempt, decision);
        if matches!(decision, Decision::Running | Decision::Source) {
            self.final_word = Some(decision);
        }
        match (decision, copy) {
            // B is at it: between its claim and RUNNING.
            (Decision::Open | Decision::Claimed, _) => vec![SourceEffect::AskAgain],
            (Decision::Running, _) => {
                vec![said, SourceEffect::DestroyCopy, SourceEffect::Finish(Ending::Arrived)]
            }
            (Decision::Source, Copy::Gone) => vec![said, SourceEffect::Finish(Ending::Crashed)],
            (Decision::Source, Copy::Held) => {
                let epoch = self.epoch_of_resume();
                self.state = SourceState::Resuming { attempt, epoch };
                vec![
                    said,
                    SourceEffect::JournalResumed(epoch),
                    SourceEffect::SendPermit(epoch),
                ]
            }
        }
    }

    /// e+1 counts as known from ARM on, so the next right of this host is the one after it.
    fn epoch_of_resume(&self) -> Epoch {
        self.epoch.next().next()
    }

    fn finish(&mut self, ending: Ending) -> Vec<SourceEffect> {
        self.state = SourceState::Ended(ending);
        vec![SourceEffect::Finish(ending)]
    }

    fn finish_rolled_back(&mut self, ending: Ending) -> Vec<SourceEffect> {
        self.state = SourceState::Ended(ending);
        vec![SourceEffect::RollBackDestination, SourceEffect::Finish(ending)]
    }
}
