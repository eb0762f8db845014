//! The sites, and the enums that they derive from.

use std::fmt;

use ferry_migration::handover::{Decision, DestinationEffect, SourceEffect};
use ferry_proto::stream::v1::{from_destination, from_source};
use ferry_proto::vmm::v1::order::Order as Command;
use ferry_proto::vmm::v1::report::Report as Body;

use crate::agent::{Call, RowWrite, SourceStep};

/// What happens at a site.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Agent A carries out an effect of its core.
    SourceEffect,
    /// Agent B carries out an effect of its core.
    DestinationEffect,
    /// An agent writes rows of its journal that are no effect of its core, or a part of one.
    Row,
    /// An agent calls the other.
    Call,
    /// An agent gives its VMM an order.
    Order,
    /// A VMM answers an order.
    Answer,
    /// A VMM tells its agent something of its own accord.
    Report,
    /// A VMM says something to the other.
    Wire,
}

impl Kind {
    /// Whether it is a message, that can be lost, doubled and late.
    #[must_use]
    pub fn is_message(self) -> bool {
        match self {
            Self::SourceEffect | Self::DestinationEffect | Self::Row => false,
            Self::Call | Self::Order | Self::Answer | Self::Report | Self::Wire => true,
        }
    }
}

/// On which side of what happens at a site.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Moment {
    /// The effect was not begun, the message not sent (of a VMM's: not received).
    Before,
    /// The effect is carried out, the message was sent (of a call: answered; of a VMM's: passed on to who waits for it).
    After,
}

impl fmt::Display for Moment {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Before => "before",
            Self::After => "after",
        })
    }
}

macro_rules! sites {
    ($($kind:ident { $($site:ident = $name:literal,)+ })+) => {
        /// A place in a migration at which an actor can die or a message can be lost.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Site {
            $($(#[doc = concat!("`", $name, "`")] $site,)+)+
        }

        impl Site {
            /// All of them, grouped by kind.
            pub const ALL: &[Self] = &[$($(Self::$site,)+)+];

            /// Its name: what happens, in words without spaces.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self {
                    $($(Self::$site => $name,)+)+
                }
            }

            /// What happens there.
            #[must_use]
            pub fn kind(self) -> Kind {
                match self {
                    $($(Self::$site => Kind::$kind,)+)+
                }
            }
        }
    };
}

sites! {
    SourceEffect {
        JournalArmed = "a.journal-armed",
        AskExpect = "a.ask-expect",
        GiveGrant = "a.give-grant",
        AskTrade = "a.ask-trade",
        AskRecall = "a.ask-recall",
        AskAfter = "a.ask-after",
        AskAgain = "a.ask-again",
        AskDecision = "a.ask-decision",
        JournalSaidRunning = "a.journal-said-running",
        JournalSaidSource = "a.journal-said-src",
        JournalSaidUndecided = "a.journal-said-undecided",
        JournalResumed = "a.journal-resumed",
        JournalResolved = "a.journal-resolved",
        SendResumePermit = "a.send-permit",
        DestroyCopy = "a.destroy-copy",
        RollBackDestination = "a.roll-back",
        SayIndeterminate = "a.say-indeterminate",
        Finish = "a.finish",
    }
    DestinationEffect {
        JournalOpen = "b.journal-open",
        JournalClaimed = "b.journal-claimed",
        JournalRunning = "b.journal-running",
        JournalSource = "b.journal-src",
        JournalLater = "b.journal-later",
        AnswerOpen = "b.answer-open",
        AnswerClaimed = "b.answer-claimed",
        AnswerRunning = "b.answer-running",
        AnswerSource = "b.answer-src",
        Refuse = "b.refuse",
        SendPermit = "b.send-permit",
        KillVmm = "b.kill-vmm",
        TellRunning = "b.tell-running",
        TellSource = "b.tell-src",
        TellUndecided = "b.tell-undecided",
        Adopt = "b.adopt",
        AdoptCrashed = "b.adopt-crashed",
    }
    Row {
        RowAccepted = "a.row-accepted",
        RowQueued = "a.row-queued",
        RowBuild = "a.row-build",
        RowPrepare = "a.row-prepare",
        RowPrepared = "a.row-prepared",
        RowCopying = "a.row-copying",
        RowSourceStatus = "a.row-status",
        RowDeparted = "a.row-departed",
        RowServing = "a.row-serving",
        RowLostAfterwards = "a.row-lost-afterwards",
        RowSourceOver = "a.row-over",
        RowReserved = "b.row-reserved",
        RowDecidedAlone = "b.row-decided-alone",
        RowDestinationStatus = "b.row-status",
        RowDestinationOver = "b.row-over",
        RowSettled = "b.row-settled",
        RowStale = "b.row-stale",
        RowResolved = "row-resolved",
        RowFoundOver = "row-found-over",
    }
    Call {
        CallCast = "call.live-migration",
        CallCreate = "call.create-migration",
        CallPrepare = "call.pre-live-migration",
        CallPutImage = "call.put-image",
        CallExpect = "call.expect",
        CallDecide = "call.decide",
        CallPost = "call.post-live-migration",
        CallRollback = "call.rollback",
        CallHeartbeat = "call.heartbeat",
        CallLateLink = "call.late-link",
        CallLatePages = "call.late-pages",
        CallFirstFrames = "call.first-frames",
    }
    Order {
        OrderHello = "order.hello",
        OrderPing = "order.ping",
        OrderBuild = "order.build",
        OrderSend = "order.send",
        OrderReceive = "order.receive",
        OrderGrant = "order.grant",
        OrderCallOff = "order.call-off",
        OrderPermit = "order.permit",
        OrderServePages = "order.serve-pages",
    }
    Answer {
        AnswerToHello = "answer.hello",
        AnswerToPing = "answer.ping",
        AnswerToBuild = "answer.build",
        AnswerToSend = "answer.send",
        AnswerToReceive = "answer.receive",
        AnswerToGrant = "answer.grant",
        AnswerToCallOff = "answer.call-off",
        AnswerToPermit = "answer.permit",
        AnswerToServePages = "answer.serve-pages",
    }
    Report {
        ReportProgress = "report.progress",
        ReportConverged = "report.converged",
        ReportDisarmed = "report.disarmed",
        ReportGoSent = "report.go-sent",
        ReportSendEnded = "report.send-ended",
        ReportReady = "report.ready",
        ReportStarted = "report.started",
        ReportLoadFailed = "report.load-failed",
        ReportGuestEnded = "report.guest-ended",
    }
    Wire {
        WireHello = "wire.hello",
        WireHelloReply = "wire.hello-reply",
        WirePopulation = "wire.population",
        WirePopulationReady = "wire.population-ready",
        WireBarrier = "wire.barrier",
        WireBarrierReached = "wire.barrier-reached",
        WireState = "wire.state",
        WireCompare = "wire.compare",
        WireCompared = "wire.compared",
        WireDigestRequest = "wire.digest-request",
        WireGo = "wire.go",
        WireDisarm = "wire.disarm",
        WireAbort = "wire.abort",
        WireRefused = "wire.refused",
        WirePing = "wire.ping",
        WirePong = "wire.pong",
        WireMissing = "wire.missing",
        WireHolding = "wire.holding",
        WireProceed = "wire.proceed",
    }
}

impl fmt::Display for Site {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

impl From<&SourceEffect> for Site {
    fn from(effect: &SourceEffect) -> Self {
        match effect {
            SourceEffect::JournalArmed(_) => Self::JournalArmed,
            SourceEffect::AskExpect(_) => Self::AskExpect,
            SourceEffect::GiveGrant(_) => Self::GiveGrant,
            SourceEffect::AskTrade(_) => Self::AskTrade,
            SourceEffect::AskRecall(_) => Self::AskRecall,
            SourceEffect::AskAfter(_) => Self::AskAfter,
            SourceEffect::AskAgain => Self::AskAgain,
            SourceEffect::AskDecision(_) => Self::AskDecision,
            SourceEffect::JournalDecision(_, decision) => match decision {
                Decision::Running => Self::JournalSaidRunning,
                Decision::Source => Self::JournalSaidSource,
                Decision::Open | Decision::Claimed => Self::JournalSaidUndecided,
            },
            SourceEffect::JournalResumed(_) => Self::JournalResumed,
            SourceEffect::JournalResolved(..) => Self::JournalResolved,
            SourceEffect::SendPermit(_) => Self::SendResumePermit,
            SourceEffect::DestroyCopy => Self::DestroyCopy,
            SourceEffect::RollBackDestination => Self::RollBackDestination,
            SourceEffect::SayIndeterminate => Self::SayIndeterminate,
            SourceEffect::Finish(_) => Self::Finish,
        }
    }
}

impl From<&DestinationEffect> for Site {
    fn from(effect: &DestinationEffect) -> Self {
        match effect {
            DestinationEffect::Journal { decision, .. } => match decision {
                Decision::Open => Self::JournalOpen,
                Decision::Claimed => Self::JournalClaimed,
                Decision::Running => Self::JournalRunning,
                Decision::Source => Self::JournalSource,
            },
            DestinationEffect::JournalLater { .. } => Self::JournalLater,
            DestinationEffect::Answer(decision) => match decision {
                Decision::Open => Self::AnswerOpen,
                Decision::Claimed => Self::AnswerClaimed,
                Decision::Running => Self::AnswerRunning,
                Decision::Source => Self::AnswerSource,
            },
            DestinationEffect::Refuse => Self::Refuse,
            DestinationEffect::SendPermit => Self::SendPermit,
            DestinationEffect::KillVmm => Self::KillVmm,
            DestinationEffect::TellSource(decision) => match decision {
                Decision::Running => Self::TellRunning,
                Decision::Source => Self::TellSource,
                Decision::Open | Decision::Claimed => Self::TellUndecided,
            },
            DestinationEffect::Adopt => Self::Adopt,
            DestinationEffect::AdoptCrashed => Self::AdoptCrashed,
        }
    }
}

impl From<Call> for Site {
    fn from(call: Call) -> Self {
        match call {
            Call::LiveMigration => Self::CallCast,
            Call::CreateMigration => Self::CallCreate,
            Call::PreLiveMigration => Self::CallPrepare,
            Call::PutImage => Self::CallPutImage,
            Call::Expect => Self::CallExpect,
            Call::Decide => Self::CallDecide,
            Call::PostLiveMigration => Self::CallPost,
            Call::RollbackLiveMigration => Self::CallRollback,
            Call::Heartbeat => Self::CallHeartbeat,
            Call::LateLink => Self::CallLateLink,
            Call::LatePages => Self::CallLatePages,
            Call::FirstFrames => Self::CallFirstFrames,
        }
    }
}

impl From<&from_source::Message> for Site {
    fn from(message: &from_source::Message) -> Self {
        use from_source::Message;
        match message {
            Message::Hello(_) => Self::WireHello,
            Message::Population(_) => Self::WirePopulation,
            Message::Barrier(_) => Self::WireBarrier,
            Message::State(_) => Self::WireState,
            Message::DigestRequest(_) => Self::WireDigestRequest,
            Message::Compare(_) => Self::WireCompare,
            Message::Go(_) => Self::WireGo,
            Message::Disarm(_) => Self::WireDisarm,
            Message::Abort(_) => Self::WireAbort,
            Message::Ping(_) => Self::WirePing,
            Message::Pong(_) => Self::WirePong,
            Message::Missing(_) => Self::WireMissing,
            Message::Proceed(_) => Self::WireProceed,
        }
    }
}

impl From<&from_destination::Message> for Site {
    fn from(message: &from_destination::Message) -> Self {
        use from_destination::Message;
        match message {
            Message::HelloReply(_) => Self::WireHelloReply,
            Message::PopulationReady(_) => Self::WirePopulationReady,
            Message::BarrierReached(_) => Self::WireBarrierReached,
            Message::Refused(_) => Self::WireRefused,
            Message::Compared(_) => Self::WireCompared,
            Message::Ping(_) => Self::WirePing,
            Message::Pong(_) => Self::WirePong,
            // On the connections of late pages, which come after the handover.
            Message::Missing(_) | Message::AllHere(_) => Self::WireMissing,
            Message::Holding(_) => Self::WireHolding,
        }
    }
}

/// The site of a durable write; none of what is an effect, whose site it has, and of what has no part in migrations.
pub(super) fn row(row: RowWrite) -> Option<Site> {
    match row {
        RowWrite::Accepted => Some(Site::RowAccepted),
        RowWrite::Entered(step) => entered(step),
        RowWrite::Prepared => Some(Site::RowPrepared),
        RowWrite::SourceStatus => Some(Site::RowSourceStatus),
        RowWrite::Departed => Some(Site::RowDeparted),
        RowWrite::Serving => Some(Site::RowServing),
        RowWrite::LostAfterwards => Some(Site::RowLostAfterwards),
        RowWrite::SourceOver => Some(Site::RowSourceOver),
        RowWrite::Reserved => Some(Site::RowReserved),
        RowWrite::DecidedAlone => Some(Site::RowDecidedAlone),
        RowWrite::DestinationStatus => Some(Site::RowDestinationStatus),
        RowWrite::DestinationOver => Some(Site::RowDestinationOver),
        RowWrite::Settled => Some(Site::RowSettled),
        RowWrite::Stale => Some(Site::RowStale),
        RowWrite::Resolved => Some(Site::RowResolved),
        RowWrite::FoundOver => Some(Site::RowFoundOver),
        RowWrite::OfEffect | RowWrite::Instance | RowWrite::Audit | RowWrite::Beginning => None,
        #[cfg(test)]
        RowWrite::Test => None,
    }
}

fn entered(step: SourceStep) -> Option<Site> {
    match step {
        SourceStep::Queue => Some(Site::RowQueued),
        SourceStep::Build => Some(Site::RowBuild),
        SourceStep::Prepare => Some(Site::RowPrepare),
        SourceStep::Copy => Some(Site::RowCopying),
        // The first is the row of acceptance, and of the others none is written, or a core's effect writes it.
        SourceStep::Accept | SourceStep::Connect | SourceStep::Arm | SourceStep::Grant => None,
        SourceStep::Go | SourceStep::Confirm | SourceStep::Serve => None,
    }
}

/// The site of an order, and of its answer; none of what has no part in migrations.
fn order_and_answer(order: &Command) -> Option<(Site, Site)> {
    match order {
        Command::Hello(_) => Some((Site::OrderHello, Site::AnswerToHello)),
        Command::Ping(_) => Some((Site::OrderPing, Site::AnswerToPing)),
        Command::Build(_) => Some((Site::OrderBuild, Site::AnswerToBuild)),
        Command::Send(_) => Some((Site::OrderSend, Site::AnswerToSend)),
        Command::Receive(_) => Some((Site::OrderReceive, Site::AnswerToReceive)),
        Command::Grant(_) => Some((Site::OrderGrant, Site::AnswerToGrant)),
        Command::CallOff(_) => Some((Site::OrderCallOff, Site::AnswerToCallOff)),
        Command::Permit(_) => Some((Site::OrderPermit, Site::AnswerToPermit)),
        Command::ServePages(_) => Some((Site::OrderServePages, Site::AnswerToServePages)),
        Command::Pause(_)
        | Command::Resume(_)
        | Command::Reboot(_)
        | Command::ConsoleInput(_)
        | Command::Snapshot(_)
        | Command::Restore(_)
        | Command::PressPowerButton(_)
        | Command::SetBalloon(_)
        | Command::ForceComplete(_)
        | Command::Retune(_)
        | Command::Profile(_)
        | Command::Sample(_)
        | Command::EndSample(_)
        // Long before the handover.
        | Command::Reconnect(_)
        // After it, of links that are lost.
        | Command::LateLink(_) => None,
    }
}

/// The site of an order.
pub(crate) fn order(order: &Command) -> Option<Site> {
    order_and_answer(order).map(|(order, _)| order)
}

/// The site of the answer to an order.
pub(crate) fn answer_to(order: &Command) -> Option<Site> {
    order_and_answer(order).map(|(_, answer)| answer)
}

/// The site of a report. Answers are named after their orders, and have none here.
pub(crate) fn report(report: &Body) -> Option<Site> {
    match report {
        Body::Progress(_) => Some(Site::ReportProgress),
        Body::Converged(_) => Some(Site::ReportConverged),
        Body::Disarmed(_) => Some(Site::ReportDisarmed),
        Body::GoSent(_) => Some(Site::ReportGoSent),
        Body::SendEnded(_) => Some(Site::ReportSendEnded),
        Body::Ready(_) => Some(Site::ReportReady),
        Body::Started(_) => Some(Site::ReportStarted),
        Body::LoadFailed(_) => Some(Site::ReportLoadFailed),
        Body::GuestEnded(_) => Some(Site::ReportGuestEnded),
        Body::Done(_) | Body::Refused(_) | Body::Standing(_) | Body::Traded(_) | Body::Pressed(_) => None,
        Body::SnapshotEnded(_) | Body::Restored(_) | Body::Profiled(_) | Body::Late(_) | Body::Sampled(_) => None,
        // No cell's user waits for a link.
        Body::LinkLost(_) | Body::LinkBack(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::Site;

    #[test]
    fn each_site_has_a_name_of_its_own() {
        let names: BTreeSet<_> = Site::ALL.iter().map(|site| site.name()).collect();
        assert_eq!(names.len(), Site::ALL.len());
    }
}
