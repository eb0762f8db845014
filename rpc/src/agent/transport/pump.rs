//! One stream between a VMM's socket and a call: what the one says is put into pieces for the other, and back.
//!
//! ```text
//!   VMM ── socket ──► up ──► one piece ──► call     an end of the socket ──► `end`
//!       ◄─────────── down ◄── one piece ◄──         `end` ──► the socket's writing half is shut down
//! ```
//!
//! The two directions are independent, as those of a connection are: a VMM that has said all may still listen, and one that listens no more may
//! still speak, as VMM A does after GO. What comes for one that does not listen is thrown away; once it has hung up altogether, that cuts the stream, as
//! a reset would. A stream that ends without an `end`, because an agent or the way to it died, or somebody misbehaved, is cut: the socket is closed in
//! the middle of whatever the VMM is doing.
//!
//! Nothing is collected. Each direction holds one piece that it read and one that waits; a receiver that does not take them lets the window of
//! HTTP/2 run full, then the sender's socket, and then the sending VMM waits.

use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::atomic::{AtomicBool, Ordering};

use ferry_proto::agent::v1::stream_piece::Piece;
use ferry_proto::agent::v1::{StreamEnd, StreamPiece};
use prost::bytes::{BufMut, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{ReadHalf, WriteHalf};
use tokio::sync::mpsc;
use tokio_stream::{Stream, StreamExt};
use tonic::Status;

use super::piece;

/// The most bytes of one piece: about what a socket's buffer holds.
pub(super) const PIECE: usize = 256 << 10;

/// Bytes that a socket takes before its reader has read any; the kernel caps it (`net.core.wmem_max`) and doubles it for its own bookkeeping.
const SOCKET_BUFFER: usize = 256 << 10;

/// Pieces that wait for a call to take them.
pub(super) const WAITING: usize = 1;

/// What a call is given to carry.
pub(super) type Outgoing = mpsc::Sender<Result<StreamPiece, Status>>;

/// Why a stream ended otherwise than by both sides having said their end.
#[derive(Debug, thiserror::Error)]
pub(super) enum Cut {
    /// The call ended, or the connection under it.
    #[error("the call ended in the middle of the stream")]
    CallEnded,
    /// The call failed, and says why.
    #[error("the call failed: {}", .0.message())]
    CallFailed(Status),
    /// The peer sent what does not belong there.
    #[error("the peer sent {0} in the middle of the stream")]
    Misbehaved(&'static str),
    /// What comes is for a VMM that has hung up.
    #[error("the VMM hung up")]
    NobodyListens,
    /// This side's socket failed.
    #[error("the VMM's socket failed")]
    Socket(#[source] io::Error),
}

/// A pair of sockets: the agent's end, and the one that its VMM is to have.
///
/// # Errors
/// This host has no room for one.
pub(super) fn pair() -> io::Result<(UnixStream, OwnedFd)> {
    let (own, handed) = StdUnixStream::pair()?;
    for socket in [&own, &handed] {
        rustix::net::sockopt::set_socket_send_buffer_size(socket, SOCKET_BUFFER)?;
    }
    own.set_nonblocking(true)?;
    Ok((UnixStream::from_std(own)?, OwnedFd::from(handed)))
}

/// Carries one stream until both sides have said their end.
///
/// # Errors
/// It was cut. The socket is closed when this returns.
pub(super) async fn pump(
    mut socket: UnixStream,
    incoming: &mut (impl Stream<Item = Result<StreamPiece, Status>> + Unpin),
    outgoing: &Outgoing,
) -> Result<(), Cut> {
    let (reading, writing) = socket.split();
    let has_hung_up = AtomicBool::new(false);
    tokio::try_join!(
        up(reading, outgoing, &has_hung_up),
        down(incoming, writing, &has_hung_up)
    )
    .map(drop)
}

/// From the VMM to the call.
async fn up(mut socket: ReadHalf<'_>, outgoing: &Outgoing, has_hung_up: &AtomicBool) -> Result<(), Cut> {
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(PIECE);
        let mut room = (&mut buffer).limit(PIECE);
        let read = tokio::select! {
            biased;
            // Noticed at once, also while the VMM has nothing to say.
            () = outgoing.closed() => return Err(Cut::CallEnded),
            read = socket.read_buf(&mut room) => read.map_err(Cut::Socket)?,
        };
        if read == 0 {
            has_hung_up.store(true, Ordering::Relaxed);
            return say(outgoing, Piece::End(StreamEnd {})).await;
        }
        say(outgoing, Piece::Bytes(buffer.split().freeze())).await?;
    }
}

async fn say(outgoing: &Outgoing, what: Piece) -> Result<(), Cut> {
    outgoing.send(Ok(piece(what))).await.map_err(|_| Cut::CallEnded)
}

/// From the call to the VMM.
async fn down(
    incoming: &mut (impl Stream<Item = Result<StreamPiece, Status>> + Unpin),
    mut socket: WriteHalf<'_>,
    has_hung_up: &AtomicBool,
) -> Result<(), Cut> {
    let mut listens = true;
    loop {
        let said = incoming.next().await.ok_or(Cut::CallEnded)?;
        let bytes = match said.map_err(Cut::CallFailed)?.piece {
            Some(Piece::Bytes(bytes)) if bytes.len() <= PIECE => bytes,
            Some(Piece::Bytes(_)) => return Err(Cut::Misbehaved("too large a piece")),
            Some(Piece::End(StreamEnd {})) => {
                // One that has hung up needs no telling.
                let _ = socket.shutdown().await;
                return Ok(());
            }
            Some(Piece::Claim(_) | Piece::Nonce(_) | Piece::Proof(_) | Piece::Taken(_)) => {
                return Err(Cut::Misbehaved("a word of the beginning"));
            }
            None => return Err(Cut::Misbehaved("an empty message")),
        };
        if listens && let Err(error) = socket.write_all(&bytes).await {
            match error.kind() {
                ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => listens = false,
                _ => return Err(Cut::Socket(error)),
            }
        }
        if !listens && has_hung_up.load(Ordering::Relaxed) {
            return Err(Cut::NobodyListens);
        }
    }
}

#[cfg(test)]
mod tests;
