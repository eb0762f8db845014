//! The source of a migration: a script that reads from top to bottom.
//!
//! ```text
//!   handshake ─► population map ─► rounds ◄──────────────┐      (cold: the guest is stopped first, and there is one round)
//!                                    │ within the budget │ called off (DISARM)
//!                                    ▼                   │
//!                        Converged, small rounds ─► stop guest, last pages, state
//!                                                        │ grant traded for GO-sent
//!                                                        ▼
//!                                                     Parked
//! ```
//!
//! Where its user allows that, a link that is lost before the switchover is asked for is not the end: the copy is kept, the guest is what it
//! was, and over another link all goes on from what the destination holds (`resume.rs`).
//!
//! Every way out but GO goes through one place, [`run`]: the grant is traded for CANCELLED, the guest runs as it did, the
//! destination is told, and every thread is joined.

mod arming;
mod cold;
mod conversation;
mod heat;
mod hints;
mod lasting;
mod meter;
mod outcome;
mod parked;
mod report;
mod resume;
mod rounds;
mod switchover;
mod telling;
mod terms;
mod verifying;

use std::cell::Cell;
use std::net::TcpStream;
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::thread::{self, Scope, ScopedJoinHandle};

use ferry_proto::stream::v1::{self, HelloReply, from_source::Message as Said};

use crate::PageSet;
use crate::compress::{Codecs, Extent};
use crate::guest::{DirtyClearer, GuestEnd, SourceGuest};
use crate::handover::{Attempt, Grants, Traded};
use crate::link::{self, Link, Outgoing, Sockets, UNHEARD};
use crate::postcopy::{PagesToServe, ServeParameters};
use crate::precopy::{Finished, Sender as PageSender, Streams};
use crate::wire::{
    LATE_PAGES_SINCE, OLDEST_PROTOCOL, PROTOCOL, RESUMES_SINCE, StreamTotals, VERIFY_SINCE, Wishes, hello,
};
use cold::Halt;
use conversation::{Conversation, Event, Heard, Outbox};
use lasting::Lasting;
pub use meter::{Amounts, Copied, MOST_BEFORE_THE_END};
pub use outcome::{SourceError, SourceOutcome};
pub use parked::{NotResumable, Parked};
pub use report::{
    Blackout, Decided, Manner, OnTimeout, Overhead, Progress, RoundSummary, SourceOrder, SourceParameters,
    SourceReport, SourceSummary, Verified, Written,
};
#[cfg(any(fuzzing, test))]
pub(crate) use resume::Holding;
use resume::Kept;
pub(crate) use resume::Unacknowledged;
pub(crate) use rounds::BETWEEN_SMALL_ROUNDS;
use rounds::Copy;
use switchover::Switched;
pub use terms::{Cap, NewTerms, Terms};

/// Why the script stops short of GO.
#[derive(Debug)]
enum Stop {
    Error(SourceError),
    /// The link is lost before the switchover was asked for: there may be another one.
    LinkLost(SourceError),
    GuestEnded(GuestEnd),
}

impl From<SourceError> for Stop {
    fn from(error: SourceError) -> Self {
        Self::Error(error)
    }
}

/// Moves a running guest to the destination at the other end of `link`. Blocks until GO was sent, or until the guest
/// runs on here; every thread that it started is joined when it returns.
///
/// `orders` and `reports` may have lost their other end: then nothing is ordered, and nobody listens.
pub fn run<G: SourceGuest>(
    mut guest: G,
    link: Link,
    parameters: &SourceParameters,
    grants: &Grants,
    orders: &Receiver<SourceOrder>,
    reports: &Sender<SourceReport>,
) -> SourceOutcome<G> {
    let SourceParameters {
        instance,
        migration,
        epoch,
        ..
    } = *parameters;
    let mut attempt = Attempt {
        instance,
        migration,
        attempt: 1,
        epoch,
    };
    let mut summary = SourceSummary::default();
    let (mut halt, mut missing, mut kept) = (None, None, None);
    let mut late_link = None;
    let asked = Asked {
        parameters,
        grants,
        orders,
        reports,
    };
    let mut journey = Journey {
        guest: &mut guest,
        attempt: &mut attempt,
        summary: &mut summary,
        halt: &mut halt,
        late_streams: link.late_streams(),
        late_link: &mut late_link,
        missing: &mut missing,
        kept: &mut kept,
        sent: StreamTotals::default(),
    };
    let lasting = Lasting::new(asked);
    let ended = over_links(&mut journey, link, &lasting);
    lasting.tell_compression();
    summary.decisions = lasting.decided();
    summary.compression = lasting.packing().tally();
    let stop = match ended {
        Ok(sockets) => {
            let late = missing.zip(late_link).map(|(missing, link)| PagesToServe {
                missing,
                link: *link,
                parameters: ServeParameters {
                    attempt,
                    bandwidth: lasting.terms().bandwidth,
                    liveness: parameters.liveness,
                    verify: parameters.verify,
                    packing: lasting.packing(),
                },
            });
            return SourceOutcome::GoSent(Parked {
                guest,
                attempt,
                summary,
                sockets,
                late,
            });
        }
        Err(stop) => stop,
    };
    // From here on a grant of this migration is refused, whether it was on its way or not.
    if grants.close(attempt) == Traded::GoSent {
        tracing::error!(%attempt, "the register says GO-sent for a migration that did not send it");
    }
    guest.end_free_pages();
    guest.stop_tracking();
    let attempt = attempt.attempt;
    match stop {
        Stop::Error(error) | Stop::LinkLost(error) => SourceOutcome::Cancelled {
            guest,
            error,
            attempt,
            summary,
        },
        Stop::GuestEnded(end) => SourceOutcome::GuestEnded {
            guest,
            end,
            attempt,
            summary,
        },
    }
}

/// What the caller asked for.
#[derive(Clone, Copy)]
struct Asked<'a> {
    parameters: &'a SourceParameters,
    grants: &'a Grants,
    orders: &'a Receiver<SourceOrder>,
    reports: &'a Sender<SourceReport>,
}

impl Asked<'_> {
    fn report(&self, report: SourceReport) {
        // A caller that stopped listening still wants the guest moved.
        let _ = self.reports.send(report);
    }
}

/// What outlives the threads.
struct Journey<'a, G> {
    guest: &'a mut G,
    /// The attempt to be armed next, or the one under way.
    attempt: &'a mut Attempt,
    summary: &'a mut SourceSummary,
    /// Set once a guest that moves cold stands still.
    halt: &'a mut Option<Halt>,
    /// Page streams for pages that come late.
    late_streams: u32,
    /// The newest connections for them.
    late_link: &'a mut Option<Box<Link>>,
    /// Set with GO, if pages come late.
    missing: &'a mut Option<PageSet>,
    /// The copy while there is no link.
    kept: &'a mut Option<Kept>,
    /// What went over links that are lost.
    sent: StreamTotals,
}

/// The whole migration, over as many links as it takes; gives the connections of the last one.
fn over_links<G: SourceGuest>(
    journey: &mut Journey<'_, G>,
    mut link: Link,
    lasting: &Lasting<'_>,
) -> Result<Vec<TcpStream>, Stop> {
    let mut session = 0;
    loop {
        if let Some(late) = link.late.take() {
            // Where that cannot be had it is noticed when pages are due.
            if let Err(error) = late.keep_alive(lasting.asked.parameters.liveness.silence) {
                tracing::info!(%error, "the connections for late pages are not kept alive");
            }
            *journey.late_link = Some(late);
        }
        let sockets = Sockets::new(link, lasting.asked.parameters.liveness).map_err(|cause| {
            let step = "set up the connections";
            give_up(journey, lasting, SourceError::Host { step, cause }.into())
        })?;
        match with_threads(journey, &sockets, lasting, session) {
            Ok(()) => return Ok(sockets.into_streams()),
            Err(Stop::LinkLost(lost)) => {
                drop(sockets);
                let another = lasting.another_link(journey.guest, lost);
                link = another.map_err(|stop| give_up(journey, lasting, stop))?;
                session += 1;
            }
            // Once more for what ended it before its script began.
            Err(stop) => return Err(give_up(journey, lasting, stop)),
        }
    }
}

/// The way back: the grant first, then a guest that stands still. Gives why the migration ended.
fn give_up<G: SourceGuest>(journey: &mut Journey<'_, G>, lasting: &Lasting<'_>, stop: Stop) -> Stop {
    let traded = lasting.asked.grants.close(*journey.attempt);
    let (halt, guest_was) = (journey.halt.take(), lasting.asked.parameters.guest_was);
    cold::undo(journey.guest, halt, traded, guest_was, stop)
}

/// The whole migration over one link, once the threads are there.
fn script<G: SourceGuest>(
    journey: &mut Journey<'_, G>,
    conversation: &mut Conversation<'_>,
    streams: &Streams<G::Clearer>,
) -> Result<(), Stop> {
    let reply = handshake(journey, conversation).map_err(|stop| conversation.lasting.lost(stop))?;
    let mut copy = Copy::take_up(journey, conversation, streams)?;
    let ended = until_given_away(&mut copy, &reply);
    copy.keep_if_lost(ended)
}

fn until_given_away<G: SourceGuest>(copy: &mut Copy<'_, '_, G>, reply: &HelloReply) -> Result<(), Stop> {
    let lasting = copy.conversation.lasting;
    copy.begin(reply).map_err(|stop| lasting.lost(stop))?;
    loop {
        // From there on, a lost link ends the migration, and what is so of the guest follows from the handover.
        let grant = copy.until_armed().map_err(|stop| match copy.is_armed() {
            true => stop,
            false => lasting.lost(stop),
        })?;
        match switchover::attempt(copy, grant)? {
            Switched::GoSent => return Ok(()),
            Switched::CalledOff => {}
        }
    }
}

fn handshake<G: SourceGuest>(
    journey: &mut Journey<'_, G>,
    conversation: &mut Conversation<'_>,
) -> Result<HelloReply, Stop> {
    use crate::guest::GuestMemory as _;

    let memory = journey.guest.memory();
    let identity = conversation.identity();
    let late_streams = journey.late_streams;
    let verify = conversation.asked.parameters.verify;
    let profile = journey.guest.profile();
    let packing = conversation.lasting.packing();
    let wishes = Wishes {
        late_streams,
        verify,
        codecs: packing.wanted(),
    };
    conversation.say(Said::Hello(hello(&identity, memory.shape(), profile, wishes)));
    let reply = conversation.wait_for(journey.guest, |heard| match heard {
        Heard::HelloReply(reply) => Ok(reply),
        other => Err(other),
    })?;
    if !reply.refusals.is_empty() {
        return Err(SourceError::Incompatible(reply.refusals).into());
    }
    if !(OLDEST_PROTOCOL..=PROTOCOL).contains(&reply.protocol) {
        let what = format!("it chose protocol version {}, which was not offered", reply.protocol);
        return Err(SourceError::Misbehaved(what).into());
    }
    if late_streams > 0 && reply.protocol < LATE_PAGES_SINCE {
        let reason = format!(
            "it speaks protocol version {}, in which no page comes late",
            reply.protocol
        );
        return Err(SourceError::Incompatible(vec![reason]).into());
    }
    if verify && reply.protocol < VERIFY_SINCE {
        let reason = format!(
            "it speaks protocol version {}, in which nothing is compared",
            reply.protocol
        );
        return Err(SourceError::Incompatible(vec![reason]).into());
    }
    if conversation.session > 0 && reply.protocol < RESUMES_SINCE {
        let what = format!(
            "it goes on in protocol version {}, which has no such links",
            reply.protocol
        );
        return Err(SourceError::Misbehaved(what).into());
    }
    let may_pay = !conversation.asked.parameters.one_host || conversation.lasting.terms().bandwidth.is_some();
    let agreed = packing.agree(Codecs::from_wire(&reply.codecs), may_pay, Extent::of(&*memory));
    agreed.map_err(|reason| SourceError::Incompatible(vec![reason]))?;
    conversation.lasting.speaks(reply.protocol);
    conversation.asked.report(SourceReport::Accepted {
        protocol: reply.protocol,
    });
    Ok(reply)
}

/// Runs the script among its threads, and ends them whichever way it went.
fn with_threads<G: SourceGuest>(
    journey: &mut Journey<'_, G>,
    sockets: &Sockets,
    lasting: &Lasting<'_>,
    session: u32,
) -> Result<(), Stop> {
    let (memory, asked) = (journey.guest.memory(), &lasting.asked);
    let digests = lasting.digests(&*memory);
    let streams = Streams::<G::Clearer>::new(sockets.streams(), lasting.terms().bandwidth, digests, lasting.packing());
    let (events_in, events) = mpsc::sync_channel(UNHEARD);
    let (outbox, outgoing) = mpsc::channel();
    journey.summary.streams = sockets.streams();
    let ended = thread::scope(|scope| {
        let ending = Ending {
            sockets,
            streams: &streams,
            parked: Cell::new(false),
        };
        let mut conversation = Conversation::new(events, outbox, sockets, lasting, &streams.bandwidth, session);
        let writer = start_control(scope, sockets, asked, &conversation.outbox, outgoing, &events_in)?;
        let identity = conversation.identity();
        for (stream, socket) in (0u16..).zip(&sockets.pages) {
            let Streams {
                feed,
                bandwidth,
                totals,
                digests,
                packing,
            } = &streams;
            let totals = &totals[usize::from(stream)];
            let sender = PageSender {
                stream,
                streams: sockets.streams(),
                socket,
                memory: &*memory,
                feed,
                bandwidth,
                packing,
                totals,
                digests: digests.as_deref(),
            };
            let events = events_in.clone();
            spawn(scope, format!("ferry-send-{stream}"), move || {
                // Nobody listens once the migration is over.
                let round_sent = || drop(events.send(Event::RoundSent));
                if let Err(error) = sender.run(&identity, round_sent) {
                    let _ = events.send(Event::StreamFailed { stream, error });
                }
            })?;
        }
        match script(journey, &mut conversation, &streams) {
            Ok(()) => {
                conversation.end();
                // Nothing is heard from here on, so the writing thread never waits to tell something.
                drop(conversation);
                // GO is on the connection when the writing thread is done. A panic there ends the scope with one as well.
                let _ = writer.join();
                ending.parked.set(true);
                Ok(())
            }
            Err(stop @ Stop::LinkLost(_)) => Err(stop),
            Err(stop) => {
                let stop = give_up(journey, lasting, stop);
                conversation.farewell(&stop);
                Err(stop)
            }
        }
    });
    journey.sent = journey.sent.plus(streams.sum());
    update(journey.summary, journey.sent, sockets);
    // The threads have ended: what they were sending is neither sent nor re-armed any further.
    if let Some(Finished { set, free }) = streams.feed.finish() {
        journey.summary.hinted_pages += free.as_ref().map_or(0, PageSet::count);
        if let Some(kept) = journey.kept.as_mut() {
            let round = kept.round;
            kept.hints.leaves_out(free);
            kept.unacknowledged = Some(Unacknowledged { session, round, set });
        }
    }
    ended
}

/// Starts the control stream's two threads and gives the writing one.
fn start_control<'scope, 'env>(
    scope: &'scope Scope<'scope, 'env>,
    sockets: &'scope Sockets,
    asked: &Asked<'_>,
    outbox: &Outbox,
    outgoing: Receiver<Outgoing<v1::FromSource>>,
    events: &SyncSender<Event>,
) -> Result<ScopedJoinHandle<'scope, ()>, SourceError> {
    let (outbox, heard, heartbeat) = (outbox.clone(), events.clone(), asked.parameters.liveness.heartbeat);
    spawn(scope, "ferry-control-in".into(), move || {
        let deliver = |message| heard.send(Event::Said(message)).is_ok();
        if let Err(error) = link::read_control(sockets, &outbox, deliver) {
            let _ = heard.send(Event::ControlLost(error));
        }
    })?;
    let events = events.clone();
    spawn(scope, "ferry-control-out".into(), move || {
        if let Err(error) = link::write_control(sockets, &outgoing, heartbeat) {
            let _ = events.send(Event::ControlLost(error));
        }
    })
}

fn spawn<'scope>(
    scope: &'scope Scope<'scope, '_>,
    name: String,
    work: impl FnOnce() + Send + 'scope,
) -> Result<ScopedJoinHandle<'scope, ()>, SourceError> {
    let spawned = thread::Builder::new().name(name).spawn_scoped(scope, work);
    spawned.map_err(|cause| SourceError::Host {
        step: "start a thread",
        cause,
    })
}

fn update(summary: &mut SourceSummary, sent: StreamTotals, sockets: &Sockets) {
    summary.bytes_sent = sent.bytes;
    summary.zero_pages = sent.zero_pages;
    summary.round_trip = sockets.round_trip();
}

/// Sends every thread home when it goes out of scope, so that no way out leaves one behind.
struct Ending<'a, C: DirtyClearer> {
    sockets: &'a Sockets,
    streams: &'a Streams<C>,
    /// GO may still be on its way: the connections stay open.
    parked: Cell<bool>,
}

impl<C: DirtyClearer> Drop for Ending<'_, C> {
    fn drop(&mut self) {
        self.streams.close();
        if self.parked.get() {
            self.sockets.stop_reading();
        } else {
            self.sockets.cut();
        }
    }
}
