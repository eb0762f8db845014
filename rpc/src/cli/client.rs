//! Connections to agents.

use std::time::Duration;

use ferry_proto::agent::v1::{HostInfo, HostRequest};
use ferry_proto::agent::v1::{compute_client, conductor_client};
use tonic::Request;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};

use super::failure::{Exit, Failure};
use crate::request::{Carried, RequestId};

/// A connection on which every call carries the request's id.
type Connection = InterceptedService<Channel, Carried>;
pub(super) type ComputeClient = compute_client::ComputeClient<Connection>;
pub(super) type ConductorClient = conductor_client::ConductorClient<Connection>;

/// The agent that a verb asks, and the request in which it does: one for all its calls, whichever agents they go to.
#[derive(Debug, Clone)]
pub(super) struct Agent {
    pub(super) url: String,
    pub(super) request: RequestId,
}

impl Agent {
    pub(super) fn new(url: String) -> Self {
        Self::within(url, RequestId::new())
    }

    /// The agent at `url`, asked in this request.
    pub(super) fn within(url: String, request: RequestId) -> Self {
        Self { url, request }
    }

    /// Connects to the services of one host.
    pub(super) async fn compute(&self) -> Result<ComputeClient, Failure> {
        Ok(ComputeClient::new(self.connect().await?).max_decoding_message_size(LARGEST_MESSAGE))
    }

    /// Connects to the service that migrates.
    pub(super) async fn conductor(&self) -> Result<ConductorClient, Failure> {
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
        let mut peers = peers_of(&self.host().await?)?;
        for (_, peer) in &mut peers {
            peer.request = self.request.clone();
        }
        Ok(peers)
    }

    async fn connect(&self) -> Result<Connection, Failure> {
        let endpoint = Endpoint::from_shared(self.url.clone());
        let endpoint = endpoint.map_err(|error| Failure::new(Exit::Usage, format!("agent {}: {error}", self.url)))?;
        // An agent that is stopped, or a host that is gone, is noticed while a stream is silent.
        let endpoint = endpoint
            .connect_timeout(PATIENCE)
            .tcp_nodelay(true)
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(WINDOW)
            .http2_keep_alive_interval(KEEP_ALIVE);
        let endpoint = endpoint.keep_alive_timeout(PATIENCE).keep_alive_while_idle(true);
        let connected = endpoint.connect().await;
        let channel = connected.map_err(|error| Failure::unreachable(&self.url, &error))?;
        let carried = Carried {
            request: self.request.clone(),
            passed_on: None,
            // Each call says how long it is waited for: `within`.
            patience: None,
        };
        Ok(InterceptedService::new(channel, carried))
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

/// A request that is given up after `deadline`, which goes along with it.
pub(super) fn within<T>(deadline: Duration, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(deadline);
    request
}

/// How long an agent may take to answer what it knows at once.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);
/// How long an agent may take for what needs a VMM, an image or a disk.
pub(super) const LONG_PATIENCE: Duration = Duration::from_secs(60);

/// How much an agent may send before it hears that it arrived: lists of thousands are megabytes, and HTTP/2's own 64 KiB would have it wait
/// for a hundred words of the reader.
const WINDOW: u32 = 8 << 20;
const KEEP_ALIVE: Duration = Duration::from_secs(3);
/// A migration of many rounds, or a console of many megabytes in one piece.
const LARGEST_MESSAGE: usize = 64 << 20;
