//! What a disk was like at a moment, and whether it still is: the memory of a guest and its disks belong together.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::thread;
use std::time::Duration;

use ferry_proto::vmm::v1::DiskMoment;
use ferry_vmm::DiskAccess;
use rustix::time::{ClockId, clock_gettime};
use uuid::Uuid;

use super::Disk;
use crate::lock_file;

/// Why a disk does not go with a guest's memory.
#[derive(Debug, thiserror::Error)]
pub(in crate::vmm_process) enum MovedOn {
    /// The machine has other disks than the snapshot.
    #[error("the snapshot has {snapshot} disks, the machine {machine}")]
    Count {
        /// How many the snapshot names.
        snapshot: usize,
        /// How many the machine has.
        machine: usize,
    },
    /// Nothing tells whether it was written.
    #[error(
        "disk {0} is a block device: nothing tells whether it was written since the snapshot, so the guest's memory cannot be \
         trusted to go with it"
    )]
    Device(String),
    /// It is longer or shorter.
    #[error("disk {path} moved on since the snapshot: it has {found} bytes, then it had {then}")]
    Size {
        /// The disk.
        path: String,
        /// Its size now.
        found: u64,
        /// Its size then.
        then: u64,
    },
    /// It was written.
    #[error(
        "disk {0} moved on since the snapshot: it was written at another time than the snapshot says. A copy of it that was \
         made then can take its place (`cp --preserve=timestamps`)"
    )]
    Written(String),
    /// Somebody had it.
    #[error("disk {path} moved on since the snapshot: instance {} had it on host {} under epoch {}", holder.name, holder.host, holder.epoch)]
    Held {
        /// The disk.
        path: String,
        /// Who had it.
        holder: lock_file::Holder,
    },
    /// It cannot be looked at.
    #[error("failed to look at disk {path}")]
    Failed {
        /// The disk.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What the disks are like. Nothing is in flight to them.
pub(super) fn of(disks: &[Disk]) -> Result<Vec<DiskMoment>, MovedOn> {
    disks.iter().map(moment).collect()
}

/// Waits until whatever is written to the disks gets a later time than it has: times of files are as coarse as the kernel's tick.
pub(super) fn let_pass(moments: &[DiskMoment]) {
    let last = moments.iter().map(|moment| moment.modified_ns).max().unwrap_or(0);
    // A tick is 10 ms at most; a clock that was set back is not waited for.
    for _ in 0..20 {
        let now = clock_gettime(ClockId::RealtimeCoarse);
        if nanoseconds(now.tv_sec, now.tv_nsec) > last {
            return;
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// Checks that the disks are what they were when instance `origin` had them. They must be locked.
pub(super) fn check(disks: &[Disk], then: &[DiskMoment], origin: Uuid) -> Result<(), MovedOn> {
    if disks.len() != then.len() {
        return Err(MovedOn::Count {
            snapshot: then.len(),
            machine: disks.len(),
        });
    }
    disks
        .iter()
        .zip(then)
        .try_for_each(|(disk, then)| check_one(disk, then, origin))
}

fn check_one(disk: &Disk, then: &DiskMoment, origin: Uuid) -> Result<(), MovedOn> {
    let path = disk.path.clone();
    let is_written = disk.access == DiskAccess::ReadWrite;
    let now = moment(disk)?;
    if now.bytes == 0 || then.bytes == 0 {
        return if is_written { Err(MovedOn::Device(path)) } else { Ok(()) };
    }
    if now.bytes != then.bytes {
        return Err(MovedOn::Size {
            path,
            found: now.bytes,
            then: then.bytes,
        });
    }
    // Before the time, because it names who it was.
    let holder = disk.lock_file.as_ref().and_then(lock_file::read);
    match holder.filter(|holder| is_written && (holder.instance, holder.epoch) != (origin, then.epoch)) {
        Some(holder) => Err(MovedOn::Held { path, holder }),
        None if now.modified_ns != then.modified_ns => Err(MovedOn::Written(path)),
        None => Ok(()),
    }
}

fn moment(disk: &Disk) -> Result<DiskMoment, MovedOn> {
    let failed = |source| MovedOn::Failed {
        path: disk.path.clone(),
        source,
    };
    let metadata = disk.image.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Ok(DiskMoment::default());
    }
    let holder = disk.lock_file.as_ref().and_then(lock_file::read);
    Ok(DiskMoment {
        bytes: metadata.len(),
        modified_ns: nanoseconds(metadata.mtime(), metadata.mtime_nsec()),
        epoch: holder.map_or(0, |holder| holder.epoch),
    })
}

fn nanoseconds(seconds: i64, nanoseconds: i64) -> i64 {
    seconds.saturating_mul(1_000_000_000).saturating_add(nanoseconds)
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::os::unix::fs::FileExt;
    use std::path::Path;
    use std::sync::Arc;

    use tempfile::TempDir;

    use super::*;

    const ORIGIN: Uuid = Uuid::from_u128(1);

    fn disk(path: &Path, access: DiskAccess) -> Disk {
        let open = |path: &Path| {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false);
            options.open(path).unwrap()
        };
        Disk {
            path: path.display().to_string(),
            image: Arc::new(open(path)),
            lock_file: Some(open(&lock_file::path_of(path))),
            readers: None,
            target: None,
            access,
            losses: Default::default(),
        }
    }

    /// A disk that `ORIGIN` has under epoch 3.
    fn image() -> (TempDir, Disk) {
        let folder = tempfile::tempdir().unwrap();
        let disk = disk(&folder.path().join("web.img"), DiskAccess::ReadWrite);
        disk.image.set_len(4096).unwrap();
        note(&disk, ORIGIN, 3);
        (folder, disk)
    }

    fn note(disk: &Disk, instance: Uuid, epoch: u64) {
        let holder = lock_file::Holder {
            host: "a".to_owned(),
            instance,
            name: "web".to_owned(),
            epoch,
            pid: 1,
        };
        lock_file::write(disk.lock_file.as_ref().unwrap(), &holder).unwrap();
    }

    #[test]
    fn a_disk_that_nobody_touched_is_what_it_was() {
        let (_folder, disk) = image();
        let then = of(std::slice::from_ref(&disk)).unwrap();
        assert_eq!((then[0].bytes, then[0].epoch), (4096, 3));
        check(&[disk], &then, ORIGIN).unwrap();
    }

    #[test]
    fn a_write_right_after_the_moment_is_noticed() {
        let (_folder, disk) = image();
        disk.image.write_all_at(b"before", 0).unwrap();
        let then = of(std::slice::from_ref(&disk)).unwrap();
        let_pass(&then);
        disk.image.write_all_at(b"after", 0).unwrap();
        assert!(matches!(check(&[disk], &then, ORIGIN), Err(MovedOn::Written(_))));
    }

    #[test]
    fn another_holder_or_epoch_is_named() {
        let (_folder, disk) = image();
        let then = of(std::slice::from_ref(&disk)).unwrap();
        note(&disk, ORIGIN, 4);
        let disks = [disk];
        assert!(
            check(&disks, &then, ORIGIN)
                .unwrap_err()
                .to_string()
                .contains("epoch 4")
        );
        note(&disks[0], Uuid::from_u128(2), 3);
        assert!(matches!(check(&disks, &then, ORIGIN), Err(MovedOn::Held { .. })));
    }

    #[test]
    fn a_disk_of_another_size_or_number_is_refused() {
        let (_folder, disk) = image();
        let then = of(std::slice::from_ref(&disk)).unwrap();
        disk.image.set_len(8192).unwrap();
        let disks = [disk];
        assert!(matches!(check(&disks, &then, ORIGIN), Err(MovedOn::Size { .. })));
        assert!(matches!(check(&disks, &[], ORIGIN), Err(MovedOn::Count { .. })));
    }

    #[test]
    fn a_device_goes_with_no_memory_unless_it_is_only_read() {
        let open = |access| Disk {
            path: "/dev/null".to_owned(),
            image: Arc::new(std::fs::File::open("/dev/null").unwrap()),
            lock_file: None,
            readers: None,
            target: None,
            access,
            losses: Default::default(),
        };
        let then = [DiskMoment::default()];
        assert!(matches!(
            check(&[open(DiskAccess::ReadWrite)], &then, ORIGIN),
            Err(MovedOn::Device(_))
        ));
        check(&[open(DiskAccess::ReadOnly)], &then, ORIGIN).unwrap();
    }
}
