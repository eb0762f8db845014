//! A copy whose link is lost: as long as its VMM waits for another one, the agents try to make it.
//!
//! ```text
//!   running ─ VMM A: link lost ─► running (link lost) ── B is asked, connections, both VMMs get theirs ──► VMM A: link back ─► running
//!                                        │  ▲ not yet        │
//!                                        │  └────────────────┘
//!                                        └─ VMM A: its window is over, or B does not take part any more ─► it ends as a lost link does
//! ```
//!
//! The VMM keeps the time: an agent that ends meanwhile, at either host, changes nothing but who tries.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ferry_proto::agent::v1::{LateLinkReply, LateLinkRequest};
use ferry_proto::vmm::v1 as wire;
use ferry_proto::vmm::v1::order::Order as Command;
use tokio::sync::{Notify, oneshot};

use super::calls::{Calls, Outcome};
use super::connecting::{Wanted, connect};
use super::script::Script;
use crate::agent::context::RequestContext;
use crate::agent::events::{Action, Subject};
use crate::agent::failure::Failure;
use crate::agent::instances::{Agent, Instance};
use crate::agent::steps::LINK_LOST;
use crate::agent::transport::Transport;
use crate::agent::vmm_client::VmmError;
use crate::vmm_process::monotonic_ns;

/// The pauses between two times that the destination is asked for connections; the last one until the VMM waits no more.
const PAUSES: [Duration; 4] = [
    Duration::from_millis(50),
    Duration::from_millis(200),
    Duration::from_millis(500),
    Duration::from_secs(1),
];

/// Who tries to make the link again, while somebody does.
pub(super) struct Reconnecting {
    /// The VMM says again that it has none: what was handed over last is lost too.
    again: Arc<Notify>,
    /// How it ended.
    ended: oneshot::Sender<Result<(), Failure>>,
}

/// What a new link is made of.
struct Maker {
    agent: Arc<Agent>,
    instance: Arc<Instance>,
    context: RequestContext,
    migration: String,
    peer: String,
    /// The destination's, where it is known.
    journal: Option<uuid::Uuid>,
    transport: Transport,
    id: uuid::Uuid,
    /// All page streams, and the control stream of late ones.
    streams: u16,
    late_streams: u16,
}

impl Script {
    /// The VMM has no link on which the copy goes on, and waits for another one.
    pub(super) async fn link_lost(&mut self, lost: wire::LinkLost, calls: &Calls) {
        let left = Duration::from_nanos(lost.until_ns.saturating_sub(monotonic_ns()));
        tracing::info!(migration = %self.row.id, reason = lost.reason, ?left, "the link of a copy is lost, another one is made");
        self.row.info.link_lost_until = Some(humantime::format_rfc3339_millis(SystemTime::now() + left).to_string());
        self.row.info.decision = Some(format!("another link is made: {}", lost.reason));
        self.show();
        match &self.reconnecting {
            Some(reconnecting) => reconnecting.again.notify_one(),
            None => self.reconnect(lost.reason, calls),
        }
        self.say_status(LINK_LOST).await;
    }

    /// The copy goes on.
    pub(super) async fn link_back(&mut self, back: wire::LinkBack) {
        tracing::info!(migration = %self.row.id, held_pages = back.held_pages, "the copy goes on over another link");
        self.end_reconnecting(Ok(()));
        self.row.info.resumed_links += 1;
        self.row.info.decision = None;
        self.say_status("running").await;
    }

    /// Nobody tries any more.
    pub(super) fn end_reconnecting(&mut self, how: Result<(), Failure>) {
        self.row.info.link_lost_until = None;
        if let Some(Reconnecting { ended, .. }) = self.reconnecting.take() {
            // Whoever tried may have given up by itself.
            let _ = ended.send(how);
        }
    }

    fn reconnect(&mut self, reason: String, calls: &Calls) {
        let (ended, end) = oneshot::channel();
        let again = Arc::new(Notify::new());
        self.reconnecting = Some(Reconnecting {
            again: Arc::clone(&again),
            ended,
        });
        let late_streams = self.late_streams().unwrap_or(0);
        let maker = Maker {
            agent: Arc::clone(&self.agent),
            instance: Arc::clone(&self.instance),
            context: self.outgoing.context.clone(),
            migration: self.row.id.to_string(),
            peer: self.row.peer.clone(),
            journal: self.row.peer_journal,
            transport: self.row.transport(),
            id: self.row.id,
            streams: self.streams() + if late_streams > 0 { late_streams + 1 } else { 0 },
            late_streams,
        };
        let subject = Subject::migration(self.row.instance, &self.row.info.name, self.row.id);
        let (agent, context) = (Arc::clone(&self.agent), self.outgoing.context.clone());
        calls.start(async move {
            let work = async {
                tokio::select! {
                    biased;
                    ended = end => ended.unwrap_or_else(|_| Err(Failure::Refused("the migration is over".to_owned()))),
                    refused = maker.make(&again) => Err(refused),
                }
            };
            let made = agent.recorded(&context, Action::Reconnect, Some(subject), work).await;
            match made {
                Err(Failure::Refused(why)) => Some(Outcome::PeerLost(format!("{reason}; {why}"))),
                _ => None,
            }
        });
    }
}

impl Maker {
    /// Makes links, one whenever the last one is lost. Ends only where there is no use in it, and says why.
    async fn make(&self, again: &Notify) -> Failure {
        loop {
            let mut pauses = PAUSES.into_iter();
            loop {
                match self.try_to_make().await {
                    Ok(()) => break,
                    Err(refused @ Failure::Refused(_)) => return refused,
                    Err(failure) => {
                        tracing::info!(migration = self.migration, error = failure.chain(), "no other link yet");
                    }
                }
                tokio::time::sleep(pauses.next().unwrap_or(PAUSES[PAUSES.len() - 1])).await;
            }
            again.notified().await;
        }
    }

    async fn try_to_make(&self) -> Result<(), Failure> {
        // That it is gone is told by others.
        let vmm = self.instance.state.lock().await.vmm.clone();
        let vmm = vmm.ok_or_else(|| Failure::Unavailable("the VMM is gone".to_owned()))?;
        let reply = self.ask().await?;
        if !reply.needed {
            return Err(Failure::Refused(format!("host {}: {}", self.peer, reply.ended)));
        }
        let first = u16::try_from(reply.first_index).ok();
        let indexes = first.and_then(|first| Some(first..first.checked_add(self.streams + 1)?));
        let indexes = indexes.ok_or_else(|| {
            let index = reply.first_index;
            Failure::Unavailable(format!("host {} wants connections from index {index} on", self.peer))
        })?;
        let wanted = Wanted {
            data_address: &reply.data_address,
            secret: &reply.secret,
            migration: self.id,
            indexes,
        };
        let connected = connect(&self.agent, &self.context, (&self.peer, self.transport), wanted).await;
        // Also one that was refused may be had later, as long as the destination says that it waits.
        let connections = connected.map_err(|failure| Failure::Unavailable(failure.chain()))?;
        let reconnect = Command::Reconnect(wire::Reconnect {
            migration: self.migration.clone(),
            late_streams: self.late_streams.into(),
        });
        match vmm.order_with(reconnect, connections).await {
            Ok(_) => Ok(()),
            // Its window is over, or it has switched: its own word on that is on the way.
            Err(VmmError::Refused(reason)) => Err(Failure::Unavailable(reason)),
            Err(error) => Err(Failure::vmm("failed to hand the connections over")(error)),
        }
    }

    async fn ask(&self) -> Result<LateLinkReply, Failure> {
        let request = LateLinkRequest {
            migration: self.migration.clone(),
            source: self.agent.host().to_owned(),
            lost: String::new(),
            streams: self.streams.into(),
            copying: true,
            late_streams: self.late_streams.into(),
            journal: String::new(),
        };
        let compute = self.agent.compute_rpcapi(&self.context, &self.peer)?;
        compute.late_link(request, self.journal).await
    }
}
