//! What the four actors hold while they live, and what agents and VMMs say to each other.

use ferry_migration::handover::{
    Attempt, Decision, DestinationAgent, DestinationEffect, Epoch, GrantRegister, Permit, Permits, SourceAgent,
    SourceEffect, Traded,
};

use crate::network::{Answers, Call, INSTANCE, Id};
use crate::rows::{InstanceRow, RowsA};

/// What agent A asks of its VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum OrderA {
    Grant(Id),
    CallOff { id: Id, end: bool },
    Permit(Permit),
    Pause(Epoch),
}

/// What VMM A answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum ReplyA {
    Done(OrderA),
    /// With the epoch that the VMM has had.
    Refused(OrderA, Epoch),
    Traded(OrderA, Traded),
}

impl ReplyA {
    pub(crate) fn order(self) -> OrderA {
        match self {
            Self::Done(order) | Self::Refused(order, _) | Self::Traded(order, _) => order,
        }
    }
}

/// What VMM A says of its own accord.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum EventA {
    Converged(Id),
    Disarmed(Id),
    GoSent(Id),
    SendEnded,
    /// The last page was acknowledged.
    Drained,
}

/// What VMM B answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum ReplyB {
    Taken,
    /// Whether it has started before.
    Refused {
        started: bool,
    },
}

/// What VMM B says of its own accord.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum EventB {
    Ready(Id),
    Started,
    LoadFailed,
}

/// Agent A, from its start to its death.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct AgentA {
    pub(crate) rows: RowsA,
    /// The migration's core; none when no migration has the instance.
    pub(crate) core: Option<SourceAgent>,
    /// Effects that are still to be carried out. Until then no other event is taken.
    pub(crate) todo: Vec<SourceEffect>,
    /// `AskAfter` or `AskAgain` is running.
    pub(crate) ask_due: bool,
    pub(crate) call: Option<Call>,
    pub(crate) answers: Answers,
    /// Orders that the VMM has not answered: given again over each new connection.
    pub(crate) unanswered: Vec<OrderA>,
    /// It has a VMM, as far as it knows.
    pub(crate) attached: bool,
    /// A right to run is journalled, and the VMM for it is not started.
    pub(crate) starting: Option<Epoch>,
    /// A person resolved the migration: the guest starts under this right, which is journalled.
    pub(crate) resolved: Option<Epoch>,
}

/// Agent B.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct AgentB {
    pub(crate) core: DestinationAgent,
    pub(crate) instance: InstanceRow,
    pub(crate) over: bool,
    pub(crate) claimed_boot: u8,
    pub(crate) todo: Vec<DestinationEffect>,
    /// Who waits for the answer to what is being done.
    pub(crate) reply: Option<Call>,
    /// A row that is to be written again.
    pub(crate) later: Option<(u32, Decision)>,
    /// The permit is given and not answered.
    pub(crate) permit: bool,
    pub(crate) attached: bool,
    pub(crate) starting: Option<Epoch>,
    /// Source A was asked what it has, and did not answer.
    pub(crate) silent: bool,
    /// This is the incarnation that prepared the migration.
    pub(crate) first: bool,
}

/// What VMM A is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum PhaseA {
    /// The guest is here, and no migration has it.
    Here,
    /// Rounds are copied while the guest runs.
    Rounds,
    /// The grant is held, the guest stands still.
    Stopped(Id),
    /// The grant was traded, the disks are let go, GO is written; the VMM's owner has not heard of it.
    Sent(Id),
    Parked(Id),
    /// Its vCPUs are closed for good: pages, and nothing else.
    PageSource,
}

/// VMM A, or the one that starts the guest anew on its host.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct VmmA {
    pub(crate) phase: PhaseA,
    pub(crate) running: bool,
    pub(crate) user_paused: bool,
    pub(crate) grants: GrantRegister,
    pub(crate) permits: Permits,
    pub(crate) migration: u8,
    pub(crate) epoch: Epoch,
    /// The attempt that may be armed next, and whether that was said.
    pub(crate) next: u32,
    pub(crate) announced: bool,
    /// Ordered to end the migration.
    pub(crate) abort: bool,
    pub(crate) send_ended: bool,
    /// The guest was booted anew.
    pub(crate) anew: bool,
}

impl VmmA {
    /// It may run its guest, now or when its user resumes it.
    pub(crate) fn owns(&self) -> bool {
        matches!(self.phase, PhaseA::Here | PhaseA::Rounds | PhaseA::Stopped(_))
    }

    pub(crate) fn is_sending(&self) -> bool {
        matches!(self.phase, PhaseA::Rounds | PhaseA::Stopped(_) | PhaseA::Sent(_))
    }

    pub(crate) fn attempt(&self, id: Id) -> Attempt {
        id.attempt(self.epoch)
    }
}

/// What VMM B is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum PhaseB {
    Loading,
    /// It holds what GO's manifest lists, and the disks' locks.
    Ready(Id),
    Here,
    Failed,
}

/// VMM B, or the one that starts the guest anew on its host.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct VmmB {
    pub(crate) phase: PhaseB,
    pub(crate) running: bool,
    pub(crate) user_paused: bool,
    pub(crate) permits: Permits,
    /// Post-copy: pages are missing.
    pub(crate) missing: bool,
    pub(crate) anew: bool,
}

impl AgentA {
    pub(crate) fn new(rows: RowsA, core: Option<SourceAgent>) -> Self {
        Self {
            rows,
            core,
            todo: Vec::new(),
            ask_due: false,
            call: None,
            answers: Answers::default(),
            unanswered: Vec::new(),
            attached: true,
            starting: None,
            resolved: None,
        }
    }

    /// The attempt of this number of the newest migration.
    pub(crate) fn id(&self, number: u32) -> Id {
        Id {
            migration: self.rows.migration.number,
            number,
        }
    }
}

impl AgentB {
    pub(crate) fn new(core: DestinationAgent, instance: InstanceRow, claimed_boot: u8) -> Self {
        Self {
            core,
            instance,
            over: false,
            claimed_boot,
            todo: Vec::new(),
            reply: None,
            later: None,
            permit: false,
            attached: true,
            starting: None,
            silent: false,
            first: true,
        }
    }
}

impl VmmB {
    pub(crate) fn loading() -> Self {
        Self {
            phase: PhaseB::Loading,
            running: false,
            user_paused: false,
            permits: Permits::new(INSTANCE),
            missing: false,
            anew: false,
        }
    }

    pub(crate) fn owns(&self) -> bool {
        self.phase == PhaseB::Here
    }
}
