//! The `Conductor` service: migrations as their users see them, at whatever agent they ask.

use std::pin::Pin;
use std::sync::Arc;

use ferry_proto::agent::v1::conductor_server::Conductor;
use ferry_proto::agent::v1::{
    HostRequest, InstanceRequest, ListMigrationsReply, ListMigrationsRequest, LiveMigrateReply, LiveMigrateRequest,
    LiveMigrationCast, MigrationInfo, MigrationRequest, ResolveRequest,
};
use ferry_proto::{required, wire_uuid};
use tokio_stream::Stream;
use tokio_stream::wrappers::WatchStream;
use tonic::{Request, Response, Status};
use uuid::Uuid;

use super::compute::whole;
use super::failure::Failure;
use super::instances::Agent;
use super::journal::{MigrationRow, Role};
use super::outgoing::request_id;
use super::peers::{CALL_TIME, Peer, PeerError};
use super::who::Who;

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
        let request = request.into_inner();
        let agent = &self.0;
        match agent.instance(&request.instance).await {
            Ok(instance) => {
                let agent = Arc::clone(agent);
                let migrated = whole(async move {
                    let migrated = agent.live_migrate(request).await;
                    agent.audit(&who, "migrate", &instance.id.to_string(), &migrated).await;
                    migrated
                });
                Ok(Response::new(migrated.await?))
            }
            Err(not_here) => {
                let Some(peer) = agent.peer_with(&request.instance).await else {
                    return Err(not_here.into());
                };
                peer.conductor().live_migrate(request).await
            }
        }
    }

    async fn list_migrations(&self, request: Request<ListMigrationsRequest>) -> Answer<ListMigrationsReply> {
        let wanted = request.into_inner().instance;
        let rows = self.0.journal.read(MigrationRow::all).await.map_err(Failure::from)?;
        let is_wanted = |info: &MigrationInfo| wanted.is_empty() || info.instance == wanted || info.name == wanted;
        let migrations = rows
            .into_iter()
            .map(|row| self.0.current(row))
            .filter(is_wanted)
            .collect();
        Ok(Response::new(ListMigrationsReply { migrations }))
    }

    async fn show_migration(&self, request: Request<MigrationRequest>) -> Answer<MigrationInfo> {
        let request = request.into_inner();
        match self.0.place(&request).await? {
            Place::Here(row) => Ok(Response::new(self.0.current(*row))),
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
    /// Nova's LiveMigrationTask: checks, chooses, casts. The instance is on this host.
    async fn live_migrate(self: &Arc<Self>, request: LiveMigrateRequest) -> Result<LiveMigrateReply, Failure> {
        let instance = self.instance(&request.instance).await?;
        let destination = self.choose(&request.destination)?;
        self.check_destination(&destination)?;
        let peer = self.peers.named(&destination)?;
        let mut client = peer.compute();
        let host = peer
            .answer(CALL_TIME, client.host(HostRequest {}))
            .await
            .map_err(|error| match error {
                PeerError::NoAnswer(reason) => Failure::Refused(format!("the destination is down: {reason}")),
                PeerError::Refused(reason) => Failure::Refused(reason),
            })?;
        if host.host != destination {
            return Err(Failure::Refused(format!(
                "the agent at {} is host {:?}, not {destination:?}: correct --peer",
                peer.url, host.host
            )));
        }
        let memory = instance.state.lock().await.row.spec.memory_bytes;
        if memory > host.memory_total_bytes {
            return Err(Failure::Refused(format!(
                "host {destination} has {} bytes of memory, the instance {memory}",
                host.memory_total_bytes
            )));
        }
        let migration = request_id(&request.request_id);
        let cast = LiveMigrationCast {
            migration: migration.to_string(),
            instance: instance.id.to_string(),
            destination,
            options: Some(required("options", request.options)?),
            rpc_version: ferry_proto::RPC_VERSION.to_owned(),
        };
        self.live_migration(cast).await?;
        Ok(LiveMigrateReply {
            migration: migration.to_string(),
            source: self.host().to_owned(),
        })
    }

    /// The destination as named, or the only other host.
    fn choose(&self, named: &str) -> Result<String, Failure> {
        if !named.is_empty() {
            return Ok(named.to_owned());
        }
        let mut others = self.peers.all();
        match (others.next(), others.next()) {
            (Some(only), None) => Ok(only.host.clone()),
            (None, _) => Err(Failure::Refused(
                "this agent knows no other host: start it with --peer".to_owned(),
            )),
            _ => Err(Failure::Refused(
                "there is more than one other host: name one with --to".to_owned(),
            )),
        }
    }

    /// The peer that has an instance.
    async fn peer_with(&self, instance: &str) -> Option<Peer> {
        for peer in self.peers.all() {
            let mut client = peer.compute();
            let request = InstanceRequest {
                instance: instance.to_owned(),
            };
            if peer.answer(CALL_TIME, client.show_instance(request)).await.is_ok() {
                return Some(peer.clone());
            }
        }
        None
    }

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
    fn current(&self, row: MigrationRow) -> MigrationInfo {
        match self.outgoing.find(row.id) {
            Some(outgoing) => outgoing.watch().borrow().clone(),
            None => row.info,
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
