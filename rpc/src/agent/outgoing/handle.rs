//! The handle on an outgoing migration.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ferry_migration::handover::{Decision, Wish};
use ferry_proto::agent::v1::{DestinationPart, MigrationInfo, RetuneRequest};
use tokio::sync::{mpsc, oneshot, watch};
use uuid::Uuid;

use super::retuning::Retuning;
use crate::agent::context::RequestContext;
use crate::agent::failure::Failure;

/// The most page streams of one migration.
pub(crate) const MOST_STREAMS: u16 = 64;

/// The wall clock, milliseconds since 1970.
pub(crate) fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// The wall clock as users read it: RFC 3339, in UTC.
pub(crate) fn now_text() -> String {
    humantime::format_rfc3339_millis(SystemTime::now()).to_string()
}

/// What agent B said of its own accord.
#[derive(Clone, Debug)]
pub(crate) struct PeerNews {
    pub(crate) attempt: u32,
    pub(crate) decision: Decision,
    pub(crate) part: Option<DestinationPart>,
    pub(crate) reason: String,
    /// When it was heard, CLOCK_MONOTONIC in nanoseconds.
    pub(crate) heard_ns: u64,
}

/// A person's wish to end the doubt, and who waits for what comes of it.
pub(super) struct Resolving {
    pub(super) wish: Wish,
    pub(super) context: RequestContext,
    reply: oneshot::Sender<Result<(), Failure>>,
}

impl Resolving {
    pub(super) fn answer(self, result: Result<(), Failure>) {
        // Whoever asked may have given up waiting.
        let _ = self.reply.send(result);
    }
}

/// A handle on one outgoing migration; its task has the rest.
pub(crate) struct Outgoing {
    pub(crate) id: Uuid,
    /// In which it was asked for, and makes its own calls.
    pub(super) context: RequestContext,
    pub(super) instance: Uuid,
    /// The epoch under which the instance was accepted.
    pub(super) epoch: u64,
    /// Whether the cast has come.
    pub(super) begun: watch::Sender<bool>,
    pub(crate) destination: String,
    pub(super) info: watch::Sender<MigrationInfo>,
    pub(super) abort: watch::Sender<Option<String>>,
    pub(super) news: mpsc::UnboundedSender<PeerNews>,
    pub(super) resolvings: mpsc::UnboundedSender<Resolving>,
    pub(super) retunings: mpsc::UnboundedSender<Retuning>,
    /// Why the pages that the destination waits for are here no more, once that is certain.
    pub(super) pages_lost: watch::Sender<Option<String>>,
    /// The destination's guest is lost with them, and how it says so.
    pub(super) guest_lost: watch::Sender<Option<String>>,
    /// The copy of the guest is destroyed, and will not be there again; or it is over.
    pub(super) let_go: watch::Sender<bool>,
    pub(super) over: watch::Sender<bool>,
}

impl Outgoing {
    /// The cast has come. False: it had come before.
    pub(super) fn begin(&self) -> bool {
        !self.begun.send_replace(true)
    }

    /// Asks the migration to end. Too late once GO was sent.
    pub(crate) fn abort(&self, reason: &str) {
        self.abort.send_if_modified(|asked| {
            let first = asked.is_none();
            asked.get_or_insert_with(|| reason.to_owned());
            first
        });
    }

    /// Agent B says what D became.
    pub(crate) fn hear(&self, news: PeerNews) {
        let _ = self.news.send(news);
    }

    /// A person ends the doubt about it. None if it was over before.
    pub(crate) async fn resolve(&self, wish: Wish, context: RequestContext) -> Option<Result<(), Failure>> {
        let (reply, answer) = oneshot::channel();
        self.resolvings.send(Resolving { wish, context, reply }).ok()?;
        answer.await.ok()
    }

    /// Other terms hold for it from now on. None if it was over before.
    pub(crate) async fn retune(&self, request: &RetuneRequest) -> Option<Result<(), Failure>> {
        let (retuning, answer) = Retuning::new(request);
        self.retunings.send(retuning).ok()?;
        answer.await.ok()
    }

    /// How it stands, and every change of it.
    pub(crate) fn watch(&self) -> watch::Receiver<MigrationInfo> {
        self.info.subscribe()
    }

    /// Whether no copy of the guest is here for it any more. What is left then is to be told, and nobody waits for it.
    pub(crate) fn has_let_go(&self) -> bool {
        *self.let_go.borrow()
    }

    /// Waits for that, or until it is over.
    pub(crate) async fn let_go(&self) {
        // The handle holds the sender, so this cannot fail before it is true.
        let _ = self.let_go.subscribe().wait_for(|&let_go| let_go).await;
    }

    /// Waits until it is over.
    pub(crate) async fn over(&self) {
        // The handle holds the sender, so this cannot fail before it is true.
        let _ = self.over.subscribe().wait_for(|&over| over).await;
    }
}

/// The outgoing migrations that have a task.
#[derive(Default)]
pub(crate) struct OutgoingMigrations(Mutex<HashMap<Uuid, Arc<Outgoing>>>);

impl OutgoingMigrations {
    fn lock(&self) -> MutexGuard<'_, HashMap<Uuid, Arc<Outgoing>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The one with this id.
    pub(crate) fn find(&self, id: Uuid) -> Option<Arc<Outgoing>> {
        self.lock().get(&id).cloned()
    }

    /// The one of an instance that waits for its cast, or whose cast has come.
    pub(super) fn accepted(&self, instance: Uuid) -> Option<Arc<Outgoing>> {
        self.lock()
            .values()
            .find(|outgoing| outgoing.instance == instance)
            .cloned()
    }

    /// Whether a migration of this instance has a task that has not let it go yet.
    pub(crate) fn has(&self, instance: Uuid) -> bool {
        let holds = |outgoing: &Arc<Outgoing>| outgoing.instance == instance && !outgoing.has_let_go();
        self.lock().values().any(holds)
    }

    /// How many there are, the queued ones among them.
    pub(crate) fn count(&self) -> usize {
        self.lock().len()
    }

    pub(super) fn add(&self, outgoing: Arc<Outgoing>) {
        self.lock().insert(outgoing.id, outgoing);
    }

    pub(super) fn remove(&self, id: Uuid) {
        self.lock().remove(&id);
    }
}
