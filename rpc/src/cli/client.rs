//! Connections to agents.

use std::time::Duration;

use ferry_proto::agent::v1::compute_client::ComputeClient;
use ferry_proto::agent::v1::conductor_client::ConductorClient;
use ferry_proto::agent::v1::{HostInfo, HostRequest};
use tonic::Request;
use tonic::metadata::MetadataValue;
use tonic::transport::{Channel, Endpoint};

use super::failure::{Exit, Failure};

/// The agent that a verb asks.
#[derive(Debug, Clone)]
pub(super) struct Agent {
    pub(super) url: String,
}

impl Agent {
    pub(super) fn new(url: String) -> Self {
        Self { url }
    }

    /// Connects to the services of one host.
    pub(super) async fn compute(&self) -> Result<ComputeClient<Channel>, Failure> {
        Ok(ComputeClient::new(self.connect().await?).max_decoding_message_size(LARGEST_MESSAGE))
    }

    /// Connects to the service that migrates.
    pub(super) async fn conductor(&self) -> Result<ConductorClient<Channel>, Failure> {
        Ok(ConductorClient::new(self.connect().await?).max_decoding_message_size(LARGEST_MESSAGE))
    }

    /// What the host says of itself.
    pub(super) async fn host(&self) -> Result<HostInfo, Failure> {
        let answer = self.compute().await?.host(within(PATIENCE, HostRequest {})).await;
        answer
            .map(tonic::Response::into_inner)
            .map_err(|status| Failure::of_status("ask for the host", &status))
    }

    /// The agents that the asked one knows, by host id.
    pub(super) async fn peers(&self) -> Result<Vec<(String, Agent)>, Failure> {
        peers_of(&self.host().await?)
    }

    async fn connect(&self) -> Result<Channel, Failure> {
        let endpoint = Endpoint::from_shared(self.url.clone());
        let endpoint = endpoint.map_err(|error| Failure::new(Exit::Usage, format!("agent {}: {error}", self.url)))?;
        // An agent that is stopped, or a host that is gone, is noticed while a stream is silent.
        let endpoint = endpoint
            .connect_timeout(PATIENCE)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEP_ALIVE);
        let endpoint = endpoint.keep_alive_timeout(PATIENCE).keep_alive_while_idle(true);
        endpoint
            .connect()
            .await
            .map_err(|error| Failure::unreachable(&self.url, &error))
    }
}

/// Reads the peers out of what a host says of itself: each is `HOST=URL`.
pub(super) fn peers_of(host: &HostInfo) -> Result<Vec<(String, Agent)>, Failure> {
    let pairs = host.peers.iter().map(|peer| {
        let (name, url) = peer.split_once('=').ok_or_else(|| {
            Failure::new(
                Exit::Failed,
                format!("host {} names a peer {peer:?} that is not HOST=URL", host.host),
            )
        })?;
        Ok((name.to_owned(), Agent::new(url.to_owned())))
    });
    pairs.collect()
}

/// A request that is given up after `deadline`. It has an id, by which it is found in an agent's audit table.
pub(super) fn within<T>(deadline: Duration, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(deadline);
    if let Ok(id) = MetadataValue::try_from(uuid::Uuid::new_v4().to_string()) {
        request.metadata_mut().insert("request-id", id);
    }
    request
}

/// How long an agent may take to answer what it knows at once.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);
/// How long an agent may take for what needs a VMM, an image or a disk.
pub(super) const LONG_PATIENCE: Duration = Duration::from_secs(60);

const KEEP_ALIVE: Duration = Duration::from_secs(3);
/// A migration of many rounds, or a console of many megabytes in one piece.
const LARGEST_MESSAGE: usize = 64 << 20;
