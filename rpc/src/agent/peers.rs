//! The other agents, and how long they are waited for.

use std::collections::BTreeMap;
use std::future::Future;
use std::time::Duration;

use ferry_proto::agent::v1::compute_client;
use ferry_proto::agent::v1::conductor_client::ConductorClient;
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status};

use super::failure::Failure;
use crate::faults::{self, Moment, Word};

/// How long a peer may take to answer a call that only looks or decides.
pub(crate) const CALL_TIME: Duration = Duration::from_secs(5);
/// How long a peer may take to prepare a guest: it starts a process and maps its memory.
pub(crate) const PREPARE_TIME: Duration = Duration::from_secs(30);

/// A client of a peer's `Compute` service.
pub(crate) type ComputeClient = compute_client::ComputeClient<Channel>;

/// The calls of a migration from one agent to the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    PreLiveMigration,
    PutImage,
    Expect,
    Decide,
    PostLiveMigration,
    RollbackLiveMigration,
    Heartbeat,
}

/// One other agent.
#[derive(Clone)]
pub(crate) struct Peer {
    pub(crate) host: String,
    pub(crate) url: String,
    channel: Channel,
}

impl Peer {
    /// A client of its `Compute` service.
    pub(crate) fn compute(&self) -> ComputeClient {
        ComputeClient::new(self.channel.clone())
    }

    /// A client of its `Conductor` service.
    pub(crate) fn conductor(&self) -> ConductorClient<Channel> {
        ConductorClient::new(self.channel.clone())
    }

    /// Makes a call of a migration and waits for the answer, `patience` at most. `send` may be called more than once.
    ///
    /// # Errors
    /// Its refusal, or that it did not answer: then what it did is unknown.
    pub(crate) async fn call<T, F>(
        &self,
        call: Call,
        patience: Duration,
        send: impl Fn(ComputeClient) -> F,
    ) -> Result<T, PeerError>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let lost = |what| Err(PeerError::NoAnswer(format!("the {what} host {} was lost", self.host)));
        match faults::reach(call.into(), Moment::Before).await {
            Word::Go => {}
            Word::Lose => return lost("call to"),
            Word::Double => drop(self.answer(patience, send(self.compute())).await),
        }
        let answered = self.answer(patience, send(self.compute())).await;
        match faults::reach(call.into(), Moment::After).await {
            Word::Lose => lost("answer of"),
            Word::Go | Word::Double => answered,
        }
    }

    /// Waits for an answer of this peer, `patience` at most.
    ///
    /// # Errors
    /// Its refusal, or that it did not answer: then what it did is unknown.
    pub(crate) async fn answer<T>(
        &self,
        patience: Duration,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, PeerError> {
        match tokio::time::timeout(patience, call).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) if is_unanswered(&status) => Err(PeerError::NoAnswer(format!(
                "host {} at {} does not answer: {}",
                self.host,
                self.url,
                reason(&status)
            ))),
            Ok(Err(status)) => Err(PeerError::Refused(format!("host {}: {}", self.host, status.message()))),
            Err(_) => Err(PeerError::NoAnswer(format!(
                "host {} at {} did not answer within {}",
                self.host,
                self.url,
                humantime::format_duration(patience)
            ))),
        }
    }
}

/// What came of a call.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PeerError {
    /// The peer said no.
    #[error("{0}")]
    Refused(String),
    /// Nobody knows what it did.
    #[error("{0}")]
    NoAnswer(String),
}

impl From<PeerError> for Failure {
    fn from(error: PeerError) -> Self {
        match error {
            PeerError::Refused(reason) => Self::Refused(reason),
            PeerError::NoAnswer(reason) => Self::Unavailable(reason),
        }
    }
}

fn is_unanswered(status: &Status) -> bool {
    use tonic::Code::{Cancelled, DeadlineExceeded, Unavailable, Unknown};
    matches!(status.code(), Unavailable | DeadlineExceeded | Cancelled | Unknown)
}

fn reason(status: &Status) -> String {
    let mut words = status.message().to_owned();
    let mut cause = std::error::Error::source(status);
    while let Some(source) = cause {
        words = format!("{words}: {source}");
        cause = source.source();
    }
    words
}

/// The agents that this one was told of.
pub(crate) struct Peers(BTreeMap<String, Peer>);

impl Peers {
    /// Prepares connections; they are made when they are needed, and anew when they break.
    ///
    /// # Errors
    /// A URL is not one.
    pub(crate) fn new(peers: &[(String, String)]) -> anyhow::Result<Self> {
        let mut known = BTreeMap::new();
        for (host, url) in peers {
            let endpoint = Endpoint::from_shared(url.clone())
                .map_err(|error| anyhow::anyhow!("--peer {host}={url}: {error}"))?
                .connect_timeout(Duration::from_secs(2))
                .tcp_nodelay(true)
                .http2_keep_alive_interval(Duration::from_secs(10))
                .keep_alive_timeout(Duration::from_secs(5));
            let peer = Peer {
                host: host.clone(),
                url: url.clone(),
                channel: endpoint.connect_lazy(),
            };
            known.insert(host.clone(), peer);
        }
        Ok(Self(known))
    }

    /// The peer with this name.
    ///
    /// # Errors
    /// This agent was not told of it.
    pub(crate) fn named(&self, host: &str) -> Result<&Peer, Failure> {
        self.0.get(host).ok_or_else(|| Failure::NotFound {
            what: format!("host {host:?} (known peers: {})", self.names()),
            moved_to: None,
        })
    }

    /// All of them.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Peer> {
        self.0.values()
    }

    fn names(&self) -> String {
        if self.0.is_empty() {
            "none".to_owned()
        } else {
            self.0.keys().cloned().collect::<Vec<_>>().join(", ")
        }
    }
}
