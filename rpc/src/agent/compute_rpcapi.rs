//! A typed client of one host's `Compute` service at a version: Nova's compute_rpcapi.
//!
//! `prepare(server, version)` is [`Agent::compute_rpcapi`]. Each message goes out at the lowest version of the agents
//! that are up, so that no fleet needs all its agents upgraded at once; a server that does not know the version says so
//! by name, is asked once more what it speaks, and then gets the message at that version. The agent's own host is
//! called directly.

mod of_migrations;

use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ferry_proto::agent::v1::{
    CheckDestinationReply, CheckDestinationRequest, CheckSourceReply, CheckSourceRequest, FirstFrame,
    FirstFramesRequest, HostInfo, LateLinkReply, LateLinkRequest, LatePagesReply, LatePagesRequest, LiveMigrationCast,
    MigrationOptions, MigrationPrediction, PreLiveMigrationReply, PreLiveMigrationRequest, PredictMigrationRequest,
    ProbeLinkReply, ProbeLinkRequest, Receipt, RecordRefusalRequest,
};
use tonic::{Request, Status};
use uuid::Uuid;

use super::context::RequestContext;
use super::failure::Failure;
use super::instances::Agent;
use super::mode::{Mode, PAUSE, POSTCOPY};
use super::peer_journal::{check_answer, on_the_wire};
use super::peers::{CALL_TIME, Call, ComputeClient, PREPARE_TIME, Peer, PeerError};
use super::reason::Reason;
use super::transport::Transport;
use super::versions::RpcVersion;

/// The metadata in which a call says at which version its message is.
pub(crate) const VERSION_KEY: &str = "ferry-rpc-version";

/// A destination opens disks and a KVM machine to say whether it could take an instance, and asks the source meanwhile.
const CHECK_TIME: Duration = Duration::from_secs(20);

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

    /// Whether each agent that is up knows what these options ask for: messages go out at the lowest version of all.
    ///
    /// # Errors
    /// Names one that does not.
    pub(crate) fn check_all_know(&self, options: &MigrationOptions) -> Result<(), Failure> {
        let Some(what) = novelty(options) else { return Ok(()) };
        let knows = |version: RpcVersion| version.understands(RpcVersion::V4_3);
        if !knows(self.config.rpc_cap) {
            return Err(knows_not(what, self.host(), self.config.rpc_cap));
        }
        for peer in self.peers.all() {
            let heard = peer.heard();
            let told = heard
                .is_up()
                .then(|| heard.info?.rpc_version.parse::<RpcVersion>().ok());
            // Of another language none is thought of, as in `rpc_cap`.
            let is_older = |version: &RpcVersion| version.common(self.config.rpc_cap).is_some() && !knows(*version);
            if let Some(version) = told.flatten().filter(is_older) {
                return Err(knows_not(what, &peer.host, version));
            }
        }
        Ok(())
    }
}

/// What of these options an agent before 4.3 does not know; it would take no notice.
fn novelty(options: &MigrationOptions) -> Option<&'static str> {
    let novelties = [
        (options.on_timeout == PAUSE, "a pause when the time is up"),
        (options.on_timeout == POSTCOPY, "post-copy when the time is up"),
        (options.max_throttle_percent > 0, "throttling the guest"),
        (options.resume_window_ms > 0, "waiting for a link that is lost"),
        (new_transport(&options.transport).is_some(), CARRYING),
        (options.verify, "comparing what is moved"),
        (options.no_disk_over_commit, "room for all that a disk may hold"),
        (
            !matches!(&*options.compress, "" | "auto" | "off"),
            "compressing what is moved",
        ),
    ];
    let of_options = novelties
        .into_iter()
        .find_map(|(is_asked_for, what)| is_asked_for.then_some(what));
    Mode::of(options).ok().and_then(new_mode).or(of_options)
}

/// What an agent before 4.3 does not know of this mode.
fn new_mode(mode: Mode) -> Option<&'static str> {
    match mode {
        Mode::Precopy => None,
        Mode::Cold => Some("a cold migration"),
        Mode::Postcopy | Mode::Hybrid | Mode::Overtime => Some("a migration with pages that come late"),
    }
}

/// What an agent before 4.3 does not serve.
const CARRYING: &str = "a migration by --transport grpc";

fn new_transport(word: &str) -> Option<&'static str> {
    (Transport::parse(word) == Ok(Transport::Grpc)).then_some(CARRYING)
}

fn knows_not(what: &str, host: &str, version: RpcVersion) -> Failure {
    Failure::denied(
        Reason::RpcVersion,
        format!(
            "host {host} speaks RPC version {version}: {what} needs {} of every agent that is up",
            RpcVersion::V4_3
        ),
    )
}

impl ComputeRpcApi {
    /// Whether a message that this version brought may be sent.
    pub(crate) fn can_send_version(&self, version: RpcVersion) -> bool {
        self.version().understands(version)
    }

    fn version(&self) -> RpcVersion {
        *self.version.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this host can take an instance of another: every check, with what came of it.
    ///
    /// # Errors
    /// It does not answer, or cannot ask the source.
    pub(crate) async fn check_can_live_migrate_destination(
        &self,
        request: CheckDestinationRequest,
    ) -> Result<CheckDestinationReply, Failure> {
        match &self.to {
            To::Here(agent) => agent.check_can_live_migrate_destination(&self.context, request).await,
            To::There(peer) => {
                self.call(peer, CHECK_TIME, |mut client, version| {
                    let request = at(version, request.clone());
                    async move { client.check_can_live_migrate_destination(request).await }
                })
                .await
            }
        }
    }

    /// What a destination must know of an instance of this host.
    ///
    /// # Errors
    /// The instance cannot migrate now, or the host does not answer.
    pub(crate) async fn check_can_live_migrate_source(
        &self,
        request: CheckSourceRequest,
    ) -> Result<CheckSourceReply, Failure> {
        match &self.to {
            To::Here(agent) => agent.check_can_live_migrate_source(request).await,
            To::There(peer) => {
                self.call(peer, CALL_TIME, |mut client, version| {
                    let request = at(version, request.clone());
                    async move { client.check_can_live_migrate_source(request).await }
                })
                .await
            }
        }
    }

    /// Whether this host tells all that is against a migration, and what it would come to.
    pub(crate) fn knows_dry_runs(&self) -> bool {
        matches!(self.to, To::Here(_)) || self.can_send_version(RpcVersion::V4_3)
    }

    /// Lets the host `source` find out what the way to this host's data port carries.
    ///
    /// # Errors
    /// It is probed already, does not answer, or is of before.
    pub(crate) async fn probe_link(&self, source: &str) -> Result<ProbeLinkReply, Failure> {
        let request = ProbeLinkRequest {
            source: source.to_owned(),
        };
        match &self.to {
            To::Here(agent) => agent.probe_link(&request),
            To::There(peer) if !self.knows_dry_runs() => Err(knows_not("a probe", &peer.host, self.version())),
            To::There(peer) => {
                self.call(peer, CALL_TIME, |mut client, version| {
                    let request = at(version, request.clone());
                    async move { client.probe_link(request).await }
                })
                .await
            }
        }
    }

    /// Has this host write down that a migration of an instance of its was refused elsewhere.
    ///
    /// # Errors
    /// The host does not answer, has the instance no more, or is of before.
    pub(crate) async fn record_refusal(&self, request: RecordRefusalRequest) -> Result<(), Failure> {
        match &self.to {
            To::Here(agent) => agent.refused_elsewhere(&self.context, request).await.map(drop),
            To::There(peer) => {
                self.check_can_say(peer, Some("a refusal elsewhere"))?;
                let told = self.call(peer, CALL_TIME, |mut client, version| {
                    let request = at(version, request.clone());
                    async move { client.record_refusal(request).await }
                });
                told.await.map(drop)
            }
        }
    }

    /// What a migration of an instance of this host would come to.
    ///
    /// # Errors
    /// The host does not answer, or is of before.
    pub(crate) async fn predict_migration(
        &self,
        request: PredictMigrationRequest,
    ) -> Result<MigrationPrediction, Failure> {
        match &self.to {
            To::Here(agent) => agent.predict_migration(&self.context, request).await,
            To::There(peer) if !self.knows_dry_runs() => Err(knows_not("a prediction", &peer.host, self.version())),
            To::There(peer) => {
                let patience = CHECK_TIME + Duration::from_millis(request.sample_ms.into());
                self.call(peer, patience, |mut client, version| {
                    let request = at(version, request.clone());
                    async move { client.predict_migration(request).await }
                })
                .await
            }
        }
    }

    /// Whether the destination still needs pages that come late, and how they get there: as the agent with this journal says, if it is
    /// known.
    ///
    /// # Errors
    /// It does not answer, or another one does.
    pub(crate) async fn late_link(
        &self,
        mut request: LateLinkRequest,
        journal: Option<Uuid>,
    ) -> Result<LateLinkReply, Failure> {
        request.journal = on_the_wire(journal);
        match &self.to {
            To::Here(agent) => agent.late_link(request).await,
            To::There(peer) => {
                let reply = self.call_at(Call::LateLink, peer, CALL_TIME, |mut client, version| {
                    let request = at(version, request.clone());
                    async move { client.late_link(request).await }
                });
                let reply = reply.await?;
                check_answer(peer, journal, &reply.journal).map(|()| reply)
            }
        }
    }

    /// Whether the source has the pages that a guest waits for.
    ///
    /// # Errors
    /// It does not answer, or is of before.
    pub(crate) async fn late_pages(&self, request: LatePagesRequest) -> Result<LatePagesReply, Failure> {
        match &self.to {
            To::Here(agent) => agent.late_pages(request).await,
            To::There(peer) if !self.can_send_version(RpcVersion::V4_3) => {
                Err(knows_not("a question for late pages", &peer.host, self.version()))
            }
            To::There(peer) => {
                self.call_at(Call::LatePages, peer, CALL_TIME, |mut client, version| {
                    let request = at(version, request.clone());
                    async move {
                        // Which version it is of may be known only now.
                        match version.understands(RpcVersion::V4_3) {
                            true => client.late_pages(request).await,
                            false => Err(Status::unimplemented("a question for late pages")),
                        }
                    }
                })
                .await
            }
        }
    }

    /// When the first frames passed each card of a guest that arrived there from the host `source`; nothing, if it is not known any more.
    ///
    /// # Errors
    /// It does not answer, or is of before.
    pub(crate) async fn first_frames(&self, migration: Uuid, source: &str) -> Result<Vec<FirstFrame>, Failure> {
        let request = FirstFramesRequest {
            migration: migration.to_string(),
            source: source.to_owned(),
        };
        let reply = match &self.to {
            To::Here(agent) => agent.first_frames(migration).await?,
            To::There(peer) if !self.can_send_version(RpcVersion::V4_3) => {
                return Err(knows_not("when frames passed", &peer.host, self.version()));
            }
            To::There(peer) => {
                self.call_at(Call::FirstFrames, peer, CALL_TIME, |mut client, version| {
                    let request = at(version, request.clone());
                    async move { client.first_frames(request).await }
                })
                .await?
            }
        };
        Ok(reply.cards)
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
