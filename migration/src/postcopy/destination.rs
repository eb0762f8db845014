//! The destination of late pages: a guest that is about to run, or runs, without all of its memory.
//!
//! ```text
//!   ferry-faults ─ a page is touched: zero at once if it is not missing, else asked for ─┐ urgent streams
//!   ferry-late   ─ sessions, one after the other:                                        ▼
//!                    each stream has a thread that takes frames in and supplies their pages ─► whoever waits goes on
//!                    the last one: nobody watches any more, AllHere, then huge pages again, over
//! ```
//!
//! Both threads outlive the migration's own and end by themselves.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, SyncSender, TryRecvError};
use std::thread::{self, Scope};
use std::time::{Duration, Instant};

use ferry_proto::stream::v1::{
    AllHere, FromDestination, FromSource, from_destination::Message as Reply, from_source::Message as Said,
};

use super::asking::Asking;
use super::gathering;
use super::taking::Taker;
use super::waiting::Shared;
use super::{Latency, SessionLost, URGENT_STREAMS};
use crate::PageSet;
use crate::compress::Codecs;
use crate::error_chain;
use crate::guest::{AbsentPages, FrameRun, GuestError, MemoryShape};
use crate::handover::Attempt;
use crate::link::{self, FAREWELL, Link, Liveness, Outgoing, Sockets, UNHEARD};
use crate::wire::{ControlError, FrameError, Spoken as _, StreamIdentity, Sums};

/// How long the threads wait at most before they look at what they were told.
const TICK: Duration = Duration::from_millis(20);

/// How often progress is told.
const PROGRESS: Duration = Duration::from_millis(250);

/// What a guest without all of its pages tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LateReport {
    /// How many pages are missing still.
    Progress {
        /// Pages.
        missing: u64,
    },
    /// The session is lost: who needs a page waits for the next one.
    LinkLost {
        /// Why, in words.
        reason: String,
    },
    /// Every page is here.
    AllHere(LateOutcome),
    /// This host cannot take pages in any more: whoever waits for one waits for ever.
    Failed {
        /// Why, in words.
        reason: String,
    },
}

/// What was measured of late pages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LateOutcome {
    /// Pages that were missing when the guest was handed over.
    pub pages: u64,
    /// How long they were waited for by whoever touched one.
    pub latency: Latency,
    /// The smallest round trip of the control stream lately; `None`: none was measured.
    pub round_trip: Option<Duration>,
    /// From GO until the last one was here.
    pub took: Duration,
    /// How many were found to be what was sent before anybody saw them; `None`: that was not asked for.
    pub verified: Option<u64>,
    /// How many were asked for again, for they were damaged on their way.
    pub sent_again: u64,
}

/// The pages of one guest that come late.
#[derive(Debug)]
pub struct LatePages {
    links: Sender<Link>,
    shared: Arc<Shared>,
}

impl LatePages {
    /// Begins to take pages in. The threads have the rights of the calling one.
    pub(crate) fn start(
        awaited: Awaited,
        link: Link,
        reports: impl Fn(LateReport) + Send + 'static,
    ) -> io::Result<Self> {
        let Awaited {
            pages,
            missing,
            wanted_huge,
            shape,
            unit,
            attempt,
            liveness,
            codecs,
            sums,
        } = awaited;
        let blocks = gathering::blocks(&wanted_huge, &missing);
        let shared = Arc::new(Shared::new(pages, missing, (shape, unit), sums));
        let (links, links_out) = mpsc::channel();
        let (faults, late) = (Arc::clone(&shared), Arc::clone(&shared));
        thread::Builder::new().name("ferry-faults".into()).spawn(move || {
            if let Err(error) = faults.watch()
                && !faults.is_over()
            {
                faults.fail(error_chain(&error));
            }
        })?;
        let supervisor = Supervisor {
            shared: late,
            blocks,
            links: links_out,
            reports: Box::new(reports),
            attempt,
            liveness,
            codecs,
            sums,
        };
        thread::Builder::new()
            .name("ferry-late".into())
            .spawn(move || supervisor.run(link))?;
        Ok(Self { links, shared })
    }

    /// Gives connections for another session. They take the place of those that are there.
    pub fn attach(&self, link: Link) {
        // Over: nothing is missing.
        let _ = self.links.send(link);
    }

    /// How many pages are missing.
    #[must_use]
    pub fn missing(&self) -> u64 {
        self.shared.left()
    }

    /// How it came out, once every page is here.
    #[must_use]
    pub fn outcome(&self) -> Option<LateOutcome> {
        self.shared.outcome()
    }
}

/// Memory whose missing pages are awaited.
pub(crate) struct Awaited {
    pub(crate) pages: Box<dyn AbsentPages>,
    pub(crate) missing: PageSet,
    /// Where huge pages are wanted once the missing ones are there: whole huge pages.
    pub(crate) wanted_huge: Vec<FrameRun>,
    pub(crate) shape: MemoryShape,
    /// How many pages come together.
    pub(crate) unit: u64,
    pub(crate) attempt: Attempt,
    pub(crate) liveness: Liveness,
    /// What pages may be compressed with.
    pub(crate) codecs: Codecs,
    /// Whether frames say what their pages add up to, so that these are checked before anybody sees them.
    pub(crate) sums: Sums,
}

/// What the threads of a session tell.
pub(super) enum Event {
    Said(FromSource),
    ControlLost(ControlError),
    StreamLost(u16, Option<FrameError>),
    Failed(GuestError),
    /// Pages were supplied, and none is missing.
    AllHere,
}

/// How often it is looked whether waiting for a link still leads anywhere.
const BETWEEN_LOOKS: Duration = Duration::from_millis(500);

struct Supervisor {
    shared: Arc<Shared>,
    /// Which of them are to be huge pages in the end.
    blocks: Vec<FrameRun>,
    links: Receiver<Link>,
    reports: Box<dyn Fn(LateReport) + Send>,
    attempt: Attempt,
    liveness: Liveness,
    codecs: Codecs,
    sums: Sums,
}

/// How a session ended.
enum Session {
    /// Every page is here.
    AllHere,
    Failed(String),
    Lost(SessionLost),
    /// Nobody wants the guest any more.
    Stopped,
}

impl Supervisor {
    fn run(self, first: Link) {
        let mut next = Some(first);
        let ended = loop {
            let link = match next.take() {
                Some(link) => link,
                None => match self.next_link() {
                    Ok(link) => link,
                    Err(ended) => break ended,
                },
            };
            let lost = match self.session(link, &mut next) {
                Session::Lost(lost) => lost,
                ended => break ended,
            };
            if let Some(reason) = self.shared.failure() {
                break Session::Failed(reason.clone());
            }
            if self.shared.left() == 0 {
                // It was lost with the last page: the source's agent asks ours.
                break match self.shared.finish() {
                    Ok(()) => Session::AllHere,
                    Err(error) => Session::Failed(error_chain(&error)),
                };
            }
            if !matches!(lost, SessionLost::Replaced) {
                let reason = error_chain(&lost);
                tracing::info!(reason, "a session of late pages is lost, whoever needs one waits");
                (self.reports)(LateReport::LinkLost { reason });
            }
        };
        match ended {
            Session::AllHere => {
                let outcome = self.shared.outcome().unwrap_or_default();
                (self.reports)(LateReport::AllHere(outcome));
                match gathering::gather(&*self.shared.pages, &self.blocks) {
                    Ok(gathered) => tracing::info!(?gathered, "huge pages again where pages came late"),
                    Err(error) => tracing::info!(reason = error_chain(&error), "pages that came late stay small"),
                }
            }
            Session::Failed(reason) => {
                self.shared.fail(reason.clone());
                (self.reports)(LateReport::Failed { reason });
            }
            // What is missing stays so: whoever waits goes with the process.
            Session::Stopped | Session::Lost(_) => self.shared.stop(),
        }
    }

    /// Waits for a link, and for whoever hears of touched pages: he may fail while there is none.
    fn next_link(&self) -> Result<Link, Session> {
        loop {
            match self.links.recv_timeout(BETWEEN_LOOKS) {
                Ok(link) => return Ok(link),
                Err(RecvTimeoutError::Disconnected) => return Err(Session::Stopped),
                Err(RecvTimeoutError::Timeout) => {}
            }
            if let Some(reason) = self.shared.failure() {
                return Err(Session::Failed(reason.clone()));
            }
        }
    }

    fn session(&self, link: Link, next: &mut Option<Link>) -> Session {
        let sockets = match Sockets::new(link, self.liveness) {
            Ok(sockets) => Arc::new(sockets),
            Err(error) => return Session::Lost(SessionLost::Host(error)),
        };
        let identity = StreamIdentity {
            instance: self.attempt.instance,
            migration: self.attempt.migration,
            epoch: self.attempt.epoch,
            streams: sockets.streams(),
            session: 0,
        };
        let (events_in, events) = mpsc::sync_channel(UNHEARD);
        let (outbox, outgoing) = mpsc::channel::<Outgoing<FromDestination>>();
        let ended = thread::scope(|scope| {
            // Nobody hears them once the scope waits for its threads: none may wait to be heard then.
            let events = events;
            let _ending = Ending(&sockets);
            let started = self.start(scope, &sockets, identity, (&outbox, outgoing), events_in);
            if let Err(error) = started {
                return Session::Lost(SessionLost::Host(error));
            }
            self.begin(&sockets, &outbox);
            self.until_all_here(&sockets, &events, &outbox, next)
        });
        self.shared.end_session();
        ended
    }

    /// Says what is missing, and asks for what is waited for.
    fn begin(&self, sockets: &Arc<Sockets>, outbox: &Sender<Outgoing<FromDestination>>) {
        for part in self.shared.tell_missing(self.attempt) {
            let message = Some(Reply::Missing(part));
            let _ = outbox.send(Outgoing::Say(FromDestination { message }));
        }
        let urgent = URGENT_STREAMS.min(sockets.pages.len()) as u16;
        let asking = Asking::new(Arc::clone(sockets), urgent, self.liveness.silence);
        self.shared.ask_on(asking);
    }

    fn start<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        sockets: &'scope Sockets,
        identity: StreamIdentity,
        (outbox, outgoing): (&Sender<Outgoing<FromDestination>>, Receiver<Outgoing<FromDestination>>),
        events: SyncSender<Event>,
    ) -> io::Result<()> {
        let (heard, outbox) = (events.clone(), outbox.clone());
        spawn(scope, "ferry-late-in".into(), move || {
            let deliver = |message| heard.send(Event::Said(message)).is_ok();
            if let Err(error) = link::read_control(sockets, &outbox, deliver) {
                let _ = heard.send(Event::ControlLost(error));
            }
        })?;
        let (lost, heartbeat) = (events.clone(), self.liveness.heartbeat);
        spawn(scope, "ferry-late-out".into(), move || {
            if let Err(error) = link::write_control(sockets, &outgoing, heartbeat) {
                let _ = lost.send(Event::ControlLost(error));
            }
        })?;
        let (shared, codecs, sums): (&Shared, _, _) = (&self.shared, self.codecs, self.sums);
        for (stream, socket) in (0u16..).zip(&sockets.pages) {
            let events = events.clone();
            spawn(scope, format!("ferry-late-{stream}"), move || {
                let taker = Taker {
                    stream,
                    socket,
                    sockets,
                    shared,
                    codecs,
                    sums,
                };
                // Nobody listens once the session is over.
                let event = match taker.run(&identity) {
                    Ok(event) => event,
                    Err(error) => Event::StreamLost(stream, error),
                };
                let _ = events.send(event);
            })?;
        }
        Ok(())
    }

    fn until_all_here(
        &self,
        sockets: &Sockets,
        events: &Receiver<Event>,
        outbox: &Sender<Outgoing<FromDestination>>,
        next: &mut Option<Link>,
    ) -> Session {
        let mut told = Instant::now();
        loop {
            match self.links.try_recv() {
                Ok(link) => {
                    *next = Some(link);
                    return Session::Lost(SessionLost::Replaced);
                }
                Err(TryRecvError::Disconnected) => return Session::Stopped,
                Err(TryRecvError::Empty) => {}
            }
            let silence = sockets.silence();
            if silence >= self.liveness.silence {
                return Session::Lost(SessionLost::Silent(silence));
            }
            if let Some(round_trip) = sockets.round_trip() {
                self.shared.note_round_trip(round_trip);
            }
            if told.elapsed() >= PROGRESS {
                told = Instant::now();
                let missing = self.shared.left();
                (self.reports)(LateReport::Progress { missing });
            }
            match events.recv_timeout(TICK) {
                Ok(Event::AllHere) => return self.end(events, outbox),
                Ok(Event::Failed(error)) => return Session::Failed(error_chain(&error)),
                Ok(Event::Said(FromSource {
                    message: Some(Said::Ping(_) | Said::Pong(_)),
                })) => {}
                Ok(Event::Said(other)) => {
                    return Session::Lost(SessionLost::Misbehaved(format!("unexpected: {}", other.kind())));
                }
                Ok(Event::ControlLost(error)) => return Session::Lost(SessionLost::Control(error)),
                Ok(Event::StreamLost(stream, error)) => return Session::Lost(SessionLost::Stream(stream, error)),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    return Session::Lost(SessionLost::Control(ControlError::Closed));
                }
            }
        }
    }

    /// The last page is here: nobody waits for one any more, and the source is told.
    fn end(&self, events: &Receiver<Event>, outbox: &Sender<Outgoing<FromDestination>>) -> Session {
        if let Err(error) = self.shared.finish() {
            return Session::Failed(error_chain(&error));
        }
        let message = Some(Reply::AllHere(AllHere {}));
        let _ = outbox.send(Outgoing::Say(FromDestination { message }));
        let _ = outbox.send(Outgoing::HangUp);
        // The source hangs up once it has heard it; if it does not, its agent asks ours.
        let deadline = Instant::now() + FAREWELL;
        loop {
            match events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(Event::ControlLost(_)) | Err(_) => return Session::AllHere,
                Ok(_) => {}
            }
        }
    }
}

fn spawn<'scope>(
    scope: &'scope Scope<'scope, '_>,
    name: String,
    work: impl FnOnce() + Send + 'scope,
) -> io::Result<()> {
    thread::Builder::new().name(name).spawn_scoped(scope, work).map(drop)
}

/// Sends the threads of a session home.
struct Ending<'a>(&'a Sockets);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.cut();
    }
}
