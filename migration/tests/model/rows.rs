//! What the journals hold, and whether a write to them lasts.

use ferry_migration::handover::{Decision, Epoch};

use crate::network::Id;

/// What an agent's journal calls the instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Status {
    /// No row: it is not this host's.
    Absent,
    /// It is moving in.
    Incoming,
    Running,
    /// By its user.
    Paused,
    Crashed,
}

impl Status {
    pub(crate) fn may_run(self) -> bool {
        matches!(self, Self::Running | Self::Paused)
    }
}

/// The instance's row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct InstanceRow {
    pub(crate) status: Status,
    pub(crate) epoch: Epoch,
    pub(crate) known: Epoch,
    /// The source of the migration that brought it here acknowledged RUNNING.
    pub(crate) settled: bool,
}

/// The migration's row at the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct MigrationRow {
    pub(crate) number: u8,
    /// The epoch e under which the source runs the guest.
    pub(crate) epoch: Epoch,
    pub(crate) armed: u32,
    pub(crate) said: Option<Decision>,
    pub(crate) resumed: Option<Epoch>,
    /// POSTCOPY: what is left here only serves pages.
    pub(crate) serves_pages: bool,
    pub(crate) over: bool,
}

/// Agent A's journal, or its memory of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct RowsA {
    pub(crate) migration: MigrationRow,
    pub(crate) instance: InstanceRow,
}

/// Agent B's journal. Of the decisions it remembers nothing but what its core holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct RowsB {
    /// The newest migration into here, and its epoch e.
    pub(crate) migration: u8,
    pub(crate) epoch: Epoch,
    /// The user had paused the guest.
    pub(crate) paused: bool,
    /// D, and the boot in which it was written.
    pub(crate) decisions: [Option<(Decision, u8)>; Id::COUNT],
    /// The migration is over here.
    pub(crate) over: bool,
    pub(crate) instance: InstanceRow,
}

/// Whether a durable write works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Write {
    Works,
    /// It fails and nothing is written.
    Fails,
    /// It fails, and is on disk all the same.
    FailsLate,
}

/// A write did not become durable, as far as the writer knows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NotDurable;

impl Write {
    pub(crate) fn lands(self) -> bool {
        self != Self::Fails
    }

    pub(crate) fn result(self) -> Result<(), NotDurable> {
        match self {
            Self::Works => Ok(()),
            Self::Fails | Self::FailsLate => Err(NotDurable),
        }
    }
}

pub(crate) fn first_row(number: u8, epoch: Epoch) -> MigrationRow {
    MigrationRow {
        number,
        epoch,
        armed: 0,
        said: None,
        resumed: None,
        serves_pages: false,
        over: false,
    }
}

pub(crate) fn incoming(epoch: Epoch) -> InstanceRow {
    InstanceRow {
        status: Status::Incoming,
        epoch,
        known: epoch,
        settled: false,
    }
}
