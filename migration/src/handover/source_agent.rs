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

use std::time::Duration;

use super::{Decision, Epoch, Traded, Wish};

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

/// What happens to agent A.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceEvent {
    /// The VMM says that the rest fits the downtime budget.
    Converged,
    /// Agent B expects this attempt, durably.
    Expecting(u32),
    /// Agent B refused to expect it, or did not answer in time.
    ExpectFailed(u32),
    /// The user, a timeout or a failed check wants the migration to end.
    Abort,
    /// The VMM answered what the attempt was traded for, and will not copy any more if CANCELLED.
    Answered(Traded),
    /// The VMM called this attempt off by itself and goes on copying.
    Disarmed(u32),
    /// The VMM refused the grant of this attempt. That proves nothing: it may have had the grant before, over a connection
    /// that broke, and have traded it since.
    GrantRefused(u32),
    /// The VMM sent GO for this attempt.
    GoSent(u32),
    /// The VMM ended the migration by itself, CANCELLED: the guest runs on.
    CopyEnded,
    /// The guest ended by itself before GO.
    GuestEnded,
    /// VMM A is dead.
    VmmGone,
    /// It is time to ask for D.
    TimeToAsk,
    /// D, or what agent B said of its own accord.
    Decided(u32, Decision),
    /// Agent B did not answer the question for D.
    NoAnswer,
    /// The VMM took the permit of the new epoch.
    Resumed,
    /// A person ends it, and [`super::Doubt::resolve`] has nothing against it.
    Resolved(Wish),
    /// The last `Journal…` effect did not become durable.
    JournalFailed,
}

/// What agent A must do, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceEffect {
    /// Durable: attempt n is armed.
    JournalArmed(u32),
    /// Ask agent B to expect the attempt (a call with a deadline).
    AskExpect(u32),
    /// Give the VMM the switch grant.
    GiveGrant(u32),
    /// Ask the VMM to trade this attempt for CANCELLED and to end the migration.
    AskTrade(u32),
    /// Ask the VMM to trade this attempt for CANCELLED and to go on copying.
    AskRecall(u32),
    /// Feed `TimeToAsk` after this time.
    AskAfter(Duration),
    /// Feed `TimeToAsk` after [`pause_before_asking_again`]: the last question brought no final answer.
    AskAgain,
    /// Ask agent B for D, claiming SRC.
    AskDecision(u32),
    /// Durable: what D said.
    JournalDecision(u32, Decision),
    /// Durable: the guest resumes here under this epoch.
    JournalResumed(Epoch),
    /// Give the VMM a permit of this epoch.
    SendPermit(Epoch),
    /// Kill VMM A and remove its copy.
    DestroyCopy,
    /// Tell agent B that the migration is over before GO. Best effort: it would find out by itself.
    RollBackDestination,
    /// Durable: a person ended it, under this epoch if the guest is to be booted anew here.
    JournalResolved(Wish, Epoch),
    /// Nobody knows who runs the guest: say so, until something else is said.
    SayIndeterminate,
    /// The migration is over.
    Finish(Ending),
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
}

impl SourceAgent {
    /// A migration of a guest that runs here under `epoch`.
    #[must_use]
    pub fn copying(epoch: Epoch) -> Self {
        Self {
            epoch,
            newest_attempt: 0,
            state: SourceState::Copying,
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
            },
            vec![SourceEffect::SendPermit(resumed)],
        )
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
            (Asking { attempt, .. }, SourceEvent::TimeToAsk) => vec![SourceEffect::AskDecision(attempt)],
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
        // The state stays Asking until the last effect is carried out: if D cannot be journalled, A asks again.
        let said = SourceEffect::JournalDecision(attempt, decision);
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

#[cfg(test)]
mod tests {
    use super::*;

    fn granted() -> SourceAgent {
        let mut agent = SourceAgent::copying(Epoch(4));
        agent.step(SourceEvent::Converged);
        agent.step(SourceEvent::Expecting(1));
        agent
    }

    fn asking() -> SourceAgent {
        let mut agent = granted();
        agent.step(SourceEvent::GoSent(1));
        agent
    }

    #[test]
    fn the_grant_follows_the_answer_and_the_copy_goes_on_running() {
        let mut agent = SourceAgent::copying(Epoch(4));
        assert_eq!(
            agent.step(SourceEvent::Converged),
            [SourceEffect::JournalArmed(1), SourceEffect::AskExpect(1)]
        );
        assert_eq!(agent.step(SourceEvent::Expecting(1)), [SourceEffect::GiveGrant(1)]);
        assert_eq!(
            agent.step(SourceEvent::GoSent(1)),
            [SourceEffect::AskAfter(WAIT_FOR_RUNNING)]
        );
        assert_eq!(
            agent.step(SourceEvent::Decided(1, Decision::Running)),
            [
                SourceEffect::JournalDecision(1, Decision::Running),
                SourceEffect::DestroyCopy,
                SourceEffect::Finish(Ending::Arrived)
            ]
        );
    }

    #[test]
    fn after_go_a_timeout_asks_and_an_abort_is_too_late() {
        let mut agent = asking();
        assert_eq!(agent.step(SourceEvent::Abort), []);
        assert_eq!(agent.step(SourceEvent::TimeToAsk), [SourceEffect::AskDecision(1)]);
        assert_eq!(agent.step(SourceEvent::NoAnswer)[0], SourceEffect::SayIndeterminate);
    }

    #[test]
    fn src_resumes_under_an_epoch_that_nobody_had() {
        let mut agent = asking();
        assert_eq!(
            agent.step(SourceEvent::Decided(1, Decision::Source)),
            [
                SourceEffect::JournalDecision(1, Decision::Source),
                SourceEffect::JournalResumed(Epoch(6)),
                SourceEffect::SendPermit(Epoch(6))
            ]
        );
        assert_eq!(agent.step(SourceEvent::Resumed), [SourceEffect::Finish(Ending::Stayed)]);
    }

    #[test]
    fn a_person_ends_the_doubt_and_nothing_else() {
        let mut agent = asking();
        agent.step(SourceEvent::NoAnswer);
        assert_eq!(
            agent.step(SourceEvent::Resolved(Wish::RunHere)),
            [
                SourceEffect::JournalResolved(Wish::RunHere, Epoch(6)),
                SourceEffect::Finish(Ending::Resolved(Wish::RunHere))
            ]
        );
        let mut early = granted();
        assert_eq!(early.step(SourceEvent::Resolved(Wish::RunHere)), []);
        let mut decided = asking();
        decided.step(SourceEvent::Decided(1, Decision::Source));
        assert_eq!(decided.step(SourceEvent::Resolved(Wish::DiscardHere)), []);
    }

    #[test]
    fn a_resolve_that_cannot_be_journalled_leaves_the_doubt() {
        let mut agent = asking();
        agent.step(SourceEvent::Resolved(Wish::RunHere));
        assert_eq!(
            agent.step(SourceEvent::JournalFailed)[0],
            SourceEffect::SayIndeterminate
        );
        assert!(matches!(agent.state(), SourceState::Asking { .. }));
    }

    #[test]
    fn claimed_is_asked_again() {
        let mut agent = asking();
        assert_eq!(
            agent.step(SourceEvent::Decided(1, Decision::Claimed)),
            [SourceEffect::AskAgain]
        );
    }

    #[test]
    fn the_pause_between_two_questions_grows_to_half_a_minute() {
        let pauses = [0, 1, 4, 7, 8, 9, u32::MAX].map(|questions| pause_before_asking_again(questions).as_millis());
        assert_eq!(pauses, [250, 500, 4000, 30_000, 30_000, 30_000, 30_000]);
    }

    #[test]
    fn an_abort_is_over_only_when_the_vmm_answered() {
        let mut agent = granted();
        assert_eq!(agent.step(SourceEvent::Abort), [SourceEffect::AskTrade(1)]);
        assert!(matches!(
            agent.step(SourceEvent::Answered(Traded::GoSent))[..],
            [SourceEffect::AskAfter(_)]
        ));
        let mut agent = granted();
        agent.step(SourceEvent::Abort);
        assert!(
            agent
                .step(SourceEvent::Answered(Traded::Cancelled))
                .contains(&SourceEffect::Finish(Ending::Stayed))
        );
    }

    #[test]
    fn an_armed_guest_whose_vmm_died_asks_before_it_is_called_crashed() {
        let mut agent = granted();
        assert_eq!(
            agent.step(SourceEvent::VmmGone),
            [SourceEffect::AskAfter(Duration::ZERO)]
        );
        assert!(
            agent
                .step(SourceEvent::Decided(1, Decision::Source))
                .contains(&SourceEffect::Finish(Ending::Crashed))
        );
    }

    #[test]
    fn a_disarmed_attempt_is_followed_by_the_next() {
        let mut agent = granted();
        assert_eq!(agent.step(SourceEvent::Disarmed(1)), []);
        assert_eq!(agent.step(SourceEvent::Converged)[0], SourceEffect::JournalArmed(2));
    }

    #[test]
    fn a_restarted_agent_recalls_the_armed_attempt_and_goes_on() {
        let (mut agent, effects) = SourceAgent::recover(Epoch(4), 1, Copy::Held);
        assert_eq!(effects, [SourceEffect::AskRecall(1)]);
        assert_eq!(agent.step(SourceEvent::Answered(Traded::Cancelled)), []);
        assert_eq!(agent.step(SourceEvent::Converged)[0], SourceEffect::JournalArmed(2));
    }

    #[test]
    fn a_refused_grant_may_have_been_traded_for_go_before() {
        let mut agent = granted();
        assert_eq!(agent.step(SourceEvent::GrantRefused(1)), [SourceEffect::AskRecall(1)]);
        assert_eq!(
            agent.step(SourceEvent::Answered(Traded::GoSent)),
            [SourceEffect::AskAfter(WAIT_FOR_RUNNING)]
        );
        let mut agent = granted();
        agent.step(SourceEvent::GrantRefused(1));
        assert_eq!(agent.step(SourceEvent::Answered(Traded::Cancelled)), []);
        assert_eq!(agent.state(), SourceState::Copying);
    }

    #[test]
    fn running_that_is_heard_before_go_is_believed() {
        let mut agent = granted();
        assert!(
            agent
                .step(SourceEvent::Decided(1, Decision::Running))
                .contains(&SourceEffect::DestroyCopy)
        );
        let mut aborting = granted();
        aborting.step(SourceEvent::Abort);
        assert!(
            aborting
                .step(SourceEvent::Decided(1, Decision::Running))
                .contains(&SourceEffect::DestroyCopy)
        );
    }

    #[test]
    fn converged_is_not_lost_while_an_attempt_is_recalled() {
        let (mut agent, _) = SourceAgent::recover(Epoch(4), 1, Copy::Held);
        assert_eq!(agent.step(SourceEvent::Converged), []);
        assert_eq!(
            agent.step(SourceEvent::Answered(Traded::Cancelled))[0],
            SourceEffect::JournalArmed(2)
        );
    }

    #[test]
    fn a_decision_that_cannot_be_journalled_destroys_nothing() {
        let mut agent = asking();
        agent.step(SourceEvent::Decided(1, Decision::Running));
        assert_eq!(
            agent.step(SourceEvent::JournalFailed)[0],
            SourceEffect::SayIndeterminate
        );
        assert!(matches!(agent.state(), SourceState::Asking { .. }));
    }
}
