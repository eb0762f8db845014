//! The cast: a migration is journalled, then its task starts. And what a restarted agent does with one in flight.

use std::sync::Arc;

use ferry_migration::handover::{Decision, Epoch, SourceAgent, SourceCopy, SourceEvent, Wish};
use ferry_proto::agent::v1::{LiveMigrationCast, MigrationInfo, Receipt};
use ferry_proto::vmm::v1::report::Report as Body;
use ferry_proto::vmm::v1::{self as wire};
use ferry_proto::{InvalidField, required, wire_uuid};
use tokio::sync::{mpsc, watch};
use uuid::Uuid;

use super::handle::{Outgoing, now_ms, now_text};
use super::options::check_options;
use super::queue::Place;
use super::retuning::note_terms;
use super::script::Script;
use crate::agent::context::RequestContext;
use crate::agent::events::{Action, Subject};
use crate::agent::failure::Failure;
use crate::agent::instances::{Agent, Instance};
use crate::agent::journal::{InstanceRow, MigrationRow, Role, RowWrite, Status};
use crate::agent::mode::Mode;
use crate::agent::reason::Reason;
use crate::agent::spawn;
use crate::agent::steps::{QUEUED, SourceStep};
use crate::agent::transport::Transport;
use crate::agent::vmm_client::Vmm;
use crate::vmm_process::monotonic_ns;

/// Whether what is accepted begins at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Begins {
    /// The cast has its record: it takes its number with its receipt.
    Now,
    /// At 4.0 a cast of its own follows: until then nobody waits behind it.
    WithItsCast,
}

/// What the journal makes of a cast.
enum Accepted {
    /// It is written down, with its number in the queue if it begins now.
    Now(Option<Place>),
    /// It was before, under this epoch.
    Before(u64),
}

impl Agent {
    /// Nova's live_migration cast: answered once the journal has it, before the work. The same id twice is one migration.
    ///
    /// At 4.0 the cast has no record: it is the one that [`Self::create_migration`] made for the instance.
    ///
    /// # Errors
    /// The instance is not here, cannot migrate now, or the journal does not take it.
    pub(crate) async fn live_migration(
        self: &Arc<Self>,
        context: &RequestContext,
        cast: LiveMigrationCast,
    ) -> Result<Receipt, Failure> {
        if cast.migration.is_empty() {
            return self.begin_accepted(&cast.instance).await;
        }
        let receipt = self.accept(context, cast, Begins::Now).await?;
        if let Some(outgoing) = wire_uuid("migration", &receipt.migration)
            .ok()
            .and_then(|id| self.outgoing.find(id))
        {
            outgoing.begin();
        }
        Ok(receipt)
    }

    /// The first half of a cast at 4.0: the migration is accepted and journalled, and waits for the cast a minute at most.
    ///
    /// # Errors
    /// As [`Self::live_migration`].
    pub(crate) async fn create_migration(
        self: &Arc<Self>,
        context: &RequestContext,
        record: LiveMigrationCast,
    ) -> Result<Receipt, Failure> {
        self.accept(context, record, Begins::WithItsCast).await
    }

    async fn begin_accepted(&self, instance: &str) -> Result<Receipt, Failure> {
        let instance = self.instance(instance).await?;
        let waiting = self
            .outgoing
            .accepted(instance.id)
            .ok_or_else(|| Failure::Refused(format!("no migration of instance {} waits for a cast", instance.id)))?;
        let replay = !waiting.begin();
        Ok(Receipt {
            migration: waiting.id.to_string(),
            replay,
            generation: waiting.epoch,
        })
    }

    async fn accept(
        self: &Arc<Self>,
        context: &RequestContext,
        cast: LiveMigrationCast,
        begins: Begins,
    ) -> Result<Receipt, Failure> {
        let id = wire_uuid("migration", &cast.migration)?;
        let refused = match self.accept_new(context, id, cast, begins).await {
            Ok(receipt) => return Ok(receipt),
            Err(refused) => refused,
        };
        // One that was accepted before has its receipt, whatever would be said to it today: its guest may have left.
        let known = self
            .journal
            .read(move |connection| MigrationRow::find(connection, id))
            .await?;
        known.map_or(Err(refused), |known| Ok(receipt(id, true, known.epoch)))
    }

    async fn accept_new(
        self: &Arc<Self>,
        context: &RequestContext,
        id: Uuid,
        cast: LiveMigrationCast,
        begins: Begins,
    ) -> Result<Receipt, Failure> {
        let options = check_options(required("options", cast.options)?)?;
        let mode = Mode::of(&options)?;
        let instance = self.instance(&cast.instance).await?;
        self.ask_origin(&instance).await;
        let mut state = instance.state.lock().await;
        // The very same cast may have come meanwhile: it was sent again before its receipt was there.
        if state.row.migration == Some(id) {
            return Ok(receipt(id, true, state.row.epoch));
        }
        state.check_can_migrate(mode)?;
        if cast.expected_epoch != 0 && cast.expected_epoch != state.row.epoch {
            return Err(Failure::denied(
                Reason::InstanceChanged,
                format!(
                    "instance {} runs under epoch {}, epoch {} was checked",
                    state.row.spec.name, state.row.epoch, cast.expected_epoch
                ),
            ));
        }
        self.check_destination(&cast.destination)?;
        state.check_settled()?;

        let step = match begins {
            Begins::Now => SourceStep::Queue,
            Begins::WithItsCast => SourceStep::Accept,
        };
        let mut row = MigrationRow {
            id,
            instance: instance.id,
            role: Role::Source,
            peer: cast.destination.clone(),
            epoch: epoch_of_move(&state.row),
            over: false,
            armed: 0,
            said: None,
            resumed: None,
            // The machine of a stopped one is built paused, and has not run when it is ended again.
            user_paused: state.row.status != Status::Running,
            info: MigrationInfo {
                id: id.to_string(),
                instance: instance.id.to_string(),
                name: state.row.spec.name.clone(),
                source: self.host().to_owned(),
                destination: cast.destination,
                status: step.status().unwrap_or_default().to_owned(),
                mode: mode.as_str().to_owned(),
                transport: Transport::parse(&options.transport)?.as_str().to_owned(),
                guest_was: state.row.status.to_string(),
                step: step.to_string(),
                started: Some(now_text()),
                guest_location: Some(self.host().to_owned()),
                ..MigrationInfo::default()
            },
            options,
            began: now_ms(),
            peer_journal: None,
        };
        note_terms(&mut row.info, &row.options);
        let mut instance_row = state.row.clone();
        instance_row.migration = Some(id);
        instance_row.epoch = row.epoch;
        instance_row.known_epoch = instance_row.known_epoch.max(row.epoch);
        let (saved, saved_instance) = (row.clone(), instance_row.clone());
        let event = Subject::migration(row.instance, &row.info.name, id).begins(context, Action::Migrate);
        let queue = self.queue.clone();
        let accepted = self.journal.write(RowWrite::Accepted, move |transaction| {
            if let Some(known) = MigrationRow::find(transaction, id)? {
                return Ok(Accepted::Before(known.epoch));
            }
            saved.save(transaction)?;
            saved_instance.save(transaction)?;
            event.begin(transaction)?;
            // Last, so that a row which is not written leaves no place behind.
            Ok(Accepted::Now((begins == Begins::Now).then(|| queue.enter())))
        });
        let place = match accepted.await? {
            Accepted::Now(place) => place,
            Accepted::Before(epoch) => return Ok(receipt(id, true, epoch)),
        };
        // Only what is durable has a receipt: a write that failed leaves no trace.
        state.row = instance_row;
        state.migrating = Some(id);
        drop(state);
        tracing::info!(
            migration = %id, instance = %instance.id, destination = row.peer, request = context.request(), "migration accepted"
        );
        let generation = row.epoch;
        let mut script = Script::new(self, context.without_deadline(), row, instance, Some(monotonic_ns()));
        script.place = place;
        tokio::spawn(script.run());
        Ok(receipt(id, false, generation))
    }

    /// The destination is named, known, and another host.
    ///
    /// # Errors
    /// It is not.
    pub(crate) fn check_destination(&self, destination: &str) -> Result<(), Failure> {
        if destination == self.host() {
            return Err(Failure::denied(
                Reason::DestinationIsSource,
                format!("the instance is on host {destination} already"),
            ));
        }
        self.peers.named(destination).map(drop)
    }
}

fn receipt(migration: Uuid, replay: bool, generation: u64) -> Receipt {
    Receipt {
        migration: migration.to_string(),
        replay,
        generation,
    }
}

/// The epoch that a guest moves under: the one that it has, or of one that is off, a right that nobody had yet.
fn epoch_of_move(row: &InstanceRow) -> u64 {
    match row.status {
        Status::Stopped => row.known_epoch + 1,
        _ => row.epoch,
    }
}

impl Script {
    /// The state of a migration's task, with its handle entered.
    pub(super) fn new(
        agent: &Arc<Agent>,
        context: RequestContext,
        row: MigrationRow,
        instance: Arc<Instance>,
        accepted_ns: Option<u64>,
    ) -> Self {
        let (peer_sender, peer_news) = mpsc::unbounded_channel();
        let (abort, _) = watch::channel(None);
        let (resolvings, asked_to_resolve) = mpsc::unbounded_channel();
        let (retunings, asked_to_retune) = mpsc::unbounded_channel();
        let outgoing = Arc::new(Outgoing {
            id: row.id,
            context,
            instance: row.instance,
            epoch: row.epoch,
            begun: watch::channel(false).0,
            destination: row.peer.clone(),
            info: watch::channel(row.info.clone()).0,
            abort,
            news: peer_sender,
            resolvings,
            retunings,
            pages_lost: watch::channel(None).0,
            guest_lost: watch::channel(None).0,
            let_go: watch::channel(false).0,
            over: watch::channel(false).0,
        });
        agent.outgoing.add(Arc::clone(&outgoing));
        let mut script = Self::with_parts(Arc::clone(agent), outgoing, instance, row, peer_news, accepted_ns);
        script.asked_to_resolve = Some(asked_to_resolve);
        script.asked_to_retune = Some(asked_to_retune);
        script
    }
}

/// Whether nothing was begun for a migration but that it was accepted: it only waits, for its turn or for a destination that has its hands full.
pub(crate) fn waits(row: &MigrationRow) -> bool {
    // The machine of an instance that is off was built for it.
    let is_put_off = row.info.status == QUEUED && row.status_before() != Status::Stopped;
    SourceStep::parse(&row.info.step)
        .is_some_and(|step| step <= SourceStep::Queue || step == SourceStep::Prepare && is_put_off)
}

/// Has a migration that [`waits`] wait on after a restart of the agent, behind those that this was called for before. The instance is
/// marked as migrating before this returns.
pub(crate) async fn wait_on(agent: &Arc<Agent>, mut row: MigrationRow, instance: Arc<Instance>) {
    tracing::info!(migration = %row.id, step = row.info.step, "a migration waits on");
    let has_its_cast = row.info.step != SourceStep::Accept.row().word;
    row.info.restarted_in = Some(row.info.step.clone());
    let context = agent.context_of(row.id).await;
    instance.state.lock().await.migrating = Some(row.id);
    let mut script = Script::new(agent, context, row, instance, None);
    script.place = has_its_cast.then(|| agent.queue.enter());
    tokio::spawn(script.run());
}

/// Goes on with an outgoing migration after a restart of the agent. The instance is marked as migrating before this returns.
pub(crate) async fn recover(agent: &Arc<Agent>, mut row: MigrationRow, instance: Arc<Instance>) {
    let epoch = Epoch(row.epoch);
    let (armed, resumed, said) = (row.armed, row.resumed, row.said.clone());
    // The VMM knows how far it is, and what the journal has may be older than what was told: unknown until it says.
    row.info.progress_percent = None;
    let context = agent.context_of(row.id).await;
    let mut script = Script::new(agent, context, row, Arc::clone(&instance), None);
    let (news_sender, news) = mpsc::unbounded_channel();
    script.news = Some(news);
    script.turn = Some(agent.queue.already_out());
    let mut state = instance.state.lock().await;
    state.migrating = Some(script.id());
    state.news = Some(news_sender);
    drop(state);

    let agent = Arc::clone(agent);
    // A VMM that is there and silent is waited for: "it does not answer" is not "it is dead".
    tokio::spawn(async move {
        let found = Vmm::find(&agent.folder(instance.id).join(spawn::SOCKET)).await;
        let copy = if found.is_some() {
            SourceCopy::Held
        } else {
            SourceCopy::Gone
        };
        if let Some((vmm, standing, events)) = found {
            agent.attach(&instance, &mut *instance.state.lock().await, vmm, events);
            if standing.migration == script.id().to_string() && script.reached() < SourceStep::Copy {
                // It was given its order, and that is not written down yet.
                script.note_step(SourceStep::Copy);
            }
            script.made_up.extend(made_up(standing));
        } else {
            tracing::info!(instance = %instance.id, "the VMM of a migrating instance is gone");
        }
        let decided = said.as_deref().and_then(Decision::parse);
        let (mut core, mut effects) = match (resumed.filter(|_| copy == SourceCopy::Held), decided) {
            (Some(resumed), _) => SourceAgent::recover_resuming(epoch, armed, Epoch(resumed)),
            (None, Some(decision)) => SourceAgent::recover_decided(epoch, armed, copy, decision),
            (None, None) => SourceAgent::recover(epoch, armed, copy),
        };
        if said.as_deref() == Some(Wish::DiscardHere.as_str()) {
            // GO was sent: nobody is asked any more what became of the grant.
            (core, _) = SourceAgent::recover(epoch, armed, SourceCopy::Gone);
            effects = core.step(SourceEvent::Resolved(Wish::DiscardHere));
        }
        script.resume(core, effects).await;
    });
}

/// What the VMM said while no agent listened, said again.
pub(super) fn made_up(standing: wire::Standing) -> Vec<Body> {
    let mut said = Vec::new();
    said.extend(standing.progress.map(Body::Progress));
    said.extend(standing.link_lost.map(Body::LinkLost));
    // It says only once that it disarmed, and then no word of the next attempt means anything to one who missed it.
    let migration = standing.migration;
    if let Some(cancelled) = standing.cancelled.filter(|attempt| attempt.migration == migration) {
        said.push(Body::Disarmed(wire::Disarmed {
            attempt: Some(cancelled),
            reason: "called off while the agent did not listen".to_owned(),
        }));
    }
    if let Some(go) = standing.last_go {
        said.push(Body::GoSent(go));
    } else if let Some(ended) = standing.send_ended {
        said.push(Body::SendEnded(ended));
    } else if standing.converged_attempt > 0 {
        let attempt = standing.converged_attempt;
        said.push(Body::Converged(wire::Converged {
            attempt,
            predicted_ms: 0.0,
        }));
    } else if matches!(standing.machine.as_str(), "running" | "paused") {
        said.push(Body::SendEnded(wire::SendEnded {
            reason: "the agent restarted before the guest was being sent".to_owned(),
            kind: "cancelled".to_owned(),
            ..wire::SendEnded::default()
        }));
    }
    said.extend(standing.ended.map(Body::GuestEnded));
    said
}

/// What a reported end of the copy means to the core.
pub(super) fn ended(ended: &wire::SendEnded) -> SourceEvent {
    if ended.guest.is_some() {
        SourceEvent::GuestEnded
    } else {
        SourceEvent::CopyEnded
    }
}

/// The migration's id of an order.
pub(super) fn call_off(row: &MigrationRow, attempt: u32, end: bool, reason: &str) -> wire::CallOff {
    wire::CallOff {
        attempt: Some(attempt_of(row, attempt)),
        end,
        reason: reason.to_owned(),
    }
}

/// The tuple (vm, M, n, e) of an attempt.
pub(super) fn attempt_of(row: &MigrationRow, attempt: u32) -> wire::Attempt {
    wire::Attempt {
        instance: row.instance.to_string(),
        migration: row.id.to_string(),
        attempt,
        epoch: row.epoch,
    }
}

/// The id of a request: a UUID that the caller chose, or a new one where it chose none.
///
/// # Errors
/// It is no UUID: the same text again would be another migration.
pub(crate) fn request_id(text: &str) -> Result<Uuid, InvalidField> {
    match text {
        "" => Ok(Uuid::new_v4()),
        chosen => wire_uuid("request_id", chosen),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn standing(cancelled_of: &str) -> wire::Standing {
        wire::Standing {
            machine: "sending".to_owned(),
            migration: "this".to_owned(),
            cancelled: Some(wire::Attempt {
                migration: cancelled_of.to_owned(),
                attempt: 1,
                ..wire::Attempt::default()
            }),
            converged_attempt: 2,
            ..wire::Standing::default()
        }
    }

    #[test]
    fn an_attempt_that_was_called_off_while_nobody_listened_is_told() {
        let said = made_up(standing("this"));
        let [Body::Disarmed(disarmed), Body::Converged(converged)] = &said[..] else {
            panic!("{said:?}");
        };
        assert_eq!(disarmed.attempt.as_ref().map(|attempt| attempt.attempt), Some(1));
        assert_eq!(converged.attempt, 2);
    }

    #[test]
    fn what_an_earlier_migration_called_off_is_no_news() {
        let said = made_up(standing("an earlier one"));
        assert!(matches!(&said[..], [Body::Converged(_)]), "{said:?}");
    }
}
