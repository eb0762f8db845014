//! Locks on disk images: who runs the guest has them, and nobody else gets in.
//!
//! The lock is an OFD lock on the image itself (`fcntl(2)`, F_OFD_SETLK), of the whole file: a disk that the guest writes takes
//! the only one, disks that are read share. It belongs to the open file that agent and VMM passed on, so it goes with the last
//! process that has it, however that ends. It holds among the hosts of a network file system that carries locks
//! (NFS does), and on one host everywhere; of a block device that hosts share it says nothing beyond one host.

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::thread;

use ferry_migration::handover::Epoch;
use ferry_vmm::DiskAccess;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use super::{Disk, readers};
use crate::lock_file::{self, Holder};

/// Why disks could not be locked.
#[derive(Debug, thiserror::Error)]
pub(in crate::vmm_process) enum LockError {
    /// Somebody has the disk, and says who.
    #[error("disk {path} is locked by instance {} (host {}, epoch {})", holder.name, holder.host, holder.epoch)]
    Held {
        /// The disk.
        path: String,
        /// Who has it.
        holder: Holder,
    },
    /// Others read the disk, and say who they are.
    #[error(
        "disk {path} is read by {}: a disk has one guest that writes it, or any number that read it",
        named(readers)
    )]
    Read {
        /// The disk.
        path: String,
        /// Who reads it.
        readers: Vec<Holder>,
    },
    /// Somebody has the disk, and does not say who.
    #[error("disk {path} is locked by a process that left no name: `lslocks` on the hosts that share it finds it")]
    HeldByStranger {
        /// The disk.
        path: String,
    },
    /// The guest had the disk under a later right to run.
    #[error("disk {path} was the instance's under epoch {}, on host {}: the guest that is to run under epoch {epoch} is stale", holder.epoch, holder.host)]
    Stale {
        /// The disk.
        path: String,
        /// Who had it.
        holder: Holder,
        /// The epoch for which it was asked.
        epoch: Epoch,
    },
    /// The file system does not lock.
    #[error("failed to lock disk {path}; a network file system may need its lock service")]
    Failed {
        /// The disk.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl LockError {
    /// Whether the next try may succeed without anybody's doing.
    pub(super) fn may_pass(&self) -> bool {
        match self {
            Self::Held { .. } | Self::Read { .. } | Self::HeldByStranger { .. } => true,
            Self::Stale { .. } | Self::Failed { .. } => false,
        }
    }
}

/// Some of them by name.
fn named(readers: &[Holder]) -> String {
    const MOST: usize = 8;
    let name = |holder: &Holder| {
        format!(
            "instance {} (host {}, epoch {})",
            holder.name, holder.host, holder.epoch
        )
    };
    let mut names: Vec<_> = readers.iter().take(MOST).map(name).collect();
    if readers.len() > MOST {
        names.push(format!("{} more", readers.len() - MOST));
    }
    names.join(", ")
}

/// The locks of a guest's disks.
#[derive(Debug)]
pub(super) struct DiskLocks {
    disks: Vec<Disk>,
    me: Holder,
    /// What the lock files say, so that it is written once.
    noted: Cell<Epoch>,
}

impl DiskLocks {
    /// Disks that are not locked yet.
    pub(super) fn new(disks: Vec<Disk>, me: Holder) -> Self {
        Self {
            disks,
            me,
            noted: Cell::new(Epoch(0)),
        }
    }

    /// The disks, locked or not.
    pub(super) fn disks(&self) -> &[Disk] {
        &self.disks
    }

    /// The same, to be changed.
    pub(super) fn disks_mut(&mut self) -> &mut [Disk] {
        &mut self.disks
    }

    /// Takes all locks, or none, and writes the holder's name. What is locked already stays so.
    pub(super) fn lock(&self, epoch: Epoch) -> Result<(), LockError> {
        self.hold(epoch).inspect(|()| self.note_epoch(epoch))
    }

    /// Takes all locks, or none. What is locked already stays so.
    pub(super) fn hold(&self, epoch: Epoch) -> Result<(), LockError> {
        let taken = self.disks.iter().try_for_each(|disk| self.lock_one(disk, epoch));
        taken.inspect_err(|_| self.unlock())
    }

    /// Takes the locks of those of these disks that the guest will write. What is locked already stays so.
    pub(super) fn lock_some(&self, numbers: &[u32], epoch: Epoch) -> Result<(), LockError> {
        let disks = numbers.iter().filter_map(|&number| self.disks.get(number as usize));
        let mut written = disks.filter(|disk| disk.access == DiskAccess::ReadWrite);
        written.try_for_each(|disk| self.lock_one(disk, epoch))
    }

    /// Gives all locks back.
    pub(super) fn unlock(&self) {
        for disk in &self.disks {
            if let Err(error) = set_lock(&disk.image, libc::F_UNLCK) {
                // The next holder will be refused, and this guest can come back.
                tracing::error!(disk = disk.path, %error, "failed to give the lock of a disk back");
            }
            if disk.access == DiskAccess::ReadOnly
                && let Some(Err(error)) = disk.readers.as_ref().map(readers::leave)
            {
                tracing::warn!(disk = disk.path, %error, "a disk is said to be read, and is not");
            }
        }
        self.noted.set(Epoch(0));
    }

    /// Writes the epoch, and has it synced by a thread of its own: whoever waits for this does not wait for the disk.
    pub(super) fn note_epoch(&self, epoch: Epoch) {
        if self.noted.replace(epoch) == epoch {
            return;
        }
        let holder = Holder {
            epoch: epoch.0,
            ..self.me.clone()
        };
        let mut written = Vec::new();
        for disk in self.disks.iter().filter(|disk| disk.access == DiskAccess::ReadWrite) {
            let Some(file) = &disk.lock_file else { continue };
            // The lock holds all the same, and a full disk is no reason to lose a guest.
            match lock_file::write(file, &holder).and_then(|()| file.try_clone()) {
                Ok(file) => written.push((disk.path.clone(), file)),
                Err(error) => {
                    tracing::warn!(disk = disk.path, %error, "the lock file of a disk does not say who has it")
                }
            }
        }
        sync(written);
    }

    fn lock_one(&self, disk: &Disk, epoch: Epoch) -> Result<(), LockError> {
        let kind = match disk.access {
            DiskAccess::ReadWrite => libc::F_WRLCK,
            DiskAccess::ReadOnly => libc::F_RDLCK,
        };
        let path = disk.path.clone();
        let read_by = || match disk.access {
            DiskAccess::ReadWrite => disk.readers.as_ref().map_or_else(Vec::new, readers::names),
            DiskAccess::ReadOnly => Vec::new(),
        };
        let holder = || disk.lock_file.as_ref().and_then(lock_file::read);
        let is_me = |holder: &Holder| {
            (holder.instance, holder.pid, &holder.host) == (self.me.instance, self.me.pid, &self.me.host)
        };
        match set_lock(&disk.image, kind) {
            Ok(()) => {}
            Err(Errno::EAGAIN | Errno::EACCES) => {
                let readers = read_by();
                if !readers.is_empty() {
                    return Err(LockError::Read { path, readers });
                }
                // Where it names us, whoever has the lock now wrote no name.
                return Err(match holder().filter(|holder| !is_me(holder)) {
                    Some(holder) => LockError::Held { path, holder },
                    None => LockError::HeldByStranger { path },
                });
            }
            Err(error) => {
                let source = error.into();
                return Err(LockError::Failed { path, source });
            }
        }
        if let Some(holder) = holder().filter(|holder| holder.instance == self.me.instance && holder.epoch > epoch.0) {
            return Err(LockError::Stale { path, holder, epoch });
        }
        self.enter(disk, epoch);
        Ok(())
    }

    /// Leaves its name with a disk that it reads.
    fn enter(&self, disk: &Disk, epoch: Epoch) {
        let Some(file) = disk.readers.as_ref().filter(|_| disk.access == DiskAccess::ReadOnly) else {
            return;
        };
        let reader = Holder {
            epoch: epoch.0,
            ..self.me.clone()
        };
        match readers::enter(file, &reader) {
            Ok(true) => {}
            Ok(false) => tracing::info!(disk = disk.path, "it has more readers than are named"),
            // The lock holds all the same.
            Err(error) => tracing::warn!(disk = disk.path, %error, "nothing says that a disk is read"),
        }
    }
}

/// Another host of a network file system sees what was written when it was written back or the file is closed, and a VMM keeps its lock
/// files open: without this a guest that is to move on within seconds would be refused, for its disk says that another host has it.
fn sync(lock_files: Vec<(String, File)>) {
    if lock_files.is_empty() {
        return;
    }
    let sync_all = move || {
        for (disk, file) in lock_files {
            if let Err(error) = file.sync_data() {
                tracing::warn!(disk, %error, "other hosts may not see yet who has a disk");
            }
        }
    };
    if let Err(error) = thread::Builder::new().name("lock-files".to_owned()).spawn(sync_all) {
        tracing::warn!(%error, "other hosts may not see yet who has a disk");
    }
}

/// Takes, changes or gives back the lock of the whole file.
fn set_lock(file: &File, kind: libc::c_int) -> nix::Result<()> {
    let lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        // To the end, wherever it will be.
        l_len: 0,
        // Must be zero for this kind of lock.
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_OFD_SETLK(&lock)).map(drop)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, OpenOptions};
    use std::path::Path;
    use std::sync::Arc;

    use tempfile::TempDir;
    use uuid::Uuid;

    use super::*;

    /// Another open file of the same image: to the locks that is another process.
    fn disk(path: &Path, access: DiskAccess) -> Disk {
        let open = |path: &Path| OpenOptions::new().read(true).write(true).open(path).unwrap();
        Disk {
            path: path.display().to_string(),
            image: Arc::new(open(path)),
            lock_file: Some(open(&lock_file::path_of(path))),
            readers: OpenOptions::new()
                .read(true)
                .write(true)
                .open(lock_file::readers_path_of(path))
                .ok(),
            target: None,
            access,
            losses: Default::default(),
        }
    }

    fn locks(name: &str, instance: u128, disks: Vec<Disk>) -> DiskLocks {
        let me = Holder {
            host: format!("host-of-{name}"),
            instance: Uuid::from_u128(instance),
            name: name.to_owned(),
            epoch: 0,
            pid: std::process::id(),
        };
        DiskLocks::new(disks, me)
    }

    fn images() -> (TempDir, [std::path::PathBuf; 2]) {
        let folder = tempfile::tempdir().unwrap();
        let paths = ["one.img", "two.img"].map(|name| folder.path().join(name));
        for path in &paths {
            fs::write(path, [0; 512]).unwrap();
            fs::write(lock_file::path_of(path), b"").unwrap();
        }
        (folder, paths)
    }

    #[test]
    fn a_locked_disk_names_its_holder() {
        let (_folder, [path, _]) = images();
        let web = locks("web", 1, vec![disk(&path, DiskAccess::ReadWrite)]);
        let other = locks("db", 2, vec![disk(&path, DiskAccess::ReadWrite)]);
        web.lock(Epoch(3)).unwrap();

        let held = other.lock(Epoch(1)).unwrap_err();
        assert_eq!(
            held.to_string(),
            format!(
                "disk {} is locked by instance web (host host-of-web, epoch 3)",
                path.display()
            )
        );
        web.note_epoch(Epoch(4));
        assert!(other.lock(Epoch(1)).unwrap_err().to_string().contains("epoch 4"));
    }

    #[test]
    fn a_lock_goes_with_its_last_descriptor() {
        let (_folder, [path, _]) = images();
        let web = locks("web", 1, vec![disk(&path, DiskAccess::ReadWrite)]);
        let kept = Arc::clone(&web.disks[0].image);
        let other = locks("db", 2, vec![disk(&path, DiskAccess::ReadWrite)]);
        web.lock(Epoch(3)).unwrap();
        drop(web);
        assert!(other.lock(Epoch(1)).is_err());
        drop(kept);
        other.lock(Epoch(1)).unwrap();
    }

    #[test]
    fn locks_are_handed_over_and_taken_back() {
        let (_folder, [path, _]) = images();
        let at_a = locks("web", 1, vec![disk(&path, DiskAccess::ReadWrite)]);
        let mut at_b = locks("web", 1, vec![disk(&path, DiskAccess::ReadWrite)]);
        at_b.me.host = "b".to_owned();
        at_a.lock(Epoch(3)).unwrap();
        at_a.lock(Epoch(3)).unwrap();
        at_a.unlock();
        at_b.lock(Epoch(3)).unwrap();
        at_b.note_epoch(Epoch(4));
        assert!(matches!(at_a.lock(Epoch(5)), Err(LockError::Held { .. })));
        drop(at_b);
        at_a.lock(Epoch(5)).unwrap();
    }

    #[test]
    fn all_disks_are_locked_or_none() {
        let (_folder, [one, two]) = images();
        let other = locks("db", 2, vec![disk(&two, DiskAccess::ReadWrite)]);
        other.lock(Epoch(1)).unwrap();
        let both = [&one, &two].map(|path| disk(path, DiskAccess::ReadWrite));
        let web = locks("web", 1, both.into());

        assert!(web.lock(Epoch(1)).is_err());

        let third = locks("third", 3, vec![disk(&one, DiskAccess::ReadWrite)]);
        third.lock(Epoch(1)).unwrap();
    }

    #[test]
    fn readers_share_and_keep_writers_out() {
        let (_folder, [path, _]) = images();
        let reader = |number| locks("reader", number, vec![disk(&path, DiskAccess::ReadOnly)]);
        let (one, other) = (reader(1), reader(2));
        one.lock(Epoch(1)).unwrap();
        other.lock(Epoch(1)).unwrap();
        let writer = locks("web", 3, vec![disk(&path, DiskAccess::ReadWrite)]);
        assert!(matches!(writer.lock(Epoch(1)), Err(LockError::HeldByStranger { .. })));
    }

    #[test]
    fn readers_are_named_to_who_would_write() {
        let (_folder, [path, _]) = images();
        fs::write(lock_file::readers_path_of(&path), b"").unwrap();
        let reader = |name, number| locks(name, number, vec![disk(&path, DiskAccess::ReadOnly)]);
        let (web, db) = (reader("web", 1), reader("db", 2));
        web.lock(Epoch(3)).unwrap();
        db.lock(Epoch(1)).unwrap();
        db.lock(Epoch(2)).unwrap();
        let writer = locks("writer", 3, vec![disk(&path, DiskAccess::ReadWrite)]);

        let refused = writer.lock(Epoch(1)).unwrap_err().to_string();

        let both = "is read by instance web (host host-of-web, epoch 3), instance db (host host-of-db, epoch 2): ";
        assert!(refused.contains(both), "{refused}");
        web.unlock();
        let refused = writer.lock(Epoch(1)).unwrap_err().to_string();
        assert!(
            refused.contains("read by instance db (") && !refused.contains("web ("),
            "{refused}"
        );
        drop(db);
        writer.lock(Epoch(1)).unwrap();
        let held = web.lock(Epoch(3)).unwrap_err().to_string();
        assert!(held.contains("locked by instance writer"), "{held}");
    }

    #[test]
    fn many_readers_are_not_all_named() {
        let holder = |number: u64| Holder {
            host: "a".to_owned(),
            instance: Uuid::nil(),
            name: format!("web-{number}"),
            epoch: 1,
            pid: 1,
        };
        let told = named(&(0..11).map(holder).collect::<Vec<_>>());
        assert!(
            told.starts_with("instance web-0 (host a, epoch 1), ") && told.ends_with(", 3 more"),
            "{told}"
        );
        assert!(!told.contains("web-8"), "{told}");
    }

    #[test]
    fn a_lock_file_that_names_the_asker_says_nothing_of_who_has_the_disk() {
        let (_folder, [path, _]) = images();
        let web = locks("web", 1, vec![disk(&path, DiskAccess::ReadWrite)]);
        web.lock(Epoch(1)).unwrap();
        web.unlock();
        let nameless = disk(&path, DiskAccess::ReadWrite);
        set_lock(&nameless.image, libc::F_WRLCK).unwrap();
        assert!(matches!(web.lock(Epoch(3)), Err(LockError::HeldByStranger { .. })));
    }

    #[test]
    fn a_guest_that_had_the_disk_under_a_later_epoch_is_not_run_under_an_earlier_one() {
        let (_folder, [path, _]) = images();
        let later = locks("web", 1, vec![disk(&path, DiskAccess::ReadWrite)]);
        later.lock(Epoch(7)).unwrap();
        drop(later);
        let stale = locks("web", 1, vec![disk(&path, DiskAccess::ReadWrite)]);
        assert!(matches!(stale.lock(Epoch(6)), Err(LockError::Stale { .. })));
        let another = locks("db", 2, vec![disk(&path, DiskAccess::ReadWrite)]);
        another.lock(Epoch(1)).unwrap();
    }
}
