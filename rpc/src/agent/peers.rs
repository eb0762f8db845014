//! The other agents, and how long they are waited for.

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use ferry_proto::agent::v1::{HostInfo, HostRequest, MigrationOptions};
use ferry_proto::agent::v1::{compute_client, conductor_client};
use tokio::net::TcpStream;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status};
use tonic_types::StatusExt;

use super::context::RequestContext;
use super::failure::Failure;
use super::outgoing::page_streams;
use super::reason::{DOMAIN, Reason};
use super::sock_diag;
use super::transport::Connector;
use crate::faults::{self, Moment, Word};
use crate::request::Carried;

/// How long a peer may take to answer a call that only looks or decides.
pub(crate) const CALL_TIME: Duration = Duration::from_secs(5);
/// How long a peer may take to prepare a guest: it starts a process and maps its memory.
pub(crate) const PREPARE_TIME: Duration = Duration::from_secs(30);

/// How often each peer is asked how it is: Nova's report_interval.
pub(crate) const ASK_EACH: Duration = Duration::from_secs(5);
/// A host whose agent was not heard for so long is down: Nova's service_down_time.
pub(crate) const DOWN_AFTER: Duration = Duration::from_secs(15);
/// How long a peer may take to say what its host is like.
const HOST_TIME: Duration = Duration::from_secs(2);
/// How long the address of a peer is looked up, where it is only of interest.
const LOOK_UP_TIME: Duration = Duration::from_millis(500);
/// A longer way is asked for up to [`TRIPS`] times: a shorter one makes no difference.
const LONG_TRIP: Duration = Duration::from_millis(4);
const TRIPS: usize = 3;
/// A connection on which every call carries its request's context.
pub(crate) type Connection = InterceptedService<Channel, Carried>;
/// A client of a peer's `Compute` service.
pub(crate) type ComputeClient = compute_client::ComputeClient<Connection>;
/// A client of a peer's `Conductor` service.
pub(crate) type ConductorClient = conductor_client::ConductorClient<Connection>;

/// The calls of a migration from one agent to the other, and before them the cast from its conductor to the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    LiveMigration,
    CreateMigration,
    PreLiveMigration,
    PutImage,
    Expect,
    Decide,
    PostLiveMigration,
    RollbackLiveMigration,
    Heartbeat,
    LateLink,
    LatePages,
    FirstFrames,
}

/// One other agent.
#[derive(Clone)]
pub(crate) struct Peer {
    pub(crate) host: String,
    pub(crate) url: String,
    /// The host that asks it: this one.
    here: Arc<str>,
    endpoint: Arc<Endpoint>,
    channel: Channel,
    heard: Arc<Mutex<Heard>>,
}

/// When an agent was last heard, and what it said of its host then: Nova's servicegroup, as this agent sees it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Heard {
    last: Option<(Instant, SystemTime)>,
    /// What it said last.
    pub(crate) info: Option<HostInfo>,
    /// Why the last question had no answer; none if it had.
    pub(crate) silence: Option<String>,
}

impl Heard {
    /// A host is up when its agent was heard within [`DOWN_AFTER`].
    pub(crate) fn is_up(&self) -> bool {
        self.last.is_some_and(|(at, _)| at.elapsed() < DOWN_AFTER)
    }

    /// By this host's clock.
    pub(crate) fn last_heard(&self) -> Option<SystemTime> {
        self.last.map(|(_, at)| at)
    }
}

impl Peer {
    /// Whether it is on this very host: whether the way to its URL ends where it begins. Where that cannot be found out, it is not.
    pub(crate) async fn is_on_this_host(&self) -> bool {
        let address = self.address().await;
        address.is_some_and(|there| is_here(there).unwrap_or(false))
    }

    /// How long a word to it and back takes, as the kernel has it of a connection to its URL: however busy the agents are. `None`: it could not be found
    /// out. Of a long one it is asked again: a busy peer's kernel takes its time, too.
    pub(crate) async fn round_trip(&self) -> Option<Duration> {
        let there = self.address().await?;
        if is_here(there).unwrap_or(false) {
            return Some(Duration::ZERO);
        }
        let mut shortest: Option<Duration> = None;
        for _ in 0..TRIPS {
            let trip = round_trip_to(there).await?;
            shortest = Some(shortest.map_or(trip, |shortest| shortest.min(trip)));
            if trip < LONG_TRIP {
                break;
            }
        }
        shortest
    }

    /// How many page streams a migration there has by these options.
    pub(crate) async fn page_streams(&self, options: &MigrationOptions) -> u16 {
        // Nobody else waits for a name to be looked up.
        let round_trip = match options.streams {
            0 => self.round_trip().await,
            _ => None,
        };
        page_streams(options, round_trip)
    }

    /// The first one that its URL's name stands for.
    async fn address(&self) -> Option<SocketAddr> {
        let uri = self.endpoint.uri();
        // An IPv6 address is in brackets in a URL.
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
        let looked_up = tokio::net::lookup_host((host, uri.port_u16().unwrap_or(80)));
        tokio::time::timeout(LOOK_UP_TIME, looked_up).await.ok()?.ok()?.next()
    }

    /// Asks its `Compute` service and waits for the answer: `patience` at most, and no longer than whoever asked waits.
    ///
    /// # Errors
    /// Its refusal, or that it did not answer: then what it did is unknown.
    pub(crate) async fn ask<T, F>(
        &self,
        context: &RequestContext,
        patience: Duration,
        send: impl FnOnce(ComputeClient) -> F,
    ) -> Result<T, PeerError>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let patience = self.left(context, patience)?;
        let client = ComputeClient::new(self.connection(context.carried(&self.here, patience)));
        self.answer(patience, send(client)).await
    }

    /// Asks its `Conductor` service as [`Self::ask`] does.
    ///
    /// # Errors
    /// As for [`Self::ask`].
    pub(crate) async fn ask_conductor<T, F>(
        &self,
        context: &RequestContext,
        patience: Duration,
        send: impl FnOnce(ConductorClient) -> F,
    ) -> Result<T, PeerError>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let patience = self.left(context, patience)?;
        let client = ConductorClient::new(self.connection(context.carried(&self.here, patience)));
        self.answer(patience, send(client)).await
    }

    /// Passes a call on that this peer is to answer: its answer is the caller's, and so is its refusal.
    ///
    /// # Errors
    /// Its refusal as it is, or that it does not answer.
    pub(crate) async fn forward<T, F>(
        &self,
        context: &RequestContext,
        send: impl FnOnce(ConductorClient) -> F,
    ) -> Result<Response<T>, Status>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let carried = Carried {
            patience: context.deadline_left(),
            ..context.carried(&self.here, Duration::MAX)
        };
        let client = ConductorClient::new(self.connection(carried));
        send(client).await.map_err(|status| self.told(status))
    }

    /// What a caller is told whose call was passed on: this peer's refusal, or that it does not answer.
    pub(crate) fn told(&self, status: Status) -> Status {
        // What it says itself has details.
        match is_unanswered(&status) && status.details().is_empty() {
            true => Failure::from(self.silence(&status)).into(),
            false => status,
        }
    }

    /// Makes a call of a migration and waits for the answer, `patience` at most. `send` may be called more than once.
    ///
    /// # Errors
    /// Its refusal, or that it did not answer: then what it did is unknown.
    pub(crate) async fn call<T, F>(
        &self,
        context: &RequestContext,
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
            Word::Double => drop(self.ask(context, patience, &send).await),
        }
        let answered = self.ask(context, patience, &send).await;
        match faults::reach(call.into(), Moment::After).await {
            Word::Lose => lost("answer of"),
            Word::Go | Word::Double => answered,
        }
    }

    /// Where it is found, for connections beside the one that all calls share.
    pub(crate) fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// A connection beside the one that all calls share. Calls on it last as long as they take.
    ///
    /// # Errors
    /// It does not answer.
    pub(crate) async fn connect(
        &self,
        context: &RequestContext,
        endpoint: &Endpoint,
        connector: Connector,
    ) -> Result<Connection, PeerError> {
        let silent = |error: tonic::transport::Error| self.silence(&Status::from_error(error.into()));
        let carried = Carried {
            patience: None,
            ..context.carried(&self.here, Duration::MAX)
        };
        let channel = endpoint.connect_with_connector(connector).await.map_err(silent)?;
        Ok(InterceptedService::new(channel, carried))
    }

    /// What came of a call that ended with this status.
    pub(crate) fn error(&self, status: &Status) -> PeerError {
        match is_unanswered(status) {
            true => self.silence(status),
            false => PeerError::Refused {
                reason: reason_of(status),
                text: format!("host {}: {}", self.host, status.message()),
            },
        }
    }

    /// How long this peer is waited for.
    fn left(&self, context: &RequestContext, patience: Duration) -> Result<Duration, PeerError> {
        let left = context.left(patience);
        match left.is_zero() {
            true => Err(PeerError::NoAnswer(format!(
                "whoever asked does not wait for host {} any more",
                self.host
            ))),
            false => Ok(left),
        }
    }

    fn connection(&self, carried: Carried) -> Connection {
        InterceptedService::new(self.channel.clone(), carried)
    }

    async fn answer<T>(
        &self,
        patience: Duration,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, PeerError> {
        match tokio::time::timeout(patience, call).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(self.error(&status)),
            Err(_) => Err(PeerError::NoAnswer(format!(
                "host {} at {} did not answer within {}",
                self.host,
                self.url,
                humantime::format_duration(patience)
            ))),
        }
    }

    fn silence(&self, status: &Status) -> PeerError {
        PeerError::NoAnswer(format!(
            "host {} at {} does not answer: {}",
            self.host,
            self.url,
            reason(status)
        ))
    }

    /// Asks what the host is like, and remembers that it was heard.
    ///
    /// # Errors
    /// It does not answer.
    pub(crate) async fn host_info(&self, context: &RequestContext) -> Result<HostInfo, PeerError> {
        let host = |mut client: ComputeClient| async move { client.host(HostRequest {}).await };
        let answer = self.ask(context, HOST_TIME, host).await;
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        match &answer {
            Ok(info) => {
                *heard = Heard {
                    last: Some((Instant::now(), SystemTime::now())),
                    info: Some(info.clone()),
                    silence: None,
                };
            }
            Err(error) => heard.silence = Some(error.to_string()),
        }
        answer
    }

    /// When it was last heard.
    pub(crate) fn heard(&self) -> Heard {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// What came of a call.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PeerError {
    /// The peer said no.
    #[error("{text}")]
    Refused {
        /// Its reason from the closed list; none for what is no refusal, such as a failing disk.
        reason: Option<Reason>,
        /// What it said.
        text: String,
    },
    /// Nobody knows what it did.
    #[error("{0}")]
    NoAnswer(String),
}

impl From<PeerError> for Failure {
    fn from(error: PeerError) -> Self {
        match error {
            PeerError::Refused {
                reason: Some(reason),
                text,
            } => Self::Denied { reason, text },
            PeerError::Refused { reason: None, text } => Self::Refused(text),
            PeerError::NoAnswer(reason) => Self::Unavailable(reason),
        }
    }
}

async fn round_trip_to(there: SocketAddr) -> Option<Duration> {
    let connected = tokio::time::timeout(LOOK_UP_TIME, TcpStream::connect(there)).await;
    let connection = connected.ok()?.ok()?;
    let (bound, connected) = (connection.local_addr().ok()?, connection.peer_addr().ok()?);
    sock_diag::round_trip(bound, connected).ok()?
}

/// Whether this address is one of this host's. A connected UDP socket has asked the kernel for the way, and sent nothing.
fn is_here(address: SocketAddr) -> io::Result<bool> {
    let any: IpAddr = match address {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(address)?;
    Ok(socket.local_addr()?.ip() == address.ip())
}

fn is_unanswered(status: &Status) -> bool {
    use tonic::Code::{Cancelled, DeadlineExceeded, Unavailable, Unknown};
    matches!(status.code(), Unavailable | DeadlineExceeded | Cancelled | Unknown)
}

/// The reason from the closed list that a status carries.
fn reason_of(status: &Status) -> Option<Reason> {
    let info = status.get_details_error_info()?;
    (info.domain == DOMAIN).then(|| Reason::parse(&info.reason)).flatten()
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
    /// Prepares connections from the host `here`; they are made when they are needed, and anew when they break.
    ///
    /// # Errors
    /// A URL is not one.
    pub(crate) fn new(here: &str, peers: &[(String, String)]) -> anyhow::Result<Self> {
        let (mut known, here) = (BTreeMap::new(), Arc::<str>::from(here));
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
                here: Arc::clone(&here),
                channel: endpoint.connect_lazy(),
                endpoint: Arc::new(endpoint),
                heard: Arc::default(),
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

    /// Asks every peer how it is, from now on and for ever.
    pub(crate) async fn listen(peers: Vec<Peer>) {
        let mut turn = tokio::time::interval(ASK_EACH);
        turn.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            turn.tick().await;
            // All at once: one that is silent holds nobody up.
            let asked: Vec<_> = peers
                .iter()
                .cloned()
                .map(|peer| tokio::spawn(async move { peer.host_info(&RequestContext::agent()).await.is_ok() }))
                .collect();
            for answer in asked {
                // What came of it is remembered with the peer.
                let _ = answer.await;
            }
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_peer_is_on_this_host_where_the_way_to_it_ends_where_it_begins() {
        let is_here = async |url: &str| {
            let peers = Peers::new("a", &[("b".to_owned(), url.to_owned())]).unwrap();
            peers.named("b").unwrap().is_on_this_host().await
        };
        assert!(is_here("http://127.0.0.1:7601").await);
        // An address for documentation (RFC 5737), which no host has.
        assert!(!is_here("http://192.0.2.1:7601").await);
        assert!(!is_here("http://no-such-host.invalid:7601").await);
    }
}
