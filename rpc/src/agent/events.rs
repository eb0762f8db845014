//! What was done to an instance, and what failed: Nova's `wrap_instance_event` and `wrap_instance_fault`.
//!
//! [`Agent::recorded`] is put around each action; a migration's event begins and ends in the transactions in which its record does.
//! No action depends on its event: a journal that takes none is told in the log, and by what the action itself writes.

use std::future::Future;

use ferry_proto::agent::v1::{InstanceEvent, InstanceFault, MigrationInfo};
use tonic::Code;
use uuid::Uuid;

use super::context::RequestContext;
use super::failure::Failure;
use super::instances::Agent;
use super::journal::{EventEnd, EventRow, FaultRow, Journal, MIGRATE, MIGRATE_IN};
use super::outgoing::now_text;

/// How many events `show` tells.
const SHOWN: u32 = 10;
/// The longest name that is kept: one that was refused may have any length.
const LONGEST_NAME: usize = 64;

/// What is done to an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    Run,
    Start,
    Pause,
    Resume,
    Reboot,
    Stop,
    ForceStop,
    Delete,
    ForceDelete,
    Balloon,
    Snapshot,
    Restore,
    /// A migration out of here.
    Migrate,
    /// A migration into here.
    MigrateIn,
    Abort,
    ForceComplete,
    Retune,
    /// The link of a migration out of here is lost, and made again.
    Reconnect,
    /// A guest waits for pages, and who has them was asked.
    AskForPages,
    Resolve,
    /// Its restart policy starts it.
    Restart,
    /// Another host has it under a higher epoch.
    DestroyStale,
}

impl Action {
    /// The word in events and in the audit table.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Run => "run",
            Self::Start => "start",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Reboot => "reboot",
            Self::Stop => "stop",
            Self::ForceStop => "stop --force",
            Self::Delete => "delete",
            Self::ForceDelete => "delete --force",
            Self::Balloon => "balloon",
            Self::Snapshot => "snapshot",
            Self::Restore => "restore",
            Self::Migrate => MIGRATE,
            Self::MigrateIn => MIGRATE_IN,
            Self::Abort => "abort",
            Self::ForceComplete => "force-complete",
            Self::Retune => "retune",
            Self::Reconnect => "reconnect",
            Self::AskForPages => "ask-for-pages",
            Self::Resolve => "resolve",
            Self::Restart => "restart",
            Self::DestroyStale => "destroy-stale",
        }
    }
}

/// The instance that something is done to, and the migration that it is about.
#[derive(Clone, Debug)]
pub(crate) struct Subject {
    pub(crate) instance: Uuid,
    pub(crate) name: String,
    pub(crate) migration: Option<Uuid>,
}

impl Subject {
    pub(crate) fn instance(instance: Uuid, name: &str) -> Self {
        Self {
            instance,
            name: name.to_owned(),
            migration: None,
        }
    }

    pub(crate) fn migration(instance: Uuid, name: &str, migration: Uuid) -> Self {
        Self {
            migration: Some(migration),
            ..Self::instance(instance, name)
        }
    }

    /// The event of an action that begins now.
    pub(crate) fn begins(&self, context: &RequestContext, action: Action) -> EventRow {
        EventRow {
            instance: self.instance.to_string(),
            name: self.name.chars().take(LONGEST_NAME).collect(),
            action: action.word(),
            actor: context.actor().to_owned(),
            request: context.request().to_owned(),
            migration: self.migration.map(|id| id.to_string()),
            started: now_text(),
        }
    }
}

impl EventEnd {
    /// The end of an action that did what was asked.
    pub(crate) fn success(message: Option<String>) -> Self {
        Self {
            finished: now_text(),
            result: "success",
            message,
            fault: None,
        }
    }

    /// The end of a question that brought no answer. That is no fault yet: it is asked again.
    pub(crate) fn unanswered(message: String) -> Self {
        Self {
            finished: now_text(),
            result: "error",
            message: Some(message),
            fault: None,
        }
    }
}

/// The end of an action that failed.
fn error(context: &RequestContext, instance: Uuid, failure: &Failure) -> EventEnd {
    let finished = now_text();
    EventEnd {
        result: "error",
        message: Some(failure.chain()),
        fault: Some(fault(context, instance, failure, finished.clone())),
        finished,
    }
}

fn fault(context: &RequestContext, instance: Uuid, failure: &Failure, created: String) -> FaultRow {
    FaultRow {
        instance: instance.to_string(),
        created,
        code: name_of(failure.code()),
        reason: failure.reason().map(super::reason::Reason::code),
        message: failure.to_string(),
        details: failure.causes().join("\n"),
        request: context.request().to_owned(),
    }
}

/// The end of a migration, as its record says. One that a person called off leaves no fault. `refusal`: what the other side said
/// no with, if that is why.
pub(crate) fn end_of_migration(context: &RequestContext, info: &MigrationInfo, refusal: Option<&Failure>) -> EventEnd {
    let message = || info.error.clone().unwrap_or_else(|| info.status.clone());
    let finished = info.ended.clone().unwrap_or_else(now_text);
    match info.status.as_str() {
        "completed" => EventEnd {
            finished,
            ..EventEnd::success(None)
        },
        "cancelled" => EventEnd {
            finished,
            result: "error",
            message: Some(message()),
            fault: None,
        },
        _ => {
            let code = match (&info.guest_ended, refusal) {
                (Some(_), _) => Code::DataLoss,
                (None, Some(refusal)) => refusal.code(),
                (None, None) => Code::Aborted,
            };
            let details = refusal.map_or_else(message, |refusal| refusal.causes().join("\n"));
            EventEnd {
                result: "error",
                message: Some(message()),
                fault: Some(FaultRow {
                    instance: info.instance.clone(),
                    created: finished.clone(),
                    code: name_of(code),
                    reason: refusal.and_then(Failure::reason).map(super::reason::Reason::code),
                    message: message(),
                    details,
                    request: context.request().to_owned(),
                }),
                finished,
            }
        }
    }
}

/// An event whose end is not written yet. Whoever drops it was dropped in the middle of the action.
struct Open {
    journal: Journal,
    id: Option<i64>,
}

impl Open {
    async fn end(mut self, end: EventEnd) {
        let Some(id) = self.id.take() else { return };
        let noted = self.journal.note(move |transaction| end.of_event(transaction, id));
        if let Err(error) = noted.await {
            tracing::error!(%error, "failed to write the end of an event");
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let Some(id) = self.id.take() else { return };
        let end = EventEnd {
            finished: now_text(),
            result: "interrupted",
            message: Some("whoever asked did not wait for the end of it".to_owned()),
            fault: None,
        };
        self.journal
            .note_later(move |transaction| end.of_event(transaction, id));
    }
}

impl Agent {
    /// Does something to an instance and leaves an event of it, and a fault if it fails. Of no instance there is no event.
    ///
    /// # Errors
    /// Those of `work`.
    pub(crate) async fn recorded<T>(
        &self,
        context: &RequestContext,
        action: Action,
        subject: Option<Subject>,
        work: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Failure> {
        let Some(subject) = subject else { return work.await };
        let event = self.begin(subject.begins(context, action)).await;
        let done = work.await;
        let end = match &done {
            Ok(_) => EventEnd::success(None),
            Err(failure) => error(context, subject.instance, failure),
        };
        event.end(end).await;
        done
    }

    /// Writes down what failed before it was begun.
    pub(crate) async fn record_failure(
        &self,
        context: &RequestContext,
        action: Action,
        subject: Subject,
        failure: &Failure,
    ) {
        let end = error(context, subject.instance, failure);
        self.record_end(context, action, subject, end).await;
    }

    /// Writes down what was found out about an instance, and nobody had begun.
    pub(crate) async fn record_end(&self, context: &RequestContext, action: Action, subject: Subject, end: EventEnd) {
        let event = self.begin(subject.begins(context, action)).await;
        event.end(end).await;
    }

    /// Writes down what fails of an action that goes on.
    pub(crate) async fn record_fault(&self, context: &RequestContext, instance: Uuid, failure: &Failure) {
        let fault = fault(context, instance, failure, now_text());
        if let Err(error) = self.journal.note(move |transaction| fault.add(transaction)).await {
            tracing::error!(%error, "failed to write a fault");
        }
    }

    async fn begin(&self, row: EventRow) -> Open {
        let noted = self.journal.note(move |transaction| row.begin(transaction)).await;
        if let Err(error) = &noted {
            tracing::error!(%error, "failed to write an event");
        }
        Open {
            journal: self.journal.clone(),
            id: noted.ok(),
        }
    }

    /// The instance of this id or name, if it is here.
    pub(crate) fn subject(&self, name_or_id: &str) -> Option<Subject> {
        let instance = self.instances.find(name_or_id)?;
        Some(Subject::instance(instance.id, &instance.name))
    }

    /// The request of a migration that goes on, for an agent that restarted.
    pub(crate) async fn context_of(&self, migration: Uuid) -> RequestContext {
        let written = self
            .journal
            .read(move |connection| EventRow::of_migration(connection, &migration.to_string()))
            .await;
        match written {
            Ok(Some((request, actor))) => RequestContext::written(&request, actor),
            _ => RequestContext::agent(),
        }
    }

    /// What was done to instances of this id or name, the newest first; 0: all.
    ///
    /// # Errors
    /// The journal cannot be read; or nothing was done to any, and there is none here.
    pub(crate) async fn events(&self, name_or_id: &str, limit: u32) -> Result<Vec<InstanceEvent>, Failure> {
        let asked = name_or_id.to_owned();
        let events = self
            .journal
            .read(move |connection| EventRow::of(connection, &asked, limit))
            .await?;
        if events.is_empty() {
            self.instance(name_or_id).await?;
        }
        Ok(events)
    }

    /// The last events and the newest fault of an instance, for `show`.
    ///
    /// # Errors
    /// The journal cannot be read.
    pub(crate) async fn history(&self, id: Uuid) -> Result<(Vec<InstanceEvent>, Option<InstanceFault>), Failure> {
        let id = id.to_string();
        let read = self.journal.read(move |connection| {
            Ok((
                EventRow::of(connection, &id, SHOWN)?,
                FaultRow::newest(connection, &id)?,
            ))
        });
        Ok(read.await?)
    }
}

/// A status code by the name that gRPC has for it.
fn name_of(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

#[cfg(test)]
mod tests {
    use super::super::reason::Reason;
    use super::*;

    fn info(status: &str) -> MigrationInfo {
        MigrationInfo {
            instance: "i".to_owned(),
            status: status.to_owned(),
            error: Some("why".to_owned()),
            ..MigrationInfo::default()
        }
    }

    #[test]
    fn a_failure_leaves_its_reason_and_its_causes() {
        let context = RequestContext::written("req-1", "root (uid 0)".to_owned());
        let source = std::io::Error::other("the disk is gone");
        let failure = Failure::host("failed to read the image")(source);
        let fault = error(&context, Uuid::from_u128(1), &failure).fault.unwrap();
        assert_eq!((fault.code, fault.reason), ("INTERNAL", None));
        assert_eq!(fault.details, "failed to read the image\nthe disk is gone");
        let refused = Failure::denied(Reason::Disks, "disk /srv/x is not there");
        let end = error(&context, Uuid::from_u128(1), &refused);
        assert_eq!(
            (end.result, end.message.as_deref()),
            ("error", Some("disk /srv/x is not there"))
        );
        let fault = end.fault.unwrap();
        assert_eq!((fault.code, fault.reason), ("FAILED_PRECONDITION", Some("DISKS")));
        assert_eq!(fault.request, "req-1");
    }

    #[test]
    fn a_migration_ends_as_its_record_says() {
        let context = RequestContext::agent();
        let end = |status: &str, refusal: Option<&Failure>| end_of_migration(&context, &info(status), refusal);
        assert_eq!(end("completed", None).result, "success");
        let cancelled = end("cancelled", None);
        assert_eq!((cancelled.result, cancelled.fault), ("error", None));
        assert_eq!(cancelled.message.as_deref(), Some("why"));
        assert_eq!(end("failed", None).fault.unwrap().code, "ABORTED");
        let busy = Failure::denied(Reason::HostBusy, "host b is busy");
        let fault = end("failed", Some(&busy)).fault.unwrap();
        assert_eq!((fault.code, fault.reason), ("FAILED_PRECONDITION", Some("HOST_BUSY")));
    }
}
