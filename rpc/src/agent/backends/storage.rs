//! What becomes of an instance's disks when it moves here: those that are here already are shared, the others come along.
//!
//! Nova's block migration. Room is made under the same path; whatever goes wrong before the guest is this host's, what was made is removed.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use ferry_proto::agent::v1::{DiskSize, DiskSpec, InstanceSpec};
use ferry_vmm::MachineProfile;
use rustix::fs::OFlags;
use rustix::io::Errno;
use uuid::Uuid;

use super::identity;
use super::room::{self, Promised};
use crate::agent::failure::Failure;
use crate::agent::images;
use crate::lock_file;

/// What a guest counts its disks in.
const SECTOR: u64 = 512;

/// What the user wants of disks. One that is only read and is there is taken as it is, whatever is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Storage {
    /// Each disk as it is found: shared if the destination has the very same, else copied.
    Auto,
    /// The destination has them all.
    Shared,
    /// The destination has none of them, or has block devices whose contents are of no more use.
    Copy,
}

/// What becomes of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// It is here.
    Shared,
    /// A file is made for what comes.
    Made,
    /// What comes is written over a block device that is here.
    WrittenOver,
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
    /// They may have room for what they hold now only; a guest that fills them may find the host's disk full.
    pub(crate) may_over_commit: bool,
}

/// Where they come to.
#[derive(Clone, Debug)]
pub(crate) struct Here {
    pub(crate) host: String,
    pub(crate) boot_id: String,
    /// Folders in which disks may lie, if not in all.
    pub(crate) allowed: Option<Vec<PathBuf>>,
    /// What other disks that are copied here were promised.
    pub(crate) promised: Vec<Promised>,
}

/// Disks that are to be copied here.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    /// Their numbers, ascending.
    pub(crate) copied: Vec<u32>,
    /// What those of them need that are files.
    pub(crate) needs: Vec<Promised>,
}

/// What becomes of each disk here. Looks only, and changes nothing.
///
/// # Errors
/// Names the disk and why it can neither be shared nor copied.
pub(crate) fn plan(spec: &InstanceSpec, storage: Storage, coming: &Coming, here: &Here) -> Result<Plan, Failure> {
    let (host, allowed) = (&here.host, here.allowed.as_deref());
    let mut plan = Plan::default();
    for (number, disk) in (0u32..).zip(&spec.disks) {
        let path = Path::new(&disk.path);
        let refused = |problem: String| Failure::Refused(format!("disk {} on host {host}: {problem}", disk.path));
        let unknown = DiskSize::default();
        let size = coming.sizes.get(number as usize).unwrap_or(&unknown);
        let fate = fate(disk, storage, coming, (size, here)).map_err(refused)?;
        if fate == Fate::Shared {
            if allowed.is_none_or(|allowed| images::check_place(path, allowed).is_ok()) {
                check_holds(image_bytes(path), size).map_err(refused)?;
            }
            continue;
        }
        if let Some(allowed) = allowed {
            let place = match fate {
                Fate::WrittenOver => path,
                Fate::Shared | Fate::Made => path.parent().unwrap_or(path),
            };
            images::check_place(place, allowed).map_err(|failure| refused(failure.to_string()))?;
        }
        if fate == Fate::WrittenOver {
            check_writes_over(path, size).map_err(refused)?;
            plan.copied.push(number);
            continue;
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
        let others = here.promised.iter().chain(&plan.needs);
        let needs = room::check(path, size, coming.may_over_commit, others).map_err(refused)?;
        plan.needs.push(needs);
        plan.copied.push(number);
    }
    Ok(plan)
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
pub(super) fn is_device(size: &DiskSize) -> bool {
    !size.device_here.is_empty()
}

/// How much there is of a disk to be copied, at most.
pub(crate) fn bytes_to_copy(size: &DiskSize) -> u64 {
    if is_device(size) {
        size.guest_bytes
    } else {
        size.allocated_bytes
    }
}

/// Of disks that are copied, the size that both ends go by where a host's own may be another: of a block device what the guest knows; else 0.
pub(crate) fn copied_bytes(copied: &[u32], sizes: &[DiskSize]) -> Vec<u64> {
    let bytes = |&number: &u32| {
        let size = sizes.get(number as usize).filter(|size| is_device(size));
        size.map_or(0, |size| size.guest_bytes)
    };
    copied.iter().map(bytes).collect()
}

/// What is found under a disk's path.
fn look(path: &Path) -> Result<Option<Metadata>, String> {
    match fs::metadata(path) {
        Ok(metadata) => Ok(Some(metadata)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(format!("it cannot be looked at: {error}")),
    }
}

/// What becomes of a disk here, of which the source tells this.
fn fate(disk: &DiskSpec, storage: Storage, coming: &Coming, (size, here): (&DiskSize, &Here)) -> Result<Fate, String> {
    let path = Path::new(&disk.path);
    match (storage, look(path)?) {
        (Storage::Shared, _) => Ok(Fate::Shared),
        (Storage::Auto | Storage::Copy, None) if is_device(size) => Err(
            "it is not there, and a block device at the source: what is on one is copied onto a block device of that name only".to_owned(),
        ),
        // A source before 4.3 does not give it: who opens it says that it is missing.
        (Storage::Auto | Storage::Copy, None) if disk.readonly && size.guest_bytes == 0 => Ok(Fate::Shared),
        (Storage::Auto | Storage::Copy, None) => Ok(Fate::Made),
        // Any number of guests may read it, and other hosts have it for that.
        (Storage::Auto | Storage::Copy, Some(_)) if disk.readonly => Ok(Fate::Shared),
        (Storage::Copy, Some(found)) if found.file_type().is_block_device() && is_device(size) => {
            check_other_device(found.rdev(), size, &here.boot_id).map(|()| Fate::WrittenOver)
        }
        (Storage::Copy, Some(_)) => Err(
            "it is there already, and nothing is written over: remove it, or say --storage shared if it is the same disk".to_owned(),
        ),
        (Storage::Auto, Some(metadata)) if metadata.file_type().is_block_device() => {
            check_same_device(metadata.rdev(), size, &here.boot_id).map(|()| Fate::Shared)
        }
        // Who opens it says what it is.
        (Storage::Auto, Some(metadata)) if !metadata.is_file() => Ok(Fate::Shared),
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
                    Ok(Fate::Shared)
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

/// Its guest writes to a device at the source while its contents are copied: onto itself they must not be.
fn check_other_device(device: u64, size: &DiskSize, boot_id: &str) -> Result<(), String> {
    let is_same = size.device_here == identity::here(boot_id, device)
        || !size.device.is_empty() && identity::of(device).as_ref() == Some(&size.device);
    match is_same {
        true => Err("it is there already, the very block device that the guest has: say --storage shared".to_owned()),
        false => Ok(()),
    }
}

/// Whether a block device can have its contents written over with those of the guest's disk: it is large enough, and nobody uses it. Nothing is
/// changed, and nothing kept from being changed after.
fn check_writes_over(path: &Path, size: &DiskSize) -> Result<(), String> {
    if size.guest_bytes == 0 {
        return Err("the source does not say how large it is, so it cannot be copied".to_owned());
    }
    check_holds(image_bytes(path), size)?;
    // The kernel's own users (a file system, a volume above it, swap) have a device for themselves.
    let flags = (OFlags::EXCL | OFlags::NONBLOCK).bits().cast_signed();
    let device = File::options().read(true).custom_flags(flags).open(path);
    let device = device.map_err(|error| match Errno::from_io_error(&error) {
        Some(Errno::BUSY) => {
            "it is in use on this host (mounted, a part of another device, or swap): nothing is written over".to_owned()
        }
        _ => format!("it cannot be opened: {error}"),
    })?;
    match lock_file::lock_on(&device) {
        Ok(None) => Ok(()),
        Ok(Some(_)) => {
            Err("it is locked by another guest's VMM (`lslocks` finds it): nothing is written over".to_owned())
        }
        Err(error) => Err(format!("whether it is locked cannot be told: {error}")),
    }
}

/// A path is no reason to take a device for the guest's disk, and nothing beside it says whose it is: the device must say so itself.
fn check_same_device(device: u64, size: &DiskSize, boot_id: &str) -> Result<(), String> {
    // Two agents of one host: the kernel has one device of that number.
    if size.device_here == identity::here(boot_id, device) {
        return Ok(());
    }
    if size.bytes > 0 {
        return Err(
            "it is a block device, and at the source a file: say --storage shared if it is the same disk".to_owned(),
        );
    }
    let advice = "say --storage shared if it is the same disk, or --storage copy to have it written over";
    match (size.device.as_str(), identity::of(device)) {
        (there, Some(here)) if there == here => Ok(()),
        ("", _) => Err(format!(
            "it is a block device, and the source does not tell which one it has: {advice}"
        )),
        (there, Some(here)) => Err(format!(
            "it is the block device {here}, and at the source it is {there}: say --storage copy to have it written over"
        )),
        (there, None) => Err(format!(
            "it is a block device that does not tell which one it is, and at the source it is {there}: {advice}"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lock_file::Holder;

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
            may_over_commit: true,
        };
        let plan = plan(&spec(path), storage, &coming, &here());
        plan.map(|plan| plan.copied).map_err(|failure| failure.to_string())
    }

    fn here() -> Here {
        Here {
            host: "b".to_owned(),
            boot_id: "boot-of-b".to_owned(),
            allowed: None,
            promised: Vec::new(),
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
            assert!(refused.contains("onto a block device"), "{refused}");
        }
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        let refused = planned_of(&path, Storage::Auto, [device()]).unwrap_err();
        assert!(refused.contains("at the source a block device"), "{refused}");
        assert_eq!(planned_of(&path, Storage::Shared, [device()]), Ok(vec![]));
    }

    #[test]
    fn a_disk_that_is_only_read_comes_along_where_it_is_not_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("web.img");
        let mut spec = spec(&path);
        spec.disks[0].readonly = true;
        let size = DiskSize {
            bytes: 1 << 20,
            guest_bytes: 1 << 20,
            ..DiskSize::default()
        };
        let coming = Coming {
            instance: INSTANCE,
            source: "a".to_owned(),
            epoch: 3,
            sizes: vec![size],
            may_over_commit: true,
        };
        let copied = |storage| plan(&spec, storage, &coming, &here()).unwrap().copied;
        assert_eq!([Storage::Auto, Storage::Copy].map(copied), [[0], [0]]);
        assert!(copied(Storage::Shared).is_empty());
        let mut before = coming.clone();
        before.sizes[0].guest_bytes = 0;
        assert!(plan(&spec, Storage::Auto, &before, &here()).unwrap().copied.is_empty());
        // Whatever names it: others may read it, too.
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        assert_eq!([Storage::Auto, Storage::Copy].map(copied), [[0; 0], []]);
    }

    #[test]
    fn a_device_is_not_copied_onto_itself() {
        let device = rustix::fs::makedev(7, 0);
        let told = |device_here: &str| DiskSize {
            device_here: device_here.to_owned(),
            ..DiskSize::default()
        };
        assert!(check_other_device(device, &told("boot-of-b 7:0"), "boot-of-b").is_err());
        assert_eq!(check_other_device(device, &told("boot-of-b 7:1"), "boot-of-b"), Ok(()));
        assert_eq!(check_other_device(device, &told("boot-of-a 7:0"), "boot-of-b"), Ok(()));
    }

    #[test]
    fn both_ends_go_by_the_guests_size_of_a_device() {
        let device = DiskSize {
            guest_bytes: 512,
            device_here: "boot 7:0".to_owned(),
            ..DiskSize::default()
        };
        let file = DiskSize {
            bytes: 4096,
            guest_bytes: 512,
            ..DiskSize::default()
        };
        assert_eq!(
            copied_bytes(&[0, 2, 9], &[device.clone(), file.clone(), file]),
            [512, 0, 0]
        );
        assert_eq!(bytes_to_copy(&device), 512);
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
    fn disks_that_do_not_fit_together_are_refused_together() {
        let folder = tempfile::tempdir().unwrap();
        let stat = rustix::fs::statvfs(folder.path()).unwrap();
        // Two thirds of what is free fit once.
        let size = DiskSize {
            bytes: 1 << 50,
            allocated_bytes: stat.f_bavail * stat.f_frsize / 3 * 2,
            ..DiskSize::default()
        };
        let disks = ["one.img", "two.img"].map(|name| folder.path().join(name));
        let both = InstanceSpec {
            disks: disks.iter().flat_map(|path| spec(path).disks).collect(),
            ..InstanceSpec::default()
        };
        let coming = Coming {
            instance: INSTANCE,
            source: "a".to_owned(),
            epoch: 3,
            sizes: vec![size.clone(), size],
            may_over_commit: true,
        };
        let first = plan(&spec(&disks[0]), Storage::Auto, &coming, &here()).unwrap();
        assert_eq!(first.copied, [0]);
        let refused = plan(&both, Storage::Auto, &coming, &here()).unwrap_err().to_string();
        assert!(refused.contains("two.img") && refused.contains("promised"), "{refused}");
        // And the disk of another guest, which is still on its way.
        let crowded = Here {
            promised: first.needs,
            ..here()
        };
        let refused = plan(&spec(&disks[1]), Storage::Auto, &coming, &crowded)
            .unwrap_err()
            .to_string();
        assert!(refused.contains("promised"), "{refused}");
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
}
