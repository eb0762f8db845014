//! Why a guest does not arrive.

use std::io;
use std::time::Duration;

use crate::guest::GuestError;
use crate::wire::{ControlError, FrameError};

/// Why a guest did not arrive.
#[derive(Debug, thiserror::Error)]
pub enum DestinationError {
    /// This host cannot take the guest; the source was told every reason.
    #[error("this host cannot take the guest: {}", .0.join("; "))]
    Incompatible(Vec<String>),
    /// The agent ordered it.
    #[error("aborted: {0}")]
    Aborted(String),
    /// The source gave the migration up; the guest is there.
    #[error("the source gave up: {0}")]
    AbortedBySource(String),
    /// Nothing was heard from the source for too long.
    #[error("the source has been silent for {:.1}s", .0.as_secs_f64())]
    Silent(Duration),
    /// The control stream failed.
    #[error("the control stream from the source was lost")]
    ControlLost(#[source] ControlError),
    /// The link was lost, and the source made no other one in time.
    #[error("the source did not make its link again within {}s", .window.as_secs_f64())]
    LinkStaysLost {
        /// For how long one was waited for.
        window: Duration,
        /// How it was lost.
        #[source]
        lost: Box<DestinationError>,
    },
    /// The source made another link.
    #[error("the source made another link")]
    Replaced,
    /// A page stream ended or failed.
    #[error("page stream {stream} from the source was lost")]
    StreamLost {
        /// Its index.
        stream: u16,
        /// How; `None` if it ended between frames.
        #[source]
        cause: Option<FrameError>,
    },
    /// A page stream carried something that is not a frame that belongs there.
    #[error("page stream {stream} cannot be read on")]
    Frame {
        /// Its index.
        stream: u16,
        /// What is wrong.
        #[source]
        cause: FrameError,
    },
    /// The source said something that makes no sense here.
    #[error("the source misbehaved: {0}")]
    Misbehaved(String),
    /// GO came, and what it lists is not what is here. Nothing was claimed.
    #[error("the manifest was refused: {}", .0.join("; "))]
    ManifestRefused(Vec<String>),
    /// GO came, and the machine could not be built from the saved state. Nothing was claimed.
    #[error("the saved state could not be loaded")]
    Restore(#[source] GuestError),
    /// This side's own guest failed.
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

impl DestinationError {
    /// Whether the connections broke, rather than what they carried.
    pub(super) fn is_lost_link(&self) -> bool {
        match self {
            Self::Silent(_) | Self::StreamLost { .. } | Self::Replaced => true,
            Self::ControlLost(error) => error.is_connection(),
            _ => false,
        }
    }
}
