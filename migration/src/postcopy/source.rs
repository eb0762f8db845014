//! The source of late pages: a stopped copy of a guest that runs elsewhere, or is about to.
//!
//! [`serve`] blocks until the destination has every page or nobody wants it to go on. It reads the memory and decides nothing: that the
//! guest is another host's by now is for its agent to know.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, SyncSender, TryRecvError};
use std::thread::{self, Scope};
use std::time::{Duration, Instant};

use ferry_proto::stream::v1::{FromDestination, FromSource, from_destination::Message as Reply};

use super::sending::LateFrames;
use super::unsent::{Unsent, chunk_pages};
use super::{SessionLost, Table, URGENT_STREAMS};
use crate::PageSet;
use crate::compress::Packing;
use crate::error_chain;
use crate::guest::GuestMemory;
use crate::handover::Attempt;
use crate::link::{self, Link, Liveness, Outgoing, Sockets, UNHEARD};
use crate::precopy::Bandwidth;
use crate::wire::{ControlError, FrameError, Spoken as _, StreamIdentity};

/// How long a session waits at most before it looks at its orders and the clock again.
const TICK: Duration = Duration::from_millis(20);

/// How often progress is told.
const PROGRESS: Duration = Duration::from_millis(250);

/// What is left to be sent of a guest whose GO listed missing pages, and the first connections for it.
#[derive(Debug)]
pub struct PagesToServe {
    /// The pages that GO called missing.
    pub missing: PageSet,
    /// For the first session.
    pub link: Link,
    /// How they are served.
    pub parameters: ServeParameters,
}

/// What is asked of a source of pages while it serves.
#[derive(Debug)]
pub enum ServeOrder {
    /// Another link: a session over it follows the one that was lost, or ends the one that goes on.
    Link(Link),
    /// Another cap in bytes a second, or none, from now on and in every session to come.
    Bandwidth(Option<NonZeroU64>),
}

/// How pages are served.
#[derive(Clone, Debug)]
pub struct ServeParameters {
    /// The attempt whose GO listed them.
    pub attempt: Attempt,
    /// The most bytes a second; where somebody waits for a page the others make up for it. Until [`ServeOrder::Bandwidth`] says otherwise.
    pub bandwidth: Option<NonZeroU64>,
    /// When the destination counts as dead, and the session as lost.
    pub liveness: Liveness,
    /// Each frame says what its pages add up to, so that the destination can tell what was damaged on the way.
    pub verify: bool,
    /// How what nobody waits for is compressed, which goes on as the rounds before did it, or begins: what a link carries shows late, too. Who waits for a page does
    /// not wait for a compressor.
    pub(crate) packing: Arc<Packing>,
}

/// What a source of pages tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServeReport {
    /// How far it is: pages not sent yet of this session, and bytes put on all streams so far.
    Progress {
        /// Pages not sent yet.
        left: u64,
        /// Bytes sent, of all sessions.
        bytes_sent: u64,
    },
    /// The session is lost: other connections are wanted.
    LinkLost {
        /// Why, in words.
        reason: String,
    },
}

/// How serving ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// The destination has every page, and said so.
    All {
        /// Bytes sent, of all sessions.
        bytes_sent: u64,
    },
    /// Nobody wants it to go on: the other end of the orders is gone.
    Stopped,
}

/// Serves pages over the first link, and after it is lost over each that is ordered, until the destination has them all or
/// the other end of `orders` is dropped. Every thread that it started is joined when it returns.
pub fn serve<M: GuestMemory>(
    memory: &M,
    pages: PagesToServe,
    orders: &Receiver<ServeOrder>,
    reports: &Sender<ServeReport>,
) -> Served {
    let mut source = Source {
        memory,
        parameters: &pages.parameters,
        bandwidth: pages.parameters.bandwidth,
        orders,
        reports,
        bytes_sent: 0,
        next: None,
    };
    let mut link = Some(pages.link);
    tracing::debug!(pages = pages.missing.count(), "pages come late");
    loop {
        let current = match link.take().or_else(|| source.next.take()) {
            Some(link) => link,
            None => match orders.recv() {
                Ok(ServeOrder::Link(link)) => link,
                Ok(ServeOrder::Bandwidth(cap)) => {
                    source.bandwidth = cap;
                    continue;
                }
                Err(_) => return Served::Stopped,
            },
        };
        match source.session(current) {
            Ok(Over::AllHere) => {
                return Served::All {
                    bytes_sent: source.bytes_sent,
                };
            }
            Ok(Over::Stopped) => return Served::Stopped,
            Err(SessionLost::Replaced) => {}
            Err(lost) => {
                let reason = error_chain(&lost);
                tracing::info!(reason, "a session of late pages is lost");
                // Whoever does not listen does not want to know.
                let _ = reports.send(ServeReport::LinkLost { reason });
            }
        }
    }
}

struct Source<'a, M> {
    memory: &'a M,
    parameters: &'a ServeParameters,
    /// The cap that holds now.
    bandwidth: Option<NonZeroU64>,
    orders: &'a Receiver<ServeOrder>,
    reports: &'a Sender<ServeReport>,
    /// By sessions before this one.
    bytes_sent: u64,
    /// Came while another session went on.
    next: Option<Link>,
}

/// How a session came to be the last one.
enum Over {
    /// The destination said that it has every page.
    AllHere,
    /// Nobody wants it to go on.
    Stopped,
}

/// What the threads tell.
enum Event {
    Said(FromDestination),
    ControlLost(ControlError),
    StreamLost(u16, Option<FrameError>),
}

/// What the threads of a session share.
pub(super) struct Shared<'a, M> {
    pub(super) memory: &'a M,
    pub(super) parameters: &'a ServeParameters,
    pub(super) sockets: &'a Sockets,
    pub(super) unsent: Unsent,
    pub(super) bandwidth: Bandwidth,
    pub(super) sent: AtomicU64,
}

impl<M> Shared<'_, M> {
    /// How many streams there are for what nobody waits for.
    pub(super) fn pushing_streams(&self) -> u32 {
        self.sockets.pages.len().saturating_sub(URGENT_STREAMS).max(1) as u32
    }
}

impl<M: GuestMemory> Source<'_, M> {
    fn session(&mut self, link: Link) -> Result<Over, SessionLost> {
        let liveness = self.parameters.liveness;
        let sockets = Sockets::new(link, liveness).map_err(SessionLost::Host)?;
        let shared = Shared {
            memory: self.memory,
            parameters: self.parameters,
            sockets: &sockets,
            unsent: Unsent::new(chunk_pages(self.memory.late_unit())),
            bandwidth: Bandwidth::new(self.bandwidth),
            sent: 0.into(),
        };
        let Attempt {
            instance,
            migration,
            epoch,
            ..
        } = self.parameters.attempt;
        let identity = StreamIdentity {
            instance,
            migration,
            epoch,
            streams: sockets.streams(),
            session: 0,
        };
        let (events_in, events) = mpsc::sync_channel(UNHEARD);
        let (outbox, outgoing) = mpsc::channel::<Outgoing<FromSource>>();
        let ended = thread::scope(|scope| {
            // Nobody hears them once the scope waits for its threads: none may wait to be heard then.
            let events = events;
            let ending = Ending(&shared);
            start_control(scope, &sockets, outbox, outgoing, liveness.heartbeat, &events_in)?;
            for (stream, socket) in (0u16..).zip(&sockets.pages) {
                let (shared, events) = (&shared, events_in.clone());
                let is_urgent = usize::from(stream) < URGENT_STREAMS;
                spawn(scope, format!("ferry-late-{stream}"), move || {
                    let mut frames = LateFrames::new(stream, socket, shared);
                    let ended = match frames.open(&identity) {
                        Ok(()) if is_urgent => frames.answer(),
                        Ok(()) => frames.push(),
                        Err(error) => Err(error),
                    };
                    // Nobody listens once the session is over.
                    let _ = events.send(Event::StreamLost(stream, ended.err()));
                })?;
            }
            let ended = self.until_all_here(&shared, &events);
            drop(ending);
            ended
        });
        self.bytes_sent += shared.sent.into_inner();
        ended
    }

    fn until_all_here(&mut self, shared: &Shared<'_, M>, events: &Receiver<Event>) -> Result<Over, SessionLost> {
        let mut table = Some(Table::new(self.memory.shape()));
        let mut told = Instant::now();
        loop {
            match self.orders.try_recv() {
                Ok(ServeOrder::Bandwidth(cap)) => {
                    self.bandwidth = cap;
                    shared.bandwidth.set(cap);
                }
                Ok(ServeOrder::Link(link)) => {
                    self.next = Some(link);
                    return Err(SessionLost::Replaced);
                }
                Err(TryRecvError::Disconnected) => return Ok(Over::Stopped),
                Err(TryRecvError::Empty) => {}
            }
            let silence = shared.sockets.silence();
            if silence >= self.parameters.liveness.silence {
                return Err(SessionLost::Silent(silence));
            }
            if told.elapsed() >= PROGRESS
                && let Some(left) = shared.unsent.left()
            {
                told = Instant::now();
                let bytes_sent = self.bytes_sent + shared.sent.load(Ordering::Relaxed);
                let _ = self.reports.send(ServeReport::Progress { left, bytes_sent });
            }
            match events.recv_timeout(TICK) {
                Ok(Event::Said(message)) => match &message.message {
                    Some(Reply::Missing(part)) => {
                        let Some(mut growing) = table.take() else {
                            return Err(SessionLost::Misbehaved("it told twice what is missing".to_owned()));
                        };
                        growing.take(part, self.memory).map_err(SessionLost::Misbehaved)?;
                        if part.last {
                            growing.whole().into_iter().for_each(|set| shared.unsent.begin(set));
                        } else {
                            table = Some(growing);
                        }
                    }
                    Some(Reply::AllHere(_)) => return Ok(Over::AllHere),
                    _ => return Err(SessionLost::Misbehaved(format!("unexpected: {}", message.kind()))),
                },
                Ok(Event::ControlLost(error)) => return Err(SessionLost::Control(error)),
                Ok(Event::StreamLost(stream, error)) => return Err(SessionLost::Stream(stream, error)),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(SessionLost::Control(ControlError::Closed)),
            }
        }
    }
}

fn start_control<'scope>(
    scope: &'scope Scope<'scope, '_>,
    sockets: &'scope Sockets,
    outbox: Sender<Outgoing<FromSource>>,
    outgoing: Receiver<Outgoing<FromSource>>,
    heartbeat: Duration,
    events: &SyncSender<Event>,
) -> Result<(), SessionLost> {
    let heard = events.clone();
    spawn(scope, "ferry-late-in".into(), move || {
        let deliver = |message| heard.send(Event::Said(message)).is_ok();
        if let Err(error) = link::read_control(sockets, &outbox, deliver) {
            let _ = heard.send(Event::ControlLost(error));
        }
    })?;
    let events = events.clone();
    spawn(scope, "ferry-late-out".into(), move || {
        if let Err(error) = link::write_control(sockets, &outgoing, heartbeat) {
            let _ = events.send(Event::ControlLost(error));
        }
    })
}

fn spawn<'scope>(
    scope: &'scope Scope<'scope, '_>,
    name: String,
    work: impl FnOnce() + Send + 'scope,
) -> Result<(), SessionLost> {
    let spawned = thread::Builder::new().name(name).spawn_scoped(scope, work);
    spawned.map(drop).map_err(SessionLost::Host)
}

/// Sends the threads of a session home.
struct Ending<'a, 'b, M>(&'a Shared<'b, M>);

impl<M> Drop for Ending<'_, '_, M> {
    fn drop(&mut self) {
        self.0.unsent.close();
        self.0.bandwidth.close();
        self.0.sockets.cut();
    }
}
