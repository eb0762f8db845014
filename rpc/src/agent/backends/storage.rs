//! What becomes of an instance's disks when it moves here: those that are here already are shared, the others come along.
//!
//! Nova's block migration. Room is made under the same path; whatever goes wrong before the guest is this host's, what was made is removed.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use ferry_proto::agent::v1::{DiskSize, DiskSpec, InstanceSpec};
use ferry_vmm::MachineProfile;
use rustix::fs::OFlags;
use uuid::Uuid;

use super::identity;
use crate::agent::failure::Failure;
use crate::agent::images;
use crate::lock_file::{self, Holder};

/// What a guest counts its disks in.
const SECTOR: u64 = 512;

/// What the user wants of writable disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Storage {
    /// Each disk as it is found: shared if the destination has the very same, else copied.
    Auto,
    /// The destination has them all.
    Shared,
    /// The destination has none of them.
    Copy,
}

impl Storage {
    /// Reads the word of a request; an empty one is that of a source which does not know of it.
    ///
    /// # Errors
    /// It is none of the three.
    pub(crate) fn parse(word: &str) -> Result<Self, String> {
        match word {
            "" | "auto" => Ok(Self::Auto),
            "shared" => Ok(Self::Shared),
            "copy" => Ok(Self::Copy),
            other => Err(format!("{other:?} is not one of auto, shared, copy")),
        }
    }
}

/// Whose disks come, and from where.
#[derive(Clone, Debug)]
pub(crate) struct Coming {
    pub(crate) instance: Uuid,
    /// The source, and the epoch under which it runs there.
    pub(crate) source: String,
    pub(crate) epoch: u64,
    pub(crate) sizes: Vec<DiskSize>,
}

/// Where they come to.
#[derive(Clone, Debug)]
pub(crate) struct Here {
    pub(crate) host: String,
    pub(crate) boot_id: String,
    /// Folders in which disks may lie, if not in all.
    pub(crate) allowed: Option<Vec<PathBuf>>,
}

/// Numbers of the disks that are to be copied here, ascending. Looks only, and changes nothing.
///
/// # Errors
/// Names the disk and why it can neither be shared nor copied.
pub(crate) fn plan(spec: &InstanceSpec, storage: Storage, coming: &Coming, here: &Here) -> Result<Vec<u32>, Failure> {
    let (host, allowed) = (&here.host, here.allowed.as_deref());
    let mut copied = Vec::new();
    for (number, disk) in (0u32..).zip(&spec.disks) {
        let path = Path::new(&disk.path);
        let refused = |problem: String| Failure::Refused(format!("disk {} on host {host}: {problem}", disk.path));
        let unknown = DiskSize::default();
        let size = coming.sizes.get(number as usize).unwrap_or(&unknown);
        if disk.readonly || !is_copied(path, storage, coming, (size, here)).map_err(refused)? {
            if allowed.is_none_or(|allowed| images::check_place(path, allowed).is_ok()) {
                check_holds(image_bytes(path), size).map_err(refused)?;
            }
            continue;
        }
        if let Some(allowed) = allowed {
            let folder = path.parent().unwrap_or(path);
            images::check_place(folder, allowed).map_err(|failure| refused(failure.to_string()))?;
        }
        if is_device(size) {
            return Err(refused(
                "it is not there, and a block device at the source: only files are copied".to_owned(),
            ));
        }
        if size.bytes == 0 {
            return Err(refused(
                "the source does not say how large it is, so it cannot be copied".to_owned(),
            ));
        }
        if size.bytes < size.guest_bytes {
            return Err(refused(format!(
                "it has {} bytes at the source by now, and the guest's disk {}",
                size.bytes, size.guest_bytes
            )));
        }
        check_room(path, size).map_err(refused)?;
        copied.push(number);
    }
    Ok(copied)
}

/// Makes room for the disks that are to be copied: files of the right size, all hole, each with a lock file that says whose it is, under no epoch
/// yet: until its VMM has the guest, nobody may take it for the guest's disk.
///
/// # Errors
/// Names the disk. What was made before it is still there, for [`remove`] to find.
pub(crate) fn make_room(
    spec: &InstanceSpec,
    copied: &[u32],
    sizes: &[DiskSize],
    holder: &Holder,
) -> Result<(), Failure> {
    for &number in copied {
        let Some((disk, size)) = spec.disks.get(number as usize).zip(sizes.get(number as usize)) else {
            continue;
        };
        let made = File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&disk.path)
            .and_then(|file| file.set_len(size.bytes))
            .and_then(|()| make_lock_file(Path::new(&disk.path), holder));
        made.map_err(Failure::host(format!(
            "host {} failed to make room for disk {}",
            holder.host, disk.path
        )))?;
    }
    Ok(())
}

/// Removes images that are not the guest's any more, with their lock files: the half copy of a migration that failed, or the source's
/// after one that did not. Only those whose lock file says that they were this guest's on this host: nothing else is ours to remove, least of all
/// what another host's guest works on under the same path.
pub(crate) fn remove(paths: &[String], instance: Uuid, host: &str) {
    for path in paths.iter().map(Path::new) {
        let lock_file = lock_file::path_of(path);
        let holder = File::open(&lock_file).ok().and_then(|file| lock_file::read(&file));
        if holder.is_none_or(|holder| holder.instance != instance || holder.host != host) {
            tracing::info!(path = %path.display(), "not removed: it is not known as the guest's on this host");
            continue;
        }
        for path in [path, &lock_file] {
            match fs::remove_file(path) {
                Ok(()) => tracing::info!(path = %path.display(), "removed"),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => tracing::error!(path = %path.display(), %error, "a disk that is no guest's stays"),
            }
        }
    }
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
    // The source removes its image once the guest runs here: until then the name of this one must be durable too.
    File::open(image.parent().unwrap_or(image))?.sync_all()
}

/// The sizes of an instance's disks here, whose VMM told this profile of it, or none, in this boot of the host; 0 of one that cannot be looked at.
pub(crate) fn sizes(spec: &InstanceSpec, profile: &[u8], boot_id: &str) -> Vec<DiskSize> {
    let sectors = MachineProfile::from_bytes(profile).map_or_else(|_| Vec::new(), |profile| profile.disk_sectors);
    let size = |(number, disk): (usize, &DiskSpec)| {
        let path = Path::new(&disk.path);
        // A guest that does not run has the disk that it will find.
        let of_guest = sectors.get(number).map(|sectors| sectors.saturating_mul(SECTOR));
        let guest_bytes = of_guest.or_else(|| image_bytes(path)).unwrap_or_default();
        match fs::metadata(path) {
            Ok(metadata) if metadata.is_file() => DiskSize {
                bytes: metadata.len(),
                allocated_bytes: metadata.blocks() * SECTOR,
                guest_bytes,
                ..DiskSize::default()
            },
            // It is shared or refused.
            Ok(metadata) if metadata.file_type().is_block_device() => DiskSize {
                guest_bytes,
                device: identity::of(metadata.rdev()).unwrap_or_default(),
                device_here: identity::here(boot_id, metadata.rdev()),
                ..DiskSize::default()
            },
            _ => DiskSize {
                guest_bytes,
                ..DiskSize::default()
            },
        }
    };
    spec.disks.iter().enumerate().map(size).collect()
}

/// The size of an image or of a block device, which is not opened; none of what is neither, or cannot be looked at.
fn image_bytes(path: &Path) -> Option<u64> {
    let metadata = fs::metadata(path).ok()?;
    if metadata.is_file() {
        return Some(metadata.len());
    }
    if !metadata.file_type().is_block_device() {
        return None;
    }
    let (major, minor) = (rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev()));
    let sectors = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/size")).ok()?;
    sectors.trim().parse::<u64>().ok()?.checked_mul(SECTOR)
}

/// Whether the guest's disk finds room in what is here; larger is an image that grew. What cannot be looked at is left to who opens it.
fn check_holds(here: Option<u64>, size: &DiskSize) -> Result<(), String> {
    let guest = match size.guest_bytes {
        // Of a source before 4.3.
        0 => size.bytes,
        known => known,
    };
    match here {
        Some(here) if here < guest => Err(format!("it has {here} bytes, and the guest's disk {guest}")),
        _ => Ok(()),
    }
}

/// Whether the source has this disk on a block device.
fn is_device(size: &DiskSize) -> bool {
    !size.device_here.is_empty()
}

/// Whether a disk is copied, of which the source tells this, to here.
fn is_copied(path: &Path, storage: Storage, coming: &Coming, (size, here): (&DiskSize, &Here)) -> Result<bool, String> {
    let found = match fs::metadata(path) {
        Ok(metadata) => Some(metadata),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(format!("it cannot be looked at: {error}")),
    };
    match (storage, found) {
        (Storage::Shared, _) => Ok(false),
        (Storage::Auto | Storage::Copy, None) => Ok(true),
        (Storage::Copy, Some(_)) => Err(
            "it is there already, and nothing is written over: remove it, or say --storage shared if it is the same disk".to_owned(),
        ),
        (Storage::Auto, Some(metadata)) if metadata.file_type().is_block_device() => {
            check_same_device(metadata.rdev(), size, &here.boot_id).map(|()| false)
        }
        // Who opens it says what it is.
        (Storage::Auto, Some(metadata)) if !metadata.is_file() => Ok(false),
        (Storage::Auto, Some(_)) if is_device(size) => {
            Err("it is a file, and at the source a block device: say --storage shared if it is the same disk".to_owned())
        }
        (Storage::Auto, Some(_)) => {
            // Whoever sees the lock file that the guest's own VMM has written, under the right that it has now, sees the same disk; what is
            // left of an earlier copy says something else.
            let holder = File::open(lock_file::path_of(path)).ok().and_then(|file| lock_file::read(&file));
            match holder {
                Some(holder)
                    if holder.instance == coming.instance
                        && holder.epoch == coming.epoch
                        && holder.host == coming.source =>
                {
                    Ok(false)
                }
                _ => Err(format!(
                    "it is there, and its lock file does not say that it is the guest's ({}): say --storage shared if it is the same disk, \
                     or remove it",
                    lock_file::path_of(path).display()
                )),
            }
        }
    }
}

/// A path is no reason to take a device for the guest's disk, and nothing beside it says whose it is: the device must say so itself.
fn check_same_device(device: u64, size: &DiskSize, boot_id: &str) -> Result<(), String> {
    // Two agents of one host: the kernel has one device of that number.
    if size.device_here == identity::here(boot_id, device) {
        return Ok(());
    }
    let advice = "say --storage shared if it is the same disk";
    if size.bytes > 0 {
        return Err(format!("it is a block device, and at the source a file: {advice}"));
    }
    match (size.device.as_str(), identity::of(device)) {
        (there, Some(here)) if there == here => Ok(()),
        ("", _) => Err(format!(
            "it is a block device, and the source does not tell which one it has: {advice}"
        )),
        (there, Some(here)) => Err(format!(
            "it is the block device {here}, and at the source it is {there}"
        )),
        (there, None) => Err(format!(
            "it is a block device that does not tell which one it is, and at the source it is {there}: {advice}"
        )),
    }
}

/// Whether what the source's file takes has room; the rest of a sparse one is the guest's to fill, as it was at the source.
fn check_room(path: &Path, size: &DiskSize) -> Result<(), String> {
    let folder = path.parent().unwrap_or(path);
    let stat = rustix::fs::statvfs(folder).map_err(|error| format!("its folder {}: {error}", folder.display()))?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    if size.allocated_bytes > free {
        return Err(format!(
            "it takes {} MiB, and {} MiB are free in {}",
            size.allocated_bytes >> 20,
            free >> 20,
            folder.display()
        ));
    }
    if size.bytes > free {
        tracing::warn!(
            disk = %path.display(),
            bytes = size.bytes,
            free,
            "there is room for what a disk holds now, and not for all that it may hold"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
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

    fn planned(path: &Path, storage: Storage, allocated_bytes: u64) -> Result<Vec<u32>, String> {
        let sizes = [DiskSize {
            bytes: 1 << 20,
            allocated_bytes,
            guest_bytes: 1 << 20,
            ..DiskSize::default()
        }];
        planned_of(path, storage, sizes)
    }

    fn planned_of(path: &Path, storage: Storage, sizes: [DiskSize; 1]) -> Result<Vec<u32>, String> {
        let coming = Coming {
            instance: INSTANCE,
            source: "a".to_owned(),
            epoch: 3,
            sizes: sizes.to_vec(),
        };
        plan(&spec(path), storage, &coming, &here()).map_err(|failure| failure.to_string())
    }

    fn here() -> Here {
        Here {
            host: "b".to_owned(),
            boot_id: "boot-of-b".to_owned(),
            allowed: None,
        }
    }

    #[test]
    fn a_disk_that_is_not_there_comes_along() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("web.img");
        assert_eq!(planned(&path, Storage::Auto, 0), Ok(vec![0]));
        assert_eq!(planned(&path, Storage::Copy, 0), Ok(vec![0]));
        assert_eq!(planned(&path, Storage::Shared, 0), Ok(vec![]));
        assert!(!path.exists());
    }

    #[test]
    fn a_disk_that_is_there_is_shared_only_if_it_is_the_guests() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("web.img");
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        assert!(planned(&path, Storage::Auto, 0).unwrap_err().contains("lock file"));
        assert!(
            planned(&path, Storage::Copy, 0)
                .unwrap_err()
                .contains("nothing is written over")
        );
        let mut holder = Holder {
            host: "a".to_owned(),
            instance: INSTANCE,
            name: "web".to_owned(),
            epoch: 2,
            pid: 1,
        };
        let file = File::create(lock_file::path_of(&path)).unwrap();
        lock_file::write(&file, &holder).unwrap();
        assert!(planned(&path, Storage::Auto, 0).is_err(), "an old copy");
        holder.epoch = 3;
        lock_file::write(&file, &holder).unwrap();
        assert_eq!(planned(&path, Storage::Auto, 0), Ok(vec![]));
        holder.host = "b".to_owned();
        lock_file::write(&file, &holder).unwrap();
        assert!(planned(&path, Storage::Auto, 0).is_err(), "a half copy");
    }

    #[test]
    fn a_device_is_shared_only_if_it_says_that_it_is_the_sources() {
        let device = rustix::fs::makedev(7, 0);
        let told = |device: &str, device_here: &str| DiskSize {
            device: device.to_owned(),
            device_here: device_here.to_owned(),
            ..DiskSize::default()
        };
        let checked = |size: &DiskSize| check_same_device(device, size, "boot-of-b");
        assert_eq!(checked(&told("", "boot-of-b 7:0")), Ok(()), "two agents of one host");
        // A loop device elsewhere, one of another number here, one that can be told from others, one of a source before 4.3, and a file.
        let file = DiskSize {
            bytes: 1 << 20,
            ..DiskSize::default()
        };
        let others = [
            (told("", "boot-of-a 7:0"), "does not tell which"),
            (told("", "boot-of-b 7:1"), "does not tell which"),
            (
                told("naa.5000c50015ea71ac", "boot-of-a 8:0"),
                "at the source it is naa.5000c50015ea71ac",
            ),
            (told("", ""), "does not tell which"),
            (file, "at the source a file"),
        ];
        for (size, why) in others {
            let refused = checked(&size).unwrap_err();
            assert!(
                refused.contains(why) && refused.contains("--storage shared"),
                "{refused}"
            );
        }
    }

    #[test]
    fn a_device_at_the_source_is_no_file_here() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("web.img");
        let device = || DiskSize {
            guest_bytes: 1 << 20,
            device_here: "boot-of-a 7:0".to_owned(),
            ..DiskSize::default()
        };
        for storage in [Storage::Auto, Storage::Copy] {
            let refused = planned_of(&path, storage, [device()]).unwrap_err();
            assert!(refused.contains("only files are copied"), "{refused}");
        }
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        let refused = planned_of(&path, Storage::Auto, [device()]).unwrap_err();
        assert!(refused.contains("at the source a block device"), "{refused}");
        assert_eq!(planned_of(&path, Storage::Shared, [device()]), Ok(vec![]));
    }

    #[test]
    fn a_disk_that_does_not_fit_is_refused_before_anything_moves() {
        let folder = tempfile::tempdir().unwrap();
        let error = planned(&folder.path().join("web.img"), Storage::Copy, 1 << 60).unwrap_err();
        assert!(error.contains("MiB are free"), "{error}");
        let error = planned(Path::new("/nowhere/web.img"), Storage::Copy, 0).unwrap_err();
        assert!(error.contains("/nowhere"), "{error}");
    }

    #[test]
    fn an_image_that_does_not_hold_the_guests_disk_is_refused_with_both_sizes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("web.img");
        let told = |bytes, guest_bytes| {
            [DiskSize {
                bytes,
                guest_bytes,
                ..DiskSize::default()
            }]
        };
        let shrunk = planned_of(&path, Storage::Auto, told(1 << 20, 2 << 20)).unwrap_err();
        assert!(
            shrunk.contains("1048576 bytes at the source") && shrunk.contains("the guest's disk 2097152"),
            "{shrunk}"
        );
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        let shared = |bytes, guest_bytes| planned_of(&path, Storage::Shared, told(bytes, guest_bytes));
        // As large, larger, of a block device at the source, and of a source that tells the image's alone.
        for (bytes, guest_bytes) in [(1 << 20, 1 << 20), (3 << 20, 1 << 19), (0, 1 << 20), (1 << 20, 0)] {
            assert_eq!(shared(bytes, guest_bytes), Ok(vec![]));
        }
        for (bytes, guest_bytes) in [(1 << 20, 2 << 20), (0, 2 << 20), (2 << 20, 0)] {
            let refused = shared(bytes, guest_bytes).unwrap_err();
            assert!(
                refused.contains("1048576 bytes, and the guest's disk 2097152"),
                "{refused}"
            );
        }
    }

    #[test]
    fn what_a_guest_knows_of_its_disk_is_told_beside_the_image() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("web.img");
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        let off = sizes(&spec(&path), &[], "boot");
        assert_eq!((off[0].bytes, off[0].guest_bytes), (1 << 20, 1 << 20));
        let nowhere = spec(Path::new("/nowhere/web.img"));
        assert_eq!(sizes(&nowhere, &[], "boot"), [DiskSize::default()]);
        assert_eq!(image_bytes(folder.path()), None);
    }

    #[test]
    fn room_is_made_without_taking_it_and_removed_with_its_lock_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("web.img");
        let sizes = [DiskSize {
            bytes: 1 << 30,
            ..DiskSize::default()
        }];
        let holder = Holder {
            host: "b".to_owned(),
            instance: INSTANCE,
            name: "web".to_owned(),
            epoch: 3,
            pid: 1,
        };
        make_room(&spec(&path), &[0], &sizes, &holder).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), 1 << 30);
        assert!(fs::metadata(&path).unwrap().blocks() < 100);
        assert!(make_room(&spec(&path), &[0], &sizes, &holder).is_err());
        let paths = [path.to_str().unwrap().to_owned()];
        remove(&paths, Uuid::from_u128(2), "b");
        remove(&paths, INSTANCE, "a");
        assert!(path.exists());
        remove(&paths, INSTANCE, "b");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
