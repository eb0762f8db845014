//! PREPARE: the destination says whether it takes the guest, makes room for it, and is sent the images that it lacks.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use ferry_proto::agent::v1::{ImageChunk, PreLiveMigrationReply, PreLiveMigrationRequest};
use ferry_proto::vmm::v1 as wire;
use ferry_proto::vmm::v1::order::Order as Command;
use ferry_proto::vmm::v1::report::Report as Body;

use super::script::{Script, Stop};
use crate::agent::backends::storage;
use crate::agent::compute_rpcapi::ComputeRpcApi;
use crate::agent::failure::Failure;
use crate::agent::images;
use crate::agent::peers::Peer;
use crate::agent::reason::Reason;
use crate::agent::steps::QUEUED;

/// The pause between two questions to a destination that has its hands full.
const BUSY_PAUSE: Duration = Duration::from_millis(500);
/// How often images are sent that others take away.
const IMAGE_TRIES: usize = 10;
/// Images are sent in pieces of this size.
const PIECE: usize = 1 << 20;

impl Script {
    /// PREPARE. While the destination has its hands full, the migration stays queued, as long as its user gives it.
    pub(super) async fn prepared(&mut self, peer: &Peer) -> Result<PreLiveMigrationReply, Stop> {
        let patience = Duration::from_millis(self.row.options.timeout_ms);
        let began = Instant::now();
        loop {
            match self.unless_aborted(self.pre_live_migration(peer)).await? {
                Err(Stop::Busy(why)) if began.elapsed() < patience => {
                    if self.row.info.status != QUEUED {
                        self.row.info.decision = Some(why);
                        self.say_status(QUEUED).await;
                    }
                    self.unless_aborted(tokio::time::sleep(BUSY_PAUSE)).await?;
                }
                prepared => return prepared,
            }
        }
    }

    /// Nova's pre_live_migration, with the kernel and initrd sent along where they are missing.
    async fn pre_live_migration(&self, peer: &Peer) -> Result<PreLiveMigrationReply, Stop> {
        let spec = self.instance.state.lock().await.row.spec.clone();
        let disk_sizes = storage::sizes(&spec, &self.machine_profile().await, &self.agent.boot_id);
        let request = PreLiveMigrationRequest {
            migration: self.row.id.to_string(),
            instance: self.row.instance.to_string(),
            spec: Some(spec),
            epoch: self.row.epoch,
            source: self.agent.host().to_owned(),
            source_url: self.agent.url.clone(),
            streams: self.streams().into(),
            digests: self.row.options.digests,
            user_paused: self.row.user_paused,
            rpc_version: String::new(),
            storage: self.row.options.storage.clone(),
            no_disk_over_commit: self.row.options.no_disk_over_commit,
            disk_sizes,
            mode: self.row.info.mode.clone(),
            transport: self.row.options.transport.clone(),
            guest_was: self.row.info.guest_was.clone(),
            resume_window_ms: self.row.options.resume_window_ms,
            journal: self.agent.journal.id().to_string(),
        };
        let compute = self.agent.compute_rpcapi(&self.outgoing.context, &peer.host)?;
        // Another migration may take an image between our sending it and our asking again.
        for _ in 0..IMAGE_TRIES {
            let reply = match compute.pre_live_migration(&request).await {
                Ok(reply) => reply,
                Err(failure) => return Err(self.refused(failure)),
            };
            // Before an image goes there. What it prepared is undone where it was asked for.
            check_who_prepares(peer, &reply.destination).map_err(|failure| self.refused(failure))?;
            if reply.missing_images.is_empty() {
                return Ok(reply);
            }
            for hash in &reply.missing_images {
                self.put_image(&compute, hash).await?;
            }
        }
        Err(Stop::Failed(format!(
            "host {} does not keep the instance's images",
            peer.host
        )))
    }

    /// What the guest's machine needs; empty where no VMM tells, as one of an earlier build does not.
    async fn machine_profile(&self) -> Vec<u8> {
        let vmm = self.instance.state.lock().await.vmm().ok().cloned();
        let Some(vmm) = vmm else { return Vec::new() };
        match vmm.order(Command::Profile(wire::Profile {})).await {
            Ok(Body::Profiled(profiled)) => profiled.profile,
            _ => Vec::new(),
        }
    }

    /// The destination says no; with which reason is kept for the instance's fault.
    fn refused(&self, failure: Failure) -> Stop {
        let (reason, text) = (failure.reason(), failure.chain());
        let stop = Stop::from(failure);
        if let (Stop::Failed(_), Some(reason)) = (&stop, reason) {
            let refusal = Failure::denied(reason, text);
            *self.refusal.lock().unwrap_or_else(PoisonError::into_inner) = Some(refusal);
        }
        stop
    }

    async fn put_image(&self, compute: &ComputeRpcApi, hash: &str) -> Result<(), Stop> {
        let path = self.agent.folder(self.row.instance).join(images::file_name(hash));
        let read = tokio::fs::read(&path).await;
        let bytes = read.map_err(Failure::host(format!("failed to read the image {}", path.display())))?;
        let hash = hash.to_owned();
        let pieces: Vec<_> = bytes
            .chunks(PIECE)
            .map(|piece| ImageChunk {
                hash: hash.clone(),
                bytes: piece.to_vec(),
            })
            .collect();
        Ok(compute.put_image(Arc::new(pieces)).await?)
    }

    /// The paths of the disks of these numbers, which the destination wants the contents of.
    pub(super) async fn paths_of(&self, copied: &[u32]) -> Result<Vec<String>, Stop> {
        let disks = self.instance.state.lock().await.row.spec.disks.clone();
        let path = |&number: &u32| {
            let disk = disks.get(number as usize);
            disk.map(|disk| disk.path.clone()).ok_or_else(|| {
                Stop::Failed(format!(
                    "host {} wants disk {number}, which is none to copy",
                    self.row.peer
                ))
            })
        };
        copied.iter().map(path).collect()
    }
}

/// The record names this host as the destination, and so will whoever looks for the guest: another one at its URL is not to have it.
fn check_who_prepares(peer: &Peer, destination: &str) -> Result<(), Failure> {
    match destination == peer.host {
        true => Ok(()),
        false => Err(Failure::denied(
            Reason::DestinationIsOther,
            format!("at {} host {destination:?} answers, not host {}", peer.url, peer.host),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::peers::Peers;

    #[tokio::test]
    async fn a_host_that_prepares_in_anothers_place_is_refused_by_both_names() {
        let peers = Peers::new("a", &[("b".to_owned(), "http://127.0.0.1:7601".to_owned())]).unwrap();
        let peer = peers.named("b").unwrap();
        assert!(check_who_prepares(peer, "b").is_ok());
        for other in ["c", ""] {
            let refused = check_who_prepares(peer, other).unwrap_err();
            assert_eq!(refused.reason(), Some(Reason::DestinationIsOther));
            let told = refused.chain();
            assert!(
                told.contains(&format!("{other:?}")) && told.contains("not host b"),
                "{told}"
            );
        }
    }
}
