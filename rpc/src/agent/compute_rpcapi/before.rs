//! What is asked before there is a migration: whether a host would take an instance, and what its way there would come to.

use std::time::Duration;

use ferry_proto::agent::v1::{
    CheckDestinationReply, CheckDestinationRequest, CheckSourceReply, CheckSourceRequest, MigrationPrediction,
    PredictMigrationRequest, ProbeLinkReply, ProbeLinkRequest, RecordRefusalRequest,
};

use super::novelties::knows_not;
use super::{ComputeRpcApi, To, at};
use crate::agent::failure::Failure;
use crate::agent::peers::CALL_TIME;
use crate::agent::versions::RpcVersion;

/// A destination opens disks and a KVM machine to say whether it could take an instance, and asks the source meanwhile.
const CHECK_TIME: Duration = Duration::from_secs(20);

impl ComputeRpcApi {
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
}
