//! The calls of a migration from one of its agents to the other, at a version as all else.
//!
//! Each goes by [`Peer::call`], which fault tests come by. What decides something is believed of one journal only.

use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ferry_proto::agent::v1::{
    AttemptRequest, DecisionReply, HeartbeatReply, HeartbeatRequest, ImageChunk, PostLiveMigrationReply,
    PostLiveMigrationRequest, RollbackRequest,
};
use tonic::{Request, Response, Status};
use uuid::Uuid;

use super::{ComputeRpcApi, To, at, is_other_version};
use crate::agent::context::RequestContext;
use crate::agent::failure::Failure;
use crate::agent::instances::Agent;
use crate::agent::peer_journal::{check_answer, on_the_wire};
use crate::agent::peers::{CALL_TIME, Call, ComputeClient, PREPARE_TIME, Peer, PeerError};

impl Agent {
    /// A client of a peer's service, as [`Agent::compute_rpcapi`] makes one of any host's.
    pub(crate) fn peer_rpcapi(&self, context: &RequestContext, peer: &Peer) -> ComputeRpcApi {
        ComputeRpcApi {
            to: To::There(peer.clone()),
            context: context.clone(),
            version: Mutex::new(self.rpc_cap()),
        }
    }
}

impl ComputeRpcApi {
    /// ARM: the host expects the attempt, durably.
    ///
    /// # Errors
    /// It does not, does not answer, or has another journal than this one, where that is known.
    pub(crate) async fn expect(
        &self,
        request: AttemptRequest,
        journal: Option<Uuid>,
    ) -> Result<DecisionReply, Failure> {
        let request = of_journal(request, journal);
        let send = |mut client: ComputeClient, request| async move { client.expect(request).await };
        let reply = self.call_of_migration(Call::Expect, CALL_TIME, request, send).await?;
        check_answer(self.peer()?, journal, &reply.journal).map(|()| reply)
    }

    /// What D is: it moves to SRC if nothing was claimed.
    ///
    /// # Errors
    /// As for [`Self::expect`].
    pub(crate) async fn decide(
        &self,
        request: AttemptRequest,
        journal: Option<Uuid>,
    ) -> Result<DecisionReply, Failure> {
        let request = of_journal(request, journal);
        let send = |mut client: ComputeClient, request| async move { client.decide(request).await };
        let reply = self.call_of_migration(Call::Decide, CALL_TIME, request, send).await?;
        check_answer(self.peer()?, journal, &reply.journal).map(|()| reply)
    }

    /// Tells the source what D became, and hears what it has of the guest.
    ///
    /// # Errors
    /// It does not answer, or has another journal than this one, where that is known.
    pub(crate) async fn post_live_migration(
        &self,
        mut news: PostLiveMigrationRequest,
        journal: Option<Uuid>,
    ) -> Result<PostLiveMigrationReply, Failure> {
        news.journal = on_the_wire(journal);
        let send = |mut client: ComputeClient, news| async move { client.post_live_migration(news).await };
        let reply = self
            .call_of_migration(Call::PostLiveMigration, CALL_TIME, news, send)
            .await?;
        check_answer(self.peer()?, journal, &reply.journal).map(|()| reply)
    }

    /// Tells the destination that it is over before GO.
    ///
    /// # Errors
    /// It does not answer.
    pub(crate) async fn rollback_live_migration(&self, request: RollbackRequest) -> Result<(), PeerError> {
        let send = |mut client: ComputeClient, request| async move { client.rollback_live_migration(request).await };
        self.call_of_migration(Call::RollbackLiveMigration, CALL_TIME, request, send)
            .await
            .map(drop)
    }

    /// Asks the destination whether it takes part, and waits so long.
    ///
    /// # Errors
    /// It does not answer.
    pub(crate) async fn heartbeat(
        &self,
        request: HeartbeatRequest,
        patience: Duration,
    ) -> Result<HeartbeatReply, PeerError> {
        let send = |mut client: ComputeClient, request| async move { client.heartbeat(request).await };
        self.call_of_migration(Call::Heartbeat, patience, request, send).await
    }

    /// Sends an image in these pieces.
    ///
    /// # Errors
    /// The destination does not take it, or does not answer.
    pub(crate) async fn put_image(&self, pieces: Arc<Vec<ImageChunk>>) -> Result<(), PeerError> {
        let send = |mut client: ComputeClient, request: Request<Arc<Vec<ImageChunk>>>| {
            let request = request.map(|pieces| {
                let count = pieces.len();
                tokio_stream::iter((0..count).map(move |at| pieces[at].clone()))
            });
            async move { client.put_image(request).await }
        };
        self.call_of_migration(Call::PutImage, PREPARE_TIME, pieces, send)
            .await
            .map(drop)
    }

    /// The other agent of a migration.
    fn peer(&self) -> Result<&Peer, PeerError> {
        match &self.to {
            To::There(peer) => Ok(peer),
            To::Here(agent) => Err(PeerError::NoAnswer(format!("host {} is this one", agent.host()))),
        }
    }

    /// A call at the version that is thought right; where that is refused, once more at the one that the host speaks.
    pub(super) async fn call_of_migration<M, T, F>(
        &self,
        call: Call,
        patience: Duration,
        message: M,
        send: impl Fn(ComputeClient, Request<M>) -> F,
    ) -> Result<T, PeerError>
    where
        M: Clone,
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let peer = self.peer()?;
        let ask = || {
            let send = |client| send(client, at(self.version(), message.clone()));
            peer.call(&self.context, call, patience, send)
        };
        match ask().await {
            Err(error) if is_other_version(&error) => {
                self.refresh(peer).await?;
                ask().await
            }
            answer => answer,
        }
    }
}

fn of_journal(request: AttemptRequest, journal: Option<Uuid>) -> AttemptRequest {
    AttemptRequest {
        journal: on_the_wire(journal),
        ..request
    }
}
