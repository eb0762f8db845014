//! What happens to agent A, and what it must do.

use std::time::Duration;

use super::{Decision, Ending, Epoch, Traded, Wish};

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
    /// A person ends it, and [`crate::handover::Doubt::resolve`] has nothing against it.
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
    /// Feed `TimeToAsk` after [`super::pause_before_asking_again`]: the last question brought no final answer.
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
