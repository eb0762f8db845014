//! `ferry snapshot`: an instance written to a new folder. The instance is what it was afterwards, in every case.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use ferry_proto::agent::v1::{InstanceSpec, SnapshotInfo};
use ferry_proto::vmm::v1::order::Order as Command;
use ferry_proto::vmm::v1::report::Report as Body;
use ferry_proto::vmm::v1::{self as wire};
use ferry_vmm::PAGE_SIZE;
use tokio::sync::oneshot;

use super::folder::Partial;
use super::manifest::{Digests, Disk, Manifest, Memory, regions_of};
use super::{INITRD, KERNEL, MACHINE_FILES, UNFINISHED};
use crate::agent::context::RequestContext;
use crate::agent::failure::Failure;
use crate::agent::images;
use crate::agent::instances::{Agent, InstanceState};
use crate::agent::journal::{InstanceRow, Status};
use crate::agent::outgoing::now_text;
use crate::vmm_process::ms;

impl Agent {
    /// Writes an instance to a folder that is not there yet.
    ///
    /// # Errors
    /// Nothing of the folder is left then.
    pub(crate) async fn snapshot_instance(
        self: &Arc<Self>,
        context: &RequestContext,
        name: &str,
        directory: &str,
    ) -> Result<SnapshotInfo, Failure> {
        let began = Instant::now();
        let target = self.snapshot_folder(directory, Path::parent)?;
        let instance = self.instance(name).await?;

        // Locked no longer than it takes to begin: writing a large guest takes minutes, and it is looked at meanwhile.
        let mut state = context.wait(instance.state.lock()).await?;
        check(&state)?;
        let row = state.row.clone();
        let notes = self.config.data_dir.join(UNFINISHED);
        let partial = tokio::task::block_in_place(|| Partial::begin(target, &notes))?;
        let mut files = MACHINE_FILES
            .iter()
            .map(|name| partial.create(name))
            .collect::<Result<Vec<_>, _>>()?;
        let ended = begin(&mut state, &files).await?;
        drop(state);

        let ended = match ended.await {
            Ok(Body::SnapshotEnded(ended)) if ended.error.is_empty() => ended,
            Ok(Body::SnapshotEnded(ended)) => {
                let what = format!("instance {name} is what it was, but its snapshot was not written");
                return Err(Failure::host(what)(std::io::Error::other(ended.error)));
            }
            Ok(_) | Err(_) => {
                return Err(Failure::Refused(format!(
                    "instance {name} ended before its snapshot was written"
                )));
            }
        };
        let manifest = describe(&row, self.host(), &ended);
        let info = SnapshotInfo {
            directory: directory.to_owned(),
            instance: row.id.to_string(),
            name: row.spec.name.clone(),
            host: self.host().to_owned(),
            epoch: row.epoch,
            created: manifest.created.clone(),
            memory_bytes: row.spec.memory_bytes,
            stored_bytes: manifest.memory.stored_bytes,
            paused_ms: ended.paused_ms,
            total_ms: 0.0,
        };
        // The guest runs again: the disk may take its time.
        tokio::task::block_in_place(|| -> Result<(), Failure> {
            let folder = self.folder(row.id);
            files.extend(copy_images(&row.spec, &folder, &partial)?);
            let bytes = manifest.to_bytes().map_err(std::io::Error::other);
            let bytes = bytes.map_err(Failure::host("failed to describe the snapshot"))?;
            partial.finish(files, &bytes)
        })?;
        tracing::info!(instance = %row.id, directory, paused_ms = ended.paused_ms, "snapshot written");
        Ok(SnapshotInfo {
            total_ms: ms(began.elapsed()),
            ..info
        })
    }
}

/// A guest is here that can be written, and can be restored from what is written.
fn check(state: &InstanceState) -> Result<(), Failure> {
    state.check_idle("be snapshotted")?;
    state.check_whole("be snapshotted")?;
    let spec = &state.row.spec;
    if !matches!(state.row.status, Status::Running | Status::Paused) {
        return Err(Failure::Refused(format!(
            "instance {} is {}: only one that is running or paused can be snapshotted",
            spec.name, state.row.status
        )));
    }
    let is_device = |path: &String| fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device());
    match spec.disks.iter().find(|disk| !disk.readonly && is_device(&disk.path)) {
        Some(disk) => Err(Failure::Refused(format!(
            "disk {} of instance {} is a block device: nothing would tell at a restore whether it was written since, and \
             memory and disk must go together",
            disk.path, spec.name
        ))),
        None => Ok(()),
    }
}

/// Orders the VMM to write; what is returned says how it ended.
async fn begin(state: &mut InstanceState, files: &[File]) -> Result<oneshot::Receiver<Body>, Failure> {
    let descriptors: std::io::Result<Vec<OwnedFd>> = files.iter().map(|file| Ok(file.try_clone()?.into())).collect();
    let descriptors = descriptors.map_err(Failure::host("failed to pass the files of a snapshot on"))?;
    let order = wire::Snapshot { epoch: state.row.epoch };
    let vmm = state.vmm()?.clone();
    let ended = state.await_outcome();
    if let Err(error) = vmm.order_with(Command::Snapshot(order), descriptors).await {
        state.outcome = None;
        return Err(Failure::vmm("failed to snapshot the guest")(error));
    }
    Ok(ended)
}

fn describe(row: &InstanceRow, host: &str, ended: &wire::SnapshotEnded) -> Manifest {
    let disk = |(spec, moment): (&ferry_proto::agent::v1::DiskSpec, &wire::DiskMoment)| Disk {
        path: spec.path.clone(),
        bytes: moment.bytes,
        modified_ns: moment.modified_ns,
        epoch: moment.epoch,
    };
    Manifest {
        instance: row.id,
        host: host.to_owned(),
        epoch: row.epoch,
        created: now_text(),
        paused: row.status == Status::Paused,
        memory: Memory {
            regions: regions_of(row.spec.memory_bytes),
            stored_bytes: ended.pages.saturating_mul(PAGE_SIZE),
        },
        disks: row.spec.disks.iter().zip(&ended.disks).map(disk).collect(),
        digests: Digests {
            pieces: ended.pieces_digest.clone(),
            state: ended.state_digest.clone(),
            profile: ended.profile_digest.clone(),
        },
        spec: row.spec.clone(),
    }
}

/// Kernel and initrd, so that the guest can reboot wherever it is restored.
fn copy_images(spec: &InstanceSpec, folder: &Path, partial: &Partial) -> Result<Vec<File>, Failure> {
    [(KERNEL, &spec.kernel), (INITRD, &spec.initrd)]
        .into_iter()
        .filter(|(_, hash)| !hash.is_empty())
        .map(|(name, hash)| partial.copy(&folder.join(images::file_name(hash)), name))
        .collect()
}
