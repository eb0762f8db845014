//! What the way to another host carries, where no migration has told: some MiB are sent there, as a migration's pages would be, and thrown away.
//!
//! ```text
//!   source:      ProbeLink ─────────► destination: a secret for one probe, for a few seconds
//!   source:      streams as a migration has them, by its transport, proven with it; bytes, then the end of them
//!   destination: how many came by it; of all streams how many have come, of these the last half, and in how many microseconds (u64 each, little-endian)
//! ```
//!
//! The last half alone tells of the link: TCP begins slowly, by round trips.
//!
//! One probe at a time at each destination, from a host that it knows, and of no more bytes than are told here: nobody fills a link or a processor with it.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
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

/// How long bytes are sent, unless that is shorter than so many round trips: by then TCP has as much under way as it will.
const SENDING: Duration = Duration::from_millis(300);
const SENDING_TRIPS: u32 = 15;
/// The longest.
const SENDING_AT_MOST: Duration = Duration::from_secs(2);

/// How long the whole of it may take: a slow link has much to carry of what buffers took meanwhile.
const PATIENCE: Duration = Duration::from_secs(8);
/// How long a stream is listened to: somewhat longer than its source waits.
const TAKING: Duration = Duration::from_secs(10);

/// How long a probe that was asked for may be begun, and keeps others away.
const VALID: Duration = Duration::from_secs(2);

/// How soon one that was not let is asked for again.
const BETWEEN_TRIES: Duration = Duration::from_millis(200);

/// What is read at once.
const PIECE: usize = 256 << 10;
/// And written: over a slow link all streams' first ones have to come through in time.
const WRITTEN: usize = 64 << 10;

/// How many times faster than on the whole what came last may have come: beyond that it is no beginning that was slow, but a destination that stood still.
const MOST_TIMES_FASTER: f64 = 8.0;

/// The most streams that are taken: as many as a migration has by itself. Versions that do not tell take [`UNTOLD_STREAMS`].
const MOST_STREAMS: u16 = 16;
const UNTOLD_STREAMS: u16 = 4;

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
    /// What has come by all of them.
    taken: Mutex<Taken>,
}

/// When how much had come.
#[derive(Default)]
struct Taken {
    bytes: u64,
    /// Then, and how much it was by then: one for each [`PIECE`].
    steps: Vec<(Instant, u64)>,
}

/// What a probe tells at the end of a stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Told {
    /// Bytes by this stream.
    arrived: u64,
    /// By all of them, so far; 0: the rest is not told.
    all: u64,
    /// Of these, the last half.
    half: u64,
    /// Within how many microseconds.
    half_us: u64,
}

impl Taken {
    /// Counts bytes that have come now.
    ///
    /// # Errors
    /// They are more than a probe may send.
    fn add(&mut self, bytes: u64, now: Instant) -> io::Result<()> {
        let all = self.bytes + bytes;
        if all > MOST_BYTES {
            return Err(io::Error::from(io::ErrorKind::FileTooLarge));
        }
        self.bytes = all;
        match self.steps.last_mut() {
            Some((_, before)) if all - *before < PIECE as u64 => {}
            _ => self.steps.push((now, all)),
        }
        Ok(())
    }

    /// What is told now at the end of a stream that brought so much of it.
    fn told(&self, arrived: u64, now: Instant) -> Told {
        let middle = self.steps.iter().find(|(_, by_then)| *by_then >= self.bytes / 2);
        let (then, by_then) = middle.copied().unwrap_or((now, self.bytes));
        Told {
            arrived,
            all: self.bytes,
            half: self.bytes - by_then,
            half_us: now.duration_since(then).as_micros() as u64,
        }
    }
}

impl Told {
    fn bytes(self) -> [u8; 32] {
        let mut bytes = [0; 32];
        let figures = [self.arrived, self.all, self.half, self.half_us];
        for (place, figure) in bytes.chunks_exact_mut(8).zip(figures) {
            place.copy_from_slice(&figure.to_le_bytes());
        }
        bytes
    }

    /// Reads one that the destination of so many bytes wrote; an older one tells what arrived alone.
    async fn read(stream: &mut (impl AsyncRead + Unpin), sent: u64) -> io::Result<Self> {
        // What the other side claims to have got it was sent.
        let arrived = stream.read_u64_le().await?.min(sent);
        let mut rest = [0; 24];
        let is_told = stream.read_exact(&mut rest).await.is_ok();
        let figure = |at: usize| match is_told {
            true => u64::from_le_bytes(std::array::from_fn(|byte| rest[at * 8 + byte])),
            false => 0,
        };
        Ok(Self {
            arrived,
            all: figure(0),
            half: figure(1),
            half_us: figure(2),
        })
    }
}

impl Probes {
    fn begin(&self) -> io::Result<Option<Arc<Probe>>> {
        let mut present = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Each of its streams has it, too.
        let goes_on = |probe: &Arc<Probe>| Instant::now() < probe.until || Arc::strong_count(probe) > 1;
        if present.as_ref().is_some_and(goes_on) {
            return Ok(None);
        }
        let probe = Arc::new(Probe {
            id: Uuid::new_v4(),
            secret: data_port::random()?,
            until: Instant::now() + VALID,
            streams: AtomicU16::new(0),
            taken: Mutex::default(),
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

    /// Takes what comes and tells how much that was; no more than a probe may send.
    async fn take_in(&self, stream: &mut (impl AsyncRead + AsyncWrite + Unpin)) -> io::Result<()> {
        let mut piece = vec![0; PIECE];
        let mut arrived = 0u64;
        loop {
            let read = stream.read(&mut piece).await? as u64;
            if read == 0 {
                break;
            }
            arrived += read;
            self.taken().add(read, Instant::now())?;
        }
        let told = self.taken().told(arrived, Instant::now());
        stream.write_all(&told.bytes()).await
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
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
            most_streams: MOST_STREAMS.into(),
        })
    }

    /// Bytes a second that the way to a host carries with so many streams, over so long a round trip.
    ///
    /// # Errors
    /// It does not let itself be probed, or is not reached in this manner.
    pub(super) async fn probe(
        self: &Arc<Self>,
        context: &RequestContext,
        (destination, transport): (&str, Transport),
        (streams, round_trip): (u16, Duration),
    ) -> Result<f64, Failure> {
        let failed = || Failure::host(format!("failed to probe the way to host {destination}"));
        let api = self.compute_rpcapi(context, destination)?;
        let began = Instant::now();
        let reply = loop {
            match api.probe_link(self.host()).await {
                // Somebody else tries it now: it is over in a moment.
                Err(busy) if busy.reason() == Some(Reason::HostBusy) && began.elapsed() < PATIENCE => {
                    tokio::time::sleep(BETWEEN_TRIES).await;
                }
                answer => break answer?,
            }
        };
        let id = wire_uuid("probe", &reply.probe)?;
        let streams = streams_of_probe(streams, reply.most_streams);
        let sending = round_trip.saturating_mul(SENDING_TRIPS).clamp(SENDING, SENDING_AT_MOST);
        let wanted = Wanted {
            data_address: &reply.data_address,
            secret: &reply.secret,
            migration: id,
            indexes: 0..streams,
        };
        let probed = async {
            let connections = connect(self, context, (destination, transport), wanted).await?;
            let measured = match transport {
                Transport::Tcp => send(each(connections, tcp).map_err(failed())?, sending).await,
                Transport::Grpc => send(each(connections, unix).map_err(failed())?, sending).await,
            };
            measured.map_err(failed())
        };
        timeout(PATIENCE, probed)
            .await
            .unwrap_or_else(|_| Err(failed()(io::ErrorKind::TimedOut.into())))
    }
}

/// How many streams try what so many will have, where so many are taken; 0: the destination does not tell.
fn streams_of_probe(wanted: u16, taken: u32) -> u16 {
    let taken = match u16::try_from(taken).unwrap_or(MOST_STREAMS) {
        0 => UNTOLD_STREAMS,
        told => told.min(MOST_STREAMS),
    };
    wanted.clamp(1, taken)
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

/// Sends on all streams at once, for so long; the bytes a second that came through, by what came last if that is told.
async fn send<S>(streams: Vec<S>, sending: Duration) -> io::Result<f64>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let began = Instant::now();
    let most = MOST_BYTES / streams.len().max(1) as u64;
    let streams: Vec<_> = streams
        .into_iter()
        .map(|stream| tokio::spawn(send_one(stream, most, began + sending)))
        .collect();
    let mut told = Vec::with_capacity(streams.len());
    for stream in streams {
        told.push(stream.await.map_err(io::Error::other)??);
    }
    rate(&told, began.elapsed()).ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))
}

/// Bytes a second by what was told of each stream, all of which took so long. `None`: nothing arrived.
fn rate(told: &[Told], took: Duration) -> Option<f64> {
    let arrived: u64 = told.iter().map(|one| one.arrived).sum();
    if arrived == 0 || took.is_zero() {
        return None;
    }
    let whole = arrived as f64 / took.as_secs_f64();
    // Of the one that ended last all had come.
    let last = told.iter().max_by_key(|one| one.all)?;
    Some(match last.half <= arrived && last.half_us > 0 {
        // The way has carried as much as it did on the whole, whatever disturbed the end.
        true => (last.half as f64 * 1e6 / last.half_us as f64).clamp(whole, whole * MOST_TIMES_FASTER),
        false => whole,
    })
}

/// Sends until then, at most so many bytes; what the other side says that it got.
async fn send_one(mut stream: impl AsyncRead + AsyncWrite + Unpin, most: u64, until: Instant) -> io::Result<Told> {
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
    for part in piece.chunks(WRITTEN).cycle() {
        if Instant::now() >= until || sent + part.len() as u64 > most {
            break;
        }
        stream.write_all(part).await?;
        sent += part.len() as u64;
    }
    stream.shutdown().await?;
    Told::read(&mut stream, sent).await
}

#[cfg(test)]
mod tests;
