//! What was decided about an incoming guest: how it gets into the journal, and how its source hears of it.

use std::time::Duration;

use ferry_migration::handover::{Decision, DestinationEvent, Origin};
use ferry_proto::agent::v1::{DestinationPart, PostLiveMigrationRequest};
use ferry_proto::vmm::v1 as wire;
use tokio::sync::mpsc;

use super::driver::Driver;
use super::handle::Request;
use super::undoing::step_of;
use crate::agent::events::end_of_migration;
use crate::agent::instances::VmmNews;
use crate::agent::journal::{Arrival, DecisionRow, EventEnd, InstanceRow, JournalError, RowWrite};
use crate::agent::outgoing::{note_completed, now_ms};
use crate::vmm_process::ms;

/// B's part of the blackout as it is measured.
#[derive(Clone, Debug, Default)]
pub(super) struct Part {
    pub(super) ready: Option<wire::Ready>,
    pub(super) ready_ns: u64,
    pub(super) permit_ns: u64,
    pub(super) entered_ns: u64,
}

impl Part {
    pub(super) fn to_wire(&self) -> Option<DestinationPart> {
        let ready = self.ready.as_ref()?;
        if self.entered_ns == 0 || self.permit_ns == 0 {
            return None;
        }
        let between = |from: u64, to: u64| ms(Duration::from_nanos(to.saturating_sub(from)));
        Some(DestinationPart {
            load_ms: ready.load_ms,
            claim_ms: between(self.ready_ns, self.permit_ns),
            start_ms: between(self.permit_ns, self.entered_ns),
            total_ms: between(ready.go_read_ns, self.entered_ns),
            memory_digest: ready.memory_digest.clone(),
            state_digest: ready.state_digest.clone(),
        })
    }
}

impl Driver {
    pub(super) async fn write_again(&mut self, attempt: u32, decision: Decision) {
        match self.journal(attempt, decision).await {
            Err(error) => self.later(attempt, decision, &error),
            Ok(()) if decision == Decision::Running => match self.vmm().await {
                Some(vmm) if !vmm.is_dead() => self.step(DestinationEvent::Started, None).await,
                _ => self.vmm_gone().await,
            },
            Ok(()) => {
                self.tell_source(decision);
                self.row.over = true;
            }
        }
    }

    /// The register, and with RUNNING the instance that is this host's from then on, in one transaction.
    pub(super) async fn journal(&mut self, attempt: u32, decision: Decision) -> Result<(), JournalError> {
        let boot_id = self.agent.boot_id.clone();
        self.step = self.step.max(step_of(decision));
        if decision == Decision::Claimed {
            self.claimed_boot.clone_from(&boot_id);
        }
        let decided = DecisionRow {
            migration: self.row.id,
            attempt,
            decision,
            boot_id,
        };
        let mut instance = None;
        if decision == Decision::Running {
            let mut state = self.instance.state.lock().await;
            state.row.epoch = self.row.epoch + 1;
            state.row.known_epoch = state.row.epoch;
            state.row.status = self.row.status_before();
            state.row.boot_id.clone_from(&self.agent.boot_id);
            state.row.restarts.started = now_ms();
            state.arrival = Some(self.arrival(attempt));
            state.origin = Origin::Unasked;
            instance = Some((state.row.clone(), self.arrival(attempt)));
        }
        self.agent
            .journal
            .write(RowWrite::OfEffect, move |transaction| {
                decided.save(transaction)?;
                let Some((row, arrival)): Option<(InstanceRow, Arrival)> = instance else {
                    return Ok(());
                };
                row.save(transaction)?;
                arrival.save(transaction)
            })
            .await
    }

    fn arrival(&self, attempt: u32) -> Arrival {
        Arrival {
            migration: self.row.id,
            instance: self.row.instance,
            source: self.row.peer.clone(),
            attempt,
        }
    }

    pub(super) fn later(&self, attempt: u32, decision: Decision, error: &JournalError) {
        tracing::error!(migration = %self.row.id, %error, %decision, "the decision is written later");
        let requests = self.incoming.requests.clone();
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_secs(1)).await;
            let _ = requests.send(Request::WriteAgain(attempt, decision));
        });
    }

    /// Tells agent A, which would ask in the end if it never heard.
    pub(super) fn tell_source(&self, decision: Decision) {
        // The core's newest attempt is the one that the news is about; A checks it against its own.
        let attempt = self.core.attempt();
        let post = PostLiveMigrationRequest {
            instance: self.row.instance.to_string(),
            migration: self.row.id.to_string(),
            attempt,
            decision: decision.to_string(),
            part: self.part.to_wire(),
            reason: self.reason.clone().unwrap_or_default(),
            destination: self.agent.host().to_owned(),
            journal: String::new(),
        };
        if decision == Decision::Running {
            return self.agent.settle(&self.incoming.context, self.arrival(attempt), post);
        }
        let Ok(peer) = self.agent.peers.named(&self.row.peer).cloned() else {
            return;
        };
        let compute = self.agent.peer_rpcapi(&self.incoming.context, &peer);
        let journal = self.row.peer_journal;
        tokio::spawn(async move {
            for pause in [0, 100, 500, 2000] {
                tokio::time::sleep(Duration::from_millis(pause)).await;
                match compute.post_live_migration(post.clone(), journal).await {
                    Ok(_) => return,
                    Err(failure) => tracing::info!(error = failure.chain(), "the source does not take the news yet"),
                }
            }
        });
    }

    /// Writes how it came out; of a guest that was refused nothing is left.
    pub(super) async fn finish(mut self, mut news: mpsc::UnboundedReceiver<VmmNews>) {
        // D is final, so the mark says nothing that the journal does not. Before the last row: nobody looks for it after that.
        self.agent.marks.remove(self.row.id);
        self.row.info.ended = Some(crate::agent::outgoing::now_text());
        self.row.info.link_lost_until = None;
        if self.core.decision() == Some(Decision::Running) {
            note_completed(&mut self.row.info);
            self.row.info.guest_location = Some(self.agent.host().to_owned());
            self.end_late().await;
            // What the VMM said since it started, while the row was being written.
            news.close();
            while let Some(late) = news.recv().await {
                let mut state = self.instance.state.lock().await;
                self.agent.instance_news(&mut state, late).await;
            }
        } else {
            self.row.info.status = "failed".to_owned();
            self.row.info.error.clone_from(&self.reason);
            self.undo().await;
        }
        self.row.info.step = self.step.to_string();
        self.row.over = true;
        let end = self.end_of_event();
        loop {
            let (row, end) = (self.row.clone(), end.clone());
            let written = self.agent.journal.write(RowWrite::DestinationOver, move |transaction| {
                row.save(transaction)?;
                end.of_migration(transaction, &row.id.to_string())
            });
            match written.await {
                Ok(()) => break,
                Err(error) => tracing::error!(%error, "failed to journal the end of a migration, trying again"),
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        self.agent.incoming.remove(self.row.id);
    }

    /// One that its source called off is no failure of this host's.
    fn end_of_event(&self) -> EventEnd {
        let mut end = end_of_migration(&self.incoming.context, &self.row.info, None);
        if self.called_off {
            end.fault = None;
        }
        end
    }
}
