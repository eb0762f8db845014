//! Mistakes: one rule of the protocol broken each. The search must find every one of them.
//!
//! The cores stay as they are. A mistake changes what reaches a core, what is done of what it asks for, or a rule of
//! the model around it.

use ferry_migration::handover::{
    Decision, DestinationAgent, DestinationEffect, DestinationEvent, Ending, Epoch, SourceEffect, SourceEvent,
    SourceState,
};

use crate::config::{Again, BASE, Config, Failure, Home};
use crate::invariants::Fault;
use crate::network::OldOrders;

macro_rules! mutants {
    ($($(#[doc = $doc:literal])+ $name:ident,)+) => {
        /// One mistake.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub(crate) enum Mutant {
            $($(#[doc = $doc])+ $name,)+
        }

        impl Mutant {
            /// Every one.
            pub(crate) const ALL: &'static [Self] = &[$(Self::$name,)+];

            /// What is done wrong.
            pub(crate) fn words(self) -> &'static str {
                match self {
                    $(Self::$name => concat!($($doc),+).trim_ascii(),)+
                }
            }
        }
    };
}

mutants! {
    /// A resumes when B does not answer
    ResumingOnATimeout,
    /// agents forget what they journalled
    ForgettingTheJournal,
    /// A sends the permit before RESUMED is journalled
    StartingBeforeJournalling,
    /// B sends the permit before CLAIMED is journalled
    PermitBeforeClaimed,
    /// a guest that crashed at B counts as never started
    CrashTakenForRefusal,
    /// the store is written without looking
    NoCompareAndSwap,
    /// messages of another attempt or migration are believed
    UntaggedMessages,
    /// B hands back although its host rebooted
    HandingBackAfterHostCrash,
    /// A destroys its copy on CLAIMED
    DestroyingOnClaimed,
    /// A calls it aborted because the guest still ran
    AbortingOnWhatWasSeen,
    /// an armed guest whose VMM is gone is started again without asking D
    RestartingWithoutAsking,
    /// a guest is started again under the epoch that it had
    UsingAnEpochTwice,
    /// a user-paused guest that arrives is never reported
    PausedGuestNeverRunning,
    /// B never hands back
    NeverHandingBack,
    /// an agent that restarted hands a claimed guest back
    AnyIncarnationHandsBack,
    /// a VMM still obeys what a killed agent wrote
    KilledAgentsOrdersObeyed,
    /// after GO a permit of the same epoch resumes
    EqualEpochAfterGo,
    /// B answers SRC before it is durable
    SourceBeforeDurable,
    /// a guest that crashed at B stays CLAIMED
    NoRunningAfterCrashAtB,
    /// resolve takes max(known) + 1 where e + 1 was not counted
    ResolveForgetsNextEpoch,
    /// B's restart policy starts the guest without asking A
    RestartAtBWithoutAsking,
    /// resolve --run-here resumes the stopped copy
    ResolveResumesTheCopy,
    /// a missing row does not count as OPEN
    MissingRowIsNotOpen,
    /// D = SRC ends it although the grant is not traded
    SourceWithGrantUntraded,
    /// the locks are tried once
    OneTryForTheLocks,
    /// post-copy: A's pages are freed on RUNNING
    FreeingPagesOnRunning,
}

impl Mutant {
    /// A search that is wide enough to meet the mistake, and no wider.
    pub(crate) fn config(self) -> Config {
        let base = Config {
            name: "mutant",
            mutant: Some(self),
            most: 2,
            ..BASE
        };
        match self {
            Self::NoCompareAndSwap => Config {
                home: Home::Store,
                ..base
            },
            Self::UntaggedMessages => Config {
                again: Again::Migration,
                breaks: &[Failure::AgentA, Failure::AgentB, Failure::VmmB],
                ..base
            },
            Self::PausedGuestNeverRunning => Config {
                paused: true,
                most: 0,
                ..base
            },
            Self::KilledAgentsOrdersObeyed => Config {
                user_pauses: true,
                breaks: &[Failure::AgentA],
                ..base
            },
            Self::FreeingPagesOnRunning => Config { postcopy: true, ..base },
            Self::NeverHandingBack => Config {
                breaks: &[Failure::VmmB],
                ..base
            },
            Self::NoRunningAfterCrashAtB => Config {
                breaks: &[Failure::VmmB, Failure::AgentB],
                ..base
            },
            Self::MissingRowIsNotOpen => Config {
                breaks: &[Failure::VmmA, Failure::AgentA],
                ..base
            },
            Self::OneTryForTheLocks => Config {
                breaks: &[Failure::AgentB],
                ..base
            },
            _ => base,
        }
    }

    /// What it must break, one of these.
    pub(crate) fn breaks(self) -> &'static [Fault] {
        match self {
            Self::ForgettingTheJournal => &[Fault::TwoOwners, Fault::SourceAfterDestination, Fault::IllegalMove],
            Self::RestartAtBWithoutAsking => &[Fault::TwoOwners, Fault::EpochTwice],
            Self::ResumingOnATimeout
            | Self::PermitBeforeClaimed
            | Self::CrashTakenForRefusal
            | Self::NoCompareAndSwap
            | Self::UntaggedMessages
            | Self::HandingBackAfterHostCrash
            | Self::RestartingWithoutAsking
            | Self::AnyIncarnationHandsBack
            | Self::SourceBeforeDurable
            | Self::ResolveResumesTheCopy => &[Fault::TwoOwners, Fault::SourceAfterDestination],
            Self::StartingBeforeJournalling
            | Self::UsingAnEpochTwice
            | Self::EqualEpochAfterGo
            | Self::ResolveForgetsNextEpoch => &[Fault::EpochTwice],
            Self::DestroyingOnClaimed => &[Fault::Lost, Fault::NobodyKnows],
            Self::FreeingPagesOnRunning => &[Fault::Lost],
            Self::AbortingOnWhatWasSeen | Self::KilledAgentsOrdersObeyed | Self::SourceWithGrantUntraded => {
                &[Fault::NobodyKnows]
            }
            Self::PausedGuestNeverRunning
            | Self::NeverHandingBack
            | Self::NoRunningAfterCrashAtB
            | Self::MissingRowIsNotOpen
            | Self::OneTryForTheLocks => &[Fault::NeverSettles],
        }
    }
}

/// What agent A hears.
pub(crate) fn as_heard(config: &Config, state: SourceState, event: SourceEvent) -> SourceEvent {
    match (config.mutant, state, event) {
        (Some(Mutant::DestroyingOnClaimed), _, SourceEvent::Decided(attempt, Decision::Claimed)) => {
            SourceEvent::Decided(attempt, Decision::Running)
        }
        (Some(Mutant::ResumingOnATimeout), SourceState::Asking { attempt, .. }, SourceEvent::NoAnswer) => {
            SourceEvent::Decided(attempt, Decision::Source)
        }
        _ => event,
    }
}

/// What agent A does instead of asking its core.
pub(crate) fn instead(config: &Config, state: SourceState, event: SourceEvent) -> Option<Vec<SourceEffect>> {
    match (config.mutant?, state, event) {
        (Mutant::AbortingOnWhatWasSeen, SourceState::Granted { .. }, SourceEvent::Abort) => Some(vec![
            SourceEffect::RollBackDestination,
            SourceEffect::Finish(Ending::Stayed),
        ]),
        (Mutant::SourceWithGrantUntraded, SourceState::Granted { .. }, SourceEvent::Decided(_, Decision::Source)) => {
            Some(vec![SourceEffect::Finish(Ending::Stayed)])
        }
        (
            Mutant::RestartingWithoutAsking,
            SourceState::Granted { .. } | SourceState::Asking { .. },
            SourceEvent::VmmGone,
        ) => Some(vec![SourceEffect::Finish(Ending::Crashed)]),
        (Mutant::ResolveResumesTheCopy, SourceState::Asking { .. }, SourceEvent::Resolved(_)) => {
            let epoch = Epoch::FIRST.next().next();
            Some(vec![
                SourceEffect::JournalResumed(epoch),
                SourceEffect::SendPermit(epoch),
            ])
        }
        _ => None,
    }
}

/// In which order, and under which epoch, agent A does what its core asks for.
pub(crate) fn reorder(config: &Config, effects: &mut [SourceEffect]) {
    match config.mutant {
        Some(Mutant::StartingBeforeJournalling) => {
            let journal = effects
                .iter()
                .position(|effect| matches!(effect, SourceEffect::JournalResumed(_)));
            if let Some(journal) = journal {
                effects.swap(journal, journal + 1);
            }
        }
        Some(Mutant::ResolveForgetsNextEpoch) => {
            for effect in effects {
                if let SourceEffect::JournalResolved(_, epoch) = effect {
                    *epoch = Epoch(epoch.0 - 1);
                }
            }
        }
        Some(Mutant::EqualEpochAfterGo) => {
            for effect in effects {
                if let SourceEffect::JournalResumed(epoch) | SourceEffect::SendPermit(epoch) = effect {
                    *epoch = Epoch(epoch.0 - 2);
                }
            }
        }
        _ => {}
    }
}

/// In which order agent B does what its core asks for.
pub(crate) fn reorder_at_b(config: &Config, effects: &mut [DestinationEffect]) {
    let swapped = match effects {
        [DestinationEffect::Journal { .. }, DestinationEffect::SendPermit, ..] => Mutant::PermitBeforeClaimed,
        [
            DestinationEffect::Journal { .. },
            DestinationEffect::Answer(Decision::Source),
            ..,
        ] => Mutant::SourceBeforeDurable,
        _ => return,
    };
    if config.is(swapped) {
        effects.swap(0, 1);
    }
}

/// What agent B does not hear.
pub(crate) fn is_ignored(config: &Config, core: &DestinationAgent, event: DestinationEvent) -> bool {
    let DestinationEvent::VmmGone { started, same_boot } = event else {
        return false;
    };
    let never_ran = !started && same_boot;
    core.decision() == Some(Decision::Claimed)
        && match config.mutant {
            Some(Mutant::NeverHandingBack) => never_ran,
            Some(Mutant::NoRunningAfterCrashAtB) => !never_ran,
            _ => false,
        }
}

/// What a VMM does with orders of the connection before.
pub(crate) fn old_orders(config: &Config) -> OldOrders {
    match config.is(Mutant::KilledAgentsOrdersObeyed) {
        true => OldOrders::StillObeyed,
        false => OldOrders::ThrownAway,
    }
}
