//! Agent B's end: the service `Streams`.

use std::convert::Infallible;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use ferry_proto::agent::v1::stream_piece::Piece;
use ferry_proto::agent::v1::streams_server::SERVICE_NAME;
use ferry_proto::agent::v1::{StreamClaim, StreamTaken};
use ferry_proto::{InvalidField, wire_uuid};
use hmac::Mac;
use tokio::net::UnixStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::Service;
use tonic::codegen::http::{Request, Response};
use tonic::server::NamedService;
use uuid::Uuid;

use super::call::{self, Hearing, Outgoing};
use super::messages::{Heard, message};
use super::pump::{self, pump};
use crate::agent::data_port::{self, MOST_UNPROVEN, NONCE, PATIENCE};
use crate::agent::failure::Failure;
use crate::agent::incoming::Incoming;
use crate::agent::instances::Agent;
use crate::agent::prediction::Probe;

/// The service over one agent. It answers as what is generated for `Streams` would, and copies less.
#[derive(Clone)]
pub(in crate::agent) struct StreamsService {
    agent: Arc<Agent>,
    /// As at the data port: so many prove themselves at the same time.
    unproven: Arc<Semaphore>,
}

impl StreamsService {
    pub(in crate::agent) fn new(agent: Arc<Agent>) -> Self {
        Self {
            agent,
            unproven: Arc::new(Semaphore::new(MOST_UNPROVEN)),
        }
    }

    async fn place(&self) -> Result<OwnedSemaphorePermit, Failure> {
        let acquired = timeout(PATIENCE, Arc::clone(&self.unproven).acquire_owned()).await;
        let crowded = || Failure::Late("no stream could begin within 5 s: nothing was done".to_owned());
        acquired.ok().and_then(Result::ok).ok_or_else(crowded)
    }
}

/// One stream, as its source names it.
#[derive(Clone, Copy)]
struct Claim {
    migration: Uuid,
    index: u16,
}

impl Claim {
    fn check(first: Result<Option<Heard>, Status>) -> Result<Self, InvalidField> {
        let unreadable = |status: Status| InvalidField {
            field: "claim",
            problem: format!("cannot be read: {}", status.message()),
        };
        let first = first.map_err(unreadable)?;
        let Some(Heard::Word(Piece::Claim(StreamClaim { migration, index }))) = first else {
            return Err(InvalidField {
                field: "claim",
                problem: "is missing: each stream begins with one".to_owned(),
            });
        };
        Ok(Self {
            migration: wire_uuid("claim.migration", &migration)?,
            index: u16::try_from(index).map_err(|_| InvalidField {
                field: "claim.index",
                problem: format!("{index} is over {}", u16::MAX),
            })?,
        })
    }
}

impl NamedService for StreamsService {
    const NAME: &'static str = SERVICE_NAME;
}

impl Service<Request<Body>> for StreamsService {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, call: Request<Body>) -> Self::Future {
        let service = self.clone();
        Box::pin(async move {
            let answer = match call.uri().path() == call::path() {
                true => service.carry(Hearing::new(call.into_body())).await,
                false => Err(Status::unimplemented("")),
            };
            Ok(answer.unwrap_or_else(Status::into_http))
        })
    }
}

impl StreamsService {
    async fn carry(self, mut hearing: Hearing) -> Result<Response<Body>, Status> {
        let place = self.place().await?;
        let silent = |_| Failure::Late("no claim came within 5 s: nothing was done".to_owned());
        let first = timeout(PATIENCE, hearing.next()).await.map_err(silent)?;
        let claim = Claim::check(first).map_err(Failure::from)?;
        let expected = Expected::find(&self.agent, claim.migration).ok_or_else(|| {
            let (id, host) = (claim.migration, self.agent.host());
            Failure::Refused(format!("migration {id} is not expected on host {host}"))
        })?;
        let (outgoing, answer) = call::response();
        tokio::spawn(take(claim, expected, hearing, outgoing, place));
        Ok(answer)
    }
}

/// Whose a stream is, by the id that it claims.
enum Expected {
    Migration(Arc<Incoming>),
    /// Of the way to here.
    Probe(Arc<Probe>),
}

impl Expected {
    fn find(agent: &Agent, id: Uuid) -> Option<Self> {
        let migration = agent.incoming.find(id).map(Self::Migration);
        migration.or_else(|| agent.probes.find(id).map(Self::Probe))
    }

    fn secret(&self) -> &[u8] {
        match self {
            Self::Migration(migration) => &migration.secret,
            Self::Probe(probe) => &probe.secret,
        }
    }

    /// Hands the VMM its end of the stream. For a probe there is none, and the agent reads in its place.
    fn connected(self, index: u16, handed: OwnedFd) -> io::Result<()> {
        match self {
            Self::Migration(migration) => migration.connected(index, handed),
            Self::Probe(probe) => {
                let socket = StdUnixStream::from(handed);
                socket.set_nonblocking(true)?;
                let socket = UnixStream::from_std(socket)?;
                tokio::spawn(async move { probe.serve(socket).await });
            }
        }
        Ok(())
    }
}

/// Has the stream prove the migration's secret, hands its other end to the VMM, and carries it.
async fn take(claim: Claim, expected: Expected, mut hearing: Hearing, outgoing: Outgoing, place: OwnedSemaphorePermit) {
    let Claim { migration: id, index } = claim;
    let proven = timeout(PATIENCE, is_proven(claim, expected.secret(), &mut hearing, &outgoing)).await;
    drop(place);
    let refused = match proven {
        Ok(Ok(true)) => None,
        Ok(Ok(false)) | Err(_) => Some(Failure::Refused(format!(
            "stream {index} did not prove the secret of migration {id}"
        ))),
        Ok(Err(failure)) => Some(failure),
    };
    if let Some(refused) = refused {
        tracing::info!(error = refused.chain(), "a stream was refused");
        // If nobody is there any more, nobody needs to know.
        let _ = outgoing.send(Err(refused.into())).await;
        return;
    }
    let taken = pump::pair().and_then(|(socket, handed)| expected.connected(index, handed).map(|()| socket));
    let socket = match taken {
        Ok(socket) => socket,
        Err(error) => {
            let failure = Failure::host("failed to make a pair of sockets")(error);
            tracing::error!(migration = %id, index, error = failure.chain(), "a stream is not taken");
            let _ = outgoing.send(Err(failure.into())).await;
            return;
        }
    };
    let _ = outgoing.send(Ok(message(Piece::Taken(StreamTaken {})))).await;
    if let Err(cut) = pump(socket, &mut hearing, &outgoing).await {
        tracing::info!(migration = %id, index, error = crate::error_chain(&cut), "a stream was cut");
    }
}

async fn is_proven(claim: Claim, secret: &[u8], hearing: &mut Hearing, outgoing: &Outgoing) -> Result<bool, Failure> {
    let nonce: [u8; NONCE] = data_port::random().map_err(Failure::host("failed to make a nonce"))?;
    let _ = outgoing.send(Ok(message(Piece::Nonce(nonce.to_vec())))).await;
    let Ok(Some(Heard::Word(Piece::Proof(shown)))) = hearing.next().await else {
        return Ok(false);
    };
    // Compared in constant time.
    Ok(data_port::proof(secret, &nonce, claim.migration, claim.index)
        .verify_slice(&shown)
        .is_ok())
}
