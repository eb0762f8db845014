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
mod tests;
