//! How users end an instance: stop and delete.

use std::sync::Arc;
use std::time::Duration;

use ferry_proto::agent::v1::InstanceInfo;
use ferry_proto::vmm::v1::order::Order as Command;
use ferry_proto::vmm::v1::report::Report as Body;
use ferry_proto::vmm::v1::{self as wire};
use uuid::Uuid;

use super::instance::{Agent, Instance, InstanceState};
use crate::agent::failure::Failure;
use crate::agent::journal::{InstanceRow, Status};

impl Agent {
    /// Stops an instance: asks its guest to switch itself off and waits for that, `patience` at most; with `force` ends it as it is.
    ///
    /// # Errors
    /// It runs on, unless the failure says that it is lost.
    pub(crate) async fn stop_instance(
        &self,
        name: &str,
        force: bool,
        patience: Duration,
    ) -> Result<InstanceInfo, Failure> {
        let instance = self.instance(name).await?;
        if force {
            return self.stop_by_force(&instance, patience).await;
        }
        if let Some(off) = self.press_power_button(&instance).await? {
            return Ok(off);
        }
        match tokio::time::timeout(patience, self.switched_off(&instance)).await {
            Ok(ended) => ended,
            Err(_) => {
                let state = instance.state.lock().await;
                Err(Failure::GuestIgnored(format!(
                    "the guest of instance {} was asked to switch off and did not within {patience:?}: it is {}; ask again, or \
                     --force pulls the plug",
                    state.row.spec.name, state.row.status
                )))
            }
        }
    }

    /// Asks the guest to switch itself off; one that is off already is given back.
    async fn press_power_button(&self, instance: &Instance) -> Result<Option<InstanceInfo>, Failure> {
        let state = instance.state.lock().await;
        state.check_idle("stop")?;
        let (name, status) = (&state.row.spec.name, state.row.status);
        match status {
            Status::Stopped | Status::Crashed => return Ok(Some(state.info(self.host()))),
            Status::Running => {}
            Status::Paused => {
                return Err(Failure::Refused(format!(
                    "instance {name} is paused, its guest cannot be asked to switch off: resume it first, or --force pulls the plug"
                )));
            }
            Status::Indeterminate | Status::Incoming => {
                return Err(Failure::Refused(format!("instance {name} is {status}")));
            }
        }
        let press = wire::PressPowerButton { epoch: state.row.epoch };
        let answer = state
            .vmm()?
            .order(Command::PressPowerButton(press))
            .await
            .map_err(Failure::vmm("failed to press the power button"))?;
        match answer {
            Body::Pressed(wire::Pressed { guest_listens: true }) => Ok(None),
            _ => Err(Failure::Refused(format!(
                "instance {name} has no power button that its guest listens to, or not yet: --force pulls the plug"
            ))),
        }
    }

    /// Waits until the instance has ended, for ever if it does not.
    ///
    /// # Errors
    /// It ended by a crash, or is not here any more: a guest may move while it shuts down.
    async fn switched_off(&self, instance: &Instance) -> Result<InstanceInfo, Failure> {
        const LOOK_AGAIN: Duration = Duration::from_millis(50);
        loop {
            let state = instance.state.lock().await;
            if self.instances.by_id(instance.id).is_none() {
                return Err(self.not_here(&instance.id.to_string()).await);
            }
            match state.row.status {
                Status::Stopped => return Ok(state.info(self.host())),
                Status::Crashed => {
                    return Err(Failure::GuestLost(format!(
                        "instance {} crashed and did not switch off: {}",
                        state.row.spec.name,
                        state.row.reason.as_deref().unwrap_or("nobody knows why")
                    )));
                }
                _ => {}
            }
            drop(state);
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// Pulls the plug. Aborts a migration before GO; after GO it waits for the decision.
    async fn stop_by_force(&self, instance: &Arc<Instance>, patience: Duration) -> Result<InstanceInfo, Failure> {
        self.end_migration(instance, patience).await?;
        let mut state = instance.state.lock().await;
        match state.row.status {
            Status::Stopped | Status::Crashed => {}
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
        self.forget(&mut state).await;
        Ok(instance.id)
    }

    async fn pull_plug(&self, state: &mut InstanceState) -> Result<(), Failure> {
        self.end(state, Status::Stopped, "stopped by its user".to_owned()).await;
        if state.row.status != Status::Stopped {
            let undead = std::io::Error::other("its process does not die, the agent's log says more");
            return Err(Failure::host("failed to end the VMM")(undead));
        }
        Ok(())
    }

    /// Aborts the migration of an instance, or waits until it is decided.
    async fn end_migration(&self, instance: &Arc<Instance>, patience: Duration) -> Result<(), Failure> {
        let (migrating, row) = {
            let state = instance.state.lock().await;
            (state.migrating, state.row.clone())
        };
        if row.status == Status::Incoming {
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
            let what = format!("instance {}", instance.id);
            return Err(Failure::NotFound { what, moved_to: None });
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
        let (migration, name, source) = (incoming.id, &row.spec.name, &incoming.source);
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
