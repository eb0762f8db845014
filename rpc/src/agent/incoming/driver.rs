//! The task of one incoming migration: events to the core, effects to the world.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ferry_migration::handover::{Decision, DestinationAgent, DestinationEffect, DestinationEvent, Ended, Epoch};
use ferry_proto::vmm::v1 as wire;
use ferry_proto::vmm::v1::order::Order as Command;
use ferry_proto::vmm::v1::report::Report as Body;
use tokio::sync::{mpsc, oneshot};

use super::asking::Questions;
use super::decisions::Part;
use super::handle::{Answer, Incoming, Request, Tuple};
use super::late::{FIRST_LATE, LOOK, LateEnd, LateSession};
use super::undoing::step_of;
use crate::agent::backends::room::Promise;
use crate::agent::failure::Failure;
use crate::agent::instances::{Agent, Instance, VmmNews};
use crate::agent::journal::{DecisionRow, JournalError, MigrationRow, Status};
use crate::agent::spawn;
use crate::agent::steps::DestinationStep;
use crate::agent::vmm_client::{Vmm, VmmError};
use crate::faults::{self, Moment, Site};
use crate::vmm_process::{attempt_from_wire, monotonic_ns};

/// After this long without a word from agent A, the guest stays with it: OPEN moves to SRC.
pub(super) const SILENCE: Duration = Duration::from_secs(30);

type Reply = oneshot::Sender<Result<Answer, Failure>>;

/// The task's state.
pub(super) struct Driver {
    pub(super) agent: Arc<Agent>,
    pub(super) incoming: Arc<Incoming>,
    pub(super) instance: Arc<Instance>,
    pub(super) core: DestinationAgent,
    pub(super) row: MigrationRow,
    /// The furthest that was reached; of a migration that an earlier run of this agent began, that may have been.
    pub(super) step: DestinationStep,
    pub(super) streams: u16,
    /// Numbers of the disks whose contents come with the guest.
    pub(super) copied_disks: Vec<u32>,
    /// How large the source has them; 0: as they are here.
    pub(super) copied_bytes: Vec<u64>,
    /// What those are promised, as long as this lasts; of a migration that an earlier run of this agent began, nothing.
    pub(super) _room: Option<Promise>,
    pub(super) connections: BTreeMap<u16, OwnedFd>,
    pub(super) part: Part,
    /// Why the guest was refused, where that is known.
    pub(super) reason: Option<String>,
    /// Whoever had the guest, or its user, called it off.
    pub(super) called_off: bool,
    /// The host's boot in which CLAIMED was written.
    pub(super) claimed_boot: String,
    /// How many page streams there are for pages that come late; none if none does.
    pub(super) late_streams: Option<u16>,
    /// How late pages are, as the VMM said last.
    pub(super) late: Option<wire::Late>,
    /// Connections for another session of them.
    pub(super) late_session: LateSession,
    /// The guest is this host's, and lacks pages.
    pub(super) is_adopted: bool,
    /// Why the guest ended before it had all of its pages, if it did.
    pub(super) ended_late: Option<LateEnd>,
    /// When agent A is asked for pages that do not come.
    pub(super) questions: Questions,
}

impl Driver {
    /// Runs until D is final and carried out. `failed`: preparing failed, so there is nothing to wait for.
    pub(super) async fn run(
        mut self,
        mut requests: mpsc::UnboundedReceiver<Request>,
        mut news: mpsc::UnboundedReceiver<VmmNews>,
        failed: Option<String>,
    ) {
        if let Some(reason) = failed {
            self.reason = Some(reason);
            self.step(DestinationEvent::LoadFailed, None).await;
        }
        let mut heard = Instant::now();
        while !self.is_over() {
            tokio::select! {
                request = requests.recv() => match request {
                    Some(request) => {
                        if !matches!(request, Request::Connected(..) | Request::PermitAnswered(_) | Request::LatePages(_)) {
                            heard = Instant::now();
                        }
                        self.take(request).await;
                    }
                    None => return,
                },
                Some(news) = news.recv() => self.take_news(news).await,
                () = tokio::time::sleep(LOOK), if self.is_adopted => {
                    self.look_at_guest().await;
                    self.ask_for_pages();
                }
                () = tokio::time::sleep_until((heard + self.patience()).into()), if self.may_give_up() => {
                    let patience = self.patience().as_secs();
                    self.reason = Some(format!("nothing was heard from host {} for {patience} s", self.row.peer));
                    heard = Instant::now();
                    self.step(DestinationEvent::GiveUp, None).await;
                }
            }
        }
        self.finish(news).await;
    }

    fn may_give_up(&self) -> bool {
        matches!(self.core.decision(), None | Some(Decision::Open))
    }

    fn is_over(&self) -> bool {
        self.row.over
    }

    async fn take(&mut self, request: Request) {
        match request {
            Request::Expect(attempt, reply) => self.step(DestinationEvent::Expect(attempt), Some(reply)).await,
            Request::Decide(attempt, reply) => self.step(DestinationEvent::Decide(attempt), Some(reply)).await,
            Request::GiveUp(reason) => {
                self.reason = Some(reason);
                self.called_off = true;
                self.step(DestinationEvent::GiveUp, None).await;
            }
            Request::Heartbeat => {}
            Request::Connected(index, connection) => self.connected(index, connection).await,
            Request::PermitAnswered(answer) => self.permit_answered(answer).await,
            Request::LateLink(asked, reply) => self.late_link(asked, reply).await,
            Request::LatePages(answer) => self.pages_answered(answer).await,
            Request::WriteAgain(attempt, decision) => self.write_again(attempt, decision).await,
        }
    }

    /// All connections of the migration, in order, go to the VMM at once.
    async fn connected(&mut self, index: u16, connection: OwnedFd) {
        if index >= FIRST_LATE {
            return self.late_connected(index, connection).await;
        }
        let all = self.streams + 1 + self.late_streams.map_or(0, |late| late + 1);
        if index >= all {
            return;
        }
        self.connections.insert(index, connection);
        if self.connections.len() < usize::from(all) {
            return;
        }
        self.enter(DestinationStep::Load);
        let descriptors = std::mem::take(&mut self.connections).into_values().collect();
        let receive = wire::Receive {
            migration: self.row.id.to_string(),
            epoch: self.row.epoch,
            copied_disks: self.copied_disks.clone(),
            copied_bytes: self.copied_bytes.clone(),
            late_streams: self.late_streams.unwrap_or(0).into(),
            resume_window_ms: self.row.options.resume_window_ms,
        };
        let Some(vmm) = self.vmm().await else { return };
        if let Err(error) = vmm.order_with(Command::Receive(receive), descriptors).await {
            self.reason = Some(format!("the VMM did not take the connections: {error}"));
            self.step(DestinationEvent::LoadFailed, None).await;
        }
    }

    async fn take_news(&mut self, news: VmmNews) {
        if let VmmNews::Event(event) = &news
            && let Body::Late(late) = &**event
        {
            return self.late_news(late.clone()).await;
        }
        if self.is_adopted {
            return self.news_of_adopted(news).await;
        }
        match news {
            VmmNews::Gone => self.vmm_gone().await,
            VmmNews::Standing(standing) => self.found(*standing).await,
            VmmNews::Event(event) => match *event {
                Body::Ready(ready) => self.ready(ready).await,
                Body::Started(started) => self.started(started).await,
                Body::LinkLost(lost) => self.link_lost(lost).await,
                Body::LinkBack(_) => self.link_back().await,
                Body::LoadFailed(failed) => {
                    self.reason.get_or_insert(failed.reason);
                    self.step(DestinationEvent::LoadFailed, None).await;
                }
                // It took the permit and could not enter the guest: a crash, and told as one.
                Body::GuestEnded(ended) => {
                    self.reason = Some(ended.reason.clone());
                    let started = DestinationEvent::VmmGone {
                        started: true,
                        same_boot: true,
                    };
                    self.step(started, None).await;
                }
                _ => {}
            },
        }
    }

    async fn ready(&mut self, ready: wire::Ready) {
        self.part.ready_ns = monotonic_ns();
        let expected = (self.row.instance, self.row.id, Epoch(self.row.epoch));
        match attempt_from_wire(ready.attempt.clone()) {
            Ok(attempt) if (attempt.instance, attempt.migration, attempt.epoch) == expected => {
                self.expect_late(ready.late_pages);
                self.part.ready = Some(ready);
                self.step(DestinationEvent::Ready(attempt.attempt), None).await;
            }
            other => {
                self.reason = Some(format!("GO was for {other:?}, which is not expected here"));
                self.step(DestinationEvent::LoadFailed, None).await;
            }
        }
    }

    async fn started(&mut self, started: wire::Started) {
        if started.epoch != self.row.epoch + 1 {
            tracing::error!(
                epoch = started.epoch,
                "the VMM started under an epoch that it was not given"
            );
            return;
        }
        self.part.entered_ns = started.entered_ns;
        self.step(DestinationEvent::Started, None).await;
    }

    pub(super) async fn vmm_gone(&mut self) {
        let started = self.agent.marks.may_have_started(self.row.id);
        let same_boot = self.claimed_boot == self.agent.boot_id;
        if self.reason.is_none() {
            let obituary = self.instance.state.lock().await.vmm_obituary().await;
            self.reason = Some(format!("on host {} {obituary}", self.agent.host()));
        }
        self.step(DestinationEvent::VmmGone { started, same_boot }, None).await;
    }

    async fn permit_answered(&mut self, answer: Result<(), VmmError>) {
        let Err(error) = answer else { return };
        let Some(vmm) = self.vmm().await else { return };
        // A dead VMM is told of by itself. Else only its own word counts: whether it took the permit, now or before.
        let asked = vmm.order(Command::Ping(wire::Ping {})).await;
        match (error, asked) {
            (
                _,
                Ok(Body::Standing(wire::Standing {
                    started: Some(started), ..
                })),
            ) => self.started(started).await,
            (VmmError::Refused(reason), Ok(Body::Standing(_))) => {
                // It did not start and will not: once it is dead, its missing mark proves that.
                self.reason = Some(format!("the VMM refused its permit: {reason}"));
                if let Err(error) = vmm.kill().await {
                    tracing::error!(%error, "the VMM does not die");
                }
            }
            (error, _) if vmm.is_dead() => tracing::info!(%error, "the VMM died before it answered its permit"),
            (error, _) => {
                tracing::info!(%error, "the permit is not answered, sending it again");
                self.send_permit_after(Duration::from_millis(500)).await;
            }
        }
    }

    /// One event: the core decides, the effects are carried out in order.
    pub(super) async fn step(&mut self, event: DestinationEvent, reply: Option<Reply>) {
        let mut reply = reply;
        let mut effects: std::collections::VecDeque<_> = self.core.step(event).into();
        tracing::debug!(migration = %self.row.id, ?event, ?effects, "destination");
        while let Some(effect) = effects.pop_front() {
            let site = Site::from(&effect);
            faults::reach(site, Moment::Before).await;
            let carried_out = self.carry_out(effect, &mut reply).await;
            faults::reach(site, Moment::After).await;
            if let Err(error) = carried_out {
                tracing::error!(migration = %self.row.id, %error, "the journal failed in a switchover");
                effects = self.core.step(DestinationEvent::JournalFailed).into();
            }
        }
        if let Some(reply) = reply {
            let unanswered = "the decision is not durable yet, ask again".to_owned();
            let _ = reply.send(Err(Failure::Unavailable(unanswered)));
        }
        if self.core.is_refused() && self.vmm().await.is_none() {
            self.row.over = true;
        }
    }

    async fn carry_out(&mut self, effect: DestinationEffect, reply: &mut Option<Reply>) -> Result<(), JournalError> {
        match effect {
            DestinationEffect::Journal { attempt, decision } => self.journal(attempt, decision).await?,
            DestinationEffect::Answer(decision) => {
                if let Some(reply) = reply.take() {
                    let _ = reply.send(Ok((decision, self.part.to_wire())));
                }
            }
            DestinationEffect::Refuse => {
                if let Some(reply) = reply.take() {
                    let why = self
                        .reason
                        .clone()
                        .unwrap_or_else(|| "the migration is over here".to_owned());
                    let _ = reply.send(Err(Failure::Refused(why)));
                }
            }
            DestinationEffect::SendPermit => self.send_permit().await,
            DestinationEffect::KillVmm => self.kill_vmm().await,
            DestinationEffect::TellSource(decision) => self.tell_source(decision),
            DestinationEffect::Adopt => self.adopt(None).await,
            DestinationEffect::AdoptCrashed => {
                let reason = self.reason.clone().unwrap_or_else(|| "the VMM died".to_owned());
                self.adopt(Some(reason)).await;
            }
            DestinationEffect::JournalLater { attempt, decision } => {
                self.later(attempt, decision, &JournalError::Ended);
            }
        }
        Ok(())
    }

    pub(super) async fn vmm(&self) -> Option<Vmm> {
        self.instance.state.lock().await.vmm.clone()
    }

    async fn send_permit(&mut self) {
        self.send_permit_after(Duration::ZERO).await;
    }

    async fn send_permit_after(&mut self, pause: Duration) {
        let Some(vmm) = self.vmm().await else { return };
        let permit = wire::Permit {
            instance: self.row.instance.to_string(),
            epoch: self.row.epoch + 1,
            paused: self.row.user_paused,
        };
        // Of a permit that is sent again, the first time counts.
        if self.part.permit_ns == 0 {
            self.part.permit_ns = monotonic_ns();
        }
        let requests = self.incoming.requests.clone();
        // Not waited for here: what matters is the VMM's word that it started, which comes before its answer.
        tokio::spawn(async move {
            if !pause.is_zero() {
                tokio::time::sleep(pause).await;
            }
            let answer = vmm.order(Command::Permit(permit)).await.map(drop);
            let _ = requests.send(Request::PermitAnswered(answer));
        });
    }

    pub(super) async fn kill_vmm(&mut self) {
        let vmm = self.instance.state.lock().await.vmm.take();
        if let Some(vmm) = vmm
            && let Err(error) = vmm.kill().await
        {
            tracing::error!(%error, "the VMM does not die");
        }
    }

    /// The guest is this host's from now on.
    async fn adopt(&mut self, crashed: Option<String>) {
        let mut state = self.instance.state.lock().await;
        if crashed.is_none() && self.lacks_pages() {
            // Its VMM's news go on coming here, until the last page is in.
            state.late = Some(self.row.id);
            drop(state);
            return self.adopted_without_its_pages().await;
        }
        // One that moves on already has its VMM's news go there.
        if state.migrating.is_none() {
            state.news = None;
        }
        if self.row.status_before() == Status::Stopped {
            // Its machine was only held, and so nothing crashed.
            let reason = format!("it was stopped when it came from host {}", self.row.peer);
            self.agent.end(&mut state, Ended::ByUser, reason).await;
        } else if let Some(reason) = crashed {
            self.agent.end(&mut state, Ended::Crashed, reason).await;
        }
        tracing::info!(instance = %self.row.instance, epoch = state.row.epoch, status = %state.row.status, "the guest arrived");
        drop(state);
        self.row.over = true;
    }

    pub(super) async fn forget(&self) -> bool {
        let mut state = self.instance.state.lock().await;
        state.news = None;
        self.agent.forget(&mut state).await.is_ok()
    }
}

/// Goes on with an incoming migration after a restart of the agent.
pub(crate) async fn recover(agent: &Arc<Agent>, row: MigrationRow, instance: Arc<Instance>) -> Result<(), Failure> {
    let migration = row.id;
    let newest = agent
        .journal
        .read(move |connection| DecisionRow::newest(connection, migration))
        .await?;
    let (requests, request_receiver) = mpsc::unbounded_channel();
    // Connections that were not handed over died with the agent that held them, so no secret will be proven again.
    let secret = crate::agent::data_port::random().map_err(Failure::host("failed to make a secret"))?;
    let incoming = Arc::new(Incoming {
        id: row.id,
        context: agent.context_of(row.id).await,
        of: Tuple {
            instance: row.instance,
            epoch: row.epoch,
            source: row.peer.clone(),
            journal: row.peer_journal,
        },
        secret,
        copied_disks: Vec::new(),
        requests,
    });
    let (news, news_receiver) = mpsc::unbounded_channel();
    let mut driver = Driver {
        agent: Arc::clone(agent),
        incoming: Arc::clone(&incoming),
        instance: Arc::clone(&instance),
        core: DestinationAgent::recover(newest.as_ref().map(|row| (row.attempt, row.decision))),
        row,
        // Up to here nothing is written down, and each may have been reached.
        step: newest
            .as_ref()
            .map_or(DestinationStep::Load, |row| step_of(row.decision))
            .max(DestinationStep::Load),
        streams: 0,
        copied_disks: Vec::new(),
        copied_bytes: Vec::new(),
        _room: None,
        connections: BTreeMap::new(),
        part: Part::default(),
        reason: None,
        called_off: false,
        claimed_boot: newest.map_or_else(|| agent.boot_id.clone(), |row| row.boot_id),
        late_streams: None,
        late: None,
        late_session: LateSession::default(),
        is_adopted: false,
        ended_late: None,
        questions: Questions::new(Instant::now()),
    };
    agent.incoming.add(incoming);

    instance.state.lock().await.news = Some(news);
    let agent = Arc::clone(agent);
    // A VMM that is there and silent is waited for: what became of the guest is what it says, or that it is dead.
    tokio::spawn(async move {
        match Vmm::find(&agent.folder(instance.id).join(spawn::SOCKET)).await {
            None => {
                tracing::info!(%migration, "the VMM of an incoming migration is gone");
                driver.vmm_gone().await;
            }
            Some((vmm, standing, events)) => {
                agent.attach(&instance, &mut *instance.state.lock().await, vmm, events);
                driver.found(standing).await;
            }
        }
        driver.run(request_receiver, news_receiver, None).await;
    });
    Ok(())
}

impl Driver {
    /// The VMM is alive after this agent restarted or its connection broke: what it said meanwhile is made up for.
    async fn found(&mut self, standing: wire::Standing) {
        if let Some(late) = standing.late.clone() {
            self.late_news(late).await;
        }
        self.step(DestinationEvent::VmmFound, None).await;
        if let Some(started) = standing.started {
            self.started(started).await;
            if let Some(ended) = standing.ended {
                let mut state = self.instance.state.lock().await;
                self.agent.guest_ended(&mut state, &ended).await;
            }
        } else if let Some(ready) = standing.ready {
            // Of a claimed guest the permit is on its way already.
            if self.core.decision() == Some(Decision::Claimed) {
                self.part.ready.get_or_insert(ready);
            } else {
                self.ready(ready).await;
            }
        } else if matches!(standing.machine.as_str(), "none" | "ended")
            || standing.machine == "blank" && self.streams == 0
        {
            self.reason.get_or_insert_with(|| {
                "this agent restarted before the connections were handed over, or loading failed".to_owned()
            });
            self.step(DestinationEvent::LoadFailed, None).await;
        }
    }
}
