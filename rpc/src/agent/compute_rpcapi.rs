//! A typed client of one host's `Compute` service at a version: Nova's compute_rpcapi.
//!
//! `prepare(server, version)` is [`Agent::compute_rpcapi`]. Each message goes out at the lowest version of the agents
//! that are up, so that no fleet needs all its agents upgraded at once; a server that does not know the version says so
//! by name, is asked once more what it speaks, and then gets the message at that version. The agent's own host is
//! called directly.

mod before;
mod late;
mod novelties;
mod of_migrations;

use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ferry_proto::agent::v1::{HostInfo, LiveMigrationCast, PreLiveMigrationReply, PreLiveMigrationRequest, Receipt};
use tonic::{Request, Status};

use self::novelties::{knows_not, new_mode, new_transport, novelty};
use super::context::RequestContext;
use super::failure::Failure;
use super::instances::Agent;
use super::mode::Mode;
use super::peers::{CALL_TIME, Call, ComputeClient, PREPARE_TIME, Peer, PeerError};
use super::reason::Reason;
use super::versions::RpcVersion;

/// The metadata in which a call says at which version its message is.
pub(crate) const VERSION_KEY: &str = "ferry-rpc-version";

/// The `Compute` service of one host.
pub(crate) struct ComputeRpcApi {
    to: To,
    /// In which all its calls are made.
    context: RequestContext,
    version: Mutex<RpcVersion>,
}

enum To {
    Here(Arc<Agent>),
    There(Peer),
}

impl Agent {
    /// A client of a host's service, at the version that all agents understand which are up.
    ///
    /// # Errors
    /// The host is not known.
    pub(crate) fn compute_rpcapi(
        self: &Arc<Self>,
        context: &RequestContext,
        host: &str,
    ) -> Result<ComputeRpcApi, Failure> {
        let to = match host == self.host() {
            true => To::Here(Arc::clone(self)),
            false => To::There(self.peers.named(host)?.clone()),
        };
        Ok(ComputeRpcApi {
            to,
            context: context.clone(),
            version: Mutex::new(self.rpc_cap()),
        })
    }

    /// The lowest version of the agents that are up, this one among them. Of another language none is thought of: its
    /// host is refused by name when it is asked.
    pub(crate) fn rpc_cap(&self) -> RpcVersion {
        let peers = self.peers.all().map(Peer::heard).filter(super::peers::Heard::is_up);
        let theirs = peers.filter_map(|heard| heard.info?.rpc_version.parse::<RpcVersion>().ok());
        theirs.fold(self.config.rpc_cap, |cap, version| cap.common(version).unwrap_or(cap))
    }
}

impl ComputeRpcApi {
    /// Whether a message that this version brought may be sent.
    pub(crate) fn can_send_version(&self, version: RpcVersion) -> bool {
        self.version().understands(version)
    }

    fn version(&self) -> RpcVersion {
        *self.version.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nova's pre_live_migration: the destination prepares, or says which images it lacks.
    ///
    /// # Errors
    /// The host refuses the guest, or does not answer: then it may have prepared.
    pub(crate) async fn pre_live_migration(
        &self,
        request: &PreLiveMigrationRequest,
    ) -> Result<PreLiveMigrationReply, Failure> {
        match &self.to {
            To::Here(agent) => agent.pre_live_migration(&self.context, request.clone()).await,
            To::There(peer) => {
                let prepare = |version: RpcVersion| {
                    let send = move |mut client: ComputeClient| {
                        let request = PreLiveMigrationRequest {
                            rpc_version: version.to_string(),
                            ..request.clone()
                        };
                        async move { client.pre_live_migration(at(version, request)).await }
                    };
                    peer.call(&self.context, Call::PreLiveMigration, PREPARE_TIME, send)
                };
                let novelty = new_mode(Mode::parse(&request.mode)?).or(new_transport(&request.transport));
                self.check_can_say(peer, novelty)?;
                match prepare(self.version()).await {
                    Err(error) if is_other_version(&error) => {
                        self.refresh(peer).await?;
                        self.check_can_say(peer, novelty)?;
                        Ok(prepare(self.version()).await?)
                    }
                    answer => Ok(answer?),
                }
            }
        }
    }

    /// Casts a migration: the receipt says that this host's journal has it. The same id again is the same migration.
    ///
    /// At 4.2 the cast carries the record. Before, the record is made by a call, and the cast finds it by its instance. Other modes than
    /// pre-copy need 4.3.
    ///
    /// # Errors
    /// The host refuses it, or does not answer: then it may have it.
    pub(crate) async fn live_migration(&self, record: &LiveMigrationCast) -> Result<Receipt, Failure> {
        if let (To::There(peer), Some(options)) = (&self.to, &record.options) {
            self.check_can_say(peer, new_mode(Mode::of(options)?))?;
        }
        match &self.to {
            To::Here(agent) => agent.live_migration(&self.context, record.clone()).await,
            To::There(peer) if self.can_send_version(RpcVersion::V4_2) => match self.cast(peer, record).await {
                Err(error) if is_other_version(&error) => {
                    self.refresh(peer).await?;
                    self.cast_again(peer, record).await
                }
                receipt => Ok(receipt?),
            },
            To::There(peer) => self.create_and_cast(peer, record).await,
        }
    }

    /// The host speaks another version than was thought, and that is known now: once more, in its way.
    async fn cast_again(&self, peer: &Peer, record: &LiveMigrationCast) -> Result<Receipt, Failure> {
        if !self.can_send_version(RpcVersion::V4_2) {
            return self.create_and_cast(peer, record).await;
        }
        self.check_can_say(peer, record.options.as_ref().and_then(novelty))?;
        Ok(self.cast(peer, record).await?)
    }

    /// A host that does not know what is new about a migration would take it for another.
    fn check_can_say(&self, peer: &Peer, novelty: Option<&str>) -> Result<(), Failure> {
        match novelty {
            Some(what) if !self.can_send_version(RpcVersion::V4_3) => Err(knows_not(what, &peer.host, self.version())),
            _ => Ok(()),
        }
    }

    async fn create_and_cast(&self, peer: &Peer, record: &LiveMigrationCast) -> Result<Receipt, Failure> {
        self.check_can_say(peer, record.options.as_ref().and_then(novelty))?;
        let create = |mut client: ComputeClient, request| async move { client.create_migration(request).await };
        let created = self
            .call_of_migration(Call::CreateMigration, CALL_TIME, record.clone(), create)
            .await?;
        let by_instance = LiveMigrationCast {
            instance: record.instance.clone(),
            ..LiveMigrationCast::default()
        };
        match self.cast(peer, &by_instance).await.map_err(Failure::from) {
            // The record was there before, and so was the cast: it is not waiting any more.
            Err(Failure::Refused(_) | Failure::Denied { .. }) if created.replay => Ok(created),
            receipt => receipt,
        }
    }

    async fn cast(&self, peer: &Peer, record: &LiveMigrationCast) -> Result<Receipt, PeerError> {
        let record = LiveMigrationCast {
            rpc_version: self.version().to_string(),
            ..record.clone()
        };
        let cast = |mut client: ComputeClient| {
            let request = at(self.version(), record.clone());
            async move { client.live_migration(request).await }
        };
        peer.call(&self.context, Call::LiveMigration, CALL_TIME, cast).await
    }

    /// A call at the version that is thought right; where that is refused, once more at the one that the host speaks.
    async fn call<T, F>(
        &self,
        peer: &Peer,
        patience: Duration,
        send: impl Fn(ComputeClient, RpcVersion) -> F,
    ) -> Result<T, Failure>
    where
        F: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        let ask = || peer.ask(&self.context, patience, |client| send(client, self.version()));
        self.at_its_version(peer, ask).await
    }

    /// The same of a call that belongs to a migration, and is a site of faults.
    async fn call_at<T, F>(
        &self,
        call: Call,
        peer: &Peer,
        patience: Duration,
        send: impl Fn(ComputeClient, RpcVersion) -> F,
    ) -> Result<T, Failure>
    where
        F: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        let send = |client| send(client, self.version());
        let ask = || peer.call(&self.context, call, patience, &send);
        self.at_its_version(peer, ask).await
    }

    async fn at_its_version<T, F>(&self, peer: &Peer, ask: impl Fn() -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, PeerError>>,
    {
        match ask().await {
            Err(error) if is_other_version(&error) => {
                self.refresh(peer).await?;
                Ok(ask().await?)
            }
            answer => Ok(answer?),
        }
    }

    /// Asks the host which version it speaks, and keeps to that.
    async fn refresh(&self, peer: &Peer) -> Result<(), PeerError> {
        let info = peer.host_info(&self.context).await?;
        let mut version = self.version.lock().unwrap_or_else(PoisonError::into_inner);
        let theirs: RpcVersion = info.rpc_version.parse().map_err(|_| other_language(peer, &info))?;
        *version = version.common(theirs).ok_or_else(|| other_language(peer, &info))?;
        Ok(())
    }
}

fn other_language(peer: &Peer, info: &HostInfo) -> PeerError {
    PeerError::Refused {
        reason: Some(Reason::RpcVersion),
        text: format!(
            "host {} speaks RPC version {}, this agent {} to {}",
            peer.host,
            info.rpc_version,
            RpcVersion::OLDEST,
            RpcVersion::NEWEST
        ),
    }
}

fn is_other_version(error: &PeerError) -> bool {
    matches!(
        error,
        PeerError::Refused {
            reason: Some(Reason::RpcVersion),
            ..
        }
    )
}

/// A request that says at which version its message is.
pub(super) fn at<T>(version: RpcVersion, message: T) -> Request<T> {
    let mut request = Request::new(message);
    // Digits and a dot.
    if let Ok(value) = version.to_string().parse() {
        request.metadata_mut().insert(VERSION_KEY, value);
    }
    request
}

/// Refuses a call whose message is of a version that an agent with this cap does not understand. One that says nothing
/// is a user's, or an agent's of before versions were told.
///
/// # Errors
/// By name, both versions told.
pub(crate) fn check_version(cap: RpcVersion, request: Request<()>) -> Result<Request<()>, Status> {
    let Some(told) = request.metadata().get(VERSION_KEY) else {
        return Ok(request);
    };
    let told = told.to_str().unwrap_or("unreadable");
    match told.parse::<RpcVersion>() {
        Ok(version) if cap.understands(version) => Ok(request),
        _ => Err(Failure::denied(
            Reason::RpcVersion,
            format!(
                "the message is of RPC version {told:?}, this agent understands {} to {cap}",
                RpcVersion::OLDEST
            ),
        )
        .into()),
    }
}

#[cfg(test)]
mod tests;
