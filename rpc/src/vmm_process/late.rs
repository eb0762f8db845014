//! Pages that come after GO: serving them out of a guest that was given away, and waiting for them in one that arrived.

use std::num::NonZeroU64;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{self, Sender, SyncSender};
use std::thread;

use anyhow::Context;
use ferry_migration::postcopy::{
    self, LateOutcome, LatePages, LateReport, PagesToServe, ServeOrder, ServeReport, Served,
};
use ferry_proto::vmm::v1::report::Report as Body;
use ferry_proto::vmm::v1::{self as wire};

use super::convert::{self, ms};
use super::events::Event;
use super::jail;
use super::memory::SharedMemory;
use super::migrating::{forward, link};
use super::vmm::{Holding, Vmm};

/// This process's part in late pages; it has one at most at a time.
#[derive(Default)]
pub(super) struct Late {
    /// Takes orders to who serves; dropping it ends that.
    serving: Option<Sender<ServeOrder>>,
    /// The cap that was ordered last, or none, while the guest was sent: the order may have come too late for what is served.
    pub(super) cap: Option<Option<NonZeroU64>>,
    /// Waits for what to serve while the guest is sent.
    pub(super) server: Option<Server>,
    /// Until the last page is here.
    awaited: Option<LatePages>,
    /// A machine whose guest ended before all of its memory was there.
    kept: Option<Holding>,
}

/// Threads that wait for what they are to serve; dropped before that, they end.
pub(super) struct Server {
    hand_in: SyncSender<(SharedMemory, PagesToServe)>,
    orders: Sender<ServeOrder>,
}

impl Late {
    /// The memory of the guest is complete.
    ///
    /// # Errors
    /// Pages of it are still on their way: what would need all of it, or give some of it up, has to wait.
    pub(super) fn check_whole(&self) -> anyhow::Result<()> {
        let missing = self.awaited.as_ref().map_or(0, LatePages::missing);
        anyhow::ensure!(
            missing == 0,
            "{missing} pages of the guest are still on their way from the host that it came from"
        );
        Ok(())
    }

    /// The guest runs on here: nobody else needs its pages.
    pub(super) fn stop_serving(&mut self) {
        self.serving = None;
    }

    /// A machine that ended is given back, unless some of its threads may be waiting for pages: if it went, they would read zeroes, and
    /// could write them to a disk. It goes with the process.
    pub(super) fn keep_unless_whole(&mut self, ended: Holding) {
        if self.check_whole().is_err() {
            self.kept = Some(ended);
        }
    }
}

impl Vmm {
    /// Starts the threads that will serve late pages, before the guest is given away: a host that has none left after GO would lose it.
    ///
    /// # Errors
    /// The host has none left.
    pub(super) fn prepare_to_serve(&self) -> anyhow::Result<Server> {
        let (hand_in, handed_in) = mpsc::sync_channel::<(SharedMemory, PagesToServe)>(1);
        let (orders, orders_out) = mpsc::channel();
        let (reports, report_receiver) = mpsc::channel();
        forward(report_receiver, self.events.clone(), Event::ServeReport)?;
        let events = self.events.clone();
        let run = move || {
            jail::narrow(jail::Kind::Migration);
            // All pages came before GO, or it never came.
            let Ok((memory, pages)) = handed_in.recv() else { return };
            let served = postcopy::serve(&memory, pages, &orders_out, &reports);
            let _ = events.send(Event::Served(served));
        };
        thread::Builder::new()
            .name("migration".to_owned())
            .spawn(run)
            .context("failed to start a thread")?;
        Ok(Server { hand_in, orders })
    }

    /// Begins to serve what GO called missing.
    pub(super) fn serve_late(&mut self, server: Option<Server>, memory: SharedMemory, pages: PagesToServe) {
        let count = pages.missing.count();
        self.standing.late = Some(wire::Late {
            what: "progress".to_owned(),
            pages: count,
            missing_pages: count,
            ..wire::Late::default()
        });
        match server {
            Some(Server { hand_in, orders }) if hand_in.send((memory, pages)).is_ok() => {
                if let Some(cap) = self.late.cap.take() {
                    // Nobody takes it where nobody serves, which is told.
                    let _ = orders.send(ServeOrder::Bandwidth(cap));
                }
                self.late.serving = Some(orders);
            }
            _ => {
                // Its agent asks for another session, hears that there is none, and calls the pages lost.
                let reason = "the thread that was to serve late pages has ended".to_owned();
                tracing::error!(reason, "nobody will get them");
                self.say_late(|late| (late.what, late.reason) = ("link-lost".to_owned(), reason));
            }
        }
    }

    /// The guest runs at its destination: vCPUs, devices and disks go, its memory stays.
    pub(super) fn serve_only(&mut self) -> anyhow::Result<Body> {
        match &self.holding {
            Holding::Serving => {}
            Holding::Parked(_) if self.standing.late.is_some() => {
                // Who serves has a handle on the memory.
                self.holding = Holding::Serving;
                tracing::info!("the guest runs elsewhere: only its memory is kept");
            }
            _ => anyhow::bail!("no pages are served here: the machine is {}", self.machine_word()),
        }
        Ok(Body::Done(wire::Done {}))
    }

    /// Begins to wait for pages.
    pub(super) fn await_late(&mut self, pages: LatePages) {
        let missing = pages.missing();
        self.standing.late.get_or_insert_with(|| wire::Late {
            what: "progress".to_owned(),
            pages: missing,
            missing_pages: missing,
            ..wire::Late::default()
        });
        self.late.awaited = Some(pages);
    }

    /// Other connections for a session of late pages.
    pub(super) fn late_link(&mut self, order: &wire::LateLink, descriptors: Vec<OwnedFd>) -> anyhow::Result<Body> {
        anyhow::ensure!(
            self.standing.migration == order.migration,
            "the connections are of migration {}, which is not the one here",
            order.migration
        );
        let link = link(descriptors)?;
        match (&self.late.serving, &self.late.awaited) {
            (Some(serving), _) => {
                let taken = serving.send(ServeOrder::Link(link));
                anyhow::ensure!(taken.is_ok(), "pages are served no more");
            }
            (None, Some(awaited)) => awaited.attach(link),
            (None, None) => anyhow::bail!("no pages come late here: the machine is {}", self.machine_word()),
        }
        Ok(Body::Done(wire::Done {}))
    }

    /// Other terms for what is sent, or for the pages that come late: of these nothing but the bandwidth is left to be changed.
    pub(super) fn retune(&mut self, retune: &wire::Retune) -> anyhow::Result<Body> {
        match &self.late.serving {
            Some(serving) => {
                let is_bandwidth_alone = retune.max_downtime_us.is_none() && retune.timeout_ms.is_none();
                anyhow::ensure!(
                    is_bandwidth_alone,
                    "the guest was handed over, nothing but its bandwidth is left to be changed"
                );
                if let Some(cap) = convert::new_terms(retune).bandwidth {
                    let taken = serving.send(ServeOrder::Bandwidth(cap));
                    anyhow::ensure!(taken.is_ok(), "pages are served no more");
                }
            }
            None => {
                self.sending()?.retune(retune);
                let cap = convert::new_terms(retune).bandwidth;
                self.late.cap = cap.or(self.late.cap);
            }
        }
        Ok(Body::Done(wire::Done {}))
    }

    /// Who serves tells how far it is.
    pub(super) fn serve_report(&mut self, report: ServeReport) {
        if self.late.serving.is_none() {
            // The guest runs on here meanwhile.
            return;
        }
        match report {
            ServeReport::Progress { left, bytes_sent } => self.say_late(|late| {
                (late.what, late.missing_pages, late.bytes_sent) = ("progress".to_owned(), left, bytes_sent);
            }),
            ServeReport::LinkLost { reason } => self.say_late(|late| {
                (late.what, late.reason) = ("link-lost".to_owned(), reason);
            }),
        }
    }

    /// It serves no more.
    pub(super) fn served(&mut self, served: Served) {
        if let Served::All { bytes_sent } = served {
            self.late.stop_serving();
            self.say_late(|late| {
                (late.what, late.missing_pages, late.bytes_sent) = ("served".to_owned(), 0, bytes_sent);
            });
        }
    }

    /// Who waits for pages tells how far that is.
    pub(super) fn late_report(&mut self, report: LateReport) {
        match report {
            LateReport::Progress { missing } => self.say_late(|late| {
                (late.what, late.missing_pages) = ("progress".to_owned(), missing);
            }),
            LateReport::LinkLost { reason } => self.say_late(|late| {
                (late.what, late.reason) = ("link-lost".to_owned(), reason);
            }),
            LateReport::AllHere(outcome) => {
                tracing::info!(
                    pages = outcome.pages,
                    took_ms = ms(outcome.took),
                    "the last page is here"
                );
                self.say_late(|late| note_outcome(late, &outcome));
                self.late.awaited = None;
            }
            LateReport::Failed { reason } => self.say_late(|late| {
                (late.what, late.reason) = ("failed".to_owned(), reason);
            }),
        }
    }

    /// How late pages are: what was told last, with how many are missing now. The last ones come before that is told.
    pub(super) fn late_now(&self) -> Option<wire::Late> {
        let mut late = self.standing.late.clone();
        if let (Some(late), Some(awaited)) = (&mut late, &self.late.awaited) {
            late.missing_pages = awaited.missing();
        }
        late
    }

    /// What an agent that connects later has to know as well.
    fn say_late(&mut self, change: impl FnOnce(&mut wire::Late)) {
        let late = self.standing.late.get_or_insert_default();
        change(late);
        let late = late.clone();
        self.report(0, Body::Late(late));
    }
}

fn note_outcome(late: &mut wire::Late, outcome: &LateOutcome) {
    late.what = "all-here".to_owned();
    late.pages = outcome.pages;
    late.missing_pages = 0;
    late.waits = outcome.latency.buckets().to_vec();
    late.longest_wait_ms = ms(outcome.latency.longest());
    late.median_wait_ms = outcome.latency.median().map(ms);
    late.round_trip_ms = outcome.round_trip.map(ms);
    late.took_ms = ms(outcome.took);
    late.verified_pages = outcome.verified;
    late.sent_again_pages = outcome.sent_again;
}
