//! What goes into a destination's run, and what it tells while it runs.

use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::guest::GuestWas;
use crate::handover::{Attempt, Epoch};
use crate::link::{Link, Liveness};
use crate::postcopy::{LatePages, LateReport};
use crate::wire::StreamTotals;

/// Which guest is expected.
#[derive(Clone, Debug)]
pub struct DestinationParameters {
    /// The instance that moves.
    pub instance: Uuid,
    /// The migration.
    pub migration: Uuid,
    /// The epoch under which the guest runs at the source.
    pub epoch: Epoch,
    /// When the source counts as dead.
    pub liveness: Liveness,
    /// How long a source whose link is lost before its guest stands still may take to make another; zero: the migration ends with it.
    pub resume_window: Duration,
}

/// An order to a running destination.
#[derive(Debug)]
pub enum DestinationOrder {
    /// Give up and tell the source.
    Abort {
        /// Why, for the record and for the source.
        reason: String,
    },
    /// Another link from the source, in place of the one that there was.
    Reconnect(Box<Link>),
}

/// What a running destination tells. Never blocks it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DestinationReport {
    /// The handshake was accepted.
    Accepted {
        /// The protocol version that both speak.
        protocol: u32,
    },
    /// The source's map arrived, and pages follow.
    Loading {
        /// Pages that the source's host has populated.
        populated_pages: u64,
        /// Pages below which huge pages are wanted.
        huge_pages: u64,
    },
    /// Every page of a round is here.
    RoundReceived {
        /// Its number, from 1.
        round: u32,
        /// What all streams carried so far.
        totals: StreamTotals,
    },
    /// The saved state is here: the guest stands still at the source.
    StateReceived {
        /// The attempt it belongs to.
        attempt: Attempt,
    },
    /// The switchover was called off by the source; pages go on.
    Disarmed {
        /// The attempt that is void.
        attempt: Attempt,
        /// Why, in the source's words.
        reason: String,
    },
    /// GO is here and everything that its manifest lists.
    GoReceived {
        /// The attempt.
        attempt: Attempt,
    },
    /// The link is lost, and another one is waited for.
    LinkLost {
        /// Why, in words.
        reason: String,
        /// For so long from now on.
        patience: Duration,
    },
    /// The source heard over another link what is here, and goes on.
    Resumed,
    /// About pages that come late. Told after the guest was loaded, too.
    Late(LateReport),
}

/// The guest, loaded and not run: the VMM tells its agent that it is ready and waits for the permit.
#[derive(Debug)]
pub struct Loaded<R> {
    /// The machine.
    pub restored: R,
    /// The attempt that GO named.
    pub attempt: Attempt,
    /// Whether its user had paused the guest.
    pub guest_was: GuestWas,
    /// How long loading took.
    pub timings: LoadTimings,
    /// What was received.
    pub summary: DestinationSummary,
    /// The digests that both sides found, where they compared.
    pub digests: Option<Digests>,
    /// What takes in the pages that come late, if some do. It is kept until they are here: without it whoever waits for one waits for ever.
    pub late: Option<LatePages>,
}

/// What memory and state digest to, the same at both ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Digests {
    /// All memory.
    pub memory: u128,
    /// The saved state, without what time alone changes.
    pub state: u128,
}

/// The destination's part of the blackout up to ready.
#[derive(Clone, Copy, Debug)]
pub struct LoadTimings {
    /// When GO was read.
    pub go_received: Instant,
    /// From then until the last page was in memory.
    pub last_pages: Duration,
    /// Building the machine from the saved state.
    pub restore: Duration,
    /// Digesting memory and state, partly before GO; zero unless verifying.
    pub verify: Duration,
}

/// What was received.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DestinationSummary {
    /// Rounds, the last one too.
    pub rounds: u32,
    /// All streams together.
    pub totals: StreamTotals,
}
