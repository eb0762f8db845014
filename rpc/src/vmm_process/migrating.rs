//! The machine on its way: the migration has a thread of its own and takes the guest by value.

use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::Duration;

use anyhow::Context;
use ferry_migration::Link;
use ferry_migration::destination::{
    self, DestinationError, DestinationOrder, DestinationParameters, DestinationReport, Loaded,
};
use ferry_migration::handover::Epoch;
use ferry_migration::source::{self, SourceError, SourceOrder, SourceOutcome, SourceReport};
use ferry_proto::vmm::v1::report::Report as Body;
use ferry_proto::vmm::v1::{self as wire};
use ferry_proto::wire_uuid;

use super::convert::{self, attempt_to_wire, go_sent, guest_ended, instant_ns, monotonic_ns, ms, progress};
use super::events::Event;
use super::guest::{LocalGuest, RestoredMachine};
use super::jail;
use super::vmm::{Holding, Vmm};
use crate::error_chain;

/// A migration out of here, as its owner sees it: the guest is with the migration's thread.
pub(super) struct Sending {
    orders: Sender<SourceOrder>,
}

/// A migration into here, as its owner sees it: the machine is with the migration's thread.
pub(super) struct Loading {
    /// None while a snapshot is being read: nothing is ordered of that.
    pub(super) orders: Option<Sender<DestinationOrder>>,
}

impl Sending {
    /// Asks the migration to switch over after its round, whatever its budget.
    pub(super) fn force_complete(&self) {
        // One that is over has switched, or its outcome is on the way.
        let _ = self.orders.send(SourceOrder::ForceComplete);
    }

    /// Tells the migration what it may take from now on.
    pub(super) fn retune(&self, retune: &wire::Retune) {
        let _ = self.orders.send(SourceOrder::Retune(convert::new_terms(retune)));
    }

    /// Asks the migration to end. Before, its attempt must have been traded for CANCELLED.
    pub(super) fn abort(&self, reason: String) {
        // A migration that is over has nobody to ask; its outcome is on the way.
        let _ = self.orders.send(SourceOrder::Abort { reason });
    }
}

/// A guest that arrived whole and waits for its permit.
pub(super) struct ReadyGuest(Loaded<RestoredMachine>);

impl ReadyGuest {
    pub(super) fn into_guest(self) -> LocalGuest {
        self.0.restored.0
    }
}

impl Vmm {
    /// Begins to send the guest over the connections that came with the order.
    pub(super) fn send(&mut self, order: &wire::Send, descriptors: Vec<OwnedFd>) -> anyhow::Result<Body> {
        anyhow::ensure!(
            matches!(self.holding, Holding::Here(_)),
            "the guest is {}",
            self.machine_word()
        );
        anyhow::ensure!(
            self.user_paused == order.user_paused,
            "the agent and this VMM do not agree on whether the user paused the guest"
        );
        self.late.check_whole()?;
        let parameters = convert::source_parameters(order, self.instance)?;
        if let Holding::Here(guest) = &mut self.holding {
            guest.copy_disks(&order.copied_disks)?;
        }
        let link = whole_link(descriptors, order.late_streams)?;
        let server = (order.late_streams > 0).then(|| self.prepare_to_serve()).transpose()?;
        let (orders, order_receiver) = mpsc::channel();
        let (reports, report_receiver) = mpsc::channel();
        forward(report_receiver, self.events.clone(), |report| {
            Event::SendReport(Box::new(report))
        })?;
        let (hand_in, guest) = mpsc::sync_channel::<Box<LocalGuest>>(1);
        let (grants, events) = (Arc::clone(&self.grants), self.events.clone());
        let run = move || {
            jail::narrow(jail::Kind::Migration);
            let Ok(guest) = guest.recv() else { return };
            let outcome = source::run(*guest, link, &parameters, &grants, &order_receiver, &reports);
            let _ = events.send(Event::SendOutcome(Box::new(outcome)));
        };
        // The guest is given to a thread that exists: if none can be had, it stays here.
        thread::Builder::new()
            .name("migration".to_owned())
            .spawn(run)
            .context("failed to start a thread")?;
        self.end_sample("a migration of the guest began");
        let Holding::Here(guest) = std::mem::replace(&mut self.holding, Holding::Sending(Sending { orders })) else {
            anyhow::bail!("the guest is gone");
        };
        anyhow::ensure!(hand_in.send(guest).is_ok(), "the migration's thread ended");
        self.standing.migration.clone_from(&order.migration);
        self.standing.send_ended = None;
        self.standing.late = None;
        (self.late.server, self.late.cap) = (server, None);
        self.standing.converged_attempt = 0;
        Ok(Body::Done(wire::Done {}))
    }

    /// Begins to load a guest from the connections that came with the order.
    pub(super) fn receive(&mut self, order: &wire::Receive, descriptors: Vec<OwnedFd>) -> anyhow::Result<Body> {
        anyhow::ensure!(
            matches!(self.holding, Holding::Blank(_)),
            "the machine is {}",
            self.machine_word()
        );
        let parameters = DestinationParameters {
            instance: self.instance,
            migration: wire_uuid("migration", &order.migration)?,
            epoch: Epoch(order.epoch),
            liveness: Default::default(),
            resume_window: Duration::from_millis(order.resume_window_ms),
        };
        if let Holding::Blank(blank) = &self.holding {
            blank.disks.lock_to_copy(&order.copied_disks, parameters.epoch)?;
        }
        let copied = match &self.holding {
            Holding::Blank(blank) => blank.disks.to_copy(&order.copied_disks, &order.copied_bytes)?,
            _ => Vec::new(),
        };
        let link = whole_link(descriptors, order.late_streams)?;
        // Of a migration into here nothing but another link is ordered: the agent ends it by ending this process.
        let (orders, order_receiver) = mpsc::channel();
        let (reports, report_receiver) = mpsc::channel();
        forward(report_receiver, self.events.clone(), Event::LoadReport)?;
        let loading = Holding::Loading(Loading { orders: Some(orders) });
        let Holding::Blank(mut blank) = std::mem::replace(&mut self.holding, loading) else {
            anyhow::bail!("the machine is gone");
        };
        blank.epoch = parameters.epoch;
        blank.copied = copied;
        let events = self.events.clone();
        let run = move || {
            jail::narrow(jail::Kind::Migration);
            let outcome = destination::run(*blank, link, &parameters, &order_receiver, &reports);
            let _ = events.send(Event::LoadOutcome(Box::new(outcome)));
        };
        thread::Builder::new()
            .name("migration".to_owned())
            .spawn(run)
            .context("failed to start a thread")?;
        self.standing.migration.clone_from(&order.migration);
        Ok(Body::Done(wire::Done {}))
    }

    /// The migration out of here tells how far it is: most of it goes to the agent.
    pub(super) fn send_report(&mut self, report: SourceReport) {
        let current = self.standing.progress.get_or_insert_default();
        let body = match report {
            SourceReport::Accepted { protocol } => {
                tracing::info!(protocol, "the destination accepted the guest");
                return;
            }
            SourceReport::Copying {
                populated_pages,
                copied,
            } => {
                current.remaining_pages = populated_pages;
                current.copied = Some(convert::copied(copied));
                Body::Progress(current.clone())
            }
            SourceReport::Progress(now) => {
                current.remaining_pages = now.remaining_pages;
                current.bytes_sent = now.bytes_sent;
                current.zero_pages = now.zero_pages;
                current.hinted_pages = now.hinted_pages;
                current.throughput_bytes_per_s = now.throughput_bytes_per_s as f64;
                current.copied = Some(convert::copied(now.copied));
                current.disk_waits = Some(convert::disk_waits(now.disk_waits));
                Body::Progress(current.clone())
            }
            SourceReport::Round {
                round,
                copied,
                disk_waits,
                decided,
            } => {
                current.copied = Some(convert::copied(copied));
                current.disk_waits = Some(convert::disk_waits(disk_waits));
                convert::add(&mut current.rounds, convert::round(&round));
                current.remaining_pages = round.dirty_pages;
                current.hinted_pages = current.hinted_pages.max(round.hinted_pages);
                current.throttle_percent = decided.throttle;
                current.decision.clone_from(&decided.words);
                convert::add(&mut current.decisions, convert::decision(&decided));
                Body::Progress(current.clone())
            }
            SourceReport::Decided(decided) => {
                tracing::info!(deed = decided.deed, words = decided.words, "decided");
                current.decision.clone_from(&decided.words);
                convert::add(&mut current.decisions, convert::decision(&decided));
                Body::Progress(current.clone())
            }
            SourceReport::Converged { attempt, predicted } => {
                self.standing.converged_attempt = attempt;
                Body::Converged(wire::Converged {
                    attempt,
                    predicted_ms: ms(predicted),
                })
            }
            SourceReport::LinkLost { reason, patience } => {
                self.link_lost(reason, patience);
                return;
            }
            SourceReport::Resumed { held_pages, due_pages } => {
                tracing::info!(held_pages, due_pages, "the copy goes on over another link");
                current.remaining_pages = due_pages;
                self.standing.link_lost = None;
                Body::LinkBack(wire::LinkBack { held_pages })
            }
            SourceReport::Switching { attempt } => {
                tracing::info!(%attempt, "switching over");
                return;
            }
            SourceReport::Disarmed { attempt, reason } => {
                self.standing.converged_attempt = 0;
                tracing::info!(%attempt, reason, "the switchover was called off");
                Body::Disarmed(wire::Disarmed {
                    attempt: Some(attempt_to_wire(attempt)),
                    reason,
                })
            }
        };
        self.report(0, body);
    }

    /// There is no link on which a copy goes on, and another one may come.
    fn link_lost(&mut self, reason: String, patience: Duration) {
        if !matches!(self.holding, Holding::Sending(_) | Holding::Loading(_)) {
            // Its end was told first.
            return;
        }
        let until_ns = monotonic_ns().saturating_add(u64::try_from(patience.as_nanos()).unwrap_or(u64::MAX));
        let lost = wire::LinkLost { reason, until_ns };
        self.standing.link_lost = Some(lost.clone());
        self.report(0, Body::LinkLost(lost));
    }

    /// Another link for a copy.
    pub(super) fn reconnect(&mut self, order: &wire::Reconnect, descriptors: Vec<OwnedFd>) -> anyhow::Result<Body> {
        anyhow::ensure!(
            self.standing.migration == order.migration,
            "the link is of migration {}, which is not the one here",
            order.migration
        );
        let link = Box::new(whole_link(descriptors, order.late_streams)?);
        let is_taken = match &self.holding {
            Holding::Sending(sending) => sending.orders.send(SourceOrder::Reconnect(link)).is_ok(),
            Holding::Loading(Loading { orders: Some(orders) }) => {
                orders.send(DestinationOrder::Reconnect(link)).is_ok()
            }
            _ => false,
        };
        anyhow::ensure!(
            is_taken,
            "nothing is being copied: the machine is {}",
            self.machine_word()
        );
        Ok(Body::Done(wire::Done {}))
    }

    /// The migration into here tells how far it is.
    pub(super) fn load_report(&mut self, report: DestinationReport) {
        match report {
            DestinationReport::Late(report) => self.late_report(report),
            DestinationReport::LinkLost { reason, patience } => self.link_lost(reason, patience),
            DestinationReport::Resumed => {
                tracing::info!("the copy goes on over another link");
                self.standing.link_lost = None;
                self.report(0, Body::LinkBack(wire::LinkBack::default()));
            }
            report => tracing::debug!(?report, "loading"),
        }
    }

    /// The migration out of here is over.
    pub(super) fn send_outcome(&mut self, outcome: SourceOutcome<LocalGuest>) {
        self.standing.converged_attempt = 0;
        self.standing.link_lost = None;
        self.standing.progress = None;
        let server = self.late.server.take();
        match outcome {
            SourceOutcome::GoSent(mut parked) => {
                let go = go_sent(&parked);
                if let Some(pages) = parked.take_late() {
                    // Before anything else: the guest may wait for one already.
                    self.serve_late(server, parked.guest().moving(), pages);
                }
                self.standing.last_go = Some(go.clone());
                self.holding = Holding::Parked(Box::new(parked));
                self.report(0, Body::GoSent(go));
            }
            SourceOutcome::Cancelled {
                guest, error, summary, ..
            } => {
                let reason = error_chain(&error);
                tracing::info!(error = %reason, "the migration ended before GO");
                let ended = wire::SendEnded {
                    reason,
                    kind: kind(&error).to_owned(),
                    guest: None,
                    progress: Some(progress(&summary)),
                };
                self.holding = Holding::Here(Box::new(guest));
                self.standing.send_ended = Some(ended.clone());
                self.report(0, Body::SendEnded(ended));
                // What the guest said while nobody looked.
                let _ = self.events.send(Event::Guest);
            }
            SourceOutcome::GuestEnded { end, summary, .. } => {
                let ended = wire::SendEnded {
                    reason: "the guest stopped".to_owned(),
                    kind: "guest-ended".to_owned(),
                    guest: Some(guest_ended(&end)),
                    progress: Some(progress(&summary)),
                };
                self.standing.send_ended = Some(ended.clone());
                self.report(0, Body::SendEnded(ended));
                self.ended(end);
            }
        }
    }

    /// The migration into here is over.
    pub(super) fn load_outcome(&mut self, outcome: Result<Loaded<RestoredMachine>, DestinationError>) {
        self.standing.link_lost = None;
        match outcome {
            Ok(mut loaded) => {
                if let Some(pages) = loaded.late.take() {
                    self.await_late(pages);
                }
                let hex = |digest: Option<u128>| digest.map(|digest| format!("{digest:032x}")).unwrap_or_default();
                let ready = wire::Ready {
                    attempt: Some(attempt_to_wire(loaded.attempt)),
                    load_ms: ms(loaded.timings.last_pages + loaded.timings.restore),
                    go_read_ns: instant_ns(loaded.timings.go_received),
                    memory_digest: hex(loaded.digests.map(|digests| digests.memory)),
                    state_digest: hex(loaded.digests.map(|digests| digests.state)),
                    late_pages: self.standing.late.as_ref().map_or(0, |late| late.pages),
                };
                self.standing.ready = Some(ready.clone());
                self.holding = Holding::Ready(Box::new(ReadyGuest(loaded)));
                self.report(0, Body::Ready(ready));
            }
            Err(error) => {
                let reason = error_chain(&error);
                tracing::info!(reason, "loading the guest failed");
                self.holding = Holding::Nothing;
                self.report(0, Body::LoadFailed(wire::LoadFailed { reason }));
            }
        }
    }
}

/// The connections of a migration: behind its own, those for so many streams of late pages, if there are any.
fn whole_link(mut descriptors: Vec<OwnedFd>, late_streams: u32) -> anyhow::Result<Link> {
    if late_streams == 0 {
        return link(descriptors);
    }
    let own = descriptors.len().checked_sub(late_streams as usize + 1);
    let late = descriptors.split_off(own.context("there are fewer connections than late streams")?);
    let mut whole = link(descriptors)?;
    whole.late = Some(Box::new(link(late)?));
    Ok(whole)
}

/// The control stream, then the page streams.
pub(super) fn link(descriptors: Vec<OwnedFd>) -> anyhow::Result<Link> {
    let mut streams = descriptors.into_iter().map(TcpStream::from);
    let control = streams.next().context("no connections came with the order")?;
    let pages: Vec<_> = streams.collect();
    anyhow::ensure!(!pages.is_empty(), "no page stream came with the order");
    for stream in pages.iter().chain([&control]) {
        // Agents open them with a runtime; the engine blocks on them.
        stream
            .set_nonblocking(false)
            .context("failed to make a connection blocking")?;
    }
    Ok(Link {
        control,
        pages,
        late: None,
    })
}

pub(super) fn forward<T: Send + 'static>(
    from: Receiver<T>,
    to: Sender<Event>,
    wrap: impl Fn(T) -> Event + Send + 'static,
) -> anyhow::Result<()> {
    let run = move || {
        jail::narrow(jail::Kind::Control);
        while let Ok(report) = from.recv() {
            if to.send(wrap(report)).is_err() {
                return;
            }
        }
    };
    thread::Builder::new()
        .name("reports".to_owned())
        .spawn(run)
        .context("failed to start a thread")?;
    Ok(())
}

/// Why a migration ended, in the words of the protocol.
fn kind(error: &SourceError) -> &'static str {
    match error {
        SourceError::Aborted(_) => "cancelled",
        SourceError::TimedOut { .. } => "timeout",
        SourceError::Incompatible(_) | SourceError::Refused(_) => "refused",
        SourceError::Silent(_)
        | SourceError::LinkStaysLost { .. }
        | SourceError::StreamLost { .. }
        | SourceError::LateLinkLost(_) => "link",
        SourceError::ControlLost(_) if error.is_lost_link() => "link",
        SourceError::ControlLost(_) | SourceError::Misbehaved(_) | SourceError::Differs(_) => "peer",
        SourceError::ForeignGrant(_) | SourceError::Guest { .. } | SourceError::Host { .. } => "local",
    }
}
