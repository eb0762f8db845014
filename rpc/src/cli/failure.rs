//! How a verb ends: the exit codes that scripts depend on, and the error that carries one.

use std::error::Error;
use std::fmt::Write as _;
use std::process::ExitCode;

use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::error_chain;
use crate::request::RequestId;

/// What `ferry` tells the shell. The numbers are a contract; `docs/cli.md` lists them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Exit {
    /// Done.
    Done = 0,
    /// Failed or cancelled; a guest runs on at the source.
    Failed = 1,
    /// The command line cannot be meant so.
    Usage = 2,
    /// No such instance, host or migration, here at least.
    NotFound = 3,
    /// A check refused it; nothing was changed.
    Refused = 4,
    /// `--wait` ran out; the migration goes on.
    WaitRanOut = 5,
    /// Nobody knows who runs the guest.
    Indeterminate = 6,
    /// The guest ended by itself or is lost.
    GuestEnded = 7,
    /// No answer from the agent: the outcome is unknown.
    NoAnswer = 8,
    /// Interrupted; a migration goes on.
    Interrupted = 130,
}

impl Exit {
    pub(super) fn number(self) -> u8 {
        self as u8
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.number())
    }
}

/// Why a verb did not do what was asked, told once, in `cli::main`.
#[derive(Debug)]
pub(super) struct Failure {
    /// How the process exits.
    pub(super) exit: Exit,
    /// The whole chain of reasons, on one line. Empty: all has been said already.
    pub(super) message: String,
    /// The host that the guest left for, where the agent knew.
    pub(super) moved_to: Option<String>,
    /// The word for the reason, where the agent gave one: `docs/control-plane.md` lists them.
    pub(super) reason: Option<String>,
    /// The field of the request that the agent could not use.
    pub(super) field: Option<String>,
    /// An agent was asked, and its answer was lost.
    pub(super) is_unknown: bool,
}

/// What each verb returns.
pub(super) type Outcome = Result<Exit, Failure>;

impl Failure {
    pub(super) fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self {
            exit,
            message: message.into(),
            moved_to: None,
            reason: None,
            field: None,
            is_unknown: false,
        }
    }

    /// What is told of it, and of the request where an agent's answer was lost: by that it can be looked for.
    pub(super) fn told_of(&self, request: Option<&RequestId>) -> String {
        match request {
            Some(request) if self.is_unknown => format!(
                "{}; what came of it is unknown: look for request {request} in `ferry events`",
                self.message
            ),
            Some(request) => format!("{} (request {request})", self.message),
            None => self.message.clone(),
        }
    }

    /// All has been said: only the exit code is left.
    pub(super) fn told(exit: Exit) -> Self {
        Self::new(exit, "")
    }

    /// An agent's answer, after `what` was asked of it.
    pub(super) fn of_status(what: &str, status: &Status) -> Self {
        let said = status.message();
        let mut message = match status.source().map(error_chain) {
            Some(reasons) if reasons.contains(said) => format!("{what}: {reasons}"),
            Some(reasons) => format!("{what}: {said}: {reasons}"),
            None => format!("{what}: {said}"),
        };
        let moved_to = status
            .metadata()
            .get(MOVED_TO)
            .and_then(|host| host.to_str().ok())
            .map(str::to_owned);
        if let Some(host) = &moved_to
            && !status.message().contains(host.as_str())
        {
            let _ = write!(message, " (it moved to {host})");
        }
        let info = status.get_details_error_info();
        let violations = status.get_details_bad_request().map(|bad| bad.field_violations);
        let field = violations.and_then(|mut violations| violations.pop());
        // What is to be done about it comes as the description of a link.
        let help = status.get_details_help().and_then(|mut help| help.links.pop());
        if let Some(remedy) = help {
            let _ = write!(message, " ({})", remedy.description);
        }
        Self {
            exit: exit_of(status),
            message,
            moved_to,
            reason: info.map(|info| info.reason),
            field: field.map(|violation| violation.field),
            is_unknown: is_lost_connection(status),
        }
    }

    /// No connection to an agent came about.
    pub(super) fn unreachable(url: &str, error: &(dyn Error + 'static)) -> Self {
        Self::new(
            Exit::NoAnswer,
            format!("reach the agent at {url}: {}", error_chain(error)),
        )
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::new(Exit::Failed, format!("{error:#}"))
    }
}

/// Whether the answer came from the connection and not from the agent: what was asked may or may not have happened.
pub(super) fn is_lost_connection(status: &Status) -> bool {
    // An agent that was late says so, and did nothing.
    let is_late = status
        .get_details_error_info()
        .is_some_and(|info| info.reason == TOO_LATE);
    // A status that an agent sent has no source; one that tonic made from a broken connection has.
    let is_lost = matches!(
        status.code(),
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled
    );
    !is_late && (is_lost || status.source().is_some())
}

fn exit_of(status: &Status) -> Exit {
    match status.code() {
        Code::NotFound => Exit::NotFound,
        Code::FailedPrecondition
        | Code::AlreadyExists
        | Code::ResourceExhausted
        | Code::InvalidArgument
        | Code::OutOfRange
        | Code::PermissionDenied => Exit::Refused,
        Code::DataLoss => Exit::GuestEnded,
        _ if is_lost_connection(status) => Exit::NoAnswer,
        Code::DeadlineExceeded => Exit::Refused,
        _ => Exit::Failed,
    }
}

/// An agent's word for a call whose deadline passed before anything was done.
const TOO_LATE: &str = "DEADLINE";

/// Where agents put the host that a guest left for.
const MOVED_TO: &str = "moved-to";

#[cfg(test)]
mod tests {
    use tonic_types::ErrorDetails;

    use super::*;

    #[test]
    fn statuses_become_the_exit_codes_of_the_contract() {
        for (code, exit) in [
            (Code::NotFound, 3),
            (Code::FailedPrecondition, 4),
            (Code::AlreadyExists, 4),
            (Code::ResourceExhausted, 4),
            (Code::InvalidArgument, 4),
            (Code::Unavailable, 8),
            (Code::DeadlineExceeded, 8),
            (Code::Internal, 1),
            (Code::Unknown, 1),
            (Code::Aborted, 1),
            (Code::DataLoss, 7),
        ] {
            let failure = Failure::of_status("ask", &Status::new(code, "why"));
            assert_eq!(failure.exit.number(), exit, "{code:?}");
            assert_eq!(failure.message, "ask: why");
        }
    }

    #[test]
    fn a_guest_that_left_is_not_found_and_tells_where_it_is() {
        let mut status = Status::not_found("no instance web");
        status.metadata_mut().insert(MOVED_TO, "b".parse().unwrap());
        let failure = Failure::of_status("show web", &status);
        assert_eq!(failure.moved_to.as_deref(), Some("b"));
        assert_eq!(failure.exit, Exit::NotFound);
    }

    #[test]
    fn what_was_too_late_was_not_done() {
        let late = ErrorDetails::with_error_info(TOO_LATE, "ferry", [] as [(String, String); 0]);
        let status = Status::with_error_details(Code::DeadlineExceeded, "late", late);
        let failure = Failure::of_status("pause", &status);
        assert_eq!(failure.exit, Exit::Refused);
        let told = failure.told_of(RequestId::parse("req-1").ok().as_ref());
        assert_eq!(told, "pause: late (request req-1)");
    }

    #[test]
    fn a_field_that_is_wrong_is_named() {
        let wrong = ErrorDetails::with_bad_request_violation("spec.vcpus", "is zero");
        let status = Status::with_error_details(Code::InvalidArgument, "invalid", wrong);
        assert_eq!(Failure::of_status("run", &status).field.as_deref(), Some("spec.vcpus"));
    }

    #[test]
    fn a_broken_connection_is_no_answer() {
        let status = Status::from_error(Box::new(std::io::Error::other("reset by peer")));
        assert!(is_lost_connection(&status));
        let failure = Failure::of_status("watch", &status);
        assert_eq!(failure.exit, Exit::NoAnswer);
        let told = failure.told_of(RequestId::parse("req-1").ok().as_ref());
        assert!(told.contains("unknown") && told.contains("req-1"), "{told}");
    }
}
