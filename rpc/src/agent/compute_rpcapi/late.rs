//! What is asked of a guest that runs at its destination: its late pages, and when its first frames passed.

use ferry_proto::agent::v1::{
    FirstFrame, FirstFramesRequest, LateLinkReply, LateLinkRequest, LatePagesReply, LatePagesRequest,
};
use tonic::Status;
use uuid::Uuid;

use super::novelties::knows_not;
use super::{ComputeRpcApi, To, at};
use crate::agent::failure::Failure;
use crate::agent::peer_journal::{check_answer, on_the_wire};
use crate::agent::peers::{CALL_TIME, Call};
use crate::agent::versions::RpcVersion;

impl ComputeRpcApi {
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
}
