//! What both ends of a migration are told about their peer and their patience.

use std::collections::VecDeque;
use std::io;
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use ferry_proto::stream::v1;
use rustix::io::Errno;
use rustix::net::sockopt::{
    set_socket_keepalive, set_tcp_keepcnt, set_tcp_keepidle, set_tcp_keepintvl, set_tcp_user_timeout,
};
use rustix::net::{RecvFlags, recv};

use crate::wire::{ControlError, Spoken, read_message, write_message};

/// The authenticated connections of one migration, as the agents handed them over. Where agents carry the streams themselves these are Unix
/// sockets, of which nothing is asked that they have not in common with TCP's.
#[derive(Debug)]
pub struct Link {
    /// The control stream: protobuf messages in both directions.
    pub control: TcpStream,
    /// The page streams, in the order of their index; at least one, and as many as the peer has.
    pub pages: Vec<TcpStream>,
    /// Further ones for pages that come after GO, if some may; the first [`URGENT_STREAMS`](crate::postcopy::URGENT_STREAMS) of their page
    /// streams are for those that somebody waits for.
    pub late: Option<Box<Link>>,
}

impl Link {
    /// How many page streams there are for pages that come late.
    pub(crate) fn late_streams(&self) -> u32 {
        self.late.as_ref().map_or(0, |late| late.pages.len() as u32)
    }

    fn connections(&self) -> impl Iterator<Item = &TcpStream> {
        self.pages.iter().chain([&self.control])
    }

    /// Has the kernel look whether the peer is there while nothing is said, so long after it was heard and as long again (`SO_KEEPALIVE` in socket(7));
    /// what stands between the hosts keeps such a connection in mind, too. Between the agents it is theirs.
    ///
    /// # Errors
    /// The kernel does not.
    pub(crate) fn keep_alive(&self, silence: Duration) -> io::Result<()> {
        for socket in self.connections() {
            set_socket_keepalive(socket, true)?;
            let second = Duration::from_secs(1);
            let tries = u32::try_from(silence.as_secs())
                .unwrap_or(u32::MAX)
                .clamp(1, MOST_KEEPALIVES);
            let set = set_tcp_keepidle(socket, silence.max(second))
                .and_then(|()| set_tcp_keepintvl(socket, second))
                .and_then(|()| set_tcp_keepcnt(socket, tries));
            unless_unix(set)?;
        }
        Ok(())
    }

    /// Whether all connections are there as far as is known here, before anything was said on them.
    ///
    /// # Errors
    /// One was closed, or the kernel has given it up.
    pub(crate) fn is_there(&self) -> io::Result<()> {
        for socket in self.connections() {
            let mut byte = [0];
            match recv(socket, &mut byte, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
                Ok((_, 0)) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) | Err(Errno::WOULDBLOCK | Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// The most that are sent without an answer, one each second.
const MOST_KEEPALIVES: u32 = 60;

/// When a peer counts as dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Liveness {
    /// How often each side says that it lives.
    pub heartbeat: Duration,
    /// How long a peer may be silent on every stream.
    pub silence: Duration,
}

impl Default for Liveness {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_secs(1),
            silence: Duration::from_secs(5),
        }
    }
}

/// How long the side that ends a migration waits for its last word to arrive.
pub(crate) const FAREWELL: Duration = Duration::from_millis(250);

/// How many times as long as a peer may be silent on every stream the bytes on one page stream may go unacknowledged or find no room. A way that drops
/// one connection and carries the others is noticed by nothing else. The peer's kernel acknowledges without its process, so it is a long time
/// for a way; it is not too long for a peer that has to wait for a slow disk before it reads on.
const STUCK_SILENCES: u32 = 6;

/// Round trips that the smallest one is taken from.
const ROUND_TRIPS_KEPT: usize = 8;

/// Between the first pings: a migration may be over before a single heartbeat is due, and one round trip alone is as
/// much the scheduler's as the network's.
const FIRST_PINGS: Duration = Duration::from_millis(20);

/// What the threads of one link told and the script has not taken yet. A message may be several megabytes; a thread that has more to tell
/// waits, and so does the peer.
pub(crate) const UNHEARD: usize = 4;

/// The connections while threads use them, and when the peer was last heard.
#[derive(Debug)]
pub(crate) struct Sockets {
    pub(crate) control: TcpStream,
    pub(crate) pages: Vec<TcpStream>,
    opened: Instant,
    /// Microseconds from `opened` to the last byte that any thread read.
    heard: AtomicU64,
    round_trips: Mutex<VecDeque<Duration>>,
    /// The token of the peer's last ping, until it is answered.
    pinged: Mutex<Option<u64>>,
}

impl Sockets {
    /// Takes the connections over: blocking, without delay; a write to the control stream fails once `silence` passed.
    ///
    /// # Errors
    /// If there is no page stream or a connection cannot be set up.
    pub(crate) fn new(link: Link, liveness: Liveness) -> io::Result<Self> {
        if link.pages.is_empty() || link.pages.len() > usize::from(u16::MAX) {
            let message = format!("{} page streams, 1 to {} are possible", link.pages.len(), u16::MAX);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        for socket in link.pages.iter().chain([&link.control]) {
            socket.set_nonblocking(false)?;
            set_nodelay(socket)?;
            socket.set_read_timeout(None)?;
            socket.set_write_timeout(None)?;
        }
        link.control.set_write_timeout(Some(liveness.silence))?;
        for socket in &link.pages {
            give_up_after(socket, liveness.silence * STUCK_SILENCES)?;
        }
        Ok(Self {
            control: link.control,
            pages: link.pages,
            opened: Instant::now(),
            heard: AtomicU64::new(0),
            round_trips: Mutex::default(),
            pinged: Mutex::default(),
        })
    }

    /// How many page streams there are.
    pub(crate) fn streams(&self) -> u32 {
        self.pages.len() as u32
    }

    /// Notes that the peer lives.
    pub(crate) fn hear(&self) {
        self.heard.store(self.now(), Ordering::Relaxed);
    }

    /// How long the peer has been silent.
    pub(crate) fn silence(&self) -> Duration {
        Duration::from_micros(self.now().saturating_sub(self.heard.load(Ordering::Relaxed)))
    }

    /// A token for a ping that is sent now.
    pub(crate) fn ping_token(&self) -> u64 {
        self.now()
    }

    /// Notes a ping of the peer. True unless an answer is due already: that one answers this ping instead of the one before it, so a peer that
    /// pings and does not read gathers nothing here.
    fn pinged(&self, token: u64) -> bool {
        let mut pinged = self.pinged.lock().unwrap_or_else(PoisonError::into_inner);
        pinged.replace(token).is_none()
    }

    /// The ping that is to be answered now.
    fn take_ping(&self) -> Option<u64> {
        self.pinged.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Takes the token of an answered ping as a measured round trip; a forged one from the future is dropped.
    pub(crate) fn ping_answered(&self, token: u64) {
        let Some(micros) = self.now().checked_sub(token) else {
            return;
        };
        let mut kept = self.round_trips.lock().unwrap_or_else(PoisonError::into_inner);
        kept.push_back(Duration::from_micros(micros));
        if kept.len() > ROUND_TRIPS_KEPT {
            kept.pop_front();
        }
    }

    /// The smallest of the last round trips.
    pub(crate) fn round_trip(&self) -> Option<Duration> {
        self.round_trips
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .min()
            .copied()
    }

    /// Cuts every connection, which wakes every thread that is blocked on one.
    pub(crate) fn cut(&self) {
        self.cut_pages();
        // A connection that is gone already needs no cutting.
        let _ = self.control.shutdown(Shutdown::Both);
    }

    /// Cuts the page streams only, so that a last word can still be said.
    pub(crate) fn cut_pages(&self) {
        for socket in &self.pages {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    /// Ends reading and leaves what was written to arrive.
    pub(crate) fn stop_reading(&self) {
        let _ = self.control.shutdown(Shutdown::Read);
    }

    /// The connections, to be kept or closed.
    pub(crate) fn into_streams(self) -> Vec<TcpStream> {
        let mut streams = self.pages;
        streams.push(self.control);
        streams
    }

    fn now(&self) -> u64 {
        u64::try_from(self.opened.elapsed().as_micros()).unwrap_or(u64::MAX)
    }
}

/// What was sent and is not taken by the peer for so long ends the connection (`TCP_USER_TIMEOUT` in tcp(7)).
fn give_up_after(socket: &TcpStream, time: Duration) -> io::Result<()> {
    let milliseconds = u32::try_from(time.as_millis()).unwrap_or(u32::MAX);
    unless_unix(set_tcp_user_timeout(socket, milliseconds))
}

/// What was asked of TCP, which a Unix socket does not know: between the agents it is theirs to notice.
fn unless_unix(set: rustix::io::Result<()>) -> io::Result<()> {
    match set {
        Err(Errno::OPNOTSUPP) => Ok(()),
        set => Ok(set?),
    }
}

/// Has what is written sent at once. A Unix socket does nothing else, and does not know the option.
fn set_nodelay(socket: &TcpStream) -> io::Result<()> {
    match socket.set_nodelay(true) {
        Err(error) if error.raw_os_error() == Some(Errno::OPNOTSUPP.raw_os_error()) => Ok(()),
        set => set,
    }
}

/// A message of one side that can also be a ping, a pong, or somebody's last word.
pub(crate) trait ControlMessage: Spoken {
    /// A ping with this token.
    fn ping(token: u64) -> Self;
    /// The answer to one.
    fn pong(token: u64) -> Self;
    /// What sign of life this is, if it is one.
    fn sign_of_life(&self) -> Option<SignOfLife>;
}

/// A ping or its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SignOfLife {
    Ping(u64),
    Pong(u64),
}

macro_rules! control_message {
    ($type:ident, $variants:ident) => {
        impl ControlMessage for v1::$type {
            fn ping(token: u64) -> Self {
                Self {
                    message: Some(v1::$variants::Message::Ping(v1::Ping { token })),
                }
            }

            fn pong(token: u64) -> Self {
                Self {
                    message: Some(v1::$variants::Message::Pong(v1::Pong { token })),
                }
            }

            fn sign_of_life(&self) -> Option<SignOfLife> {
                match &self.message {
                    Some(v1::$variants::Message::Ping(ping)) => Some(SignOfLife::Ping(ping.token)),
                    Some(v1::$variants::Message::Pong(pong)) => Some(SignOfLife::Pong(pong.token)),
                    _ => None,
                }
            }
        }
    };
}

control_message!(FromSource, from_source);
control_message!(FromDestination, from_destination);

/// What the control stream's writing thread is to do.
#[derive(Debug)]
pub(crate) enum Outgoing<M> {
    /// Write this.
    Say(M),
    /// Answer the peer's last ping; there is one of these at most.
    Pong,
    /// Close this direction after what was said, and end.
    HangUp,
    /// End and leave the connection as it is: data that the peer still sends must not reset it.
    End,
}

/// The control stream's writing thread: writes what is in the outbox, and a ping whenever a heartbeat is due, until
/// it is told to end or the outbox is dropped.
///
/// # Errors
/// The connection's; nothing is written after it.
pub(crate) fn write_control<M: ControlMessage>(
    sockets: &Sockets,
    outbox: &Receiver<Outgoing<M>>,
    heartbeat: Duration,
) -> Result<(), ControlError> {
    let mut socket = &sockets.control;
    let (mut due, mut pings) = (Instant::now(), 0);
    loop {
        let message = match outbox.recv_timeout(due.saturating_duration_since(Instant::now())) {
            Ok(Outgoing::Say(message)) => message,
            Ok(Outgoing::Pong) => match sockets.take_ping() {
                Some(token) => M::pong(token),
                None => continue,
            },
            Ok(Outgoing::End) => return Ok(()),
            Ok(Outgoing::HangUp) => return sockets.control.shutdown(Shutdown::Write).map_err(ControlError::Io),
            Err(RecvTimeoutError::Timeout) => {
                pings += 1;
                let first = pings < ROUND_TRIPS_KEPT;
                due = Instant::now() + if first { FIRST_PINGS.min(heartbeat) } else { heartbeat };
                M::ping(sockets.ping_token())
            }
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
        };
        write_message(&mut socket, &message)?;
    }
}

/// The control stream's reading thread: answers pings and delivers everything else until `deliver` returns false.
///
/// # Errors
/// The connection's, [`ControlError::Closed`] at its end.
pub(crate) fn read_control<Theirs: ControlMessage, Ours: ControlMessage>(
    sockets: &Sockets,
    outbox: &Sender<Outgoing<Ours>>,
    mut deliver: impl FnMut(Theirs) -> bool,
) -> Result<(), ControlError> {
    let mut socket = &sockets.control;
    loop {
        let message: Theirs = read_message(&mut socket)?;
        sockets.hear();
        match message.sign_of_life() {
            // The writing thread is gone only when the migration is over.
            Some(SignOfLife::Ping(token)) if sockets.pinged(token) => drop(outbox.send(Outgoing::Pong)),
            Some(SignOfLife::Ping(_)) => {}
            Some(SignOfLife::Pong(token)) => sockets.ping_answered(token),
            None if deliver(message) => {}
            None => return Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc;

    use super::*;

    fn pair() -> (TcpStream, TcpStream) {
        let (near, far) = UnixStream::pair().unwrap();
        (OwnedFd::from(near).into(), OwnedFd::from(far).into())
    }

    /// One side's connections, and the other end of the control stream.
    fn sockets() -> (Sockets, TcpStream) {
        let ((control, far), (page, _)) = (pair(), pair());
        let link = Link {
            control,
            pages: vec![page],
            late: None,
        };
        (Sockets::new(link, Liveness::default()).unwrap(), far)
    }

    #[test]
    fn of_a_thousand_pings_that_were_not_answered_yet_the_last_one_is() {
        let (sockets, far) = sockets();
        let (outbox, outgoing) = mpsc::channel::<Outgoing<v1::FromDestination>>();
        let pinging = std::thread::spawn(move || {
            (1..=1000).for_each(|token| write_message(&mut &far, &v1::FromSource::ping(token)).unwrap());
            far.shutdown(Shutdown::Write).unwrap();
            far
        });
        let ended = read_control::<v1::FromSource, _>(&sockets, &outbox, |_| true);
        assert!(matches!(ended, Err(ControlError::Closed)), "{ended:?}");
        let far = pinging.join().unwrap();

        outbox.send(Outgoing::End).unwrap();
        let waiting: Vec<_> = outgoing.try_iter().collect();
        assert!(
            matches!(waiting.as_slice(), [Outgoing::Pong, Outgoing::End]),
            "{} things wait to be said",
            waiting.len()
        );
        waiting.into_iter().for_each(|outgoing| outbox.send(outgoing).unwrap());
        write_control(&sockets, &outgoing, Duration::from_secs(60)).unwrap();
        drop(sockets);
        let answered = std::iter::from_fn(|| read_message::<v1::FromDestination>(&mut &far).ok());
        let pongs: Vec<_> = answered.filter_map(|message| message.sign_of_life()).collect();
        assert!(pongs.contains(&SignOfLife::Pong(1000)), "{pongs:?}");
    }
}
