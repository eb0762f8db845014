//! What this process does with its guest's disks besides lending them to the machine: locks, and the page cache.
//!
//! Who may call what, and when: at a fresh start `lock` before the guest runs. At the source of a migration `settle` while it
//! runs, `write_back` once it stands still, `unlock` after the grant was traded for GO-sent and before GO is written; a guest
//! that comes back is locked again before it runs. At the destination `lock` and `forget_cached` after GO's manifest was checked,
//! before the machine is restored. For a snapshot `write_back`, `moments` and `let_pass` while it stands still; to restore one
//! `hold` and `check_moments` before anything is loaded, and `lock` before the guest runs.

mod cache;
mod locks;
mod moments;
mod readers;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use ferry_migration::guest::DiskCondition;
use ferry_migration::handover::Epoch;
use ferry_proto::vmm::v1::DiskMoment;
use ferry_vmm::{DiskAccess, Losses};
use rustix::fs::{SeekFrom, seek};
use uuid::Uuid;

use self::cache::PageCache;
use self::locks::DiskLocks;
pub(super) use self::locks::LockError;
pub(super) use self::moments::MovedOn;
use super::copied::CopiedDisk;
use crate::lock_file::Holder;

/// How long a disk is waited for: far less than an agent waits for the answer to its permit.
const PATIENCE: Duration = Duration::from_secs(1);
const BETWEEN_TRIES: Duration = Duration::from_millis(10);

/// What a guest counts its disks in.
const SECTOR: u64 = 512;

/// A disk as its VMM has it.
#[derive(Debug)]
pub(super) struct Disk {
    /// For messages.
    pub(super) path: String,
    /// The open file that the machine has too: a lock is on it, not on the path, and lasts until the last descriptor of it
    /// is closed.
    pub(super) image: Arc<File>,
    pub(super) lock_file: Option<File>,
    /// Where those who only read it leave their names, if there is such a file.
    pub(super) readers: Option<File>,
    /// What is written while a disk is copied here that its guest only reads.
    pub(super) target: Option<Arc<File>>,
    pub(super) access: DiskAccess,
    /// Something that the guest wrote did not reach the disk, and it was not told.
    pub(super) losses: Arc<Losses>,
}

/// All disks of a guest.
#[derive(Debug)]
pub(super) struct Disks {
    locks: DiskLocks,
    cache: PageCache,
}

impl Disks {
    /// Disks that are not locked yet; the lock files will name `me`.
    pub(super) fn new(disks: Vec<Disk>, me: Holder) -> Self {
        Self {
            cache: PageCache::new(&disks),
            locks: DiskLocks::new(disks, me),
        }
    }

    /// Locks all of them for the guest under `epoch`, or none. Those that are locked stay so.
    ///
    /// # Errors
    /// Names the disk and who has it.
    pub(super) fn lock(&self, epoch: Epoch) -> Result<(), LockError> {
        self.locks.lock(epoch)
    }

    /// The same, for a guest that waits: a VMM that was killed may let go of a disk a moment after it is dead, when the
    /// requests that it had in flight are done.
    ///
    /// # Errors
    /// Names the disk and who has it still.
    pub(super) fn lock_patiently(&self, epoch: Epoch) -> Result<(), LockError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.lock(epoch) {
                Err(error) if error.may_pass() && Instant::now() < deadline => thread::sleep(BETWEEN_TRIES),
                settled => return settled,
            }
        }
    }

    /// The disks of these numbers, to be copied; of so many bytes each where those are told and not 0.
    ///
    /// # Errors
    /// There is no such disk, or its size cannot be told, or is less.
    pub(super) fn to_copy(&self, numbers: &[u32], bytes: &[u64]) -> anyhow::Result<Vec<CopiedDisk>> {
        let copied = |(position, &number): (usize, &u32)| {
            let disk = self.locks.disks().get(number as usize);
            let disk = disk.with_context(|| format!("there is no disk {number} to copy"))?;
            let image = Arc::clone(disk.target.as_ref().unwrap_or(&disk.image));
            let bytes = bytes.get(position).copied().filter(|&bytes| bytes > 0);
            CopiedDisk::new(image, &disk.path, position, bytes)
                .with_context(|| format!("failed to copy disk {}", disk.path))
        };
        numbers.iter().enumerate().map(copied).collect()
    }

    /// Keeps others from those of these disks that are written here while they are copied. Nobody has them anywhere else.
    ///
    /// # Errors
    /// Names the disk and who has it.
    pub(super) fn lock_to_copy(&self, numbers: &[u32], epoch: Epoch) -> Result<(), LockError> {
        self.locks.lock_some(numbers, epoch)
    }

    /// Whether this disk is on a block device.
    pub(super) fn is_device(&self, number: u32) -> bool {
        let disk = self.locks.disks().get(number as usize);
        let metadata = disk.and_then(|disk| disk.image.metadata().ok());
        metadata.is_some_and(|metadata| metadata.file_type().is_block_device())
    }

    /// What was copied is only read from here on.
    pub(super) fn end_copy(&mut self) {
        self.locks.disks_mut().iter_mut().for_each(|disk| disk.target = None);
    }

    /// Names each that does not hold the guest's disk of so many sectors. Looks at sizes only, and may be asked while the guest is elsewhere.
    pub(super) fn too_small_for(&self, sectors: &[u64]) -> Vec<String> {
        let disks = self.locks.disks().iter().zip(sectors);
        disks.filter_map(|(disk, &sectors)| too_small(disk, sectors)).collect()
    }

    /// The same of the disks of these numbers alone.
    pub(super) fn too_small_among(&self, numbers: &[u32], sectors: &[u64]) -> Vec<String> {
        let disk = |&number: &u32| {
            self.locks
                .disks()
                .get(number as usize)
                .zip(sectors.get(number as usize))
        };
        let disks = numbers.iter().filter_map(disk);
        disks.filter_map(|(disk, &sectors)| too_small(disk, sectors)).collect()
    }

    /// Locks all of them or none, as [`Disks::lock`] does, but leaves no name yet: the guest may turn out not to be theirs.
    ///
    /// # Errors
    /// Names the disk and who has it.
    pub(super) fn hold(&self, epoch: Epoch) -> Result<(), LockError> {
        self.locks.hold(epoch)
    }

    /// What they are like, of a guest that stands still.
    ///
    /// # Errors
    /// A disk cannot be looked at.
    pub(super) fn moments(&self) -> Result<Vec<DiskMoment>, MovedOn> {
        moments::of(self.locks.disks())
    }

    /// Waits, some milliseconds at most, until a write would show that it came after these moments.
    pub(super) fn let_pass(&self, moments: &[DiskMoment]) {
        moments::let_pass(moments);
    }

    /// Checks that they are what they were when instance `origin` had them. They must be locked or held.
    ///
    /// # Errors
    /// Names the disk that moved on, and how that shows.
    pub(super) fn check_moments(&self, then: &[DiskMoment], origin: Uuid) -> Result<(), MovedOn> {
        moments::check(self.locks.disks(), then, origin)
    }

    /// Lets go of all of them: another host's guest may have them from here on.
    pub(super) fn unlock(&self) {
        self.locks.unlock();
    }

    /// The guest runs under `epoch`, which the lock files shall say.
    pub(super) fn note_epoch(&self, epoch: Epoch) {
        self.locks.note_epoch(epoch);
    }

    /// Has the page cache written while the guest runs, so that [`Disks::write_back`] finds little. Does not block: it is
    /// asked again until it is done.
    pub(super) fn settle(&mut self) -> DiskCondition {
        self.cache.settle()
    }

    /// Writes back all that the page cache holds of what the guest wrote.
    ///
    /// # Errors
    /// A disk did not take it.
    pub(super) fn write_back(&self) -> io::Result<()> {
        self.cache.write_back()
    }

    /// The same of a guest that stands still, given up at the deadline.
    ///
    /// # Errors
    /// A disk did not take it, or not in time.
    pub(super) fn write_back_by(&self, deadline: Instant) -> io::Result<()> {
        self.cache.write_back_by(deadline)
    }

    /// Forgets what this host read of the disks before: another host has written them since.
    pub(super) fn forget_cached(&self) {
        self.cache.forget();
    }
}

/// What is wrong with a disk that does not hold so many sectors.
fn too_small(disk: &Disk, sectors: u64) -> Option<String> {
    let guest = sectors.saturating_mul(SECTOR);
    match seek(&*disk.image, SeekFrom::End(0)) {
        Ok(here) if here >= guest => None,
        Ok(here) => Some(format!("disk {} has {here} bytes, and the guest's {guest}", disk.path)),
        Err(error) => Some(format!("the size of disk {} cannot be told: {error}", disk.path)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_that_does_not_hold_the_guests_is_named_with_both_sizes() {
        let disk = |path: &str| {
            let image = tempfile::tempfile().unwrap();
            image.set_len(1 << 20).unwrap();
            Disk {
                path: path.to_owned(),
                image: Arc::new(image),
                lock_file: None,
                readers: None,
                target: None,
                access: DiskAccess::ReadWrite,
                losses: Default::default(),
            }
        };
        let me = Holder {
            host: "b".to_owned(),
            instance: Uuid::from_u128(1),
            name: "web".to_owned(),
            epoch: 0,
            pid: 1,
        };
        let disks = Disks::new(["/srv/a", "/srv/b", "/srv/c"].map(disk).into(), me);

        let small = disks.too_small_for(&[2048, 2049, 1]);

        assert_eq!(small, ["disk /srv/b has 1048576 bytes, and the guest's 1049088"]);
        assert!(disks.too_small_for(&[]).is_empty());
        assert_eq!(disks.too_small_for(&[u64::MAX]).len(), 1);
    }
}
