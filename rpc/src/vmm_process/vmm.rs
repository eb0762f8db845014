//! The owner of the machine: orders and events in, reports out.
//!
//! ```text
//!   nothing ─build─► here ─send─► sending ─GO─► parked ─permit(higher epoch)─► here
//!      │               ▲             │ called off          (or the agent kills this process)
//!      │               └─────────────┘
//!      └─build(incoming)─► blank ─receive─► loading ─GO read─► ready ─permit─► here
//!                            └───restore──► loading ─────────► here, without a right to run yet
//!   here ─snapshot─► snapshotting ─written, or not─► here
//!   here, sending ─the guest ended─► ended
//!   parked, with pages missing at its destination ─it runs there─► serving
//! ```
//!
//! A guest starts to run in one place, [`Vmm::permit`], and only with a permit of its agent.

mod asked;
mod permit;

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::Duration;

use ferry_migration::guest::GuestEnd;
use ferry_migration::handover::{Grants, Permits, Traded};
use ferry_migration::source::Parked;
use ferry_proto::vmm::v1::order::Order as Command;
use ferry_proto::vmm::v1::report::Report as Body;
use ferry_proto::vmm::v1::{self as wire, Order, Report};
use ferry_proto::{OLDEST_VMM_PROTOCOL, required, wire_uuid};
use ferry_vmm::{BalloonLevel, CardTraffic, ConsoleInput, MachineEvent, RunState};
use uuid::Uuid;

use super::adapter::end_of;
use super::console::ConsoleLog;
use super::convert::{attempt_from_wire, guest_ended};
use super::events::{Connection, Event};
use super::frames;
use super::guest::{BlankGuest, Blueprint, LocalGuest, Purpose};
use super::late::Late;
use super::migrating::{Loading, ReadyGuest, Sending};
use super::reporting;
use super::sampling::Sampling;
use crate::vmm_channel;

/// The pause between two tries of what a guest asked for and cannot have yet.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// What this process holds.
pub(super) enum Holding {
    Nothing,
    Here(Box<LocalGuest>),
    Snapshotting,
    Sending(Sending),
    Parked(Box<Parked<LocalGuest>>),
    /// Nothing but memory, which `late` serves.
    Serving,
    Blank(Box<BlankGuest>),
    Loading(Loading),
    Ready(Box<ReadyGuest>),
    Ended,
}

/// One VMM process.
pub(super) struct Vmm {
    folder: PathBuf,
    /// Told when a machine is to be built, if it could not be opened.
    console_log: io::Result<ConsoleLog>,
    pub(super) events: Sender<Event>,
    pub(super) instance: Uuid,
    pub(super) holding: Holding,
    pub(super) grants: Arc<Grants>,
    permits: Permits,
    pub(super) user_paused: bool,
    started_mark: PathBuf,
    console: Option<ConsoleInput>,
    balloon: Option<BalloonLevel>,
    traffic: Vec<CardTraffic>,
    pub(super) late: Late,
    /// What is being found out of the guest that is here.
    pub(super) sampling: Option<Sampling>,
    agent: Option<(UnixStream, Connection)>,
    newest_connection: Option<Connection>,
    /// The newest version of the protocol that it speaks.
    protocol: u32,
    /// What an agent that connects later has to know.
    pub(super) standing: wire::Standing,
}

impl Vmm {
    /// A process that holds nothing yet.
    pub(super) fn new(
        folder: PathBuf,
        console_log: io::Result<ConsoleLog>,
        events: Sender<Event>,
        protocol: u32,
    ) -> Self {
        Self {
            folder,
            console_log,
            events,
            instance: Uuid::nil(),
            holding: Holding::Nothing,
            grants: Arc::default(),
            permits: Permits::new(Uuid::nil()),
            user_paused: false,
            started_mark: PathBuf::new(),
            console: None,
            balloon: None,
            traffic: Vec::new(),
            late: Late::default(),
            sampling: None,
            agent: None,
            newest_connection: None,
            protocol,
            standing: wire::Standing {
                version: protocol,
                pid: std::process::id(),
                ..Default::default()
            },
        }
    }

    /// Serves until no event can come any more.
    pub(super) fn serve(mut self, events: &Receiver<Event>) {
        while let Some(event) = self.next(events) {
            self.take(event);
        }
    }

    /// Waits for what happens next; a reset that could not be carried out yet, and the next look of a sample, come by themselves. None: nothing
    /// can happen any more.
    fn next(&self, events: &Receiver<Event>) -> Option<Event> {
        let look_again = match &self.holding {
            Holding::Here(guest) if !guest.inbox.is_empty() => Some((LOOK_AGAIN, Event::Guest)),
            _ => None,
        };
        let sample = self.sampling.as_ref().map(|sampling| (sampling.rest(), Event::Sample));
        let Some((rest, due)) = sample.into_iter().chain(look_again).min_by_key(|(rest, _)| *rest) else {
            return events.recv().ok();
        };
        match events.recv_timeout(rest) {
            Ok(event) => Some(event),
            Err(RecvTimeoutError::Timeout) => Some(due),
            Err(RecvTimeoutError::Disconnected) => None,
        }
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Connected(socket, connection) => {
                self.end_sample("another connection of the agent was made");
                if let Some((old, _)) = self.agent.replace((socket, connection)) {
                    let _ = old.shutdown(std::net::Shutdown::Both);
                }
                self.newest_connection = Some(connection);
            }
            Event::Order(connection, order, descriptors) if self.newest_connection == Some(connection) => {
                let number = order.number;
                let answer = self.obey(*order, descriptors).unwrap_or_else(|error| {
                    Some(Body::Refused(wire::Refused {
                        reason: format!("{error:#}"),
                    }))
                });
                if let Some(body) = answer {
                    self.report(number, body);
                }
            }
            Event::Order(..) => tracing::info!("threw away an order of an earlier agent connection"),
            Event::Disconnected(connection) => {
                if self.agent.as_ref().is_some_and(|&(_, current)| current == connection) {
                    self.agent = None;
                    self.end_sample("the agent hung up");
                }
            }
            Event::Sample => self.look_at_sample(),
            Event::Guest => self.look_at_guest(),
            Event::SendReport(report) => self.send_report(*report),
            Event::SendOutcome(outcome) => self.send_outcome(*outcome),
            Event::ServeReport(report) => self.serve_report(report),
            Event::Served(served) => self.served(served),
            Event::LoadReport(report) => self.load_report(report),
            Event::LoadOutcome(outcome) => self.load_outcome(*outcome),
            Event::SnapshotOutcome(outcome) => self.snapshot_outcome(outcome),
            Event::RestoreOutcome(outcome) => self.restore_outcome(outcome),
        }
    }

    /// Obeys an order. What it has to answer; None: the answer comes later.
    fn obey(&mut self, order: Order, descriptors: Vec<OwnedFd>) -> anyhow::Result<Option<Body>> {
        let number = order.number;
        // To a build of this version, what is newer is no order at all.
        let known = order
            .order
            .filter(|order| vmm_channel::brought_by(order).0 <= self.protocol);
        let answer = match required("order", known)? {
            Command::Sample(sample) => return self.sample(number, sample),
            Command::EndSample(_) => {
                self.end_sample("nobody waits for it any more");
                Ok(Body::Done(wire::Done {}))
            }
            Command::Hello(hello) => {
                if hello.oldest_version > self.protocol || hello.newest_version < OLDEST_VMM_PROTOCOL {
                    anyhow::bail!(
                        "the agent speaks versions {} to {}, this VMM {OLDEST_VMM_PROTOCOL} to {}",
                        hello.oldest_version,
                        hello.newest_version,
                        self.protocol
                    );
                }
                self.standing.version = self.protocol.min(hello.newest_version);
                Ok(Body::Standing(self.standing()))
            }
            Command::Ping(_) => Ok(Body::Standing(self.standing())),
            Command::Build(build) => self.build(build, descriptors),
            Command::Permit(permit) => self.permit(&permit),
            Command::Pause(pause) => self.pause(pause.epoch),
            Command::Resume(resume) => self.resume(resume.epoch),
            Command::Reboot(_) => self.reboot(),
            Command::PressPowerButton(press) => self.press_power_button(press.epoch),
            Command::ConsoleInput(input) => self.console_input(&input.bytes),
            Command::SetBalloon(order) => self.set_balloon(order),
            Command::Profile(_) => self.profile(),
            Command::ForceComplete(_) => {
                self.sending()?.force_complete();
                Ok(Body::Done(wire::Done {}))
            }
            Command::Retune(retune) => self.retune(&retune),
            Command::ServePages(_) => self.serve_only(),
            Command::LateLink(link) => self.late_link(&link, descriptors),
            Command::Reconnect(link) => self.reconnect(&link, descriptors),
            Command::Send(send) => self.send(&send, descriptors),
            Command::Receive(receive) => self.receive(&receive, descriptors),
            Command::Snapshot(snapshot) => self.snapshot(&snapshot, descriptors),
            Command::Restore(restore) => self.restore(&restore, descriptors),
            Command::Grant(grant) => {
                let attempt = attempt_from_wire(grant.attempt)?;
                anyhow::ensure!(matches!(self.holding, Holding::Sending(_)), "nothing is being sent");
                // An agent gives an order until it is answered, also when the migration that it was meant for is over: held,
                // it would bind the guest for ever.
                anyhow::ensure!(
                    self.standing.migration == attempt.migration.to_string(),
                    "{attempt} is not of the migration that is under way"
                );
                self.grants.offer(attempt)?;
                Ok(Body::Done(wire::Done {}))
            }
            Command::CallOff(call_off) => {
                let attempt = attempt_from_wire(call_off.attempt)?;
                let traded = self.grants.trade_for_cancelled(attempt);
                if let (Traded::Cancelled, true, Holding::Sending(sending)) = (traded, call_off.end, &self.holding) {
                    sending.abort(call_off.reason);
                }
                Ok(Body::Traded(wire::Traded {
                    go_sent: traded == Traded::GoSent,
                }))
            }
        };
        answer.map(Some)
    }

    /// The migration out of here, as long as its guest has not been given away.
    pub(super) fn sending(&self) -> anyhow::Result<&Sending> {
        match &self.holding {
            Holding::Sending(sending) => Ok(sending),
            Holding::Parked(_) => anyhow::bail!("the guest was handed over"),
            _ => anyhow::bail!("nothing is being sent: the machine is {}", self.machine_word()),
        }
    }

    fn build(&mut self, build: wire::Build, descriptors: Vec<OwnedFd>) -> anyhow::Result<Body> {
        anyhow::ensure!(
            matches!(self.holding, Holding::Nothing),
            "a machine was built here before"
        );
        let spec = required("spec", build.spec)?;
        self.instance = wire_uuid("spec.instance", &spec.instance)?;
        self.permits = Permits::new(self.instance);
        self.standing.instance.clone_from(&spec.instance);
        self.started_mark = PathBuf::from(build.started_mark);
        let purpose = if build.incoming {
            Purpose::Incoming
        } else {
            Purpose::Boot
        };
        let console = match &self.console_log {
            Ok(log) => log.clone(),
            Err(error) => anyhow::bail!("failed to open the console log in {}: {error}", self.folder.display()),
        };
        let blueprint = Blueprint::new(&self.folder, &spec, purpose, descriptors)?;
        let blank = blueprint.blank(console, self.events.clone())?;
        self.holding = if build.incoming {
            Holding::Blank(Box::new(blank))
        } else {
            let guest = blank.boot()?;
            self.console = Some(guest.console_input());
            Holding::Here(Box::new(guest))
        };
        Ok(Body::Done(wire::Done {}))
    }

    /// A vCPU said something. While a migration has the machine, it looks for itself.
    fn look_at_guest(&mut self) {
        let Holding::Here(guest) = &mut self.holding else {
            return;
        };
        let ended = match guest.inbox.take() {
            None => return,
            // Loading its kernel could have to wait for pages, and whoever brings connections for them waits for this thread.
            Some(reset @ MachineEvent::ResetRequested) if self.late.check_whole().is_err() => {
                return guest.inbox.put_back(reset);
            }
            Some(MachineEvent::ResetRequested) => match guest.reset_asked() {
                Ok(_) => return,
                Err(error) => GuestEnd::Crashed(format!("failed to reset: {error:#}")),
            },
            Some(event) => end_of(event),
        };
        self.ended(ended);
    }

    /// The guest ended by itself: its memory is given back now, the word of it stays for the agent.
    pub(super) fn ended(&mut self, end: GuestEnd) {
        self.end_sample("the guest ended");
        tracing::info!(?end, "the guest ended");
        self.console = None;
        self.balloon = None;
        let ended = guest_ended(&end);
        self.standing.ended = Some(ended.clone());
        let before = std::mem::replace(&mut self.holding, Holding::Ended);
        self.late.keep_unless_whole(before);
        self.report(0, Body::GuestEnded(ended));
    }

    /// What an agent that connects must know.
    fn standing(&self) -> wire::Standing {
        let to_wire = super::convert::attempt_to_wire;
        wire::Standing {
            machine: self.machine_word().to_owned(),
            epoch: self.permits.had().0,
            user_paused: self.user_paused,
            held: self.grants.held().map(to_wire),
            go_sent: self.grants.go_sent().map(to_wire),
            cancelled: self.grants.cancelled().map(to_wire),
            balloon: self.balloon.as_ref().map(|level| wire::Balloon {
                wanted_pages: level.wanted_pages(),
                actual_pages: level.actual_pages(),
                driver: level.has_driver(),
            }),
            frames: self
                .standing
                .started
                .map(|started| frames::after(&self.traffic, started.entered_ns))
                .unwrap_or_default(),
            late: self.late_now(),
            ..self.standing.clone()
        }
    }

    pub(super) fn machine_word(&self) -> &'static str {
        match &self.holding {
            Holding::Nothing => "none",
            Holding::Here(guest) if guest.machine.run_state() == RunState::Running => "running",
            Holding::Here(_) => "paused",
            Holding::Snapshotting => "snapshotting",
            Holding::Sending(_) => "sending",
            Holding::Parked(_) => "parked",
            Holding::Serving => "serving",
            Holding::Blank(_) => "blank",
            Holding::Loading(_) => "loading",
            Holding::Ready(_) => "ready",
            Holding::Ended => "ended",
        }
    }

    /// Tells the agent, if there is one that listens.
    pub(super) fn report(&mut self, reply_to: u64, body: Body) {
        let Some((socket, _)) = &self.agent else { return };
        let report = Report {
            reply_to,
            report: Some(body),
        };
        if let Err(error) = reporting::send(socket, report) {
            tracing::info!(%error, "the agent does not listen");
            let _ = socket.shutdown(std::net::Shutdown::Both);
            self.agent = None;
        }
    }
}
