//! Agent A's end: makes the calls, and proves the migration's secret on each.

use std::future::poll_fn;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::time::Duration;

use ferry_proto::agent::v1::stream_piece::Piece;
use ferry_proto::agent::v1::{StreamClaim, StreamTaken};
use hmac::Mac;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::Service;
use tonic::codegen::http::Request;
use uuid::Uuid;

use super::call::{self, Hearing, Outgoing};
use super::connector::Connector;
use super::messages::{Heard, message};
use super::pump::{self, pump};
use super::{FRAME, WINDOW};
use crate::agent::context::RequestContext;
use crate::agent::data_port::{PATIENCE, Secret, all_at_once, proof};
use crate::agent::failure::Failure;
use crate::agent::peers::{Peer, PeerError};

/// How often the peer is asked whether it lives, and how long it may take to say so. The VMMs notice by themselves; this is for streams on which
/// nobody waits any more.
const ASK_EACH: Duration = Duration::from_secs(10);
const ANSWER_TIME: Duration = Duration::from_secs(5);

/// Makes the streams of a migration with these indexes, proven and in order, and carries them from then on. What is handed back are the VMM's ends.
///
/// # Errors
/// The peer does not answer, or refuses one of them by name.
pub(crate) async fn connect(
    peer: &Peer,
    context: &RequestContext,
    secret: &[u8],
    migration: Uuid,
    indexes: Range<u16>,
) -> Result<Vec<OwnedFd>, Failure> {
    let secret = Secret::try_from(secret).map_err(|_| {
        let told = format!("host {} told a secret of {} bytes", peer.host, secret.len());
        Failure::Refused(told)
    })?;
    all_at_once(indexes, |index| {
        let (peer, context) = (peer.clone(), context.clone());
        async move {
            let carrying = carry(&peer, &context, secret, migration, index);
            let carried = tokio::time::timeout(PATIENCE, carrying).await;
            let silent = |_| Failure::Unavailable(format!("host {} did not take a stream within 5 s", peer.host));
            carried.map_err(silent)?
        }
    })
    .await
}

async fn carry(
    peer: &Peer,
    context: &RequestContext,
    secret: Secret,
    migration: Uuid,
    index: u16,
) -> Result<OwnedFd, Failure> {
    let connection = peer.endpoint().clone();
    let connection = connection
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .max_frame_size(FRAME)
        .http2_keep_alive_interval(ASK_EACH)
        .keep_alive_timeout(ANSWER_TIME);
    let mut connection = peer.connect(context, &connection, Connector).await?;
    let (outgoing, request) = call::request();
    let claim = StreamClaim {
        migration: migration.to_string(),
        index: index.into(),
    };
    // The channel has room for one.
    let _ = outgoing.send(Ok(message(Piece::Claim(claim)))).await;
    let broken = |error: tonic::transport::Error| peer.error(&Status::from_error(error.into()));
    let ready = poll_fn(|context| Service::<Request<Body>>::poll_ready(&mut connection, context));
    ready.await.map_err(broken)?;
    let answer = connection.call(request).await.map_err(broken)?;
    let heard = call::answered(answer.map(Body::new));
    let mut hearing = heard.map_err(|status| peer.error(&status))?;
    prove(peer, &mut hearing, &outgoing, (secret, migration, index)).await?;

    let failed = Failure::host("failed to make a pair of sockets");
    let (socket, handed) = pump::pair().map_err(failed)?;
    tokio::spawn(async move {
        match pump(socket, &mut hearing, &outgoing).await {
            Ok(()) => end(hearing, outgoing).await,
            Err(cut) => tracing::info!(%migration, index, error = crate::error_chain(&cut), "a stream was cut"),
        }
    });
    Ok(handed)
}

/// Says over the peer's nonce what only one who knows the secret can say.
async fn prove(
    peer: &Peer,
    hearing: &mut Hearing,
    outgoing: &Outgoing,
    (secret, migration, index): (Secret, Uuid, u16),
) -> Result<(), Failure> {
    let Some(Heard::Word(Piece::Nonce(nonce))) = said(peer, hearing).await? else {
        return Err(out_of_place(peer));
    };
    let proof = proof(&secret, &nonce, migration, index).finalize().into_bytes();
    // If the call is over, what it said last is read next.
    let _ = outgoing.send(Ok(message(Piece::Proof(proof.to_vec())))).await;
    match said(peer, hearing).await? {
        Some(Heard::Word(Piece::Taken(StreamTaken {}))) => Ok(()),
        _ => Err(out_of_place(peer)),
    }
}

async fn said(peer: &Peer, hearing: &mut Hearing) -> Result<Option<Heard>, PeerError> {
    hearing.next().await.map_err(|status| peer.error(&status))
}

fn out_of_place(peer: &Peer) -> Failure {
    let source = io::Error::new(io::ErrorKind::InvalidData, "it answered out of place");
    Failure::host(format!("host {} did not take a stream", peer.host))(source)
}

/// Both sides have said all: the peer may end the call, which was this side's.
async fn end(mut hearing: Hearing, outgoing: Outgoing) {
    drop(outgoing);
    // One that does not is hung up on.
    let _ = tokio::time::timeout(ANSWER_TIME, hearing.next()).await;
}
