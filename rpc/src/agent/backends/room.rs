//! Room for disks that are copied here: whether there is any, made, promised, and given back.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ferry_proto::agent::v1::{DiskSize, InstanceSpec};
use rustix::fs::{FallocateFlags, OFlags, fallocate};
use uuid::Uuid;

use super::storage;
use crate::agent::failure::Failure;
use crate::lock_file::{self, Holder, Lock};

/// What blocks of files are counted in.
const SECTOR: u64 = 512;

/// What is promised to disks while they are copied here. Looking for room may take as long as a network file system likes, so nobody waits for
/// who looks: who finds that others were promised some meanwhile looks again.
#[derive(Default)]
pub(crate) struct Promises(Arc<Mutex<Made>>);

#[derive(Debug, Default)]
struct Made {
    by_migration: HashMap<Uuid, Vec<Promised>>,
    /// How many were ever made.
    count: u64,
}

/// A promise of room. Dropping it takes it back.
#[derive(Debug)]
pub(crate) struct Promise {
    migration: Uuid,
    made: Arc<Mutex<Made>>,
}

impl Promises {
    /// All that is promised now.
    pub(crate) fn all(&self) -> Vec<Promised> {
        lock(&self.0).by_migration.values().flatten().cloned().collect()
    }

    /// How many promises were ever made.
    pub(crate) fn count(&self) -> u64 {
        lock(&self.0).count
    }

    /// Promises a migration what its disks need, unless another promise was made since there were so many.
    pub(crate) fn promise(&self, migration: Uuid, needs: &[Promised], count: u64) -> Option<Promise> {
        let mut made = lock(&self.0);
        if !needs.is_empty() {
            if made.count != count {
                return None;
            }
            made.count += 1;
        }
        made.by_migration.insert(migration, needs.to_vec());
        Some(Promise {
            migration,
            made: Arc::clone(&self.0),
        })
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        lock(&self.made).by_migration.remove(&self.migration);
    }
}

fn lock(made: &Mutex<Made>) -> MutexGuard<'_, Made> {
    made.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a disk that is copied here needs of the file system that it comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Promised {
    /// The file system.
    device: u64,
    path: PathBuf,
    bytes: u64,
}

impl Promised {
    /// What is still to come of it: the rest is taken already, and no longer free.
    fn outstanding(&self) -> u64 {
        let taken = fs::metadata(&self.path).map_or(0, |image| image.blocks() * SECTOR);
        self.bytes.saturating_sub(taken)
    }
}

/// Whether what the source's file takes has room besides what others are promised; the rest of a sparse one is the guest's to fill, as it
/// was at the source. Where that may not be, whether all that it may ever hold has.
pub(super) fn check<'a>(
    path: &Path,
    size: &DiskSize,
    may_over_commit: bool,
    others: impl Iterator<Item = &'a Promised>,
) -> Result<Promised, String> {
    let folder = path.parent().unwrap_or(path);
    let unseen = |error: io::Error| format!("its folder {}: {error}", folder.display());
    let stat = rustix::fs::statvfs(folder).map_err(|error| unseen(error.into()))?;
    let device = fs::metadata(folder).map_err(unseen)?.dev();
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    let others = others.filter(|other| other.device == device && other.path != path);
    let promised = others.map(Promised::outstanding).sum::<u64>();
    let left = free.saturating_sub(promised);
    let needed = match may_over_commit {
        true => size.allocated_bytes,
        false => size.bytes,
    };
    if needed > left {
        let of_others = match promised {
            0 => String::new(),
            _ => format!(
                ", of which {} MiB are promised to other disks that come",
                promised.div_ceil(1 << 20)
            ),
        };
        return Err(format!(
            "it {} {} MiB, and {} MiB are free in {}{of_others}",
            if may_over_commit { "takes" } else { "may come to" },
            needed >> 20,
            free >> 20,
            folder.display()
        ));
    }
    if size.bytes > left {
        tracing::warn!(
            disk = %path.display(),
            bytes = size.bytes,
            left,
            "there is room for what a disk holds now, and not for all that it may hold"
        );
    }
    Ok(Promised {
        device,
        path: path.to_owned(),
        bytes: needed,
    })
}

/// Makes room for the disks that are to be copied: files of the right size, all hole unless all of their room is to be kept for them, each with a lock file that says whose it is, under no epoch
/// yet: until its VMM has the guest, nobody may take it for the guest's disk.
///
/// # Errors
/// Names the disk. What was made before it is still there, for [`remove`] to find.
pub(crate) fn make_room(
    spec: &InstanceSpec,
    copied: &[u32],
    sizes: &[DiskSize],
    may_over_commit: bool,
    holder: &Holder,
) -> Result<(), Failure> {
    for &number in copied {
        let Some((disk, size)) = spec.disks.get(number as usize).zip(sizes.get(number as usize)) else {
            continue;
        };
        // A block device has its room.
        if storage::is_device(size) {
            continue;
        }
        make_image(Path::new(&disk.path), size.bytes, may_over_commit, holder).map_err(Failure::host(format!(
            "host {} failed to make room for disk {}",
            holder.host, disk.path
        )))?;
    }
    Ok(())
}

/// The image gets its size last: one without a size and without a name beside it is what an agent left that was killed in between, and
/// nobody's disk.
fn make_image(path: &Path, bytes: u64, may_over_commit: bool, holder: &Holder) -> io::Result<()> {
    let image = File::options().write(true).create_new(true).mode(0o600).open(path)?;
    let give_size = || match may_over_commit {
        true => image.set_len(bytes),
        false => Ok(fallocate(&image, FallocateFlags::empty(), 0, bytes)?),
    };
    let made = make_lock_file(path, holder).and_then(|()| give_size());
    made.inspect_err(|_| {
        // Whoever finds it would refuse to write over it.
        let removed = fs::remove_file(path);
        tracing::debug!(path = %path.display(), ?removed, "an image could not be made");
        let lock_file = lock_file::path_of(path);
        if is_of(&lock_file, |found| found == holder) || fs::metadata(&lock_file).is_ok_and(|file| file.len() == 0) {
            let _ = fs::remove_file(&lock_file);
        }
    })
}

/// Whether a lock file names such a holder.
fn is_of(lock_file: &Path, holder: impl FnOnce(&Holder) -> bool) -> bool {
    let found = File::open(lock_file).ok().and_then(|file| lock_file::read(&file));
    found.is_some_and(|found| holder(&found))
}

/// Removes images that are not the guest's any more, with their lock files: the half copy of a migration that failed, or the source's
/// after one that did not. Only those whose lock file says that they were this guest's on this host: nothing else is ours to remove, least of all
/// what another host's guest works on under the same path, or what others read meanwhile. Gives the block devices among them: what is on those stays.
pub(crate) fn remove<'p>(paths: &'p [String], instance: Uuid, host: &str) -> Vec<&'p Path> {
    let is_device = |path: &&Path| fs::metadata(path).is_ok_and(|found| found.file_type().is_block_device());
    let (devices, images) = paths.iter().map(Path::new).partition::<Vec<_>, _>(is_device);
    for path in images {
        let lock_file = lock_file::path_of(path);
        let is_ours = is_of(&lock_file, |holder| {
            // What its guest only reads has no epoch, and others may read it, too.
            holder.instance == instance && holder.host == host && !(holder.epoch == 0 && is_read(path))
        });
        if !is_ours && !is_begun(path, &lock_file) {
            tracing::info!(path = %path.display(), "not removed: it is not known as the guest's on this host");
            continue;
        }
        for path in [path, &lock_file, &lock_file::readers_path_of(path)] {
            match fs::remove_file(path) {
                Ok(()) => tracing::info!(path = %path.display(), "removed"),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => tracing::error!(path = %path.display(), %error, "a disk that is no guest's stays"),
            }
        }
    }
    for device in &devices {
        tracing::info!(path = %device.display(), "a block device keeps what is on it");
    }
    devices
}

/// Whether somebody has an image to read.
fn is_read(image: &Path) -> bool {
    File::open(image).is_ok_and(|image| lock_file::lock_on(&image).is_ok_and(|lock| lock == Some(Lock::Shared)))
}

/// Whether an image has no size yet, and beside it is nothing that names anybody: see [`make_image`]. No disk is so small.
fn is_begun(path: &Path, lock_file: &Path) -> bool {
    let is_empty_file = fs::symlink_metadata(path).is_ok_and(|file| file.is_file() && file.len() == 0);
    is_empty_file && !is_of(lock_file, |_| true)
}

fn make_lock_file(image: &Path, holder: &Holder) -> io::Result<()> {
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o644)
        // Whoever may write into the image's folder must not lead us elsewhere.
        .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
        .open(lock_file::path_of(image))?;
    lock_file::write(&file, holder)?;
    // Before the image has its size, whatever becomes of this host.
    file.sync_all()?;
    // The source removes its image once the guest runs here: until then the name of this one must be durable too.
    File::open(image.parent().unwrap_or(image))?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::slice;

    use ferry_proto::agent::v1::DiskSpec;

    use super::*;

    const INSTANCE: Uuid = Uuid::from_u128(1);

    fn spec(path: &Path) -> InstanceSpec {
        InstanceSpec {
            disks: vec![DiskSpec {
                path: path.to_str().unwrap().to_owned(),
                ..DiskSpec::default()
            }],
            ..InstanceSpec::default()
        }
    }

    fn holder() -> Holder {
        Holder {
            host: "b".to_owned(),
            instance: INSTANCE,
            name: "web".to_owned(),
            epoch: 3,
            pid: 1,
        }
    }

    #[test]
    fn room_is_made_without_taking_it_and_removed_with_its_lock_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("web.img");
        let sizes = [DiskSize {
            bytes: 1 << 30,
            ..DiskSize::default()
        }];
        let holder = holder();
        make_room(&spec(&path), &[0], &sizes, true, &holder).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), 1 << 30);
        assert!(fs::metadata(&path).unwrap().blocks() < 100);
        assert!(make_room(&spec(&path), &[0], &sizes, true, &holder).is_err());
        let paths = [path.to_str().unwrap().to_owned()];
        remove(&paths, Uuid::from_u128(2), "b");
        remove(&paths, INSTANCE, "a");
        assert!(path.exists());
        remove(&paths, INSTANCE, "b");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn an_image_without_its_lock_file_is_not_left_behind() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("web.img");
        let sizes = [DiskSize {
            bytes: 1 << 20,
            ..DiskSize::default()
        }];
        fs::create_dir(lock_file::path_of(&path)).unwrap();
        assert!(make_room(&spec(&path), &[0], &sizes, true, &holder()).is_err());
        assert!(!path.exists(), "a later attempt would be refused");
        fs::remove_dir(lock_file::path_of(&path)).unwrap();
        make_room(&spec(&path), &[0], &sizes, true, &holder()).unwrap();
        // Not even a disk of another is touched where one cannot be made.
        assert!(make_room(&spec(&path), &[0], &sizes, true, &holder()).is_err());
        assert_eq!(fs::metadata(&path).unwrap().len(), 1 << 20);
    }

    #[test]
    fn what_an_agent_that_was_killed_had_begun_is_removed_and_no_disk_of_others() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("web.img");
        let paths = [path.to_str().unwrap().to_owned()];
        let image = File::create(&path).unwrap();
        fs::write(lock_file::path_of(&path), b"").unwrap();
        remove(&paths, INSTANCE, "b");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        drop(image);
        // It has a size, or somebody's name beside it.
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        remove(&paths, INSTANCE, "b");
        assert!(path.exists());
        let lock = File::create(lock_file::path_of(&path)).unwrap();
        lock_file::write(&lock, &holder()).unwrap();
        File::create(&path).unwrap();
        remove(&paths, Uuid::from_u128(2), "b");
        assert!(path.exists());
    }

    #[test]
    fn room_is_promised_until_it_is_taken_or_given_back() {
        let folder = tempfile::tempdir().unwrap();
        let needs = Promised {
            device: 1,
            path: folder.path().join("web.img"),
            bytes: 1 << 20,
        };
        let promises = Promises::default();
        let promise = promises.promise(Uuid::from_u128(7), slice::from_ref(&needs), 0);
        let late = promises.promise(Uuid::from_u128(8), slice::from_ref(&needs), 0);
        assert!(late.is_none(), "it knew nothing of the other");
        assert_eq!(promises.all(), slice::from_ref(&needs));
        assert_eq!(needs.outstanding(), 1 << 20);
        fs::write(&needs.path, vec![1; 1 << 19]).unwrap();
        File::open(&needs.path).unwrap().sync_all().unwrap();
        assert!(needs.outstanding() <= 1 << 19);
        drop(promise);
        assert!(promises.all().is_empty());
    }
}
