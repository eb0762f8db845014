//! What is made durable, by name.

use crate::agent::steps::SourceStep;

/// A durable write: one value for each kind, so that no place writes what the fault matrix has not thought about
/// (`rpc/src/faults/`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RowWrite {
    /// The rows of an effect of the switchover's cores, which has a site of its own.
    OfEffect,
    /// Agent A accepts a migration: its row, the instance's, and its event.
    Accepted,
    /// Agent A begins a step: before it, or, of a copy, while the VMM is at it.
    Entered(SourceStep),
    /// The destination has prepared: which journal D is in, and which disks are copied.
    Prepared,
    /// What is told of a migration out of here changes, and decides nothing: its status, its terms, a lost link.
    SourceStatus,
    /// The guest has left agent A's host.
    Departed,
    /// The guest has left agent A's host, which keeps its memory.
    Serving,
    /// Agent A learns that a guest was lost whose pages were gone.
    LostAfterwards,
    /// A migration is over at agent A.
    SourceOver,
    /// Agent B takes a migration in: its row, the instance's with its claim, and its event.
    Reserved,
    /// Agent B answers a question for D that no task of its own answers.
    DecidedAlone,
    /// What is told of a migration into here changes, and decides nothing: that pages come late, a lost link.
    DestinationStatus,
    /// A migration is over at agent B.
    DestinationOver,
    /// Agent B's source knows that the guest has arrived.
    Settled,
    /// Agent B's source has the guest under a higher epoch: what is here is gone.
    Stale,
    /// A person says whose the guest is, where no migration is under way.
    Resolved,
    /// A migration that the agent before this one left unfinished is over.
    FoundOver,
    /// An instance, by what its user or its guest does.
    Instance,
    /// Who did what.
    Audit,
    /// Whose the journal is, and what ended with the agent before this one.
    Beginning,
    /// A test's.
    #[cfg(test)]
    Test,
}
