//! The handle on an incoming migration, and the register when no task owns it any more.

use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ferry_migration::handover::Decision;
use ferry_proto::agent::v1::{DestinationPart, LateLinkReply, LateLinkRequest, LatePagesReply};
use ferry_proto::{InvalidField, wire_uuid};
use tokio::sync::{mpsc, oneshot};
use uuid::Uuid;

use super::late::reply_of;
use crate::agent::context::RequestContext;
use crate::agent::data_port::Secret;
use crate::agent::failure::Failure;
use crate::agent::instances::Agent;
use crate::agent::journal::{DecisionRow, MigrationRow, RowWrite};
use crate::agent::outgoing::{MOST_STREAMS, late_streams};

/// D, and B's part of the blackout where it is known.
pub(crate) type Answer = (Decision, Option<DestinationPart>);

/// What reaches the task of an incoming migration.
pub(super) enum Request {
    /// Agent A asks to expect an attempt.
    Expect(u32, oneshot::Sender<Result<Answer, Failure>>),
    /// Agent A asks for D.
    Decide(u32, oneshot::Sender<Result<Answer, Failure>>),
    /// Agent A gave the migration up.
    GiveUp(String),
    /// Agent A is there.
    Heartbeat,
    /// A connection proved the secret.
    Connected(u16, OwnedFd),
    /// What the VMM answered to its permit.
    PermitAnswered(Result<(), crate::agent::vmm_client::VmmError>),
    /// Agent A asks whether pages that come late are needed still.
    LateLink(LateLinkRequest, oneshot::Sender<LateLinkReply>),
    /// What agent A says of pages that the guest waits for.
    LatePages(Result<LatePagesReply, Failure>),
    /// A row that could not be written is to be tried again.
    WriteAgain(u32, Decision),
}

/// What a migration is of: asked again under the same id with another, it is somebody else's, or an old message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Tuple {
    pub(crate) instance: Uuid,
    pub(crate) epoch: u64,
    pub(crate) source: String,
    /// The source's, if it tells.
    pub(crate) journal: Option<Uuid>,
}

/// A handle on one incoming migration.
pub(crate) struct Incoming {
    pub(crate) id: Uuid,
    /// In which it was asked for, as its source says.
    pub(super) context: RequestContext,
    /// Whose guest it is, under which epoch, and by which host's journal.
    pub(crate) of: Tuple,
    pub(crate) secret: Secret,
    /// Numbers of the disks whose contents come with the guest.
    pub(crate) copied_disks: Vec<u32>,
    pub(super) requests: mpsc::UnboundedSender<Request>,
}

impl Incoming {
    /// A connection of this migration proved itself.
    pub(crate) fn connected(&self, index: u16, connection: OwnedFd) {
        let _ = self.requests.send(Request::Connected(index, connection));
    }

    /// Agent A is there. False if the migration is over here.
    pub(crate) fn heartbeat(&self) -> bool {
        self.requests.send(Request::Heartbeat).is_ok()
    }

    /// Agent A gave the migration up.
    pub(crate) fn give_up(&self, reason: &str) {
        let _ = self.requests.send(Request::GiveUp(reason.to_owned()));
    }

    /// Waits until nothing of it is left to do.
    pub(crate) async fn over(&self) {
        self.requests.closed().await;
    }

    async fn ask(
        &self,
        request: impl FnOnce(oneshot::Sender<Result<Answer, Failure>>) -> Request,
    ) -> Option<Result<Answer, Failure>> {
        let (reply, answer) = oneshot::channel();
        self.requests.send(request(reply)).ok()?;
        answer.await.ok()
    }
}

/// The incoming migrations that have a task.
#[derive(Default)]
pub(crate) struct IncomingMigrations(Mutex<Known>);

#[derive(Default)]
struct Known {
    live: HashMap<Uuid, Arc<Incoming>>,
    /// Given up before they were known here, with the reason; the newest last.
    buried: VecDeque<(Uuid, String)>,
}

/// How many migrations are remembered that were given up before they were known: their PREPARE is on the way still, or
/// never comes.
const MOST_BURIED: usize = 256;

/// Characters of a reason that are kept for it: the peer chose its length.
const MOST_REASON: usize = 1000;

impl IncomingMigrations {
    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The one with this id.
    pub(crate) fn find(&self, id: Uuid) -> Option<Arc<Incoming>> {
        self.lock().live.get(&id).cloned()
    }

    /// Agent A gives a migration up: the one that has a task, or one whose PREPARE the news has overtaken.
    pub(crate) fn give_up(&self, id: Uuid, reason: &str) -> Option<Arc<Incoming>> {
        let mut known = self.lock();
        let Some(incoming) = known.live.get(&id).cloned() else {
            if known.buried.len() == MOST_BURIED {
                known.buried.pop_front();
            }
            known.buried.push_back((id, reason.chars().take(MOST_REASON).collect()));
            return None;
        };
        incoming.give_up(reason);
        Some(incoming)
    }

    /// Why a migration that is not known yet was given up, if it was.
    pub(super) fn why_buried(&self, id: Uuid) -> Option<String> {
        let known = self.lock();
        let mut buried = known.buried.iter();
        buried.find(|(found, _)| *found == id).map(|(_, reason)| reason.clone())
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.lock().live.len()
    }

    /// Which there are.
    pub(super) fn ids(&self) -> Vec<Uuid> {
        self.lock().live.keys().copied().collect()
    }

    pub(super) fn add(&self, incoming: Arc<Incoming>) {
        self.lock().live.insert(incoming.id, incoming);
    }

    pub(super) fn remove(&self, id: Uuid) {
        self.lock().live.remove(&id);
    }
}

impl Agent {
    /// Agent A asks whether pages that come late are needed still. Of a migration that is over here they are not.
    ///
    /// # Errors
    /// A field cannot be used, or the journal cannot be read.
    pub(crate) async fn late_link(&self, mut request: LateLinkRequest) -> Result<LateLinkReply, Failure> {
        let migration = wire_uuid("migration", &request.migration)?;
        // Those of a copy, and behind their control stream those for late pages.
        let most = u32::from(MOST_STREAMS + 1 + late_streams(MOST_STREAMS));
        if !(1..=most).contains(&request.streams) {
            let problem = format!("{} is not between 1 and {most}", request.streams);
            return Err(InvalidField {
                field: "streams",
                problem,
            }
            .into());
        }
        request.lost = request.lost.chars().take(MOST_REASON).collect();
        if let Some(incoming) = self.incoming.find(migration) {
            let (reply, answer) = oneshot::channel();
            let asked = incoming.requests.send(Request::LateLink(request, reply)).is_ok();
            if asked && let Ok(answer) = answer.await {
                return Ok(answer);
            }
        }
        let row = self
            .journal
            .read(move |connection| MigrationRow::find(connection, migration))
            .await?;
        match row {
            Some(row) if row.over => Ok(reply_of(&row.info)),
            Some(_) => Err(Failure::Unavailable(format!(
                "migration {migration} is being taken up on host {}",
                self.host()
            ))),
            None => Ok(LateLinkReply {
                ended: format!("host {} does not know the migration", self.host()),
                ..LateLinkReply::default()
            }),
        }
    }

    /// Agent A asks to expect an attempt: D becomes OPEN, durably.
    ///
    /// # Errors
    /// The migration is over here, the attempt is stale, or the journal does not take it.
    pub(crate) async fn expect(&self, migration: Uuid, attempt: u32) -> Result<Answer, Failure> {
        let over = || Failure::Refused(format!("migration {migration} is not expected on host {}", self.host()));
        let incoming = self.incoming.find(migration).ok_or_else(over)?;
        incoming
            .ask(|reply| Request::Expect(attempt, reply))
            .await
            .unwrap_or_else(|| Err(over()))
    }

    /// Agent A asks for D: it moves to SRC if nothing was claimed.
    ///
    /// # Errors
    /// The answer cannot be made durable.
    pub(crate) async fn decide(&self, migration: Uuid, attempt: u32) -> Result<Answer, Failure> {
        if let Some(incoming) = self.incoming.find(migration)
            && let Some(answer) = incoming.ask(|reply| Request::Decide(attempt, reply)).await
        {
            return answer;
        }
        // No task owns the row: the migration is over here, or was never known. A missing row counts as OPEN.
        let boot_id = self.boot_id.clone();
        let decision = self
            .journal
            .write(RowWrite::DecidedAlone, move |transaction| {
                let newest = DecisionRow::newest(transaction, migration)?;
                if let Some(row) = newest.filter(|row| row.attempt >= attempt) {
                    let settled = if row.attempt > attempt {
                        Decision::Source
                    } else {
                        row.decision
                    };
                    if settled != Decision::Open {
                        return Ok(settled);
                    }
                }
                let row = DecisionRow {
                    migration,
                    attempt,
                    decision: Decision::Source,
                    boot_id,
                };
                row.save(transaction)?;
                Ok(Decision::Source)
            })
            .await?;
        Ok((decision, None))
    }
}
