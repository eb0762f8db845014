//! How users end an instance: stop and delete.

use std::sync::Arc;
use std::time::Duration;

use ferry_proto::agent::v1::InstanceInfo;
use uuid::Uuid;

use super::instance::{Agent, Instance, InstanceState};
use crate::agent::failure::Failure;
use crate::agent::journal::{InstanceRow, Status};

impl Agent {
    /// Stops an instance. Guests have no power button yet, so only `force` does; it aborts a migration before GO, and after
    /// GO it waits for the decision.
    pub(crate) async fn stop_instance(
        &self,
        name: &str,
        force: bool,
        patience: Duration,
    ) -> Result<InstanceInfo, Failure> {
        let instance = self.instance(name).await?;
        if !force {
            let state = instance.state.lock().await;
            state.check_idle("stop")?;
            if matches!(state.row.status, Status::Stopped | Status::Crashed) {
                return Ok(state.info(self.host()));
            }
            return Err(Failure::Refused(format!(
                "instance {name} has no power button that would ask its guest to stop: --force pulls the plug"
            )));
        }
        self.end_migration(&instance, patience).await?;
        let mut state = instance.state.lock().await;
        match state.row.status {
            Status::Stopped | Status::Crashed => {}
            Status::Indeterminate | Status::Incoming => {
                return Err(Failure::Refused(format!("instance {name} is {}", state.row.status)));
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
