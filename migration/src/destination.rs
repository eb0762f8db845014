//! The destination of a migration: a state machine, because the source decides what comes next.
//!
//! ```text
//!   handshake ─► population map ─► Copying ──State──► GuestStopped ──Go──► check manifest ─► restore ─► Loaded
//!                                   │  ▲ Barrier           │
//!                                   └──┘◄─────Disarm───────┘
//! ```
//!
//! Where its user allows that, a link that is lost while the source copies is not the end: what is here is kept, and over another link the
//! source hears what that is (`resume.rs`). Every thread of the old link has ended before, so that nothing of it is written later.
//!
//! The guest is never started here: what comes out waits for a permit. On any error the machine is gone, and nothing of
//! the guest is left on this host.

mod crew;
mod error;
mod hearing;
mod opening;
mod phase;
mod population;
mod received;
mod receiver;
mod report;
mod resume;
mod shared;
mod verifying;

use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::{Duration, Instant};

use crate::PageSet;
use crate::compress::Codecs;
use crate::guest::{DestinationGuest, FRAMES_PER_HUGE_PAGE, GuestMemory, GuestWas, Population, RestoredGuest};
use crate::handover::Attempt;
use crate::link::{Link, Sockets, UNHEARD};
use crate::postcopy::{Awaited, LatePages};
use crate::wire::Sums;
use crew::Crew;
pub use error::DestinationError;
use hearing::Hearing;
use opening::{handshake, load_population};
use phase::{Phase, Step};
use population::wanted_huge;
pub use report::{
    DestinationOrder, DestinationParameters, DestinationReport, DestinationSummary, Digests, LoadTimings, Loaded,
};
use resume::Kept;
use shared::Shared;

/// Receives the guest from the source at the other end of `link`. Blocks until the guest is loaded, or until it is
/// certain that it will not be; every thread that it started is joined when it returns, and every connection is closed.
///
/// `orders` and `reports` may have lost their other end: then nothing is ordered, and nobody listens.
///
/// # Errors
/// Why the guest did not arrive. Nothing was started and nothing was claimed.
pub fn run<G: DestinationGuest>(
    guest: G,
    mut link: Link,
    parameters: &DestinationParameters,
    orders: &Receiver<DestinationOrder>,
    reports: &Sender<DestinationReport>,
) -> Result<Loaded<G::Restored>, DestinationError> {
    let asked = Asked {
        parameters,
        orders,
        reports,
    };
    let memory = guest.memory();
    let mut shared = Shared::new(&*memory);
    let (mut guest, mut late_link) = (guest, None);
    let mut kept = Kept::new();
    let come = loop {
        late_link = link.late.take().or(late_link);
        let sockets = Sockets::new(link, parameters.liveness).map_err(|cause| DestinationError::Host {
            step: "set up the connections",
            cause,
        })?;
        shared.begin_session(&sockets, late_link.as_deref());
        let (given_back, error) = match over_link(guest, &sockets, &shared, &mut kept, asked) {
            Ok(come) => break come,
            Err(ended) => ended,
        };
        drop(sockets);
        if !kept.may_resume(&asked, &error) {
            return Err(error);
        }
        link = kept.another_link(&asked, error)?;
        guest = given_back;
    };
    match (come, late_link) {
        (Come::Whole(loaded), _) => Ok(loaded),
        (Come::Broken(error), _) => Err(error),
        (Come::InPart(guest, mut arrived), Some(link)) => {
            let late = await_late(
                &*memory,
                (&shared, kept.codecs),
                &mut arrived,
                *link,
                (parameters, reports),
            )?;
            let loaded = load(guest, arrived, &shared)?;
            Ok(Loaded {
                late: Some(late),
                ..loaded
            })
        }
        (Come::InPart(..), None) => Err(DestinationError::ManifestRefused(vec![
            "pages are missing, and there are no connections on which they could come".to_owned(),
        ])),
    }
}

/// Receives over one link, until the guest is here or the link, or more, is lost: then the guest is given back.
fn over_link<G: DestinationGuest>(
    guest: G,
    sockets: &Sockets,
    shared: &Shared,
    kept: &mut Kept,
    asked: Asked<'_>,
) -> Result<Come<G>, (G, DestinationError)> {
    let memory = guest.memory();
    thread::scope(|scope| {
        let _ending = Ending { sockets };
        let (events_in, events) = mpsc::sync_channel(UNHEARD);
        let (outbox, outgoing) = mpsc::channel();
        let mut hearing = Hearing::new(events, outbox, sockets, asked);
        let crew = Crew {
            scope,
            sockets,
            shared,
            memory: &*memory,
            events: events_in,
        };
        let received = crew
            .start_control(&hearing.outbox, outgoing, asked.parameters.liveness.heartbeat)
            .and_then(|()| receive(&guest, &mut hearing, &crew, kept));
        match received {
            // Its memory must be nobody else's when its missing pages begin to be awaited: not of those who back it ahead, either.
            Ok(arrived) if arrived.missing.is_some() => Ok(Come::InPart(guest, arrived)),
            Ok(arrived) => {
                // The threads go home while the machine is being built.
                sockets.cut();
                match load(guest, arrived, shared) {
                    Ok(loaded) => Ok(Come::Whole(loaded)),
                    Err(error) => Ok(Come::Broken(error)),
                }
            }
            Err(error) => {
                kept.next = hearing.take_next();
                if !kept.may_resume(&asked, &error) {
                    hearing.farewell(&error);
                }
                Err((guest, error))
            }
        }
    })
}

/// A guest that is here.
enum Come<G: DestinationGuest> {
    Whole(Loaded<G::Restored>),
    /// But for pages that come late; its machine is not built yet.
    InPart(G, Arrived),
    /// It came whole, and its machine could not be built: nothing is left of it.
    Broken(DestinationError),
}

/// From here on whoever touches a missing page waits for it: restoring the machine may be the first to do so.
fn await_late<M: GuestMemory>(
    memory: &M,
    (shared, codecs): (&Shared, Codecs),
    arrived: &mut Arrived,
    link: Link,
    (parameters, reports): (&DestinationParameters, &Sender<DestinationReport>),
) -> Result<LatePages, DestinationError> {
    let missing = arrived.missing.take().unwrap_or_else(|| PageSet::new(memory.shape()));
    // In the end there is what came before and what comes late.
    let mut populated = shared.received.to_set();
    populated.union_with(&missing);
    let populated = Population {
        populated: populated.runs().collect(),
        huge: Vec::new(),
    };
    let pages = memory.await_late(&missing).map_err(|cause| DestinationError::Guest {
        step: "wait for its missing pages",
        cause,
    })?;
    let unit = memory.late_unit();
    let awaited = Awaited {
        pages,
        missing,
        // What comes by huge pages is in huge pages.
        wanted_huge: match unit < FRAMES_PER_HUGE_PAGE {
            true => wanted_huge(&populated, memory.shape()),
            false => Vec::new(),
        },
        shape: memory.shape().clone(),
        unit,
        attempt: arrived.attempt,
        liveness: parameters.liveness,
        codecs,
        sums: match shared.digests.get() {
            Some(_) => Sums::Told,
            None => Sums::Absent,
        },
    };
    let reports = reports.clone();
    // Whoever does not listen does not want to know.
    let report = move |report| drop(reports.send(DestinationReport::Late(report)));
    LatePages::start(awaited, link, report).map_err(|cause| DestinationError::Host {
        step: "start a thread",
        cause,
    })
}

/// What the caller asked for.
#[derive(Clone, Copy)]
struct Asked<'a> {
    parameters: &'a DestinationParameters,
    orders: &'a Receiver<DestinationOrder>,
    reports: &'a Sender<DestinationReport>,
}

impl Asked<'_> {
    fn report(&self, report: DestinationReport) {
        // A caller that stopped listening still wants the guest received.
        let _ = self.reports.send(report);
    }
}

/// A guest that is here, in parts.
struct Arrived {
    attempt: Attempt,
    state: Vec<u8>,
    guest_was: GuestWas,
    /// Pages that come late, if some do.
    missing: Option<PageSet>,
    /// That of memory was compared; that of the state is the source's, still to be compared.
    digests: Option<Digests>,
    go_received: Instant,
    last_pages: Duration,
    verify: Duration,
}

/// Everything up to a checked manifest.
fn receive<G: DestinationGuest>(
    guest: &G,
    hearing: &mut Hearing<'_>,
    crew: &Crew<'_, '_, G::Memory>,
    kept: &mut Kept,
) -> Result<Arrived, DestinationError> {
    let identity = handshake(guest, hearing, crew, kept)?;
    if identity.session > 0 {
        kept.go_on(&identity, hearing, crew)?;
    }
    crew.start_receivers(&identity, kept.codecs)?;
    if !kept.begun {
        load_population(hearing, crew, kept)?;
    }
    let mut phase = Phase::Copying {
        disarmed: kept.copying.unwrap_or(0),
    };
    loop {
        kept.copying = phase.copying();
        match phase.step(hearing.message()?, hearing, crew)? {
            Step::Next(next) => phase = next,
            Step::Arrived(arrived) => return Ok(*arrived),
        }
    }
}

/// Builds the machine.
fn load<G: DestinationGuest>(
    guest: G,
    arrived: Arrived,
    shared: &Shared,
) -> Result<Loaded<G::Restored>, DestinationError> {
    let began = Instant::now();
    let restored = guest.restore(&arrived.state).map_err(DestinationError::Restore)?;
    let restore = began.elapsed();
    let mut verify = arrived.verify;
    if let Some(Digests { state: expected, .. }) = arrived.digests {
        let began = Instant::now();
        let found = restored.state_digest().map_err(DestinationError::Restore)?;
        if found != expected {
            let reason = format!("the state digests to {found:032x} here and to {expected:032x} at the source");
            return Err(DestinationError::ManifestRefused(vec![reason]));
        }
        verify += began.elapsed();
    }
    let Arrived {
        attempt,
        guest_was,
        go_received,
        last_pages,
        digests,
        ..
    } = arrived;
    Ok(Loaded {
        restored,
        attempt,
        guest_was,
        timings: LoadTimings {
            go_received,
            last_pages,
            restore,
            verify,
        },
        summary: DestinationSummary {
            rounds: shared.round.load(Ordering::Acquire),
            totals: shared.sum(),
        },
        digests,
        late: None,
    })
}

/// Sends every thread home when it goes out of scope, so that no way out leaves one behind.
struct Ending<'a> {
    sockets: &'a Sockets,
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.sockets.cut();
    }
}
