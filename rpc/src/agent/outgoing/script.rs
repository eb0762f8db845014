//! One migration out of here, from top to bottom.

use std::collections::VecDeque;
use std::future::Future;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ferry_migration::Compression;
use ferry_migration::handover::{Ending, Epoch, SourceAgent, SourceEffect};
use ferry_proto::vmm::v1 as wire;
use ferry_proto::vmm::v1::order::Order as Command;
use ferry_proto::vmm::v1::report::Report as Body;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use uuid::Uuid;

use super::calls::SILENCE;
use super::handle::{Outgoing, PeerNews, Resolving};
use super::options::compression;
use super::queue::{Place, Turn};
use super::reconnecting::Reconnecting;
use super::retuning::Retuning;
use super::streams::{kept_streams, late_streams};
use crate::agent::failure::Failure;
use crate::agent::instances::{Agent, Instance, VmmNews};
use crate::agent::journal::{InstanceRow, MigrationRow, RowWrite, Status};
use crate::agent::mode::{Mode, PAUSE, POSTCOPY};
use crate::agent::peer_journal::journal_of;
use crate::agent::peers::PeerError;
use crate::agent::reason::Reason;
use crate::agent::steps::{Journalled, SourceStep};
use crate::agent::transport::Transport;

/// How long a migration that was accepted waits for its cast.
const CAST_PATIENCE: Duration = Duration::from_secs(60);

/// Why the migration ended before the guest was being sent, or while it was.
#[derive(Clone, Debug)]
pub(super) enum Stop {
    /// Somebody asked for it.
    Aborted(String),
    /// It could not go on.
    Failed(String),
    /// The destination takes no further migration now.
    Busy(String),
}

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Self {
        match failure.reason() {
            Some(Reason::HostBusy) => Self::Busy(failure.chain()),
            _ => Self::Failed(failure.chain()),
        }
    }
}

impl From<PeerError> for Stop {
    fn from(error: PeerError) -> Self {
        Self::from(Failure::from(error))
    }
}

/// The state of the task.
pub(super) struct Script {
    pub(super) agent: Arc<Agent>,
    pub(super) outgoing: Arc<Outgoing>,
    pub(super) instance: Arc<Instance>,
    pub(super) row: MigrationRow,
    pub(super) aborted: watch::Receiver<Option<String>>,
    pub(super) peer_news: mpsc::UnboundedReceiver<PeerNews>,
    pub(super) news: Option<mpsc::UnboundedReceiver<VmmNews>>,
    pub(super) asked_to_resolve: Option<mpsc::UnboundedReceiver<Resolving>>,
    pub(super) asked_to_retune: Option<mpsc::UnboundedReceiver<Retuning>>,
    /// A person ends it, and waits for that.
    pub(super) resolving: Option<Resolving>,
    /// What the VMM said while nobody listened, still to be taken.
    pub(super) made_up: VecDeque<Body>,
    pub(super) abort_seen: bool,
    /// Questions for D in a row that brought no final answer.
    pub(super) questions: u32,
    /// RUNNING that was heard before the VMM said that it sent GO.
    pub(super) early: Option<PeerNews>,
    /// For how long agent B may not answer before it counts as dead or hung.
    pub(super) peer_patience: watch::Sender<Duration>,
    /// Who tries to make the link of the copy again, while it is lost.
    pub(super) reconnecting: Option<Reconnecting>,
    /// A copy that ended because the link broke, while B's word on why is waited for.
    pub(super) lost_link: Option<Box<wire::SendEnded>>,
    /// When the cast was accepted, CLOCK_MONOTONIC; none after a restart of this agent.
    pub(super) accepted_ns: Option<u64>,
    pub(super) stop: Option<Stop>,
    pub(super) go: Option<wire::GoSent>,
    pub(super) guest_ended: Option<wire::GuestEnded>,
    /// The guest is the destination's, and needs pages of the memory that is kept here.
    pub(super) serving: bool,
    /// Whoever answered in the destination's place had another journal; why the record has an error.
    pub(super) another_answers: bool,
    /// What the destination said no with before anything was sent.
    pub(super) refusal: Mutex<Option<Failure>>,
    /// Telling agent B that it is over; true once it has answered.
    pub(super) rollback: Option<JoinHandle<bool>>,
    /// When how far the copy is was journalled last.
    pub(super) reported: Instant,
    /// The number in the queue, until the turn has come.
    pub(super) place: Option<Place>,
    /// The place among the migrations that run at the same time.
    pub(super) turn: Option<Turn>,
}

impl Script {
    pub(super) fn with_parts(
        agent: Arc<Agent>,
        outgoing: Arc<Outgoing>,
        instance: Arc<Instance>,
        row: MigrationRow,
        peer_news: mpsc::UnboundedReceiver<PeerNews>,
        accepted_ns: Option<u64>,
    ) -> Self {
        let aborted = outgoing.abort.subscribe();
        Self {
            agent,
            outgoing,
            instance,
            row,
            aborted,
            peer_news,
            news: None,
            asked_to_resolve: None,
            asked_to_retune: None,
            resolving: None,
            made_up: VecDeque::new(),
            abort_seen: false,
            questions: 0,
            early: None,
            peer_patience: watch::Sender::new(SILENCE),
            reconnecting: None,
            lost_link: None,
            accepted_ns,
            stop: None,
            go: None,
            guest_ended: None,
            serving: false,
            another_answers: false,
            refusal: Mutex::new(None),
            rollback: None,
            reported: Instant::now(),
            place: None,
            turn: None,
        }
    }

    pub(super) fn id(&self) -> Uuid {
        self.row.id
    }

    /// The whole migration.
    pub(super) async fn run(mut self) {
        let ending = match self.until_sending().await {
            Ok(()) => {
                let core = SourceAgent::copying(Epoch(self.row.epoch));
                self.switchover(core, Vec::new()).await
            }
            Err(stop) => {
                tracing::info!(migration = %self.row.id, ?stop, "the migration ends before anything was sent");
                self.stop = Some(stop);
                Ending::Stayed
            }
        };
        self.finish(ending).await;
    }

    /// The rest of a migration that an earlier run of this agent began.
    pub(super) async fn resume(mut self, core: SourceAgent, effects: Vec<SourceEffect>) {
        let reached = self.reached();
        tracing::info!(migration = %self.row.id, step = %reached, "a migration is taken up in the step that the journal has");
        self.row.info.restarted_in = Some(reached.to_string());
        if reached < SourceStep::Copy {
            // Nothing was sent, and what was begun for it is undone.
            self.stop = Some(Stop::Failed(format!("the agent restarted in step {reached}")));
        } else {
            self.say_status("running").await;
        }
        self.show();
        let ending = self.switchover(core, effects).await;
        self.finish(ending).await;
    }

    /// Queue, prepare, connect, and give the VMM its order. On an error nothing has been sent.
    async fn until_sending(&mut self) -> Result<(), Stop> {
        let agent = Arc::clone(&self.agent);
        let place = match self.place.take() {
            Some(place) => place,
            None => {
                self.wait_for_cast().await?;
                self.enter(SourceStep::Queue).await?;
                agent.queue.enter()
            }
        };
        self.turn = Some(self.unless_aborted(place.turn()).await?);
        self.hold("queued").await?;

        if self.row.status_before() == Status::Stopped {
            self.enter(SourceStep::Build).await?;
            self.build_stopped().await?;
        }

        self.enter(SourceStep::Prepare).await?;
        let peer = agent.peers.named(&self.row.peer)?.clone();
        let streams = self.unless_aborted(peer.page_streams(&self.row.options)).await?;
        self.row.info.streams = streams.into();
        let prepared = self.prepared(&peer).await?;
        self.hold("preparing").await?;

        self.enter(SourceStep::Connect).await?;
        let streams = self.streams();
        let own = streams + 1;
        let all = own + self.late_streams().map_or(0, |late| late + 1);
        let connect = self.connect(&prepared.data_address, &prepared.secret, 0..all);
        let connections = self.unless_aborted(connect).await??;

        let copied = prepared.copied_disks;
        self.row.info.copied_disks = self.paths_of(&copied).await?;
        self.row.peer_journal = journal_of(&prepared.journal).map_err(Failure::from)?;
        // Before anything of it happens: an agent that restarts must know what becomes superfluous here, and which journal D is in.
        self.save(RowWrite::Prepared).await?;
        self.enter(SourceStep::Copy).await?;
        self.send(connections, copied).await?;
        // The VMM copies meanwhile. Should this fail it goes on all the same: a restarted agent believes the VMM's word.
        if let Err(failure) = self.save(RowWrite::Entered(SourceStep::Copy)).await {
            tracing::error!(migration = %self.row.id, error = failure.chain(), "failed to journal that the guest is being sent");
        }
        Ok(())
    }

    /// The machine of an instance that is off, to be moved like any other.
    async fn build_stopped(&self) -> Result<(), Stop> {
        let mut state = self.instance.state.lock().await;
        Ok(self.agent.hold(&self.instance, &mut state, self.row.epoch).await?)
    }

    /// A migration that was accepted at RPC version 4.0 begins with a cast of its own.
    async fn wait_for_cast(&self) -> Result<(), Stop> {
        let mut begun = self.outgoing.begun.subscribe();
        let cast = tokio::time::timeout(CAST_PATIENCE, begun.wait_for(|&begun| begun));
        match self.unless_aborted(cast).await? {
            Ok(_) => Ok(()),
            Err(_) => Err(Stop::Failed(format!(
                "it was accepted, and its cast did not come within {}",
                humantime::format_duration(CAST_PATIENCE)
            ))),
        }
    }

    /// The VMM begins to send; its news come to this task from now on.
    async fn send(&mut self, connections: Vec<OwnedFd>, copied_disks: Vec<u32>) -> Result<(), Stop> {
        let options = &self.row.options;
        let compress = compression(&options.compress).unwrap_or_default();
        let send = wire::Send {
            migration: self.row.id.to_string(),
            epoch: self.row.epoch,
            max_downtime_us: options.max_downtime_us,
            timeout_ms: options.timeout_ms,
            bandwidth_bytes_per_s: options.bandwidth_bytes_per_s,
            digests: options.digests,
            verify: options.verify,
            user_paused: self.row.user_paused,
            copied_disks,
            cold: self.row.is_cold(),
            pause_on_timeout: [PAUSE, POSTCOPY].contains(&options.on_timeout.as_str()),
            max_throttle_percent: self.row.options.max_throttle_percent,
            lateness: Mode::parse(&self.row.info.mode)
                .map_err(Failure::from)?
                .lateness()
                .to_owned(),
            late_streams: self.late_streams().unwrap_or(0).into(),
            resume_window_ms: self.row.options.resume_window_ms,
            carried: self.row.transport() == Transport::Grpc,
            // A request that says nothing of it wants none.
            compress: compress.to_string(),
            // Only `auto` goes by it: nobody else waits for a name to be looked up.
            one_host: compress == Compression::Auto && self.agent.peers.named(&self.row.peer)?.is_on_this_host().await,
            overhead: self.usual_overhead().await,
        };
        let (sender, news) = mpsc::unbounded_channel();
        let mut state = self.instance.state.lock().await;
        let vmm = state.vmm()?.clone();
        state.news = Some(sender);
        let sent = vmm.order_with(Command::Send(send), connections).await;
        if let Err(error) = sent {
            state.news = None;
            return Err(Failure::vmm("failed to begin sending the guest")(error).into());
        }
        self.news = Some(news);
        Ok(())
    }

    /// What the last switchovers to the destination took beside their last pages, if the journal tells.
    async fn usual_overhead(&self) -> Option<wire::Overhead> {
        let usual = self.agent.usual_overhead(&self.row.peer, self.row.transport()).await;
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        usual.map(|usual| wire::Overhead {
            stop_us: micros(usual.stop),
            start_us: micros(usual.start),
        })
    }

    /// How many page streams: what was found to fit when it was prepared.
    pub(super) fn streams(&self) -> u16 {
        kept_streams(self.row.info.streams, &self.row.options)
    }

    /// How many page streams there are for pages that come late; none if none does.
    pub(super) fn late_streams(&self) -> Option<u16> {
        self.row.may_be_late().then(|| late_streams(self.streams()))
    }

    /// Waits for `work`, unless the migration is aborted first.
    pub(super) async fn unless_aborted<T>(&self, work: impl Future<Output = T>) -> Result<T, Stop> {
        let mut aborted = self.aborted.clone();
        tokio::select! {
            biased;
            asked = aborted.wait_for(Option::is_some) => {
                let reason = asked.ok().and_then(|asked| asked.clone());
                Err(Stop::Aborted(reason.unwrap_or_else(|| "aborted".to_owned())))
            }
            done = work => Ok(done),
        }
    }

    /// A test switch: waits at this point for the abort.
    async fn hold(&self, point: &str) -> Result<(), Stop> {
        if self.row.options.hold_at == point {
            self.unless_aborted(std::future::pending::<()>()).await?;
        }
        Ok(())
    }

    /// The furthest step that was reached, as the record has it.
    pub(super) fn reached(&self) -> SourceStep {
        SourceStep::parse(&self.row.info.step).unwrap_or(if self.row.armed > 0 {
            SourceStep::Arm
        } else {
            // Of an agent that knew no steps: all that can be undone may have been reached.
            SourceStep::Copy
        })
    }

    /// The next step begins: shown, and journalled where its row says that this comes first.
    ///
    /// # Errors
    /// The journal does not take it: then the step must not begin.
    pub(super) async fn enter(&mut self, step: SourceStep) -> Result<(), Failure> {
        self.note_step(step);
        match step.row().journalled {
            Journalled::Before => self.save(RowWrite::Entered(step)).await,
            Journalled::Along => {
                self.show();
                Ok(())
            }
        }
    }

    /// The record is to say that this is the step.
    pub(super) fn note_step(&mut self, step: SourceStep) {
        if self.row.info.step != step.row().word {
            tracing::info!(migration = %self.row.id, %step, "{}", step.row().does);
            self.row.info.step = step.to_string();
        }
        if let Some(status) = step.status() {
            self.row.info.status = status.to_owned();
        }
    }

    /// Changes the status, journalled and shown.
    pub(super) async fn say_status(&mut self, status: &str) {
        if self.row.info.status == status {
            return;
        }
        self.row.info.status = status.to_owned();
        tracing::info!(migration = %self.row.id, status, "migration");
        if let Err(failure) = self.save(RowWrite::SourceStatus).await {
            tracing::error!(migration = %self.row.id, error = failure.chain(), "failed to journal a migration's status");
        }
    }

    /// Makes the row durable and shows it.
    pub(super) async fn save(&mut self, write: RowWrite) -> Result<(), Failure> {
        self.show();
        let row = self.row.clone();
        self.agent
            .journal
            .write(write, move |transaction| row.save(transaction))
            .await
            .map_err(Failure::from)
    }

    /// Makes the row durable together with the instance's, and shows it.
    pub(super) async fn save_with(&mut self, write: RowWrite, instance: InstanceRow) -> Result<(), Failure> {
        self.show();
        let row = self.row.clone();
        self.agent
            .journal
            .write(write, move |transaction| {
                row.save(transaction)?;
                instance.save(transaction)
            })
            .await
            .map_err(Failure::from)
    }

    /// Shows how it stands to whoever watches.
    pub(super) fn show(&self) {
        self.outgoing.info.send_replace(self.row.info.clone());
    }
}
