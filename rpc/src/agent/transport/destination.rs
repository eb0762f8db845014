//! Agent B's end: the service `Streams`.

use std::sync::Arc;

use ferry_proto::agent::v1::stream_piece::Piece;
use ferry_proto::agent::v1::streams_server::Streams;
use ferry_proto::agent::v1::{StreamClaim, StreamPiece, StreamTaken};
use ferry_proto::{InvalidField, wire_uuid};
use hmac::Mac;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use uuid::Uuid;

use super::piece;
use super::pump::{self, Outgoing, pump};
use crate::agent::data_port::{self, MOST_UNPROVEN, NONCE, PATIENCE};
use crate::agent::failure::Failure;
use crate::agent::incoming::Incoming;
use crate::agent::instances::Agent;

/// The service over one agent.
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
    fn check(first: Result<Option<StreamPiece>, Status>) -> Result<Self, InvalidField> {
        let unreadable = |status: Status| InvalidField {
            field: "claim",
            problem: format!("cannot be read: {}", status.message()),
        };
        let first = first.map_err(unreadable)?.and_then(|first| first.piece);
        let Some(Piece::Claim(StreamClaim { migration, index })) = first else {
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

#[tonic::async_trait]
impl Streams for StreamsService {
    type CarryStream = ReceiverStream<Result<StreamPiece, Status>>;

    async fn carry(&self, request: Request<Streaming<StreamPiece>>) -> Result<Response<Self::CarryStream>, Status> {
        let place = self.place().await?;
        let mut incoming = request.into_inner();
        let silent = |_| Failure::Late("no claim came within 5 s: nothing was done".to_owned());
        let first = timeout(PATIENCE, incoming.message()).await.map_err(silent)?;
        let claim = Claim::check(first).map_err(Failure::from)?;
        let migration = self.agent.incoming.find(claim.migration).ok_or_else(|| {
            let (id, host) = (claim.migration, self.agent.host());
            Failure::Refused(format!("migration {id} is not expected on host {host}"))
        })?;
        let (outgoing, pieces) = mpsc::channel(pump::WAITING);
        tokio::spawn(take(claim, migration, incoming, outgoing, place));
        Ok(Response::new(ReceiverStream::new(pieces)))
    }
}

/// Has the stream prove the migration's secret, hands its other end to the VMM, and carries it.
async fn take(
    claim: Claim,
    migration: Arc<Incoming>,
    mut incoming: Streaming<StreamPiece>,
    outgoing: Outgoing,
    place: OwnedSemaphorePermit,
) {
    let Claim { migration: id, index } = claim;
    let proven = timeout(PATIENCE, is_proven(claim, &migration.secret, &mut incoming, &outgoing)).await;
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
    let (socket, handed) = match pump::pair() {
        Ok(pair) => pair,
        Err(error) => {
            let failure = Failure::host("failed to make a pair of sockets")(error);
            tracing::error!(migration = %id, index, error = failure.chain(), "a stream is not taken");
            let _ = outgoing.send(Err(failure.into())).await;
            return;
        }
    };
    let _ = outgoing.send(Ok(piece(Piece::Taken(StreamTaken {})))).await;
    migration.connected(index, handed);
    if let Err(cut) = pump(socket, &mut incoming, &outgoing).await {
        tracing::info!(migration = %id, index, error = crate::error_chain(&cut), "a stream was cut");
    }
}

async fn is_proven(
    claim: Claim,
    secret: &[u8],
    incoming: &mut Streaming<StreamPiece>,
    outgoing: &Outgoing,
) -> Result<bool, Failure> {
    let nonce: [u8; NONCE] = data_port::random().map_err(Failure::host("failed to make a nonce"))?;
    let _ = outgoing.send(Ok(piece(Piece::Nonce(nonce.to_vec())))).await;
    let said = incoming.message().await.ok().flatten().and_then(|said| said.piece);
    let Some(Piece::Proof(shown)) = said else {
        return Ok(false);
    };
    // Compared in constant time.
    Ok(data_port::proof(secret, &nonce, claim.migration, claim.index)
        .verify_slice(&shown)
        .is_ok())
}
