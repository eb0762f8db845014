//! How users end an instance: stop and delete.

use std::sync::Arc;
use std::time::Duration;

use ferry_migration::handover::Ended;
use ferry_proto::agent::v1::InstanceInfo;
use ferry_proto::vmm::v1::order::Order as Command;
use ferry_proto::vmm::v1::report::Report as Body;
use ferry_proto::vmm::v1::{self as wire};
use uuid::Uuid;

use super::instance::{Agent, Instance, InstanceState};
use crate::agent::context::RequestContext;
use crate::agent::failure::Failure;
use crate::agent::journal::{InstanceRow, Status};
use crate::agent::vmm_client::VmmError;

/// What came of pressing a power button.
pub(crate) enum Press {
    /// The guest was off already.
    IsOff(Box<InstanceInfo>),
    /// The guest is asked.
    Asked(Asked),
}

/// An instance whose guest was asked to switch itself off.
pub(crate) struct Asked {
    instance: Arc<Instance>,
    /// Of the VMM that was asked.
    pid: i32,
}

impl Agent {
    /// Asks the guest to switch itself off. [`switched_off`](Self::switched_off) waits for that.
    ///
    /// # Errors
    /// It runs on, unless the failure says that it is lost.
    pub(crate) async fn press_power_button(&self, context: &RequestContext, name: &str) -> Result<Press, Failure> {
        let instance = self.instance(name).await?;
        let mut state = context.wait(instance.state.lock()).await?;
        state.check_idle("stop")?;
        if matches!(state.row.status, Status::Stopped | Status::Crashed) {
            self.cancel_restart(&mut state).await?;
            return Ok(Press::IsOff(Box::new(state.info(self.host()))));
        }
        if state.row.status == Status::Running && !state.row.restarts.asked_off {
            // Before it is asked: however it ends then, it was its user's wish.
            state.row.restarts.asked_off = true;
            self.save(&state.row).await?;
        }
        let pressed = self.press(&state).await;
        if matches!(pressed, Err(Failure::Refused(_))) && std::mem::take(&mut state.row.restarts.asked_off) {
            // It was not asked, and goes on as before.
            self.save(&state.row).await?;
        }
        let pid = pressed?;
        drop(state);
        Ok(Press::Asked(Asked { instance, pid }))
    }

    /// The VMM's process, whose guest is asked.
    async fn press(&self, state: &InstanceState) -> Result<i32, Failure> {
        let (name, status) = (&state.row.spec.name, state.row.status);
        match status {
            Status::Running => {}
            Status::Paused => {
                return Err(Failure::Refused(format!(
                    "instance {name} is paused, its guest cannot be asked to switch off: resume it first, or --force pulls the plug"
                )));
            }
            Status::Indeterminate | Status::Incoming | Status::Stopped | Status::Crashed => {
                return Err(Failure::Refused(format!("instance {name} is {status}")));
            }
        }
        let press = wire::PressPowerButton { epoch: state.row.epoch };
        let vmm = state.vmm()?;
        match vmm.order(Command::PressPowerButton(press)).await {
            Ok(Body::Pressed(wire::Pressed { guest_listens: true }))
            // How it ended is about to be known.
            | Err(VmmError::Gone) => {}
            Ok(_) => {
                return Err(Failure::Refused(format!(
                    "instance {name} has no power button that its guest listens to, or not yet: --force pulls the plug"
                )));
            }
            Err(error) => {
                let what = format!("failed to press the power button of instance {name}");
                return Err(Failure::vmm(what)(error));
            }
        }
        Ok(vmm.pid())
    }

    /// Waits until a guest that was asked to switch off has, `patience` at most.
    ///
    /// # Errors
    /// It did not, it ended by a crash, or it is not here any more: a guest may move while it shuts down.
    pub(crate) async fn switched_off(&self, asked: &Asked, patience: Duration) -> Result<InstanceInfo, Failure> {
        const LOOK_AGAIN: Duration = Duration::from_millis(50);
        let looking = async {
            loop {
                match self.look_whether_off(asked).await {
                    Ok(None) => tokio::time::sleep(LOOK_AGAIN).await,
                    Ok(Some(off)) => return Ok(off),
                    Err(failure) => return Err(failure),
                }
            }
        };
        if let Ok(ended) = tokio::time::timeout(patience, looking).await {
            return ended;
        }
        // The end may have been written down while the time ran out.
        if let Some(off) = self.look_whether_off(asked).await? {
            return Ok(off);
        }
        let state = asked.instance.state.lock().await;
        let (name, status) = (&state.row.spec.name, state.row.status);
        let remedy = match status {
            Status::Running | Status::Paused => "; ask again, or --force pulls the plug",
            _ => "",
        };
        Err(Failure::GuestIgnored(format!(
            "the guest of instance {name} was asked to switch off and did not within {patience:?}: it is {status}{remedy}"
        )))
    }

    async fn look_whether_off(&self, Asked { instance, pid }: &Asked) -> Result<Option<InstanceInfo>, Failure> {
        let state = instance.state.lock().await;
        let name = &state.row.spec.name;
        match state.row.status {
            // Also of one that was deleted since.
            Status::Stopped => return Ok(Some(state.info(self.host()))),
            Status::Crashed => {
                let reason = state.row.reason.as_deref().unwrap_or("nobody knows why");
                let told = format!("instance {name} crashed and did not switch off: {reason}");
                return Err(Failure::GuestLost(told));
            }
            _ => {}
        }
        if self.instances.by_id(instance.id).is_none() {
            return Err(self.not_here(name).await);
        }
        // It was off, and somebody has started it again.
        let is_another = state.vmm.as_ref().is_some_and(|vmm| vmm.pid() != *pid);
        Ok(is_another.then(|| state.info(self.host())))
    }

    /// Pulls the plug. Aborts a migration before GO; after GO it waits for the decision.
    ///
    /// # Errors
    /// It runs on; the migration is not decided within `patience`; or the journal does not take that it stopped, which it has: it is tried again.
    pub(crate) async fn stop_by_force(&self, name: &str, patience: Duration) -> Result<InstanceInfo, Failure> {
        let instance = self.instance(name).await?;
        self.end_migration(&instance, patience).await?;
        let mut state = instance.state.lock().await;
        match state.row.status {
            Status::Stopped | Status::Crashed => self.cancel_restart(&mut state).await?,
            Status::Indeterminate | Status::Incoming => {
                return Err(Failure::Refused(format!(
                    "instance {} is {}",
                    state.row.spec.name, state.row.status
                )));
            }
            Status::Running | Status::Paused => {
                self.pull_plug(&mut state).await?;
            }
        }
        Ok(state.info(self.host()))
    }

    /// Removes an instance and all that belongs to it.
    ///
    /// # Errors
    /// It is not one to be deleted now; its VMM does not die; or the journal does not take it: it is stopped then, and still there.
    pub(crate) async fn delete_instance(&self, name: &str, force: bool) -> Result<Uuid, Failure> {
        let instance = self.instance(name).await?;
        if force {
            self.end_migration(&instance, Duration::from_secs(60)).await?;
        }
        let mut state = instance.state.lock().await;
        if force && state.row.status != Status::Incoming {
            // Whoever waits for a snapshot of it is told that it ended.
            state.outcome = None;
        }
        state.check_idle("be deleted")?;
        match state.row.status {
            Status::Stopped | Status::Crashed => {}
            Status::Indeterminate | Status::Incoming => {
                return Err(Failure::Refused(format!("instance {name} is {}", state.row.status)));
            }
            status if !force => {
                return Err(Failure::Refused(format!(
                    "instance {name} is {status}: stop it first, or add --force to delete it as it is"
                )));
            }
            _ => self.pull_plug(&mut state).await?,
        }
        self.forget(&mut state).await?;
        Ok(instance.id)
    }

    async fn pull_plug(&self, state: &mut InstanceState) -> Result<(), Failure> {
        self.end(state, Ended::ByUser, "stopped by its user".to_owned()).await;
        if state.row.status != Status::Stopped {
            let undead = std::io::Error::other("its process does not die, the agent's log says more");
            return Err(Failure::host("failed to end the VMM")(undead));
        }
        // Whoever is told that it is stopped counts on that after a restart of this agent, too.
        self.write_end(state).await
    }

    /// Aborts the migration of an instance, or waits until it is decided.
    async fn end_migration(&self, instance: &Arc<Instance>, patience: Duration) -> Result<(), Failure> {
        let (migrating, is_arriving, row) = {
            let state = instance.state.lock().await;
            (state.migrating, state.is_arriving(), state.row.clone())
        };
        if is_arriving {
            return self.refuse_incoming(instance, &row, patience).await;
        }
        let Some(migration) = migrating else {
            return Ok(());
        };
        if let Some(outgoing) = self.outgoing.find(migration) {
            outgoing.abort("the instance's user ends it");
            if tokio::time::timeout(patience, outgoing.over()).await.is_err() {
                return Err(Failure::Unavailable(format!(
                    "migration {migration} is not decided yet"
                )));
            }
        }
        // It may have gone meanwhile: then it is not this host's to stop.
        if self.instances.by_id(instance.id).is_none() {
            return Err(self.not_here(&row.spec.name).await);
        }
        Ok(())
    }

    /// Ends a migration into here. Before GO the guest runs on where it was: it is not this host's to stop. After GO the
    /// decision is waited for, and may make it so.
    async fn refuse_incoming(
        &self,
        instance: &Arc<Instance>,
        row: &InstanceRow,
        patience: Duration,
    ) -> Result<(), Failure> {
        let Some(incoming) = row.migration.and_then(|id| self.incoming.find(id)) else {
            return Ok(());
        };
        incoming.give_up("the instance's user ends it");
        let (migration, name, source) = (incoming.id, &row.spec.name, &incoming.of.source);
        if tokio::time::timeout(patience, incoming.over()).await.is_err() {
            return Err(Failure::Unavailable(format!(
                "migration {migration} is not decided yet"
            )));
        }
        if self.instances.by_id(instance.id).is_none() {
            return Err(Failure::Refused(format!(
                "migration {migration} was ended, instance {name} stays at host {source}: ask there"
            )));
        }
        Ok(())
    }
}
