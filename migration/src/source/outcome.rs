//! How a migration ends for its source.

use std::io;
use std::time::Duration;

use super::{Parked, SourceSummary};
use crate::guest::{GuestEnd, GuestError};
use crate::handover::Attempt;
use crate::wire::ControlError;

/// What became of the guest.
#[derive(Debug)]
pub enum SourceOutcome<G> {
    /// GO was sent: the decision register says who runs it.
    GoSent(Parked<G>),
    /// The migration ended before GO. The guest runs on here, or is paused if its user had paused it.
    Cancelled {
        /// The guest, untracked.
        guest: G,
        /// Why.
        error: SourceError,
        /// The attempt that was traded for CANCELLED: the next one to be armed, or the one that was.
        attempt: u32,
        /// What was measured.
        summary: SourceSummary,
    },
    /// The guest ended by itself before GO.
    GuestEnded {
        /// What is left of it.
        guest: G,
        /// How.
        end: GuestEnd,
        /// The attempt that was traded for CANCELLED.
        attempt: u32,
        /// What was measured.
        summary: SourceSummary,
    },
}

/// Why a migration ended at the source before GO.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The destination cannot take this guest: every reason by name.
    #[error("the destination cannot take the guest: {}", .0.join("; "))]
    Incompatible(Vec<String>),
    /// The destination gave the migration up.
    #[error("the destination gave up: {}", .0.join("; "))]
    Refused(Vec<String>),
    /// The agent ordered it.
    #[error("aborted: {0}")]
    Aborted(String),
    /// The copy did not come within the budget in time.
    #[error("not done within {}s{}", .after.as_secs_f64(), .last.as_ref().map(|words| format!(": {words}")).unwrap_or_default())]
    TimedOut {
        /// The time that it had.
        after: Duration,
        /// What was decided on its last round, and why; `None`: no round was over.
        last: Option<String>,
    },
    /// Nothing was heard from the destination for too long.
    #[error("the destination has been silent for {:.1}s", .0.as_secs_f64())]
    Silent(Duration),
    /// The control stream failed.
    #[error("the control stream to the destination was lost")]
    ControlLost(#[source] ControlError),
    /// The link was lost, and no other one came in time.
    #[error("the link to the destination was not made again within {}s", .window.as_secs_f64())]
    LinkStaysLost {
        /// For how long one was waited for.
        window: Duration,
        /// How it was lost.
        #[source]
        lost: Box<SourceError>,
    },
    /// A page stream failed.
    #[error("page stream {stream} to the destination was lost")]
    StreamLost {
        /// Its index.
        stream: u16,
        /// How.
        #[source]
        cause: io::Error,
    },
    /// A connection for late pages was lost while nothing was to be said on it; nothing was handed over.
    #[error("a connection for late pages to the destination was lost before it was needed")]
    LateLinkLost(#[source] io::Error),
    /// What the destination holds is not what was sent, again after it was sent again.
    #[error("what the destination holds is not what was sent, and was not when it was sent again: {0}")]
    Differs(String),
    /// The destination said something that makes no sense here.
    #[error("the destination misbehaved: {0}")]
    Misbehaved(String),
    /// The agent gave a grant of something else.
    #[error("the grant is for {0}")]
    ForeignGrant(Attempt),
    /// The guest's own side failed.
    #[error("the guest's side could not {step}")]
    Guest {
        /// At what.
        step: &'static str,
        /// How.
        #[source]
        cause: GuestError,
    },
    /// This host failed.
    #[error("this host could not {step}")]
    Host {
        /// At what.
        step: &'static str,
        /// How.
        #[source]
        cause: io::Error,
    },
}

impl SourceError {
    /// Whether the connections broke, rather than what they carried.
    #[must_use]
    pub fn is_lost_link(&self) -> bool {
        match self {
            Self::Silent(_) | Self::StreamLost { .. } | Self::LateLinkLost(_) => true,
            Self::ControlLost(error) => error.is_connection(),
            _ => false,
        }
    }
}
