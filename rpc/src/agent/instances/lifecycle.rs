//! What users do with an instance: run, start, pause, resume, reboot. How it is ended is in `stopping`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ferry_migration::handover::Epoch;
use ferry_proto::agent::v1::{InstanceInfo, InstanceSpec};
use ferry_proto::vmm::v1::order::Order as Command;
use ferry_proto::vmm::v1::{self as wire};
use uuid::Uuid;

use super::instance::{Agent, Instance, InstanceState};
use super::restarting::Clearance;
use super::spec;
use crate::agent::backends::{self, Occasion, Opened, Whose};
use crate::agent::context::RequestContext;
use crate::agent::failure::Failure;
use crate::agent::journal::{InstanceRow, Restarts, RowWrite, Status};
use crate::agent::outgoing::now_ms;
use crate::agent::vmm_client::Vmm;
use crate::agent::{images, spawn};

/// What a VMM is started for.
#[derive(Clone, Copy, Debug)]
enum Purpose {
    /// To run the guest.
    Run,
    /// To hold the machine of an instance that is off, and stays off, while it moves.
    Hold,
}

/// A right to run that no guest has had.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NewRight {
    /// Never used before.
    pub(crate) epoch: u64,
    /// Its user had paused the guest.
    pub(crate) paused: bool,
}

impl Agent {
    /// Makes an instance of this new id and starts it.
    ///
    /// # Errors
    /// Nothing of it is left then.
    pub(crate) async fn run_instance(
        self: &Arc<Self>,
        id: Uuid,
        mut spec: InstanceSpec,
    ) -> Result<InstanceInfo, Failure> {
        tokio::task::block_in_place(|| backends::complete(&mut spec))?;
        spec::check(&spec)?;
        let reserved = self.reserve_new(id, &spec).await?;
        let folder = self.make_folder(id)?;
        // Up to a gigabyte is read and written: other tasks go elsewhere meanwhile.
        let imported = tokio::task::block_in_place(|| self.import_images(&mut spec, &folder));
        if let Err(failure) = imported {
            self.remove_folder(id);
            return Err(failure);
        }
        let row = InstanceRow {
            id,
            status: Status::Stopped,
            epoch: 0,
            known_epoch: 0,
            spec,
            migration: None,
            reason: None,
            boot_id: self.boot_id.clone(),
            restarts: Default::default(),
        };
        if let Err(failure) = self.save(&row).await {
            self.remove_folder(id);
            return Err(failure);
        }
        let instance = self.instances.add(row);
        drop(reserved);
        let mut state = instance.state.lock().await;
        if let Err(failure) = self.start(&instance, &mut state, Occasion::Run, Epoch::FIRST.0).await {
            // The log has why not.
            let _ = self.forget(&mut state).await;
            return Err(failure);
        }
        Ok(state.info(self.host()))
    }

    /// What of an instance some other of this host has: its name, addresses of its network cards.
    async fn taken(&self, spec: &InstanceSpec) -> Vec<Failure> {
        let mut taken = Vec::new();
        if self.instances.find(&spec.name).is_some() {
            taken.push(Failure::Refused(format!(
                "an instance named {:?} is on host {}",
                spec.name,
                self.host()
            )));
        }
        let mut promises = self.reservations.promises();
        for instance in self.instances.all() {
            promises.retain(|promise| promise.instance != instance.id);
            let state = instance.state.lock().await;
            taken.extend(self.taken_by(&state.row.spec, spec));
        }
        for promise in promises {
            if promise.spec.name == spec.name {
                taken.push(Failure::Refused(format!(
                    "an instance named {:?} is on its way to host {}",
                    spec.name,
                    self.host()
                )));
            }
            taken.extend(self.taken_by(&promise.spec, spec));
        }
        taken
    }

    /// Addresses of network cards that another one has.
    fn taken_by(&self, other: &InstanceSpec, spec: &InstanceSpec) -> Vec<Failure> {
        let is_taken = |mac: &String| other.nics.iter().any(|nic| nic.mac == *mac);
        let taken = spec.nics.iter().filter(|nic| is_taken(&nic.mac));
        let has = |mac: &str| {
            Failure::Refused(format!(
                "instance {} on host {} has the MAC address {mac} already",
                other.name,
                self.host()
            ))
        };
        taken.map(|nic| has(&nic.mac)).collect()
    }

    fn import_images(&self, spec: &mut InstanceSpec, folder: &Path) -> Result<(), Failure> {
        for (what, path) in [("kernel", &mut spec.kernel), ("initrd", &mut spec.initrd)] {
            if path.is_empty() && what == "initrd" {
                continue;
            }
            if self.config.is_exposed() {
                images::check_place(Path::new(path.as_str()), &self.config.image_dirs)?;
            }
            *path = images::import(what, Path::new(path.as_str()), folder)?;
        }
        Ok(())
    }

    /// Starts an instance that is stopped or crashed.
    pub(crate) async fn start_instance(
        self: &Arc<Self>,
        context: &RequestContext,
        name: &str,
    ) -> Result<InstanceInfo, Failure> {
        let instance = self.instance(name).await?;
        context.wait(self.ask_origin(&instance)).await?;
        let mut state = context.wait(instance.state.lock()).await?;
        state.check_idle("start")?;
        if self.instances.by_id(instance.id).is_none() {
            // It was deleted while it was waited for.
            return Err(self.not_here(name).await);
        }
        if !matches!(state.row.status, Status::Stopped | Status::Crashed) {
            return Err(Failure::Refused(format!("instance {name} is {}", state.row.status)));
        }
        let epoch = match self.clear_for_user(&mut state).await {
            Clearance::Epoch(epoch) => epoch,
            Clearance::No(failure) => return Err(failure),
        };
        // Its user looks after it: what happened before does not count.
        state.row.restarts.count = 0;
        self.start(&instance, &mut state, Occasion::Start, epoch).await?;
        Ok(state.info(self.host()))
    }

    /// A VMM, a machine, and a permit of this epoch, which was never used and is journalled before.
    pub(crate) async fn start(
        self: &Arc<Self>,
        instance: &Arc<Instance>,
        state: &mut InstanceState,
        occasion: Occasion,
        epoch: u64,
    ) -> Result<(), Failure> {
        self.raise(instance, state, (Purpose::Run, occasion), epoch).await
    }

    /// The machine of a stopped instance, built and paused, so that it can move as any other does. Its VMM has the disks' locks, under
    /// this epoch, which was never used and is journalled before. Its user goes on to see it stopped.
    ///
    /// # Errors
    /// It cannot be built; nothing of it is left then.
    pub(crate) async fn hold(
        self: &Arc<Self>,
        instance: &Arc<Instance>,
        state: &mut InstanceState,
        epoch: u64,
    ) -> Result<(), Failure> {
        self.raise(instance, state, (Purpose::Hold, Occasion::Start), epoch)
            .await
    }

    async fn raise(
        self: &Arc<Self>,
        instance: &Arc<Instance>,
        state: &mut InstanceState,
        (purpose, occasion): (Purpose, Occasion),
        epoch: u64,
    ) -> Result<(), Failure> {
        if let Some(earlier) = state.vmm.take() {
            earlier
                .kill()
                .await
                .map_err(Failure::host("failed to end the VMM that was there"))?;
        }
        let whose = Whose {
            instance: instance.id,
            known_epoch: state.row.known_epoch,
            occasion,
        };
        let backends = self.open_backends(&state.row.spec, whose).await?;
        let (vmm, events) = self.spawn_vmm(instance.id, None).await?;
        self.attach(instance, state, vmm.clone(), events);
        let started = self.build_and_permit(state, &vmm, backends, (purpose, epoch)).await;
        if started.is_err() {
            state.vmm = None;
            if let Err(error) = vmm.kill().await {
                tracing::error!(instance = %instance.id, %error, "the VMM does not die");
            }
            spawn::remove_cgroup(&instance.id.to_string());
        }
        started
    }

    async fn build_and_permit(
        &self,
        state: &mut InstanceState,
        vmm: &Vmm,
        backends: Opened,
        (purpose, epoch): (Purpose, u64),
    ) -> Result<(), Failure> {
        let build = wire::Build {
            spec: Some(state.machine_spec(self.host(), backends.disks, backends.nics)),
            incoming: false,
            started_mark: String::new(),
        };
        vmm.order_with(Command::Build(build), backends.descriptors)
            .await
            .map_err(Failure::vmm("failed to build the machine"))?;
        match purpose {
            Purpose::Run => {
                let right = NewRight { epoch, paused: false };
                self.give_permit(state, vmm, right).await
            }
            Purpose::Hold => {
                let instance = state.row.id.to_string();
                let permit = wire::Permit {
                    instance,
                    epoch,
                    paused: true,
                };
                let held = vmm.order(Command::Permit(permit)).await.map(drop);
                held.map_err(Failure::vmm("failed to hold the machine"))
            }
        }
    }

    /// Journals a right to run and then gives it to the VMM, whose guest waits for it.
    ///
    /// # Errors
    /// The guest does not run, and may not under this epoch.
    pub(crate) async fn give_permit(
        &self,
        state: &mut InstanceState,
        vmm: &Vmm,
        right: NewRight,
    ) -> Result<(), Failure> {
        let NewRight { epoch, paused } = right;
        let before = state.row.clone();
        state.row.epoch = epoch;
        state.row.known_epoch = epoch;
        state.row.status = if paused { Status::Paused } else { Status::Running };
        state.row.reason = None;
        state.row.boot_id.clone_from(&self.boot_id);
        state.row.restarts = Restarts {
            count: before.restarts.count,
            started: now_ms(),
            ..Restarts::default()
        };
        if let Err(failure) = self.save(&state.row).await {
            state.row = before;
            return Err(failure);
        }
        let permit = wire::Permit {
            instance: state.row.id.to_string(),
            epoch,
            paused,
        };
        if let Err(error) = vmm.order(Command::Permit(permit)).await {
            state.row.status = Status::Stopped;
            state.row.reason = Some(error.to_string());
            self.save(&state.row).await?;
            return Err(Failure::vmm("failed to start the guest")(error));
        }
        Ok(())
    }

    /// Starts a VMM process for an instance and greets it. For a guest that moves in: with a folder for its started mark.
    pub(crate) async fn spawn_vmm(
        &self,
        id: Uuid,
        mark_folder: Option<PathBuf>,
    ) -> Result<(Vmm, tokio::sync::mpsc::UnboundedReceiver<wire::report::Report>), Failure> {
        let folder = self.folder(id);
        let socket = folder.join(spawn::SOCKET);
        let (users, cap) = (self.config.vmm_users, self.config.vmm_protocol_cap);
        let spawn = move || spawn::vmm(&folder, mark_folder.as_deref(), users, cap, &id.to_string());
        let spawned = tokio::task::spawn_blocking(spawn).await;
        let (started, process) = spawned
            .map_err(std::io::Error::other)
            .and_then(|result| result)
            .and_then(|process| Ok((process.try_clone()?, process)))
            .map_err(Failure::host("failed to start a VMM process"))?;
        match Vmm::connect(&socket, Some(process)).await {
            Ok((vmm, _standing, events)) => Ok((vmm, events)),
            Err(error) => {
                // Not by its socket: until it listens there itself, nobody can tell by that whose it is.
                let ended = tokio::task::spawn_blocking(move || started.kill()).await;
                tracing::info!(instance = %id, ?ended, "a VMM that did not answer was ended");
                Err(Failure::vmm("failed to reach the new VMM")(error))
            }
        }
    }

    /// The user's pause.
    pub(crate) async fn pause_instance(&self, context: &RequestContext, name: &str) -> Result<InstanceInfo, Failure> {
        let instance = self.instance(name).await?;
        let mut state = context.wait(instance.state.lock()).await?;
        state.check_idle("pause")?;
        self.expect_status(&state, Status::Running)?;
        let epoch = state.row.epoch;
        let pause = Command::Pause(wire::Pause { epoch });
        state
            .vmm()?
            .order(pause)
            .await
            .map_err(Failure::vmm("failed to pause the guest"))?;
        state.row.status = Status::Paused;
        self.save(&state.row).await?;
        Ok(state.info(self.host()))
    }

    /// The user's resume.
    pub(crate) async fn resume_instance(&self, context: &RequestContext, name: &str) -> Result<InstanceInfo, Failure> {
        let instance = self.instance(name).await?;
        let mut state = context.wait(instance.state.lock()).await?;
        state.check_idle("resume")?;
        self.expect_status(&state, Status::Paused)?;
        let epoch = state.row.epoch;
        let resume = Command::Resume(wire::Resume { epoch });
        state
            .vmm()?
            .order(resume)
            .await
            .map_err(Failure::vmm("failed to resume the guest"))?;
        state.row.status = Status::Running;
        self.save(&state.row).await?;
        Ok(state.info(self.host()))
    }

    /// Back to power-on, the kernel loaded again.
    pub(crate) async fn reboot_instance(&self, context: &RequestContext, name: &str) -> Result<InstanceInfo, Failure> {
        let instance = self.instance(name).await?;
        let mut state = context.wait(instance.state.lock()).await?;
        state.check_idle("reboot")?;
        state.check_whole("reboot")?;
        self.expect_status(&state, Status::Running)?;
        if std::mem::take(&mut state.row.restarts.asked_off) {
            self.save(&state.row).await?;
        }
        let reboot = Command::Reboot(wire::Reboot {});
        state
            .vmm()?
            .order(reboot)
            .await
            .map_err(Failure::vmm("failed to reboot the guest"))?;
        Ok(state.info(self.host()))
    }

    /// Removes row, folder and entry of an instance that has no process.
    ///
    /// # Errors
    /// The row could not be removed: then nothing was.
    pub(crate) async fn forget(&self, state: &mut InstanceState) -> Result<(), Failure> {
        let id = state.row.id;
        self.journal
            .write(RowWrite::Instance, move |transaction| {
                InstanceRow::delete(transaction, id)
            })
            .await
            .inspect_err(
                |error| tracing::error!(instance = %id, %error, "failed to remove an instance from the journal"),
            )?;
        self.instances.remove(id);
        self.remove_folder(id);
        Ok(())
    }

    pub(super) fn expect_status(&self, state: &InstanceState, wanted: Status) -> Result<(), Failure> {
        if state.row.status == wanted {
            Ok(())
        } else {
            Err(Failure::Refused(format!(
                "instance {} is {}, not {wanted}",
                state.row.spec.name, state.row.status
            )))
        }
    }
}

/// Checks an instance that wants to move in, as if it were to be run.
///
/// # Errors
/// This host cannot have it.
pub(crate) async fn check_incoming(agent: &Agent, id: Uuid, spec: &InstanceSpec) -> Result<(), Failure> {
    why_not_incoming(agent, id, spec)
        .await
        .into_iter()
        .next()
        .map_or(Ok(()), Err)
}

/// Every reason why an instance cannot move in, as if it were to be run.
pub(crate) async fn why_not_incoming(agent: &Agent, id: Uuid, spec: &InstanceSpec) -> Vec<Failure> {
    if let Err(invalid) = spec::check(spec) {
        return vec![invalid];
    }
    // Its name and its addresses are there, too, then.
    if agent.instances.by_id(id).is_some() {
        let there = format!("instance {id} is on host {} already", agent.host());
        return vec![Failure::Refused(there)];
    }
    if agent.reservations.expects(id) {
        let expected = format!("instance {id} is on its way to host {}", agent.host());
        return vec![Failure::Refused(expected)];
    }
    agent.taken(spec).await
}
