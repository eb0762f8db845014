//! Looking after a VMM: its events, and its end.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use ferry_migration::handover::Ended;
use ferry_proto::vmm::v1::report::Report as Body;
use ferry_proto::vmm::v1::{GuestEnded, Restored};
use tokio::sync::mpsc::UnboundedReceiver;
use uuid::Uuid;

use super::instance::{Agent, Instance, InstanceState, VmmNews};
use super::restarting;
use crate::agent::failure::Failure;
use crate::agent::journal::Status;
use crate::agent::outgoing::now_ms;
use crate::agent::spawn;
use crate::agent::vmm_client::Vmm;

impl Agent {
    /// Makes `vmm` the instance's and looks after it until it is gone.
    pub(crate) fn attach(
        self: &Arc<Self>,
        instance: &Arc<Instance>,
        state: &mut InstanceState,
        vmm: Vmm,
        events: UnboundedReceiver<Body>,
    ) {
        state.vmm = Some(vmm.clone());
        tokio::spawn(Arc::clone(self).look_after(Arc::clone(instance), vmm, events));
    }

    async fn look_after(self: Arc<Self>, instance: Arc<Instance>, mut vmm: Vmm, mut events: UnboundedReceiver<Body>) {
        loop {
            while let Some(event) = events.recv().await {
                self.news(&instance, &vmm, VmmNews::Event(Box::new(event))).await;
            }
            if is_dead_soon(&vmm).await {
                self.news(&instance, &vmm, VmmNews::Gone).await;
                return;
            }
            // The process lives and the connection does not: it could not be written to, or somebody else was faster.
            let socket = self.folder(instance.id).join(spawn::SOCKET);
            let Some((again, standing, new_events)) = Vmm::find(&socket).await else {
                self.news(&instance, &vmm, VmmNews::Gone).await;
                return;
            };
            let mut state = instance.state.lock().await;
            if !state.vmm.as_ref().is_some_and(|current| current.is_same(&vmm)) {
                return;
            }
            tracing::info!(instance = %instance.id, "the connection to the VMM broke and was made again");
            state.vmm = Some(again.clone());
            drop(state);
            (vmm, events) = (again, new_events);
            // What it said in between is lost; where it stands tells as much.
            self.news(&instance, &vmm, VmmNews::Standing(Box::new(standing))).await;
        }
    }

    /// To the migration that has the VMM, else to the instance itself. Nobody asks for news of a VMM that was ended on purpose.
    async fn news(self: &Arc<Self>, instance: &Arc<Instance>, vmm: &Vmm, news: VmmNews) {
        let mut state = instance.state.lock().await;
        if !state.vmm.as_ref().is_some_and(|current| current.is_same(vmm)) {
            return;
        }
        let news = match &state.news {
            Some(migration) => match migration.send(news) {
                Ok(()) => return,
                Err(unsent) => unsent.0,
            },
            None => news,
        };
        self.instance_news(&mut state, news).await;
    }

    /// News of an instance that no migration has.
    pub(crate) async fn instance_news(&self, state: &mut InstanceState, news: VmmNews) {
        match news {
            VmmNews::Event(event) => match *event {
                Body::GuestEnded(ended) => self.guest_ended(state, &ended).await,
                outcome @ (Body::SnapshotEnded(_) | Body::Restored(_) | Body::LoadFailed(_)) => {
                    tell_outcome(state, Some(outcome));
                }
                _ => {}
            },
            VmmNews::Standing(standing) => {
                match standing.machine.as_str() {
                    "snapshotting" | "loading" => {}
                    "paused" if state.row.status == Status::Incoming => {
                        tell_outcome(state, Some(Body::Restored(Restored {})));
                    }
                    _ => tell_outcome(state, standing.snapshot_ended.map(Body::SnapshotEnded)),
                }
                if let Some(ended) = standing.ended {
                    self.guest_ended(state, &ended).await;
                }
            }
            VmmNews::Gone => self.vmm_died(state).await,
        }
    }

    /// The guest ended by itself: a power-off stops the instance, anything else crashed it.
    pub(crate) async fn guest_ended(&self, state: &mut InstanceState, ended: &GuestEnded) {
        if matches!(state.row.status, Status::Stopped | Status::Crashed) {
            return;
        }
        let (how, reason) = match ended.how.as_str() {
            "powered-off" => (Ended::PoweredOff, "the guest powered off".to_owned()),
            how if ended.reason.is_empty() => (Ended::Crashed, format!("the guest {how}")),
            how => (Ended::Crashed, format!("{how}: {}", ended.reason)),
        };
        tracing::info!(instance = %state.row.id, ?how, reason, "the guest ended");
        self.end(state, how, reason).await;
    }

    /// The VMM died, and the guest with it.
    pub(crate) async fn vmm_died(&self, state: &mut InstanceState) {
        if matches!(state.row.status, Status::Stopped | Status::Crashed) {
            state.vmm = None;
            return;
        }
        let reason = state.vmm_obituary().await;
        tracing::info!(instance = %state.row.id, reason, "the instance crashed");
        self.end(state, Ended::Crashed, reason).await;
    }

    /// Ends the VMM and writes what became of the instance: in this order, for nobody looks for the VMM of an instance
    /// that the journal calls stopped. The instance stays as it is if its VMM does not die. Its restart policy may have it
    /// started again.
    pub(crate) async fn end(&self, state: &mut InstanceState, ended: Ended, reason: String) {
        let killed = match &state.vmm {
            Some(vmm) => vmm.kill().await,
            // It may be there all the same: silent, and not found again yet by an agent that restarted.
            None => self.kill_listening(state.row.id).await,
        };
        if let Err(error) = killed {
            tracing::error!(instance = %state.row.id, %error, "the VMM does not die: the instance stays as it is");
            return;
        }
        state.vmm = None;
        state.outcome = None;
        state.row.status = match ended {
            Ended::Crashed => Status::Crashed,
            Ended::PoweredOff | Ended::ByUser => Status::Stopped,
        };
        state.row.reason = Some(reason);
        restarting::plan(&mut state.row, ended, now_ms());
        state.is_unwritten = true;
        if let Err(error) = self.write_end(state).await {
            tracing::error!(instance = %state.row.id, error = error.chain(), "failed to journal how the instance ended: it is tried again");
        }
        if state.row.restarts.due.is_some() || state.is_unwritten {
            // Whoever starts instances lives as long as the agent.
            let _ = self.due.send(state.row.id);
        }
        spawn::remove_cgroup(&state.row.id.to_string());
    }

    /// Writes how the instance ended, where the journal did not take it before.
    ///
    /// # Errors
    /// The journal's: it is not known to an agent that restarts.
    pub(super) async fn write_end(&self, state: &mut InstanceState) -> Result<(), Failure> {
        // Whoever started it since has written its row, and a doubt is not for the journal.
        let has_ended = matches!(state.row.status, Status::Stopped | Status::Crashed);
        if state.is_unwritten && has_ended {
            self.save(&state.row).await?;
            state.is_unwritten = false;
        }
        Ok(())
    }
}

impl Agent {
    /// Kills whatever VMM listens on the instance's socket, and waits until it is dead.
    pub(super) async fn kill_listening(&self, id: Uuid) -> io::Result<()> {
        let socket = self.folder(id).join(spawn::SOCKET);
        tokio::task::spawn_blocking(move || spawn::kill_listening(&socket))
            .await
            .map_err(io::Error::other)?
    }
}

/// Tells whoever waits what became of a snapshot, or that nobody will ever know.
fn tell_outcome(state: &mut InstanceState, outcome: Option<Body>) {
    if let (Some(waiting), Some(outcome)) = (state.outcome.take(), outcome) {
        // Whoever waited gave up.
        let _ = waiting.send(outcome);
    }
}

/// Whether the process is dead, or dies within a moment: its socket closes a little earlier.
async fn is_dead_soon(vmm: &Vmm) -> bool {
    for _ in 0..50 {
        if vmm.is_dead() {
            return true;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    false
}
