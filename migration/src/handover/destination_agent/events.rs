//! What happens to agent B, and what it must do.

use super::Decision;

/// What happens to agent B.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DestinationEvent {
    /// Agent A asks to expect this attempt.
    Expect(u32),
    /// VMM B holds what GO's manifest of this attempt lists.
    Ready(u32),
    /// VMM B announced that the guest entered KVM_RUN, or that it took a user-paused guest's permit.
    Started,
    /// VMM B refused the manifest or failed to load. Its process may be alive.
    LoadFailed,
    /// VMM B is dead.
    VmmGone {
        /// It left its started mark.
        started: bool,
        /// The host has not rebooted since CLAIMED was written.
        same_boot: bool,
    },
    /// Agent A asks for D of this attempt, claiming SRC.
    Decide(u32),
    /// Agent A gave the migration up before GO, or nothing was heard from it for too long.
    GiveUp,
    /// This agent restarted and found VMM B alive.
    VmmFound,
    /// The last `Journal` effect did not become durable.
    JournalFailed,
}

/// What agent B must do, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DestinationEffect {
    /// Make this durable before anything that follows.
    Journal {
        /// Attempt n.
        attempt: u32,
        /// The new value of D(M,n).
        decision: Decision,
    },
    /// Answer the request with D.
    Answer(Decision),
    /// Answer that the request is refused: this migration is over here, or the attempt is stale.
    Refuse,
    /// Give VMM B the permit of epoch e+1.
    SendPermit,
    /// Kill VMM B and wait until it is dead.
    KillVmm,
    /// Tell agent A what D is now.
    TellSource(Decision),
    /// The guest is this host's from now on, running or user-paused.
    Adopt,
    /// The guest is this host's and crashed here.
    AdoptCrashed,
    /// Write the row again later and feed the outcome.
    JournalLater {
        /// Attempt n.
        attempt: u32,
        /// The value to write.
        decision: Decision,
    },
}
