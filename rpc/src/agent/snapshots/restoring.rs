//! `ferry restore`: an instance made of a snapshot's folder.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use ferry_proto::agent::v1::{InstanceInfo, InstanceSpec, ListInstancesRequest};
use ferry_proto::vmm::v1::order::Order as Command;
use ferry_proto::vmm::v1::report::Report as Body;
use ferry_proto::vmm::v1::{self as wire};
use tokio::sync::oneshot;
use uuid::Uuid;

use super::folder::Folder;
use super::manifest::{Digests, Manifest};
use super::{INITRD, KERNEL, MACHINE_FILES};
use crate::agent::backends::{self, Occasion, Whose};
use crate::agent::context::RequestContext;
use crate::agent::events::{Action, Subject};
use crate::agent::failure::Failure;
use crate::agent::images;
use crate::agent::instances::{Agent, Instance, InstanceState, NewRight};
use crate::agent::journal::{InstanceRow, Status};
use crate::agent::outgoing::now_ms;
use crate::agent::peers::{CALL_TIME, ComputeClient};
use crate::agent::vmm_client::Vmm;

/// Which instance a snapshot becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Identity {
    /// Another one: a new id, epochs from 1 on, other MAC addresses, another generation id.
    New,
    /// The one that was snapshotted, which must be nowhere any more.
    Same,
}

impl Agent {
    /// Makes an instance of a snapshot; it runs, unless its user had paused it.
    ///
    /// # Errors
    /// Nothing of it is left then.
    pub(crate) async fn restore_instance(
        self: &Arc<Self>,
        context: &RequestContext,
        directory: &str,
        name: &str,
        identity: Identity,
    ) -> Result<InstanceInfo, Failure> {
        let path = self.snapshot_folder(directory, |path| Some(path))?;
        let (folder, manifest) = tokio::task::block_in_place(|| -> Result<_, Failure> {
            let folder = Folder::open(path)?;
            let manifest = folder.manifest()?;
            Ok((folder, manifest))
        })?;
        let row = self.row_of(&manifest, name, identity)?;
        let subject = Subject::instance(row.id, &row.spec.name);
        let restore = self.restore_as(context, row, &folder, &manifest, identity);
        self.recorded(context, Action::Restore, Some(subject), restore).await
    }

    async fn restore_as(
        self: &Arc<Self>,
        context: &RequestContext,
        row: InstanceRow,
        folder: &Folder,
        manifest: &Manifest,
        identity: Identity,
    ) -> Result<InstanceInfo, Failure> {
        let reserved = self.reserve_new(row.id, &row.spec).await?;
        let right = NewRight {
            epoch: first_epoch(&row, identity),
            paused: manifest.paused,
        };
        let Some(instance) = self.instances.add_new(row) else {
            return Err(Failure::Refused(format!(
                "instance {} is on host {} already",
                manifest.instance,
                self.host()
            )));
        };
        drop(reserved);
        let gone = match identity {
            // From here on peers see it here: of two hosts that restore it at the same time, one at least notices.
            Identity::Same => self.check_gone_elsewhere(context, instance.id).await,
            Identity::New => Ok(()),
        };
        let made = match gone {
            Ok(()) => self.make(&instance, folder, manifest, identity, right).await,
            Err(failure) => Err(failure),
        };
        let mut state = instance.state.lock().await;
        match made {
            Ok(()) => Ok(state.info(self.host())),
            Err(failure) => {
                self.undo(&mut state).await;
                Err(failure)
            }
        }
    }

    fn row_of(&self, manifest: &Manifest, name: &str, identity: Identity) -> Result<InstanceRow, Failure> {
        let mut spec = manifest.spec.clone();
        if !name.is_empty() {
            name.clone_into(&mut spec.name);
        }
        let (id, known_epoch) = match identity {
            Identity::Same => (manifest.instance, manifest.epoch),
            Identity::New => {
                spec.nics.iter_mut().for_each(|nic| nic.mac.clear());
                (Uuid::new_v4(), 0)
            }
        };
        // A card without an address gets one.
        tokio::task::block_in_place(|| backends::complete(&mut spec))?;
        Ok(InstanceRow {
            id,
            status: Status::Incoming,
            epoch: 0,
            known_epoch,
            spec,
            migration: None,
            reason: None,
            boot_id: self.boot_id.clone(),
            restarts: Default::default(),
        })
    }

    async fn make(
        self: &Arc<Self>,
        instance: &Arc<Instance>,
        folder: &Folder,
        manifest: &Manifest,
        identity: Identity,
        right: NewRight,
    ) -> Result<(), Failure> {
        let mut state = instance.state.lock().await;
        let own = self.make_folder(instance.id)?;
        tokio::task::block_in_place(|| take_images(&manifest.spec, folder, &own))?;
        self.save(&state.row).await?;
        let vmm = self.build_blank(instance, &mut state, manifest).await?;
        let restored = order(&mut state, &vmm, folder, manifest, identity, right.epoch).await?;
        drop(state);

        // A large guest takes minutes, and is looked at meanwhile.
        let outcome = restored.await;
        let mut state = instance.state.lock().await;
        match outcome {
            Ok(Body::Restored(_)) => self.give_permit(&mut state, &vmm, right).await,
            Ok(Body::LoadFailed(failed)) => Err(Failure::Refused(format!(
                "the snapshot {}: {}",
                folder.path().display(),
                failed.reason
            ))),
            Ok(_) | Err(_) => Err(Failure::Refused(format!(
                "the VMM ended while the snapshot {} was loaded",
                folder.path().display()
            ))),
        }
    }

    /// No other host has the instance, as far as this agent knows hosts.
    async fn check_gone_elsewhere(&self, context: &RequestContext, id: Uuid) -> Result<(), Failure> {
        for peer in self.peers.all() {
            let list = |mut client: ComputeClient| async move { client.list_instances(ListInstancesRequest {}).await };
            let asked = peer.ask(context, CALL_TIME, list).await;
            let found = asked.map_err(|error| {
                Failure::Refused(format!(
                    "whether instance {id} is gone cannot be told, and two of it must never run: {error}; without \
                     --same-identity the snapshot becomes another instance"
                ))
            })?;
            if let Some(other) = found.instances.iter().find(|instance| instance.id == id.to_string()) {
                return Err(Failure::Refused(format!(
                    "instance {id} is on host {} ({}, {}): delete it there first, or restore without --same-identity",
                    peer.host, other.name, other.status
                )));
            }
        }
        Ok(())
    }

    async fn build_blank(
        self: &Arc<Self>,
        instance: &Arc<Instance>,
        state: &mut InstanceState,
        manifest: &Manifest,
    ) -> Result<Vmm, Failure> {
        let whose = Whose {
            instance: instance.id,
            known_epoch: manifest.epoch,
            // What is in its images is its own affair.
            occasion: Occasion::Start,
        };
        let backends = self.open_backends(&state.row.spec, whose).await?;
        let (vmm, events) = self.spawn_vmm(instance.id, None).await?;
        self.attach(instance, state, vmm.clone(), events);
        let build = wire::Build {
            spec: Some(state.machine_spec(self.host(), backends.disks, backends.nics)),
            incoming: true,
            started_mark: String::new(),
        };
        vmm.order_with(Command::Build(build), backends.descriptors)
            .await
            .map_err(Failure::vmm("failed to build the machine"))?;
        Ok(vmm)
    }

    /// Ends the VMM of an instance that did not come to be, and forgets it.
    async fn undo(&self, state: &mut InstanceState) {
        if let Some(vmm) = state.vmm.take()
            && let Err(error) = vmm.kill().await
        {
            tracing::error!(instance = %state.row.id, %error, "the VMM does not die");
        }
        // The log has why not.
        let _ = self.forget(state).await;
    }
}

/// The epoch under which it runs. Its own epochs after the snapshot are not known if it was deleted since, and none may be
/// used twice: one that counts milliseconds since 1970 is later than any that counts starts and moves.
fn first_epoch(row: &InstanceRow, identity: Identity) -> u64 {
    match identity {
        Identity::New => 1,
        Identity::Same => (row.known_epoch + 1).max(now_ms().unsigned_abs()),
    }
}

/// Copies kernel and initrd into the instance's own folder; they must be what the snapshot says.
fn take_images(spec: &InstanceSpec, folder: &Folder, own: &Path) -> Result<(), Failure> {
    let wanted = [(KERNEL, &spec.kernel), (INITRD, &spec.initrd)];
    for (name, hash) in wanted.into_iter().filter(|(_, hash)| !hash.is_empty()) {
        let found = images::import_file(name, &folder.path().join(name), folder.file(name)?, own)?;
        if found != *hash {
            return Err(folder.refused(
                name,
                &"it is damaged: its BLAKE3 digest is not the one in snapshot.json",
            ));
        }
    }
    Ok(())
}

/// Orders the VMM to load; what is returned says how it ended.
async fn order(
    state: &mut InstanceState,
    vmm: &Vmm,
    folder: &Folder,
    manifest: &Manifest,
    identity: Identity,
    epoch: u64,
) -> Result<oneshot::Receiver<Body>, Failure> {
    let descriptors = MACHINE_FILES
        .iter()
        .map(|name| folder.file(name).map(OwnedFd::from))
        .collect::<Result<Vec<_>, _>>()?;
    let moment = |disk: &super::manifest::Disk| wire::DiskMoment {
        bytes: disk.bytes,
        modified_ns: disk.modified_ns,
        epoch: disk.epoch,
    };
    let Digests {
        pieces,
        state: state_digest,
        profile,
    } = manifest.digests.clone();
    let restore = wire::Restore {
        origin: manifest.instance.to_string(),
        epoch,
        pieces_digest: pieces,
        state_digest,
        profile_digest: profile,
        disks: manifest.disks.iter().map(moment).collect(),
        new_identity: identity == Identity::New,
        macs: state.row.spec.nics.iter().map(|nic| nic.mac.clone()).collect(),
    };
    let restored = state.await_outcome();
    vmm.order_with(Command::Restore(restore), descriptors)
        .await
        .map_err(Failure::vmm("failed to restore the guest"))?;
    Ok(restored)
}
