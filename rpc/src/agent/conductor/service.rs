//! The `Conductor` service: migrations as their users see them, at whatever agent they ask.

use std::pin::Pin;
use std::sync::Arc;

use ferry_proto::agent::v1::conductor_server::Conductor;
use ferry_proto::agent::v1::{
    ListHostsReply, ListHostsRequest, ListMigrationsReply, ListMigrationsRequest, LiveMigrateReply, LiveMigrateRequest,
    MigrationInfo, MigrationRequest, ResolveRequest,
};
use ferry_proto::wire_uuid;
use tokio_stream::Stream;
use tokio_stream::wrappers::WatchStream;
use tonic::{Request, Response, Status};
use uuid::Uuid;

use crate::agent::compute::whole;
use crate::agent::failure::Failure;
use crate::agent::instances::Agent;
use crate::agent::journal::{MigrationRow, Role};
use crate::agent::peers::{CALL_TIME, Peer};
use crate::agent::who::Who;

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
        let who = Who::sent(&request);
        let (agent, request) = (Arc::clone(&self.0), request.into_inner());
        let migrated = whole(async move {
            let (instance, dry_run) = (request.instance.clone(), request.dry_run);
            let migrated = agent.live_migrate(request).await;
            if !dry_run {
                agent.audit(&who, "migrate", &instance, &migrated).await;
            }
            migrated
        });
        Ok(Response::new(migrated.await?))
    }

    async fn list_hosts(&self, _: Request<ListHostsRequest>) -> Answer<ListHostsReply> {
        Ok(Response::new(ListHostsReply {
            hosts: self.0.hosts().await,
        }))
    }

    async fn list_migrations(&self, request: Request<ListMigrationsRequest>) -> Answer<ListMigrationsReply> {
        let wanted = request.into_inner().instance;
        let reports = self
            .0
            .journal
            .read(MigrationRow::reports)
            .await
            .map_err(Failure::from)?;
        let is_wanted = |info: &MigrationInfo| wanted.is_empty() || info.instance == wanted || info.name == wanted;
        let migrations = reports
            .into_iter()
            .map(|(id, info)| self.0.current(id, info))
            .filter(is_wanted)
            .collect();
        Ok(Response::new(ListMigrationsReply { migrations }))
    }

    async fn show_migration(&self, request: Request<MigrationRequest>) -> Answer<MigrationInfo> {
        let request = request.into_inner();
        match self.0.place(&request).await? {
            Place::Here(row) => Ok(Response::new(self.0.current(row.id, row.info))),
            Place::There(peer) => peer.conductor().show_migration(forwarded(request)).await,
        }
    }

    type WatchMigrationStream = Snapshots;

    async fn watch_migration(&self, request: Request<MigrationRequest>) -> Answer<Snapshots> {
        let request = request.into_inner();
        match self.0.place(&request).await? {
            Place::Here(row) => Ok(Response::new(self.0.snapshots(*row))),
            Place::There(peer) => {
                let stream = peer.conductor().watch_migration(forwarded(request)).await?.into_inner();
                Ok(Response::new(Box::pin(stream)))
            }
        }
    }

    async fn abort_migration(&self, request: Request<MigrationRequest>) -> Answer<MigrationInfo> {
        let who = Who::sent(&request);
        let request = request.into_inner();
        match self.0.place(&request).await? {
            Place::Here(row) => {
                let instance = row.instance.to_string();
                let aborted = self.0.abort_migration(*row).await;
                self.0.audit(&who, "abort", &instance, &aborted).await;
                Ok(Response::new(aborted?))
            }
            Place::There(peer) => peer.conductor().abort_migration(forwarded(request)).await,
        }
    }

    async fn resolve_migration(&self, request: Request<ResolveRequest>) -> Answer<MigrationInfo> {
        let who = Who::sent(&request);
        let (agent, request) = (Arc::clone(&self.0), request.into_inner());
        let resolved = whole(async move {
            let resolved = agent.resolve_migration(request.clone(), &who).await;
            if resolved.is_err() {
                // One that was carried out is written down together with what it changed.
                agent.audit(&who, "resolve", &request.migration, &resolved).await;
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
    async fn place(&self, request: &MigrationRequest) -> Result<Place, Failure> {
        let id = wire_uuid("migration", &request.migration)?;
        let row = self
            .journal
            .read(move |connection| MigrationRow::find(connection, id))
            .await?;
        match row {
            Some(row) if request.forwarded || row.role == Role::Source => Ok(Place::Here(Box::new(row))),
            Some(row) => match self.peers.named(&row.peer) {
                Ok(peer) if is_known_at(peer, id).await => Ok(Place::There(Box::new(peer.clone()))),
                _ => Ok(Place::Here(Box::new(row))),
            },
            None if request.forwarded => Err(unknown(id)),
            None => {
                for peer in self.peers.all() {
                    if is_known_at(peer, id).await {
                        return Ok(Place::There(Box::new(peer.clone())));
                    }
                }
                Err(unknown(id))
            }
        }
    }

    /// The record as it stands: the task's, while there is one.
    fn current(&self, id: Uuid, journalled: MigrationInfo) -> MigrationInfo {
        match self.outgoing.find(id) {
            Some(outgoing) => outgoing.watch().borrow().clone(),
            None => journalled,
        }
    }

    fn snapshots(&self, row: MigrationRow) -> Snapshots {
        match self.outgoing.find(row.id) {
            Some(outgoing) => {
                use tokio_stream::StreamExt;
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

    async fn abort_migration(&self, row: MigrationRow) -> Result<MigrationInfo, Failure> {
        let over = || Failure::Refused(format!("migration {} is over: {}", row.id, row.info.status));
        if row.role == Role::Destination {
            return Err(Failure::Refused(format!(
                "migration {} is aborted at its source, host {}, which does not answer",
                row.id, row.peer
            )));
        }
        let outgoing = self.outgoing.find(row.id).ok_or_else(over)?;
        outgoing.abort("aborted by its user");
        // Before GO this takes well under a second. Later the record tells where it stands.
        let _ = tokio::time::timeout(CALL_TIME, outgoing.over()).await;
        let now = outgoing.watch().borrow().clone();
        if now.status == "completed" {
            return Err(Failure::Refused(format!(
                "migration {} had switched over before the abort",
                row.id
            )));
        }
        Ok(now)
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

async fn is_known_at(peer: &Peer, id: Uuid) -> bool {
    let request = MigrationRequest {
        migration: id.to_string(),
        forwarded: true,
    };
    let mut client = peer.conductor();
    peer.answer(CALL_TIME, client.show_migration(request)).await.is_ok()
}
