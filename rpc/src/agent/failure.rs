//! What an agent answers when it does not do what was asked, mapped once to a gRPC status.

use ferry_proto::InvalidField;
use tonic::metadata::MetadataValue;
use tonic::{Code, Status};

use super::journal::JournalError;
use super::vmm_client::VmmError;

/// Why something was not done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// There is no such thing here; it may have moved.
    #[error("{what} is not here{}", moved_to.as_ref().map(|host| format!(": it moved to host {host}")).unwrap_or_default())]
    NotFound {
        /// The thing, with its name.
        what: String,
        /// The host to which it went.
        moved_to: Option<String>,
    },
    /// A check says no; nothing was changed.
    #[error("{0}")]
    Refused(String),
    /// A field of the request cannot be used.
    #[error("the request is invalid")]
    Invalid(#[from] InvalidField),
    /// A peer does not answer; what it did is unknown.
    #[error("{0}")]
    Unavailable(String),
    /// The journal failed: nothing is done without it.
    #[error("the journal does not take it")]
    Journal(#[from] JournalError),
    /// The guest did not do what it was asked to, and runs on.
    #[error("{0}")]
    GuestIgnored(String),
    /// The guest ended, and not as it was asked to.
    #[error("{0}")]
    GuestLost(String),
    /// The VMM failed.
    #[error("{what}")]
    Vmm {
        /// What was tried.
        what: String,
        /// Why it failed.
        #[source]
        source: VmmError,
    },
    /// Something of this host failed.
    #[error("{what}")]
    Host {
        /// What was tried.
        what: String,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
}

impl Failure {
    /// A failure of this host's file system or processes.
    pub(crate) fn host(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Host { what, source }
    }

    /// A failure of a VMM.
    pub(crate) fn vmm(what: impl Into<String>) -> impl FnOnce(VmmError) -> Self {
        let what = what.into();
        move |source| Self::Vmm { what, source }
    }

    /// The failure with all its causes, in one line.
    pub(crate) fn chain(&self) -> String {
        crate::error_chain(self)
    }
}

impl From<Failure> for Status {
    fn from(failure: Failure) -> Self {
        let code = match &failure {
            Failure::NotFound { .. } => Code::NotFound,
            Failure::Refused(_) => Code::FailedPrecondition,
            Failure::Invalid(_) => Code::InvalidArgument,
            Failure::Unavailable(_) => Code::Unavailable,
            Failure::GuestIgnored(_) => Code::Aborted,
            Failure::GuestLost(_) => Code::DataLoss,
            Failure::Vmm {
                source: VmmError::Refused(_),
                ..
            } => Code::FailedPrecondition,
            Failure::Journal(_) | Failure::Vmm { .. } | Failure::Host { .. } => Code::Internal,
        };
        let mut status = Self::new(code, failure.chain());
        if let Failure::NotFound {
            moved_to: Some(host), ..
        } = &failure
            && let Ok(host) = MetadataValue::try_from(host)
        {
            status.metadata_mut().insert("moved-to", host);
        }
        status
    }
}
