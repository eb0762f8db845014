//! What an agent answers when it does not do what was asked, mapped once to a gRPC status.

use ferry_proto::InvalidField;
use tonic::metadata::MetadataValue;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use super::journal::JournalError;
use super::reason::{DOMAIN, Reason};
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
    /// A check says no, for one of the closed list of reasons; nothing was changed.
    #[error("{text}")]
    Denied {
        /// The reason.
        reason: Reason,
        /// The things and numbers, for people.
        text: String,
    },
    /// A field of the request cannot be used.
    #[error("the request is invalid")]
    Invalid(#[from] InvalidField),
    /// A peer does not answer; what it did is unknown.
    #[error("{0}")]
    Unavailable(String),
    /// Whoever asked does not wait any more; nothing was done.
    #[error("{0}")]
    Late(String),
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

    /// A refusal with its reason from the closed list.
    pub(crate) fn denied(reason: Reason, text: impl Into<String>) -> Self {
        Self::Denied {
            reason,
            text: text.into(),
        }
    }

    /// The same refusal under this reason, unless it has one of its own. What is no refusal stays what it is.
    #[must_use]
    pub(crate) fn because(self, reason: Reason) -> Self {
        match self {
            Self::Refused(text) => Self::Denied { reason, text },
            other => other,
        }
    }

    /// Its reason from the closed list, if it is a refusal.
    pub(crate) fn reason(&self) -> Option<Reason> {
        match self {
            Self::Denied { reason, .. } => Some(*reason),
            Self::Refused(_) => Some(Reason::Other),
            _ => None,
        }
    }

    /// The word for scripts in `google.rpc.ErrorInfo`.
    fn word(&self) -> &'static str {
        match self {
            Self::Denied { reason, .. } => reason.code(),
            Self::Refused(_) => Reason::Other.code(),
            Self::NotFound { moved_to: Some(_), .. } => "MOVED",
            Self::NotFound { .. } => "NOT_FOUND",
            Self::Invalid(_) => "INVALID_FIELD",
            Self::Unavailable(_) => "OUTCOME_UNKNOWN",
            Self::Late(_) => "DEADLINE",
            Self::Journal(_) => "JOURNAL",
            Self::GuestIgnored(_) => "GUEST_IGNORED",
            Self::GuestLost(_) => "GUEST_LOST",
            Self::Vmm { .. } => "VMM",
            Self::Host { .. } => "HOST",
        }
    }

    /// The failure with all its causes, in one line.
    pub(crate) fn chain(&self) -> String {
        bounded(crate::error_chain(self))
    }

    /// The failure and its causes, each by itself.
    pub(crate) fn causes(&self) -> Vec<String> {
        let first: &dyn std::error::Error = self;
        std::iter::successors(Some(first), |error| error.source())
            .map(ToString::to_string)
            .collect()
    }

    /// What a gRPC client sees of it first.
    pub(crate) fn code(&self) -> Code {
        match self {
            Self::NotFound { .. }
            | Self::Denied {
                reason: Reason::DestinationUnknown,
                ..
            } => Code::NotFound,
            Self::Refused(_) | Self::Denied { .. } => Code::FailedPrecondition,
            Self::Invalid(_) => Code::InvalidArgument,
            Self::Unavailable(_) => Code::Unavailable,
            Self::Late(_) => Code::DeadlineExceeded,
            Self::GuestIgnored(_) => Code::Aborted,
            Self::GuestLost(_) => Code::DataLoss,
            Self::Vmm {
                source: VmmError::Refused(_) | VmmError::TooOld { .. },
                ..
            } => Code::FailedPrecondition,
            Self::Journal(_) | Self::Vmm { .. } | Self::Host { .. } => Code::Internal,
        }
    }
}

/// The longest text of a failure, in bytes. Names that callers choose are part of it, and it travels in a header of at most 16 KiB, in which
/// a byte may take three: with a longer one HTTP/2 gives up the connection, and whatever else goes on there.
const LONGEST: usize = 3072;
/// Of a longer one, how much of its end is kept: there are the causes.
const END: usize = 1024;

fn bounded(text: String) -> String {
    if text.len() <= LONGEST {
        return text;
    }
    let is_boundary = |at: &usize| text.is_char_boundary(*at);
    let start = (0..=LONGEST - END).rev().find(is_boundary).unwrap_or(0);
    let end = (text.len() - END..text.len()).find(is_boundary).unwrap_or(text.len());
    format!("{} … {}", &text[..start], &text[end..])
}

impl From<Failure> for Status {
    fn from(failure: Failure) -> Self {
        let mut details = ErrorDetails::with_error_info(failure.word(), DOMAIN, [] as [(String, String); 0]);
        if let Failure::Denied { reason, .. } = &failure {
            details.add_help_link(reason.remedy(), "");
        }
        if let Failure::Invalid(invalid) = &failure {
            details.add_bad_request_violation(invalid.field, bounded(invalid.problem.clone()));
        }
        let mut status = Self::with_error_details(failure.code(), failure.chain(), details);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_of_a_megabyte_does_not_come_back_whole() {
        let status = Status::from(Failure::NotFound {
            what: format!("instance {}", "ü".repeat(1 << 19)),
            moved_to: None,
        });
        let told = status.message();
        assert!(told.len() < LONGEST + 10, "{} bytes", told.len());
        assert!(
            told.starts_with("instance ü") && told.ends_with("ü is not here"),
            "{told}"
        );
        let short = Failure::Refused("no".to_owned());
        assert_eq!(short.chain(), "no");
    }
}
