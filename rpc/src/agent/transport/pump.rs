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

use ferry_proto::agent::v1::StreamEnd;
use ferry_proto::agent::v1::stream_piece::Piece;
use prost::bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{ReadHalf, WriteHalf};
use tonic::Status;

use super::call::{Hearing, Outgoing};
use super::messages::{Heard, PIECE, Rooms, message};

/// Bytes that a socket takes before its reader has read any; the kernel caps it (`net.core.wmem_max`) and doubles it for its own bookkeeping.
const SOCKET_BUFFER: usize = PIECE;

/// What is read at once and is no more than this is copied, so that its room is free again.
const LITTLE: usize = 4 << 10;

/// Why a stream ended otherwise than by both sides having said their end.
#[derive(Debug, thiserror::Error)]
pub(super) enum Cut {
    /// The call ended, or the connection under it.
    #[error("the call ended in the middle of the stream")]
    CallEnded,
    /// The call failed, or what came in it is no message of a stream; it says why.
    #[error("the call failed: {}", .0.message())]
    CallFailed(Status),
    /// The peer sent what does not belong there.
    #[error("the peer sent a word of the beginning in the middle of the stream")]
    OutOfPlace,
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
pub(super) async fn pump(mut socket: UnixStream, hearing: &mut Hearing, outgoing: &Outgoing) -> Result<(), Cut> {
    let (reading, writing) = socket.split();
    let has_hung_up = AtomicBool::new(false);
    tokio::try_join!(
        up(reading, outgoing, &has_hung_up),
        down(hearing, writing, &has_hung_up)
    )
    .map(drop)
}

/// From the VMM to the call.
async fn up(mut socket: ReadHalf<'_>, outgoing: &Outgoing, has_hung_up: &AtomicBool) -> Result<(), Cut> {
    let rooms = Rooms::default();
    loop {
        let mut room = rooms.room();
        let read = tokio::select! {
            biased;
            // Noticed at once, also while the VMM has nothing to say.
            () = outgoing.closed() => return Err(Cut::CallEnded),
            read = socket.read(room.space()) => read.map_err(Cut::Socket)?,
        };
        if read == 0 {
            has_hung_up.store(true, Ordering::Relaxed);
            return say(outgoing, message(Piece::End(StreamEnd {}))).await;
        }
        let said = match read <= LITTLE {
            true => message(Piece::Bytes(Bytes::copy_from_slice(&room.space()[..read]))),
            false => room.message(read),
        };
        say(outgoing, said).await?;
    }
}

async fn say(outgoing: &Outgoing, message: Bytes) -> Result<(), Cut> {
    outgoing.send(Ok(message)).await.map_err(|_| Cut::CallEnded)
}

/// From the call to the VMM.
async fn down(hearing: &mut Hearing, mut socket: WriteHalf<'_>, has_hung_up: &AtomicBool) -> Result<(), Cut> {
    let mut listens = true;
    loop {
        let heard = hearing.next().await.map_err(Cut::CallFailed)?;
        let bytes = match heard.ok_or(Cut::CallEnded)? {
            Heard::Bytes(bytes) => bytes,
            Heard::Word(Piece::End(StreamEnd {})) => {
                // One that has hung up needs no telling.
                let _ = socket.shutdown().await;
                return Ok(());
            }
            Heard::Word(_) => return Err(Cut::OutOfPlace),
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
