//! The descriptors that came with the order to build a machine: what the machine gets of them, and what this process keeps.

use std::fs::File;
use std::num::NonZeroU64;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use anyhow::{Context, ensure};
use ferry_proto::vmm::v1::MachineSpec;
use ferry_proto::wire_uuid;
use ferry_vmm::{Backends, DiskAccess, DiskBackend, NicBackend};

use super::announce::{Announcer, Card};
use super::disks::{Disk, Disks};
use crate::lock_file::Holder;
use crate::mac::MacAddress;

/// The host's side of a machine's devices.
pub(super) struct HostSide {
    /// What the machine works on.
    pub(super) backends: Backends,
    /// The same disks, to be locked and written back.
    pub(super) disks: Disks,
    /// The same network cards, to be announced.
    pub(super) announcer: Announcer,
}

impl HostSide {
    /// Sorts the descriptors: for each disk its image and, as far as it has them, its lock file, the file with its readers' names
    /// and what is written while it is copied; then each card's tap.
    ///
    /// # Errors
    /// There are more or fewer than the order says.
    pub(super) fn new(spec: &MachineSpec, descriptors: Vec<OwnedFd>) -> anyhow::Result<Self> {
        let mut descriptors = descriptors.into_iter();
        let mut next = |what: &str| {
            descriptors
                .next()
                .with_context(|| format!("no descriptor came of {what}"))
        };
        let mut backends = Backends::default();
        let (mut disks, mut cards) = (Vec::new(), Vec::new());
        for disk in &spec.disks {
            let file = File::from(next(&disk.path)?);
            let access = if disk.readonly {
                DiskAccess::ReadOnly
            } else {
                DiskAccess::ReadWrite
            };
            let lock_file = match disk.has_lock_file {
                true => Some(File::from(next("a lock file")?)),
                false => None,
            };
            let readers = match disk.has_readers_file {
                true => Some(File::from(next("a file of readers")?)),
                false => None,
            };
            let target = match disk.has_copy_target {
                true => Some(Arc::new(File::from(next("what is copied")?))),
                false => None,
            };
            let losses = Arc::default();
            let image = file
                .try_clone()
                .with_context(|| format!("failed to keep disk {}", disk.path))?;
            disks.push(Disk {
                path: disk.path.clone(),
                image: Arc::new(image),
                lock_file,
                readers,
                target,
                access,
                losses: Arc::clone(&losses),
            });
            backends.disks.push(DiskBackend {
                file,
                access,
                serial: disk.serial.clone(),
                losses,
            });
        }
        for nic in &spec.nics {
            let tap = next("a tap")?;
            let mac: MacAddress = nic.mac.parse().map_err(anyhow::Error::msg)?;
            cards.push(Card {
                tap: tap.try_clone().context("failed to keep a tap")?,
                mac,
            });
            let mac = mac.octets();
            backends.nics.push(NicBackend {
                tap,
                mac,
                rate: NonZeroU64::new(nic.rate_bytes_per_s),
            });
        }
        ensure!(
            descriptors.next().is_none(),
            "more descriptors came than the machine has disks and network cards"
        );
        let me = Holder {
            host: spec.host.clone(),
            instance: wire_uuid("spec.instance", &spec.instance)?,
            name: spec.name.clone(),
            epoch: 0,
            pid: std::process::id(),
        };
        Ok(Self {
            backends,
            disks: Disks::new(disks, me),
            announcer: Announcer::new(cards),
        })
    }
}

#[cfg(test)]
mod tests {
    use ferry_proto::vmm::v1 as wire;

    use super::*;

    fn spec() -> MachineSpec {
        MachineSpec {
            instance: "00000000-0000-0000-0000-000000000001".to_owned(),
            disks: vec![
                wire::Disk {
                    path: "/srv/a".to_owned(),
                    has_lock_file: true,
                    ..wire::Disk::default()
                },
                wire::Disk {
                    path: "/srv/b".to_owned(),
                    readonly: true,
                    has_readers_file: true,
                    serial: "b".to_owned(),
                    ..wire::Disk::default()
                },
            ],
            nics: vec![wire::Nic {
                mac: "02:00:00:00:00:01".to_owned(),
                rate_bytes_per_s: 8_000,
            }],
            ..MachineSpec::default()
        }
    }

    fn files(count: usize) -> Vec<OwnedFd> {
        (0..count).map(|_| tempfile::tempfile().unwrap().into()).collect()
    }

    #[test]
    fn each_descriptor_finds_its_device() {
        let host = HostSide::new(&spec(), files(5)).unwrap();
        let [a, b] = &host.backends.disks[..] else {
            panic!("{:?}", host.backends)
        };
        assert_eq!((a.access, b.access), (DiskAccess::ReadWrite, DiskAccess::ReadOnly));
        assert_eq!(b.serial, "b");
        assert_eq!(host.backends.nics[0].mac, [2, 0, 0, 0, 0, 1]);
        assert_eq!(host.backends.nics[0].rate, NonZeroU64::new(8_000));
    }

    #[test]
    fn a_wrong_number_of_descriptors_is_refused() {
        let told = |count| {
            HostSide::new(&spec(), files(count))
                .err()
                .map(|error| error.to_string())
        };
        assert!(told(1).unwrap().contains("lock file"));
        assert!(told(2).unwrap().contains("/srv/b"));
        assert!(told(3).unwrap().contains("readers"));
        assert!(told(4).unwrap().contains("tap"));
        assert_eq!(told(5), None);
        assert!(told(6).unwrap().contains("more descriptors"));
    }
}
