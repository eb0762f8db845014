//! What the way to another host carries, where no migration has told: some MiB are sent there, as a migration's pages would be, and thrown away.
//!
//! ```text
//!   source:      ProbeLink ─────────► destination: a secret for one probe, for a few seconds
//!   source:      streams as a migration has them, by its transport, proven with it; bytes, then the end of them
//!   destination: how many came (u64, little-endian)
//! ```
//!
//! One probe at a time at each destination, from a host that it knows, and of no more bytes than are told here: nobody fills a link or a processor with it.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ferry_proto::agent::v1::{ProbeLinkReply, ProbeLinkRequest};
use ferry_proto::wire_uuid;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;
use uuid::Uuid;

use crate::agent::context::RequestContext;
use crate::agent::data_port::{self, Secret};
use crate::agent::failure::Failure;
use crate::agent::instances::Agent;
use crate::agent::outgoing::{Wanted, connect};
use crate::agent::reason::Reason;
use crate::agent::transport::Transport;

/// The most that is sent, and taken, by all connections of a probe together.
const MOST_BYTES: u64 = 128 << 20;

/// How long bytes are sent, and how long the whole of it may take: a slow link has much to carry then of what buffers took meanwhile.
const SENDING: Duration = Duration::from_millis(300);
const PATIENCE: Duration = Duration::from_secs(8);
/// How long a stream is listened to: somewhat longer than its source waits.
const TAKING: Duration = Duration::from_secs(10);

/// How long a probe that was asked for may be begun, and keeps others away.
const VALID: Duration = Duration::from_secs(2);

/// How soon one that was not let is asked for again.
const BETWEEN_TRIES: Duration = Duration::from_millis(200);

/// What is written, and read, at once.
const PIECE: usize = 256 << 10;

/// The most streams.
const MOST_STREAMS: u16 = 4;

/// The probe that somebody may make of the way to here.
#[derive(Default)]
pub(crate) struct Probes(Mutex<Option<Arc<Probe>>>);

/// One of them.
pub(crate) struct Probe {
    id: Uuid,
    /// What its streams prove.
    pub(crate) secret: Secret,
    until: Instant,
    /// Streams that it has had.
    streams: AtomicU16,
    /// Bytes that are still taken.
    left: AtomicU64,
}

impl Probes {
    fn begin(&self) -> io::Result<Option<Arc<Probe>>> {
        let mut present = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if present.as_ref().is_some_and(|probe| Instant::now() < probe.until) {
            return Ok(None);
        }
        let probe = Arc::new(Probe {
            id: Uuid::new_v4(),
            secret: data_port::random()?,
            until: Instant::now() + VALID,
            streams: AtomicU16::new(0),
            left: AtomicU64::new(MOST_BYTES),
        });
        *present = Some(Arc::clone(&probe));
        Ok(Some(probe))
    }

    /// The probe with this id, while it may be made.
    pub(crate) fn find(&self, id: Uuid) -> Option<Arc<Probe>> {
        let present = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        present
            .clone()
            .filter(|probe| probe.id == id && Instant::now() < probe.may_be_joined_until())
    }
}

impl Probe {
    /// Its streams come all at once, of an older host one after the other: over a long way each some round trips later.
    fn may_be_joined_until(&self) -> Instant {
        match self.streams.load(Ordering::Relaxed) {
            0 => self.until,
            _ => self.until + PATIENCE,
        }
    }

    /// Serves one of its streams, which has proven that it is one.
    pub(crate) async fn serve(&self, mut stream: impl AsyncRead + AsyncWrite + Unpin) {
        if self.streams.fetch_add(1, Ordering::Relaxed) >= MOST_STREAMS {
            tracing::info!(probe = %self.id, "a further stream of a probe is not taken");
            return;
        }
        let taken = timeout(TAKING, self.take_in(&mut stream)).await;
        if let Err(error) = taken.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
            tracing::info!(probe = %self.id, %error, "a stream of a probe was not heard to its end");
        }
    }

    /// Takes what comes and tells how much that was; no more than is left.
    async fn take_in(&self, stream: &mut (impl AsyncRead + AsyncWrite + Unpin)) -> io::Result<()> {
        let mut piece = vec![0; PIECE];
        let mut taken = 0u64;
        loop {
            let read = stream.read(&mut piece).await? as u64;
            if read == 0 {
                break;
            }
            taken += read;
            let had = self
                .left
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(read));
            if had.is_err() {
                return Err(io::Error::from(io::ErrorKind::FileTooLarge));
            }
        }
        stream.write_all(&taken.to_le_bytes()).await
    }
}

impl Agent {
    /// Lets a host that is known here find out what the way to here carries.
    ///
    /// # Errors
    /// The host is not known, or another one does so now.
    pub(crate) fn probe_link(&self, request: &ProbeLinkRequest) -> Result<ProbeLinkReply, Failure> {
        self.peers.named(&request.source)?;
        let begun = self.probes.begin().map_err(Failure::host("failed to make a secret"))?;
        let probe = begun.ok_or_else(|| {
            Failure::denied(
                Reason::HostBusy,
                format!("the way to host {} is being probed already", self.host()),
            )
        })?;
        Ok(ProbeLinkReply {
            probe: probe.id.to_string(),
            secret: probe.secret.to_vec(),
            data_address: self.data_address.clone(),
        })
    }

    /// Bytes a second that the way to a host carries.
    ///
    /// # Errors
    /// It does not let itself be probed, or is not reached in this manner.
    pub(super) async fn probe(
        self: &Arc<Self>,
        context: &RequestContext,
        (destination, transport): (&str, Transport),
        streams: u32,
    ) -> Result<f64, Failure> {
        let failed = || Failure::host(format!("failed to probe the way to host {destination}"));
        let api = self.compute_rpcapi(context, destination)?;
        let began = Instant::now();
        let reply = loop {
            match api.probe_link(self.host()).await {
                // Somebody else tries it now: it is over in a moment.
                Err(busy) if busy.reason() == Some(Reason::HostBusy) && began.elapsed() < VALID * 2 => {
                    tokio::time::sleep(BETWEEN_TRIES).await;
                }
                answer => break answer?,
            }
        };
        let id = wire_uuid("probe", &reply.probe)?;
        let streams = u16::try_from(streams).unwrap_or(MOST_STREAMS).clamp(1, MOST_STREAMS);
        let wanted = Wanted {
            data_address: &reply.data_address,
            secret: &reply.secret,
            migration: id,
            indexes: 0..streams,
        };
        let probed = async {
            let connections = connect(self, context, (destination, transport), wanted).await?;
            let measured = match transport {
                Transport::Tcp => send(each(connections, tcp).map_err(failed())?).await,
                Transport::Grpc => send(each(connections, unix).map_err(failed())?).await,
            };
            measured.map_err(failed())
        };
        timeout(PATIENCE, probed)
            .await
            .unwrap_or_else(|_| Err(failed()(io::ErrorKind::TimedOut.into())))
    }
}

fn each<S>(connections: Vec<OwnedFd>, stream: fn(OwnedFd) -> io::Result<S>) -> io::Result<Vec<S>> {
    connections.into_iter().map(stream).collect()
}

fn tcp(connection: OwnedFd) -> io::Result<TcpStream> {
    let stream = std::net::TcpStream::from(connection);
    stream.set_nonblocking(true)?;
    TcpStream::from_std(stream)
}

fn unix(connection: OwnedFd) -> io::Result<UnixStream> {
    let stream = std::os::unix::net::UnixStream::from(connection);
    stream.set_nonblocking(true)?;
    UnixStream::from_std(stream)
}

/// Sends on all streams at once; the bytes a second that came through.
async fn send<S>(streams: Vec<S>) -> io::Result<f64>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let began = Instant::now();
    let each = MOST_BYTES / streams.len().max(1) as u64;
    let sending: Vec<_> = streams
        .into_iter()
        .map(|stream| tokio::spawn(send_one(stream, each, began)))
        .collect();
    let mut arrived = 0u64;
    for sent in sending {
        arrived += sent.await.map_err(io::Error::other)??;
    }
    let seconds = began.elapsed().as_secs_f64();
    match arrived > 0 && seconds > 0.0 {
        true => Ok(arrived as f64 / seconds),
        false => Err(io::Error::from(io::ErrorKind::UnexpectedEof)),
    }
}

/// How many bytes the other side says it got, of at most so many.
async fn send_one(mut stream: impl AsyncRead + AsyncWrite + Unpin, most: u64, began: Instant) -> io::Result<u64> {
    // No page is like another, so that nothing on the way makes less of it.
    let mut piece = vec![0; PIECE];
    for (number, page) in piece.chunks_mut(4096).enumerate() {
        getrandom::fill(&mut page[..64]).map_err(io::Error::other)?;
        let (pattern, rest) = page.split_at_mut(64);
        rest.chunks_mut(64).for_each(|chunk| {
            chunk.copy_from_slice(&pattern[..chunk.len()]);
            chunk[0] ^= number as u8;
        });
    }
    let mut sent = 0;
    while began.elapsed() < SENDING && sent + PIECE as u64 <= most {
        stream.write_all(&piece).await?;
        sent += PIECE as u64;
    }
    stream.shutdown().await?;
    let arrived = stream.read_u64_le().await?;
    // What the other side claims to have got it was sent.
    Ok(arrived.min(sent))
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (one, other) = tokio::join!(TcpStream::connect(address), listener.accept());
        (one.unwrap(), other.unwrap().0)
    }

    fn probe(left: u64) -> Probe {
        Probe {
            id: Uuid::from_u128(1),
            secret: [0; 32],
            until: Instant::now() + VALID,
            streams: AtomicU16::new(0),
            left: AtomicU64::new(left),
        }
    }

    #[tokio::test]
    async fn what_is_sent_is_counted_by_who_takes_it() {
        let (near, mut far) = pair().await;
        let bounded = probe(MOST_BYTES);
        let (rate, taken) = tokio::join!(send(vec![near]), bounded.take_in(&mut far));
        taken.unwrap();
        assert!(rate.unwrap() > 0.0);
        assert!(bounded.left.load(Ordering::Relaxed) < MOST_BYTES);
    }

    #[tokio::test]
    async fn no_more_is_taken_than_a_probe_may_send() {
        let (mut near, mut far) = pair().await;
        let bounded = probe(1000);
        let write = async {
            // It may be cut off in the middle of it.
            let _ = near.write_all(&[0; 4000]).await;
            let _ = near.shutdown().await;
        };
        let (taken, ()) = tokio::join!(bounded.take_in(&mut far), write);
        assert_eq!(taken.unwrap_err().kind(), io::ErrorKind::FileTooLarge);
    }

    #[tokio::test]
    async fn a_probe_has_no_more_streams_than_are_told() {
        let (near, far) = pair().await;
        let bounded = probe(MOST_BYTES);
        bounded.streams.store(MOST_STREAMS, Ordering::Relaxed);
        let (rate, ()) = tokio::join!(send(vec![near]), bounded.serve(far));
        assert!(rate.is_err());
        assert_eq!(bounded.left.load(Ordering::Relaxed), MOST_BYTES);
    }

    #[test]
    fn one_probe_is_made_at_a_time_and_by_its_id() {
        let probes = Probes::default();
        let first = probes.begin().unwrap().unwrap();
        assert!(probes.begin().unwrap().is_none());
        assert!(probes.find(first.id).is_some());
        assert!(probes.find(Uuid::from_u128(7)).is_none());
    }
}
