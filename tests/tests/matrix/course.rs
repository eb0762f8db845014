//! The ways through a migration that lead past every site.

use std::fmt;

use ferry_rpc::faults::{Kind, Site};

use crate::cell::Power;

/// A way through a migration when nothing else happens to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Course {
    /// It succeeds.
    Straight,
    /// Its user gives it up when it is armed.
    Aborted,
    /// GO is lost on the wire, so B refuses the guest.
    Refused,
    /// Of the news that the guest runs at B nothing arrives, so A asks.
    Asked,
    /// Nor does an answer to A's questions.
    Unanswered,
    /// Agent A is killed when it is armed, and starts again.
    Recalled,
    /// It succeeds, by post-copy: the guest's memory comes once it runs at B.
    Late,
}

impl fmt::Display for Course {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Straight => "straight",
            Self::Aborted => "aborted",
            Self::Refused => "refused",
            Self::Asked => "asked",
            Self::Unanswered => "unanswered",
            Self::Recalled => "recalled",
            Self::Late => "late",
        })
    }
}

/// When a site is come by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stretch {
    /// Before ARM, or after CONFIRM.
    Outside,
    /// From ARM to CONFIRM.
    Switchover,
}

/// How a site is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reach {
    /// On this course.
    On(Course, Stretch),
    /// Only as what comes of a fault elsewhere: the cells of that fault go by it.
    AfterFault,
    /// Never: the core has no such move.
    Never,
}

/// What the instances of a site's cells are, on the same course.
pub(crate) fn powers(site: Site) -> &'static [Power] {
    match site {
        // Only a machine that is off is built to be moved.
        Site::RowBuild => &[Power::Off],
        _ if is_for_a_stopped_one(site) => &[Power::On, Power::Off],
        _ => &[Power::On],
    }
}

/// Whether the site has cells with an instance that is stopped: what the agents do of their cores' effects and what they write is another
/// thing then, and so is what they have their VMMs do. Between the VMMs it is a machine like any other.
fn is_for_a_stopped_one(site: Site) -> bool {
    match site.kind() {
        Kind::SourceEffect | Kind::DestinationEffect => true,
        // No page of an instance that is off comes late.
        Kind::Row => !matches!(site, Site::RowServing | Site::RowDestinationStatus),
        Kind::Order | Kind::Answer => matches!(
            site,
            Site::OrderBuild | Site::AnswerToBuild | Site::OrderPermit | Site::AnswerToPermit
        ),
        Kind::Report => site == Site::ReportStarted,
        Kind::Call => site == Site::CallPost,
        Kind::Wire => false,
    }
}

/// How a site is reached. No wildcard: a site that is new has to be thought about.
pub(crate) fn reach(site: Site) -> Reach {
    use Course::{Aborted, Asked, Late, Recalled, Refused, Straight, Unanswered};
    use Stretch::{Outside, Switchover};
    match site {
        Site::JournalArmed | Site::AskExpect | Site::GiveGrant | Site::AskAfter => Reach::On(Straight, Switchover),
        Site::JournalSaidRunning | Site::DestroyCopy => Reach::On(Straight, Switchover),
        Site::Finish => Reach::On(Straight, Outside),
        Site::AskTrade | Site::RollBackDestination => Reach::On(Aborted, Switchover),
        Site::AskRecall => Reach::On(Recalled, Switchover),
        Site::AskDecision => Reach::On(Asked, Switchover),
        Site::JournalSaidSource | Site::JournalResumed | Site::SendResumePermit => Reach::On(Refused, Switchover),
        Site::SayIndeterminate | Site::AskAgain => Reach::On(Unanswered, Switchover),
        // A person's word: the scenarios of `resolve` go by it.
        Site::JournalResolved => Reach::AfterFault,
        Site::JournalSaidUndecided => Reach::Never,

        Site::JournalOpen | Site::AnswerOpen | Site::JournalClaimed | Site::SendPermit => {
            Reach::On(Straight, Switchover)
        }
        Site::JournalRunning | Site::Adopt | Site::TellRunning => Reach::On(Straight, Switchover),
        Site::JournalSource | Site::KillVmm | Site::TellSource => Reach::On(Refused, Switchover),
        // Of Decide that comes while B is at it (once it is over, the journal answers), of an attempt that is over, or when a VMM
        // or a journal failed.
        Site::AnswerClaimed | Site::AnswerRunning | Site::AnswerSource => Reach::AfterFault,
        Site::Refuse | Site::AdoptCrashed | Site::JournalLater => Reach::AfterFault,
        Site::TellUndecided => Reach::Never,

        // A cell's migration is told to whoever began it once it is accepted: the scenarios of casts go by that.
        Site::RowAccepted => Reach::AfterFault,
        Site::RowBuild | Site::RowPrepare | Site::RowReserved => Reach::On(Straight, Outside),
        Site::RowPrepared | Site::RowCopying => Reach::On(Straight, Outside),
        // Of an agent at RPC 4.0: the scenarios of casts and upgrades go by it.
        Site::RowQueued => Reach::AfterFault,
        // What is only told, now and then.
        Site::RowSourceStatus => Reach::AfterFault,
        // Each actor has the last word of the other by then, so what is left is cleaning up; but a part of it is CONFIRM's.
        Site::RowDeparted | Site::RowDestinationOver => Reach::On(Straight, Switchover),
        Site::RowSourceOver | Site::RowSettled => Reach::On(Straight, Outside),
        // That pages come late is written down; over another link again.
        Site::RowDestinationStatus => Reach::On(Late, Outside),
        // Of a question that comes when B is done with it, of a copy that is stale, of a migration that ended with its agent, of pages that
        // are gone, and of a person's word.
        Site::RowDecidedAlone | Site::RowStale | Site::RowFoundOver => Reach::AfterFault,
        Site::RowLostAfterwards | Site::RowResolved => Reach::AfterFault,
        // From here on the guest is B's for good, and A's VMM keeps nothing but its memory.
        Site::RowServing | Site::OrderServePages | Site::AnswerToServePages => Reach::On(Late, Outside),

        // A cell's conductor is the source's own agent, which sends itself nothing: the scenarios of casts go by them.
        Site::CallCast | Site::CallCreate => Reach::AfterFault,
        Site::CallPrepare | Site::CallPutImage | Site::CallHeartbeat => Reach::On(Straight, Outside),
        Site::CallExpect | Site::CallPost => Reach::On(Straight, Switchover),
        Site::CallDecide => Reach::On(Asked, Switchover),
        // Of a link for late pages that was lost, of a guest that waits for a page too long, and of network cards, which no cell's guest has.
        Site::CallLateLink | Site::CallLatePages | Site::CallFirstFrames => Reach::AfterFault,
        Site::CallRollback => Reach::On(Aborted, Switchover),

        Site::OrderBuild | Site::OrderSend | Site::OrderReceive => Reach::On(Straight, Outside),
        Site::AnswerToBuild | Site::AnswerToSend | Site::AnswerToReceive => Reach::On(Straight, Outside),
        Site::OrderHello | Site::AnswerToHello => Reach::On(Straight, Outside),
        Site::OrderGrant | Site::AnswerToGrant | Site::OrderPermit | Site::AnswerToPermit => {
            Reach::On(Straight, Switchover)
        }
        Site::OrderCallOff | Site::AnswerToCallOff => Reach::On(Aborted, Switchover),
        // The end of an abort asks whether the VMM has its machine back.
        Site::OrderPing | Site::AnswerToPing => Reach::On(Aborted, Outside),

        Site::ReportProgress => Reach::On(Straight, Outside),
        Site::ReportConverged | Site::ReportGoSent | Site::ReportReady | Site::ReportStarted => {
            Reach::On(Straight, Switchover)
        }
        Site::ReportSendEnded => Reach::On(Aborted, Switchover),
        Site::ReportLoadFailed => Reach::On(Refused, Switchover),
        // A budget that is overrun, and a guest that ends: not things that happen by themselves in a small idle guest.
        Site::ReportDisarmed | Site::ReportGuestEnded => Reach::AfterFault,

        Site::WireHello | Site::WireHelloReply | Site::WirePopulation | Site::WirePopulationReady => {
            Reach::On(Straight, Outside)
        }
        Site::WireBarrier | Site::WireBarrierReached => Reach::On(Straight, Outside),
        Site::WireState | Site::WireCompare | Site::WireCompared | Site::WireDigestRequest | Site::WireGo => {
            Reach::On(Straight, Switchover)
        }
        // The agents' roll-back is often faster than the VMM's word of an abort.
        Site::WireAbort => Reach::AfterFault,
        Site::WireDisarm | Site::WireRefused => Reach::AfterFault,
        Site::WirePing | Site::WirePong => Reach::On(Straight, Outside),
        Site::WireMissing => Reach::On(Late, Outside),
        // No cell's user waits for a link that is lost; the scenarios of that go by them.
        Site::WireHolding | Site::WireProceed => Reach::AfterFault,
    }
}
