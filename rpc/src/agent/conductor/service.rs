//! The `Conductor` service: migrations as their users see them, at whatever agent they ask.

use std::pin::Pin;
use std::sync::Arc;

use ferry_proto::agent::v1::conductor_server::Conductor;
use ferry_proto::agent::v1::{
    ListHostsReply, ListHostsRequest, ListMigrationsReply, ListMigrationsRequest, LiveMigrateReply, LiveMigrateRequest,
    MigrationInfo, MigrationRequest, ResolveRequest, RetuneRequest,
};
use ferry_proto::vmm::v1 as wire;
use ferry_proto::vmm::v1::order::Order as Command;
use ferry_proto::wire_uuid;
use tokio_stream::wrappers::WatchStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status};
use uuid::Uuid;

use super::listing::Parts;
use crate::agent::compute::whole;
use crate::agent::context::RequestContext;
use crate::agent::events::{Action, Subject};
use crate::agent::failure::Failure;
use crate::agent::instances::Agent;
use crate::agent::journal::{Depth, MigrationRow, Role};
use crate::agent::outgoing::{Outgoing, check_retuning};
use crate::agent::peers::{CALL_TIME, ConductorClient, Peer};
use crate::agent::steps::{LINK_LOST, POST_COPY, SourceStep};

/// The service over one agent.
pub(crate) struct ConductorService(pub(crate) Arc<Agent>);

type Answer<T> = Result<Response<T>, Status>;
type Snapshots = Pin<Box<dyn Stream<Item = Result<MigrationInfo, Status>> + Send>>;

/// Where a migration is looked up.
enum Place {
    /// Here: the record is this agent's.
    Here(Box<MigrationRow>),
    /// At this peer, which is its source.
    There(Box<Peer>),
}

#[tonic::async_trait]
impl Conductor for ConductorService {
    async fn live_migrate(&self, request: Request<LiveMigrateRequest>) -> Answer<LiveMigrateReply> {
        let context = RequestContext::of(&request);
        let (agent, request) = (Arc::clone(&self.0), request.into_inner());
        if request.dry_run {
            // Nothing is begun that had to be ended: it goes no further than it is waited for.
            return Ok(Response::new(agent.live_migrate(&context, request).await?));
        }
        let migrated = whole(async move {
            let instance = request.instance.clone();
            let migrated = agent.live_migrate(&context, request).await;
            agent.audit(&context, "migrate", &instance, &migrated).await;
            migrated
        });
        Ok(Response::new(migrated.await?))
    }

    async fn list_hosts(&self, request: Request<ListHostsRequest>) -> Answer<ListHostsReply> {
        let context = RequestContext::of_question(&request);
        Ok(Response::new(ListHostsReply {
            hosts: self.0.hosts(&context).await,
        }))
    }

    async fn list_migrations(&self, request: Request<ListMigrationsRequest>) -> Answer<ListMigrationsReply> {
        // As ever: who asked for it before there were parts was told all.
        let mut parts = self.0.list_migrations(request.into_inner().instance, Depth::Full);
        let mut all = ListMigrationsReply::default();
        while let Some(part) = parts.next().await {
            all.migrations.extend(part?.migrations);
        }
        Ok(Response::new(all))
    }

    type ListMigrationPartsStream = Parts;

    async fn list_migration_parts(&self, request: Request<ListMigrationsRequest>) -> Answer<Parts> {
        let ListMigrationsRequest { instance, details } = request.into_inner();
        let depth = if details { Depth::Full } else { Depth::Summary };
        Ok(Response::new(self.0.list_migrations(instance, depth)))
    }

    async fn show_migration(&self, request: Request<MigrationRequest>) -> Answer<MigrationInfo> {
        let (context, request) = (RequestContext::of_question(&request), request.into_inner());
        match self.0.place(&context, &request).await? {
            Place::Here(row) => Ok(Response::new(self.0.newest(row.info))),
            Place::There(peer) => {
                let show = |mut client: ConductorClient| async move { client.show_migration(forwarded(request)).await };
                peer.forward(&context, show).await
            }
        }
    }

    type WatchMigrationStream = Snapshots;

    async fn watch_migration(&self, request: Request<MigrationRequest>) -> Answer<Snapshots> {
        let (context, request) = (RequestContext::of_question(&request), request.into_inner());
        match self.0.place(&context, &request).await? {
            Place::Here(row) => Ok(Response::new(self.0.snapshots(*row))),
            Place::There(peer) => {
                let watch =
                    |mut client: ConductorClient| async move { client.watch_migration(forwarded(request)).await };
                let stream = peer.forward(&context, watch).await?.into_inner();
                let lost = move |status| peer.told(status);
                Ok(Response::new(Box::pin(stream.map(move |info| info.map_err(&lost)))))
            }
        }
    }

    async fn abort_migration(&self, request: Request<MigrationRequest>) -> Answer<MigrationInfo> {
        let context = RequestContext::of(&request);
        let request = request.into_inner();
        match self.0.place(&context, &request).await? {
            Place::Here(row) => {
                let agent = Arc::clone(&self.0);
                let aborted = whole(async move {
                    let subject = Subject::migration(row.instance, &row.info.name, row.id);
                    let abort = agent.abort_migration(&context, *row);
                    let instance = subject.instance.to_string();
                    let aborted = agent.recorded(&context, Action::Abort, Some(subject), abort).await;
                    agent.audit(&context, "abort", &instance, &aborted).await;
                    aborted
                });
                Ok(Response::new(aborted.await?))
            }
            Place::There(peer) => {
                let abort =
                    |mut client: ConductorClient| async move { client.abort_migration(forwarded(request)).await };
                peer.forward(&context, abort).await
            }
        }
    }

    async fn force_complete_migration(&self, request: Request<MigrationRequest>) -> Answer<MigrationInfo> {
        let context = RequestContext::of(&request);
        let request = request.into_inner();
        match self.0.place(&context, &request).await? {
            Place::Here(row) => {
                let agent = Arc::clone(&self.0);
                let forced = whole(async move {
                    let subject = Subject::migration(row.instance, &row.info.name, row.id);
                    let instance = subject.instance.to_string();
                    let force = agent.force_complete(&context, *row);
                    let forced = agent
                        .recorded(&context, Action::ForceComplete, Some(subject), force)
                        .await;
                    agent.audit(&context, "force-complete", &instance, &forced).await;
                    forced
                });
                Ok(Response::new(forced.await?))
            }
            Place::There(peer) => {
                let force = |mut client: ConductorClient| async move {
                    client.force_complete_migration(forwarded(request)).await
                };
                peer.forward(&context, force).await
            }
        }
    }

    async fn retune_migration(&self, request: Request<RetuneRequest>) -> Answer<MigrationInfo> {
        let context = RequestContext::of(&request);
        let request = request.into_inner();
        let named = MigrationRequest {
            migration: request.migration.clone(),
            forwarded: request.forwarded,
        };
        match self.0.place(&context, &named).await? {
            Place::Here(row) => {
                let agent = Arc::clone(&self.0);
                let retuned = whole(async move {
                    let subject = Subject::migration(row.instance, &row.info.name, row.id);
                    let instance = subject.instance.to_string();
                    let retune = agent.retune(&context, *row, &request);
                    let retuned = agent.recorded(&context, Action::Retune, Some(subject), retune).await;
                    agent.audit(&context, "retune", &instance, &retuned).await;
                    retuned
                });
                Ok(Response::new(retuned.await?))
            }
            Place::There(peer) => {
                let request = RetuneRequest {
                    forwarded: true,
                    ..request
                };
                let retune = |mut client: ConductorClient| async move { client.retune_migration(request).await };
                peer.forward(&context, retune).await
            }
        }
    }

    async fn resolve_migration(&self, request: Request<ResolveRequest>) -> Answer<MigrationInfo> {
        let context = RequestContext::of(&request);
        let (agent, request) = (Arc::clone(&self.0), request.into_inner());
        let resolved = whole(async move {
            let resolved = agent.resolve_migration(request.clone(), &context).await;
            if resolved.is_err() {
                // One that was carried out is written down together with what it changed.
                agent.audit(&context, "resolve", &request.migration, &resolved).await;
            }
            resolved
        });
        Ok(Response::new(resolved.await?))
    }
}

fn forwarded(request: MigrationRequest) -> MigrationRequest {
    MigrationRequest {
        forwarded: true,
        ..request
    }
}

impl Agent {
    /// Where a migration is to be asked for: at its source while that answers, else here.
    async fn place(&self, context: &RequestContext, request: &MigrationRequest) -> Result<Place, Failure> {
        let id = wire_uuid("migration", &request.migration)?;
        let row = self
            .journal
            .read(move |connection| MigrationRow::find(connection, id))
            .await?;
        match row {
            Some(row) if request.forwarded || row.role == Role::Source => Ok(Place::Here(Box::new(row))),
            Some(row) => match self.peers.named(&row.peer) {
                Ok(peer) if is_known_at(context, peer, id).await => Ok(Place::There(Box::new(peer.clone()))),
                _ => Ok(Place::Here(Box::new(row))),
            },
            None if request.forwarded => Err(unknown(id)),
            None => {
                for peer in self.peers.all() {
                    if is_known_at(context, peer, id).await {
                        return Ok(Place::There(Box::new(peer.clone())));
                    }
                }
                Err(unknown(id))
            }
        }
    }

    /// The record as it stands: the task's, while there is one. One that has ended stands as it was written.
    pub(super) fn newest(&self, written: MigrationInfo) -> MigrationInfo {
        let goes_on = written.ended.is_none();
        let id = goes_on.then(|| wire_uuid("migration", &written.id).ok()).flatten();
        match id.and_then(|id| self.outgoing.find(id)) {
            Some(outgoing) => outgoing.watch().borrow().clone(),
            None => written,
        }
    }

    fn snapshots(&self, row: MigrationRow) -> Snapshots {
        match self.outgoing.find(row.id) {
            Some(outgoing) => {
                let agent_over = outgoing.watch();
                let mut ended = false;
                // The last snapshot is the one with an end; nothing comes after it.
                let until_end = WatchStream::new(agent_over).take_while(move |info| {
                    let go_on = !ended;
                    ended = info.ended.is_some();
                    go_on
                });
                Box::pin(until_end.map(Ok))
            }
            None => Box::pin(tokio_stream::once(Ok(row.info))),
        }
    }

    async fn abort_migration(&self, context: &RequestContext, row: MigrationRow) -> Result<MigrationInfo, Failure> {
        let over = || Failure::Refused(format!("migration {} is over: {}", row.id, row.info.status));
        if row.role == Role::Destination {
            return Err(Failure::Refused(format!(
                "migration {} is aborted at its source, host {}, which does not answer",
                row.id, row.peer
            )));
        }
        let outgoing = self.outgoing.find(row.id).ok_or_else(over)?;
        let serves = || SourceStep::parse(&outgoing.watch().borrow().step) == Some(SourceStep::Serve);
        let too_late = || {
            Failure::Refused(format!(
                "migration {} cannot be aborted: its guest runs on host {}, and pages of it are on their way",
                row.id, row.peer
            ))
        };
        if serves() {
            return Err(too_late());
        }
        outgoing.abort("aborted by its user");
        // Before GO this takes well under a second. Later the record tells where it stands.
        let _ = tokio::time::timeout(context.left(CALL_TIME), outgoing.over()).await;
        let now = outgoing.watch().borrow().clone();
        if now.status == "completed" {
            return Err(Failure::Refused(format!(
                "migration {} had switched over before the abort",
                row.id
            )));
        }
        if serves() {
            return Err(too_late());
        }
        Ok(now)
    }

    /// Nova's live_migration_force_complete: the copy switches over after its round, whatever its budget. It tells how the migration
    /// stands once its VMM has the order; that it ends is its own affair.
    async fn force_complete(&self, context: &RequestContext, row: MigrationRow) -> Result<MigrationInfo, Failure> {
        let refused = |why: &str| Failure::Refused(format!("migration {} cannot be completed by force: {why}", row.id));
        let outgoing = self.copying(&row).map_err(|why| refused(&why))?;
        let instance = self
            .instances
            .by_id(row.instance)
            .ok_or_else(|| refused("its guest is gone"))?;
        let vmm = context.wait(instance.state.lock()).await?.vmm()?.clone();
        vmm.order(Command::ForceComplete(wire::ForceComplete {}))
            .await
            .map_err(Failure::vmm("failed to have the VMM switch over"))?;
        Ok(outgoing.watch().borrow().clone())
    }

    /// Other terms for a copy: it goes by them once this is answered, and the journal has them.
    async fn retune(
        &self,
        context: &RequestContext,
        row: MigrationRow,
        request: &RetuneRequest,
    ) -> Result<MigrationInfo, Failure> {
        check_retuning(request, row.is_cold())?;
        let refused = |why: &str| Failure::Refused(format!("migration {} cannot be retuned: {why}", row.id));
        let outgoing = match self.outgoing.find(row.id) {
            Some(outgoing) if outgoing.watch().borrow().status == POST_COPY => {
                if request.max_downtime_us.is_some() || request.timeout_ms.is_some() {
                    return Err(refused(
                        "its guest was handed over, nothing but --bandwidth is left to be changed",
                    ));
                }
                outgoing
            }
            _ => self.copying(&row).map_err(|why| refused(&why))?,
        };
        context.check()?;
        let retuned = outgoing.retune(request).await;
        retuned.ok_or_else(|| refused("it is over"))??;
        Ok(outgoing.watch().borrow().clone())
    }

    /// A migration out of here whose guest is being sent; or why it is not.
    fn copying(&self, row: &MigrationRow) -> Result<Arc<Outgoing>, String> {
        if row.role == Role::Destination {
            return Err(format!("its source, host {}, does not answer", row.peer));
        }
        let outgoing = self.outgoing.find(row.id).ok_or("it is over")?;
        let status = outgoing.watch().borrow().status.clone();
        match status.as_str() {
            "running" | LINK_LOST | "switching" => Ok(outgoing),
            _ => Err(format!("nothing is being copied, it is {status}")),
        }
    }

    /// Why an incoming migration is over here, for the source.
    pub(crate) async fn why_over(&self, id: Uuid) -> String {
        let row = self
            .journal
            .read(move |connection| MigrationRow::find(connection, id))
            .await;
        match row {
            Ok(Some(row)) => row.info.error.unwrap_or(row.info.status),
            _ => "the migration is not known there".to_owned(),
        }
    }
}

fn unknown(id: Uuid) -> Failure {
    Failure::NotFound {
        what: format!("migration {id}"),
        moved_to: None,
    }
}

async fn is_known_at(context: &RequestContext, peer: &Peer, id: Uuid) -> bool {
    let request = MigrationRequest {
        migration: id.to_string(),
        forwarded: true,
    };
    let show = |mut client: ConductorClient| async move { client.show_migration(request).await };
    peer.ask_conductor(context, CALL_TIME, show).await.is_ok()
}
