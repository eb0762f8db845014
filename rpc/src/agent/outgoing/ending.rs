//! What becomes of the instance and of the record when a migration out of here is over.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use ferry_migration::handover::{Decision, Ended, Ending, Wish};

use super::figures::note_completed;
use super::handle::now_text;
use super::script::{Script, Stop};
use crate::agent::backends::room;
use crate::agent::events::end_of_migration;
use crate::agent::failure::Failure;
use crate::agent::instances::InstanceState;
use crate::agent::journal::{EventEnd, InstanceRow, MigrationRow, RowWrite, Status};
use crate::agent::steps::SourceUndo;
use crate::agent::vmm_client::Vmm;

/// What the record says once a person ended the migration, on this host.
pub(super) fn note_resolved(row: &mut MigrationRow, host: &str, wish: Wish) {
    let (status, location) = match wish {
        Wish::RunHere => ("failed", host),
        // Nobody but its user says so.
        Wish::DiscardHere => ("error", row.peer.as_str()),
    };
    row.info.status = status.to_owned();
    row.info.guest_location = Some(location.to_owned());
    row.info.error = Some(format!("resolved by its user: {}", wish.as_str()));
    row.info.ended = Some(now_text());
    row.said = Some(wish.as_str().to_owned());
}

/// How long the VMM may take to give the machine back after it answered CANCELLED.
const WIND_UP: Duration = Duration::from_secs(5);

/// How long an ending waits for the destination to have cleaned up.
const ROLLBACK_TIME: Duration = Duration::from_millis(500);

impl Script {
    /// The guest is the destination's: the copy is killed and removed. D was journalled before.
    pub(super) async fn destroy_copy(&mut self) -> Result<(), Failure> {
        // Whoever asks for the instance is answered meanwhile.
        let vmm = self.instance.state.lock().await.vmm.clone();
        if let Some(vmm) = vmm {
            self.end_left_vmm(&vmm).await;
        }
        let mut state = self.instance.state.lock().await;
        state.vmm = None;
        let (row, host, migration) = (state.row.clone(), self.row.peer.clone(), self.row.id);
        self.agent
            .journal
            .write(RowWrite::Departed, move |transaction| {
                InstanceRow::depart(transaction, &row, &host, migration)
            })
            .await?;
        self.agent.instances.remove(self.row.instance);
        self.agent.remove_folder(self.row.instance);
        // Where a person said so, who may be wrong, what is on its disks is kept.
        if self.row.said.as_deref() == Some(Decision::Running.as_str()) {
            // Their contents are the destination's now, and go on changing there.
            room::remove(&self.row.info.copied_disks, self.row.instance, self.agent.host());
        }
        // Last: from here on the guest may come back, and bring its disks to the same paths.
        self.outgoing.let_go.send_replace(true);
        Ok(())
    }

    /// The VMM that the guest has left is dead when this returns, however long that takes: where the guest is does not depend on it, nor does
    /// anybody wait who could do something about it. Until then the record says what is waited for; an agent that ends meanwhile leaves it to
    /// the next one.
    pub(super) async fn end_left_vmm(&mut self, vmm: &Vmm) {
        let before = self.row.info.decision.clone();
        while let Err(error) = vmm.kill().await {
            tracing::error!(migration = %self.row.id, %error, "the VMM of a guest that has moved does not die, trying again");
            self.row.info.decision = Some(format!("the VMM that the guest has left is waited for: {error}"));
            self.show();
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        self.row.info.decision = before;
    }

    /// The last lines of the script.
    pub(super) async fn finish(mut self, ending: Ending) {
        match ending {
            Ending::Arrived if self.serving => {
                self.serve_pages().await;
                self.note_network_gap().await;
            }
            Ending::Arrived => {
                // Whoever waits for a turn, or for the copy to be gone, need not wait for what is only told.
                drop(self.turn.take());
                self.note_network_gap().await;
                self.arrived();
            }
            Ending::Resolved(wish) => self.resolved(wish).await,
            Ending::Stayed => {
                self.undo().await;
                self.stayed().await;
            }
            Ending::Crashed => {
                self.undo().await;
                self.crashed().await;
            }
            Ending::GuestStopped => {
                self.undo().await;
                self.guest_stopped().await;
            }
        }
        self.row.info.ended = Some(now_text());
        self.row.info.link_lost_until = None;
        self.row.info.remaining_pages = 0;
        self.row.over = true;
        let refusal = self.refusal.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        let end = end_of_migration(&self.outgoing.context, &self.row.info, refusal.as_ref());
        while let Err(failure) = self.save_over(end.clone()).await {
            tracing::error!(migration = %self.row.id, error = failure.chain(), "failed to journal a migration's end");
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        tracing::info!(
            migration = %self.row.id,
            status = self.row.info.status,
            error = self.row.info.error,
            "migration is over"
        );
        self.agent.outgoing.remove(self.row.id);
        self.outgoing.let_go.send_replace(true);
        self.outgoing.over.send_replace(true);
        if let Some(resolving) = self.resolving.take() {
            resolving.answer(Ok(()));
        }
    }

    /// Makes the row of a migration that is over durable, and with it the end of its event.
    async fn save_over(&self, end: EventEnd) -> Result<(), Failure> {
        self.show();
        let row = self.row.clone();
        let saved = self.agent.journal.write(RowWrite::SourceOver, move |transaction| {
            row.save(transaction)?;
            end.of_migration(transaction, &row.id.to_string())
        });
        saved.await.map_err(Failure::from)
    }

    /// Undoes the steps that were reached, the last first, and writes into the record what was.
    async fn undo(&mut self) {
        let reached = self.reached();
        for (step, how, words) in reached.undoing() {
            let undone = match how {
                SourceUndo::TakeMachineBack => self.take_machine_back().await && !self.is_decided(),
                SourceUndo::RollBackDestination => self.destination_is_told().await,
                SourceUndo::EndMachine => self.end_machine().await,
                SourceUndo::GiveUpTurn => self.turn.take().is_some(),
            };
            if undone {
                tracing::info!(migration = %self.row.id, %step, "undone: {words}");
                self.row.info.undone.push(format!("{step}: {words}"));
            }
        }
    }

    /// Whether D has given the guest back: then GO was sent, and the steps before it are not undone but superseded.
    fn is_decided(&self) -> bool {
        self.row.said.as_deref() == Some(Decision::Source.as_str())
    }

    /// Waits a moment until the destination knows that it is over. Where D says SRC it said so itself.
    async fn destination_is_told(&mut self) -> bool {
        if self.is_decided() {
            return false;
        }
        if self.rollback.is_none() {
            self.roll_back_destination();
        }
        let Some(rollback) = self.rollback.take() else {
            return false;
        };
        // An answer means that it is ready for the next attempt; without one it finds out by itself.
        matches!(tokio::time::timeout(ROLLBACK_TIME, rollback).await, Ok(Ok(true)))
    }

    /// The machine of an instance that is off was only held. True if there was one.
    async fn end_machine(&mut self) -> bool {
        if self.row.status_before() != Status::Stopped {
            return false;
        }
        let mut state = self.instance.state.lock().await;
        let was_held = state.vmm.is_some();
        let reason = state
            .row
            .reason
            .clone()
            .unwrap_or_else(|| "it was not started".to_owned());
        self.agent.end(&mut state, Ended::ByUser, reason).await;
        was_held
    }

    /// A person ended it. The copy that GO stopped is killed; a guest that is to run here is booted anew by whoever asked.
    async fn resolved(&mut self, wish: Wish) {
        if wish == Wish::DiscardHere {
            return;
        }
        let instance = Arc::clone(&self.instance);
        let mut state = instance.state.lock().await;
        state.news = None;
        state.migrating = None;
        if let Some(vmm) = state.vmm.take()
            && let Err(error) = vmm.kill().await
        {
            // It has GO sent, and is killed again before its guest is started.
            tracing::error!(migration = %self.row.id, %error, "the VMM of a stale copy does not die");
            state.vmm = Some(vmm);
        }
    }

    pub(super) fn arrived(&mut self) {
        note_completed(&mut self.row.info);
        self.row.info.guest_location = Some(self.row.peer.clone());
        self.row.info.error = None;
    }

    /// The guest goes on here. The record says why.
    async fn stayed(&mut self) {
        let info = &mut self.row.info;
        info.guest_location = Some(self.agent.host().to_owned());
        let (status, error) = match self.stop.take() {
            Some(Stop::Aborted(reason)) => ("cancelled", reason),
            Some(Stop::Failed(reason) | Stop::Busy(reason)) => ("failed", reason),
            None => ("failed", format!("host {} did not take the guest", self.row.peer)),
        };
        info.status = status.to_owned();
        info.error = Some(error);
        let instance = Arc::clone(&self.instance);
        let mut state = instance.state.lock().await;
        state.news = None;
        state.migrating = None;
        if self.row.status_before() == Status::Stopped {
            // It is that again.
            return;
        }
        // It may have ended before anything was sent.
        let over = matches!(state.row.status, Status::Stopped | Status::Crashed);
        if over {
            self.row.info.guest_ended = Some(state.row.status.to_string());
            return;
        }
        state.row.status = self.row.status_before();
        if let Err(failure) = self.agent.save(&state.row).await {
            tracing::error!(error = failure.chain(), "failed to journal that the instance stays");
        }
        self.take_late_news(&mut state).await;
    }

    /// What the VMM said while the migration ended: its guest may have ended, or itself.
    async fn take_late_news(&mut self, state: &mut InstanceState) {
        if let Some(mut news) = self.news.take() {
            news.close();
            while let Some(late) = news.recv().await {
                self.agent.instance_news(state, late).await;
            }
        }
        if let Some(ended) = self.guest_ended.take() {
            self.row.info.guest_ended = Some(ended.how.clone());
            self.agent.guest_ended(state, &ended).await;
        }
        if state.vmm.as_ref().is_some_and(Vmm::is_dead) {
            self.agent.vmm_died(state).await;
        }
    }

    /// After CANCELLED the VMM still winds the copy up: the instance is idle only when it has its machine back. False if it never will.
    async fn take_machine_back(&mut self) -> bool {
        let deadline = tokio::time::Instant::now() + WIND_UP;
        loop {
            let Some(vmm) = self.instance.state.lock().await.vmm.clone() else {
                return false;
            };
            let ping = ferry_proto::vmm::v1::order::Order::Ping(ferry_proto::vmm::v1::Ping {});
            match vmm.order(ping).await {
                Ok(ferry_proto::vmm::v1::report::Report::Standing(standing)) if standing.machine == "sending" => {}
                Ok(ferry_proto::vmm::v1::report::Report::Standing(standing)) => {
                    self.guest_ended = self.guest_ended.take().or(standing.ended);
                    return self.guest_ended.is_none();
                }
                _ => return false,
            }
            if tokio::time::Instant::now() >= deadline {
                tracing::warn!(migration = %self.row.id, "the VMM does not wind the migration up");
                return false;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn crashed(&mut self) {
        let mut state = self.instance.state.lock().await;
        if self.row.status_before() == Status::Stopped {
            // There was no guest in it.
            let why = match self.stop.take() {
                Some(Stop::Aborted(reason) | Stop::Failed(reason) | Stop::Busy(reason)) => reason,
                None => "the VMM that held its machine died".to_owned(),
            };
            self.row.info.status = "failed".to_owned();
            self.row.info.error = Some(why);
            self.row.info.guest_location = Some(self.agent.host().to_owned());
            state.news = None;
            state.migrating = None;
            return;
        }
        let reason = format!("during a migration {}", state.vmm_obituary().await);
        self.row.info.status = "failed".to_owned();
        self.row.info.error = Some(format!("the guest crashed on host {}: {reason}", self.agent.host()));
        self.row.info.guest_ended = Some("crashed".to_owned());
        self.row.info.guest_location = Some(self.agent.host().to_owned());
        state.news = None;
        state.migrating = None;
        self.agent.end(&mut state, Ended::Crashed, reason).await;
    }

    async fn guest_stopped(&mut self) {
        self.row.info.status = "failed".to_owned();
        self.row.info.error = Some("guest stopped".to_owned());
        self.row.info.guest_location = Some(self.agent.host().to_owned());
        let ended = self.guest_ended.take().unwrap_or_default();
        self.row.info.guest_ended = Some(ended.how.clone());
        let mut state = self.instance.state.lock().await;
        state.news = None;
        state.migrating = None;
        self.agent.guest_ended(&mut state, &ended).await;
    }
}
