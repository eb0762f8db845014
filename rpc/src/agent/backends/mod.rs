//! What an instance's disks and network cards work on: opened by the agent, handed to the VMM, and not kept.
//!
//! A VMM opens no path and makes no interface. What it is handed is all that it can reach; and what the agent kept of it
//! would outlive the guest: a tap, or a lock on a disk.

mod disks;
mod identity;
mod nics;
pub(crate) mod room;
mod spec;
pub(crate) mod storage;

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use ferry_proto::agent::v1::InstanceSpec;
use ferry_proto::vmm::v1 as wire;
use uuid::Uuid;

pub(crate) use self::nics::is_interface_name;
pub(crate) use self::spec::{NIC_RATES, check, complete};
use super::failure::Failure;
use super::instances::Agent;

/// All that is opened for one VMM.
#[derive(Debug, Default)]
pub(crate) struct Opened {
    /// What the VMM is told of its disks.
    pub(crate) disks: Vec<wire::Disk>,
    /// What the VMM is told of its network cards.
    pub(crate) nics: Vec<wire::Nic>,
    /// For each disk its image and, as far as it has them, its lock file, that of its readers, and what is written while it is copied; then the tap
    /// of each card.
    pub(crate) descriptors: Vec<OwnedFd>,
}

/// Whether what is on a disk comes with its guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Contents {
    /// It does, and is written over what is there.
    Come,
    AreHere,
}

/// What the backends are opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Occasion {
    /// A new instance: what is in its images is looked at.
    Run,
    /// An instance that had them before: what is in its images is its own affair.
    Start,
    /// A migration into here: the source writes the images still, so nothing that is read of them would be true.
    Prepare,
}

/// Whose backends, and what is known of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Whose {
    pub(crate) instance: Uuid,
    /// The highest epoch that this agent knows of it.
    pub(crate) known_epoch: u64,
    pub(crate) occasion: Occasion,
}

impl Agent {
    /// Opens everything that an instance's devices work on. Taps made here are gone when what is returned is dropped and
    /// the VMM is.
    ///
    /// # Errors
    /// Names the disk, tap or bridge, this host, and what is wrong with it.
    pub(crate) async fn open_backends(&self, spec: &InstanceSpec, whose: Whose) -> Result<Opened, Failure> {
        self.open_to_copy(spec, whose, &[]).await
    }

    /// The same where the contents of disks of these numbers come with the guest.
    ///
    /// # Errors
    /// As [`Agent::open_backends`].
    pub(crate) async fn open_to_copy(
        &self,
        spec: &InstanceSpec,
        whose: Whose,
        copied: &[u32],
    ) -> Result<Opened, Failure> {
        if spec.disks.is_empty() && spec.nics.is_empty() {
            return Ok(Opened::default());
        }
        let (spec, host, copied) = (spec.clone(), self.host().to_owned(), copied.to_vec());
        let allowed = self.config.is_exposed().then(|| self.config.image_dirs.clone());
        // A network file system may take its time.
        tokio::task::spawn_blocking(move || open(&spec, (whose, &copied), &host, allowed.as_deref()))
            .await
            .map_err(|error| Failure::host("failed to open the instance's disks")(std::io::Error::other(error)))?
    }
}

/// Who has a tap that an instance is to have here may be that very instance, at its source.
const SAME_NETWORK: &str = " (if both agents are in one network namespace, the guest has it at its source: a tap by name has one user, a \
                            card on a bridge moves)";

fn open(
    spec: &InstanceSpec,
    (whose, copied): (Whose, &[u32]),
    host: &str,
    allowed: Option<&[PathBuf]>,
) -> Result<Opened, Failure> {
    let mut opened = Opened::default();
    for (number, disk) in (0u32..).zip(&spec.disks) {
        let refused = |problem| Failure::Refused(format!("disk {} on host {host}: {problem}", disk.path));
        let contents = match copied.contains(&number) {
            true => Contents::Come,
            false => Contents::AreHere,
        };
        let open = disks::open(disk, whose, contents, allowed).map_err(refused)?;
        opened.disks.push(wire::Disk {
            path: disk.path.clone(),
            readonly: disk.readonly,
            serial: disk.serial.clone().unwrap_or_default(),
            has_lock_file: open.lock_file.is_some(),
            has_readers_file: open.readers.is_some(),
            has_copy_target: open.target.is_some(),
        });
        opened.descriptors.push(open.image.into());
        let beside = open.lock_file.into_iter().chain(open.readers).chain(open.target);
        opened.descriptors.extend(beside.map(OwnedFd::from));
    }
    for nic in &spec.nics {
        let refused = |error| {
            let advice = match whose.occasion {
                Occasion::Prepare if nics::is_in_use(&error) => SAME_NETWORK,
                _ => "",
            };
            Failure::Refused(format!("host {host} failed to {}{advice}", crate::error_chain(&error)))
        };
        let tap = nics::open(nic).map_err(refused)?;
        opened.nics.push(wire::Nic {
            mac: nic.mac.clone(),
            rate_bytes_per_s: nic.rate_bytes_per_s.unwrap_or_default(),
        });
        opened.descriptors.push(tap);
    }
    Ok(opened)
}
