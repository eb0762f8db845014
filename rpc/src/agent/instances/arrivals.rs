//! Guests that came here: their source is told until it has acknowledged it.
//!
//! Until then the source may come to have them again, by a person's `resolve`, under a higher epoch. Whoever learns of a
//! higher epoch destroys what it has: a host that comes back after its guests were started elsewhere asks, and learns it here.

use std::sync::Arc;
use std::time::Duration;

use ferry_migration::handover::{Decision, Epoch, Heard, Origin, PeerCopy, heard};
use ferry_proto::agent::v1::{PostLiveMigrationReply, PostLiveMigrationRequest};
use uuid::Uuid;

use super::instance::{Agent, Instance, InstanceState};
use crate::agent::context::RequestContext;
use crate::agent::events::{Action, Subject};
use crate::agent::failure::Failure;
use crate::agent::journal::{Arrival, EventEnd, InstanceRow, JournalError, MigrationRow, RowWrite, Status};

/// The pauses between two times that a source is told; the last one for ever.
const PAUSES: [Duration; 6] = [
    Duration::from_millis(100),
    Duration::from_millis(250),
    Duration::from_millis(500),
    Duration::from_secs(2),
    Duration::from_secs(5),
    Duration::from_secs(15),
];

/// What a source's answer says of its copy to this host, which has its own under the epoch `here`. One under a higher epoch was the right
/// one, also where it is deleted since; of two that nobody could tell apart the deleted one was the wrong one.
fn copy_of(reply: PostLiveMigrationReply, here: Epoch) -> PeerCopy {
    let PostLiveMigrationReply {
        pending,
        kept_epoch,
        deleted,
        // It was compared when the answer came.
        journal: _,
    } = reply;
    match (pending, Epoch(kept_epoch)) {
        (true, _) => PeerCopy::Pending,
        (false, Epoch(0)) => PeerCopy::Nothing,
        (false, there) if deleted && there <= here => PeerCopy::Nothing,
        (false, there) => PeerCopy::Holds(there),
    }
}

/// What an instance is once its source has said that it has no copy: what it was before, with what is known now.
fn undoubted(before: Option<(Status, Option<String>)>, source: &str) -> (Status, Option<String>) {
    match before {
        Some((Status::Stopped, reason)) => (Status::Stopped, reason),
        _ => {
            let reason = format!("it crashed, and host {source} has no copy of it");
            (Status::Crashed, Some(reason))
        }
    }
}

impl Agent {
    /// What a source is told of a guest that came from it.
    pub(crate) fn arrived(&self, arrival: &Arrival) -> PostLiveMigrationRequest {
        PostLiveMigrationRequest {
            instance: arrival.instance.to_string(),
            migration: arrival.migration.to_string(),
            attempt: arrival.attempt,
            decision: Decision::Running.to_string(),
            part: None,
            reason: String::new(),
            destination: self.host().to_owned(),
            journal: String::new(),
        }
    }

    /// Tells a source that its guest is here until it acknowledges that, for ever if need be. `news` may hold more than
    /// [`Agent::arrived`] makes.
    pub(crate) fn settle(self: &Arc<Self>, context: &RequestContext, arrival: Arrival, news: PostLiveMigrationRequest) {
        let (agent, context) = (Arc::clone(self), context.without_deadline());
        tokio::spawn(async move {
            let mut pauses = PAUSES.into_iter();
            let mut last = PAUSES[0];
            loop {
                let here = agent.epoch_here(arrival.instance).await;
                if let Some(copy) = agent.tell(&context, &arrival, here, news.clone()).await
                    && agent.heard_of(&arrival, copy).await
                {
                    return;
                }
                last = pauses.next().unwrap_or(last);
                tokio::time::sleep(last).await;
            }
        });
    }

    async fn epoch_here(&self, id: Uuid) -> Epoch {
        match self.instances.by_id(id) {
            Some(instance) => Epoch(instance.state.lock().await.row.epoch),
            None => Epoch(0),
        }
    }

    /// None if the source did not answer, or does not want to know.
    async fn tell(
        &self,
        context: &RequestContext,
        arrival: &Arrival,
        here: Epoch,
        news: PostLiveMigrationRequest,
    ) -> Option<PeerCopy> {
        let peer = self.peers.named(&arrival.source).ok()?;
        // Another agent at its URL never heard of the guest, and would say that nobody has it.
        let journal = match self.journal_of_peer(arrival.migration).await {
            Ok(journal) => journal,
            Err(error) => {
                tracing::error!(instance = %arrival.instance, %error, "failed to read of whom a guest came");
                return None;
            }
        };
        match self.peer_rpcapi(context, peer).post_live_migration(news, journal).await {
            Ok(reply) => Some(copy_of(reply, here)),
            Err(failure) => {
                let error = failure.chain();
                tracing::info!(instance = %arrival.instance, error, "the source does not acknowledge yet that its guest is here");
                None
            }
        }
    }

    /// Which journal the other host of a migration has, if it was told.
    async fn journal_of_peer(&self, migration: Uuid) -> Result<Option<Uuid>, JournalError> {
        let find = move |connection: &rusqlite::Connection| MigrationRow::find(connection, migration);
        let row = self.journal.read(find).await?;
        Ok(row.and_then(|row| row.peer_journal))
    }

    /// Acts upon what a source said. True if it need not be told again.
    async fn heard_of(&self, arrival: &Arrival, copy: PeerCopy) -> bool {
        let Some(instance) = self.instances.by_id(arrival.instance) else {
            // It went on, or was deleted.
            return copy != PeerCopy::Pending && self.forget_arrival(arrival).await;
        };
        let mut state = instance.state.lock().await;
        if state.arrival.as_ref() != Some(arrival) {
            // Settled or destroyed by somebody else, or it came again since.
            return true;
        }
        match heard(Epoch(state.row.epoch), copy) {
            Heard::NotYet => false,
            Heard::Settled => self.settled(&mut state, arrival).await,
            Heard::Superseded(epoch) => {
                self.destroy_stale(&mut state, epoch).await;
                self.instances.by_id(arrival.instance).is_none()
            }
            Heard::Conflict(_) => {
                self.note_said(&mut state, copy).await;
                false
            }
        }
    }

    /// An instance that is to come here may be here already: a stale copy of it, of which this host has not learned yet.
    pub(crate) async fn clear_the_way(&self, id: Uuid) {
        let Some(instance) = self.instances.by_id(id) else {
            return;
        };
        self.ask_origin(&instance).await;
        let mut state = instance.state.lock().await;
        if state.arrival.is_some()
            && let Origin::Says(copy) = state.origin
            && let Heard::Superseded(epoch) = heard(Epoch(state.row.epoch), copy)
        {
            self.destroy_stale(&mut state, epoch).await;
        }
    }

    /// Asks the host that an instance came from, if it has not acknowledged that, for whoever wants to start the instance or to move it
    /// on. That host may be silent: the instance is not locked while it is waited for, and can be looked at.
    pub(crate) async fn ask_origin(&self, instance: &Instance) {
        let mut state = instance.state.lock().await;
        let Some(arrival) = state.arrival.clone() else {
            state.origin = Origin::Settled;
            return;
        };
        let here = Epoch(state.row.epoch);
        drop(state);
        // The host's own affair, whoever has it look.
        let context = RequestContext::agent();
        let said = self.tell(&context, &arrival, here, self.arrived(&arrival)).await;
        let mut state = instance.state.lock().await;
        if state.arrival.as_ref() != Some(&arrival) {
            // It was acknowledged meanwhile, or the copy was destroyed.
            return;
        }
        match said {
            None => state.origin = Origin::Silent,
            Some(PeerCopy::Nothing) => drop(self.settled(&mut state, &arrival).await),
            Some(copy) => self.note_said(&mut state, copy).await,
        }
    }

    /// The source still has something of it. That both hosts have the instance is a failure of it, told when it is first heard; until one
    /// of them is deleted whoever looks at it is told.
    async fn note_said(&self, state: &mut InstanceState, copy: PeerCopy) {
        let was_known = state.conflict().is_some();
        state.origin = Origin::Says(copy);
        let Some((source, there)) = state.conflict().filter(|_| !was_known) else {
            return;
        };
        let failure = Failure::Refused(format!(
            "two hosts have the instance, this one under epoch {}, host {source} under epoch {there}: its migration was resolved on \
             both; delete one of them",
            state.row.epoch
        ));
        tracing::error!(instance = %state.row.id, error = failure.chain(), "an instance is on two hosts");
        let subject = Subject {
            migration: state.row.migration,
            ..Subject::instance(state.row.id, &state.row.spec.name)
        };
        let context = RequestContext::agent();
        self.record_failure(&context, Action::Resolve, subject, &failure).await;
    }

    /// The source acknowledged: nobody but this host has the guest.
    async fn settled(&self, state: &mut InstanceState, arrival: &Arrival) -> bool {
        state.origin = Origin::Says(PeerCopy::Nothing);
        if !self.forget_arrival(arrival).await {
            return false;
        }
        state.arrival = None;
        state.origin = Origin::Settled;
        if state.row.status == Status::Indeterminate && state.migrating.is_none() {
            (state.row.status, state.row.reason) = undoubted(state.doubted.take(), &arrival.source);
            if let Err(failure) = self.save(&state.row).await {
                tracing::error!(
                    error = failure.chain(),
                    "failed to journal that an instance is this host's"
                );
            }
        }
        true
    }

    async fn forget_arrival(&self, arrival: &Arrival) -> bool {
        let migration = arrival.migration;
        let forgotten = self
            .journal
            .write(RowWrite::Settled, move |transaction| {
                Arrival::settle(transaction, migration)
            })
            .await;
        if let Err(error) = &forgotten {
            tracing::error!(%migration, %error, "failed to journal that a source acknowledged");
        }
        forgotten.is_ok()
    }

    /// Rule 5: another host has the guest under a higher epoch. What is here is killed and removed before anything else; its
    /// disk images are kept, they are no part of what could run.
    pub(super) async fn destroy_stale(&self, state: &mut InstanceState, epoch: Epoch) {
        let Some(arrival) = state.arrival.clone() else { return };
        let id = state.row.id;
        let killed = match &state.vmm {
            Some(vmm) => vmm.kill().await,
            None => self.kill_listening(id).await,
        };
        if let Err(error) = killed {
            tracing::error!(instance = %id, %error, "the VMM of a stale copy does not die, trying again");
            return;
        }
        state.vmm = None;
        let done = format!(
            "host {} has it under epoch {epoch}, here it had {}",
            arrival.source, state.row.epoch
        );
        tracing::warn!(instance = %id, name = state.row.spec.name, done, "destroying a stale copy");
        let context = RequestContext::agent();
        let audit = context.did(Action::DestroyStale.word(), &id.to_string(), &done);
        let event =
            Subject::migration(id, &state.row.spec.name, arrival.migration).begins(&context, Action::DestroyStale);
        let end = EventEnd::success(Some(done));
        let row = state.row.clone();
        let written = self
            .journal
            .write(RowWrite::Stale, move |transaction| {
                InstanceRow::depart(transaction, &row, &arrival.source, arrival.migration)?;
                Arrival::settle(transaction, arrival.migration)?;
                let event = event.begin(transaction)?;
                end.of_event(transaction, event)?;
                audit.add(transaction)
            })
            .await;
        if let Err(error) = written {
            tracing::error!(instance = %id, %error, "failed to journal that a stale copy is gone, trying again");
            return;
        }
        state.row.restarts.due = None;
        state.arrival = None;
        self.instances.remove(id);
        self.remove_folder(id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_was_stopped_before_the_doubt_is_stopped_after_it() {
        let reason = Some("it was stopped when it came from host a".to_owned());
        let stopped = undoubted(Some((Status::Stopped, reason.clone())), "a");
        assert_eq!(stopped, (Status::Stopped, reason));
        let (status, reason) = undoubted(Some((Status::Crashed, None)), "a");
        assert_eq!(status, Status::Crashed);
        assert!(reason.is_some_and(|reason| reason.contains("host a has no copy")));
    }

    #[test]
    fn a_source_that_knows_nothing_of_this_has_acknowledged() {
        let of = |reply| copy_of(reply, Epoch(6));
        assert_eq!(of(PostLiveMigrationReply::default()), PeerCopy::Nothing);
        assert_eq!(of(reply(true, 0, false)), PeerCopy::Pending);
        assert_eq!(of(reply(false, 6, false)), PeerCopy::Holds(Epoch(6)));
    }

    #[test]
    fn of_two_that_were_resolved_the_deleted_one_counts_no_more_unless_its_epoch_is_higher() {
        let of = |kept_epoch| copy_of(reply(false, kept_epoch, true), Epoch(6));
        assert_eq!((of(6), of(7)), (PeerCopy::Nothing, PeerCopy::Holds(Epoch(7))));
    }

    fn reply(pending: bool, kept_epoch: u64, deleted: bool) -> PostLiveMigrationReply {
        PostLiveMigrationReply {
            pending,
            kept_epoch,
            deleted,
            journal: String::new(),
        }
    }
}
