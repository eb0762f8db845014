//! Which block device is which, over hosts: what a path names on one host may be another disk on the next.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use rustix::fs::{major, minor};

/// Where the kernel tells of block devices, by number.
const BLOCK_DEVICES: &str = "/sys/dev/block";

/// How names begin that are given to one disk in the world (SPC-5, 7.7.6; NVMe 2.0, 4.5). Others are made of what a vendor likes: each
/// QEMU's first disk is `t10.ATA QEMU HARDDISK QM00001`.
const WORLDWIDE: [&str; 3] = ["naa.", "eui.", "uuid."];

/// And those of them that more than one has all the same: assigned by whoever set the host up, tgt's default, some QEMU's.
const COMMON: [&str; 3] = ["naa.3", "naa.6000000", "eui.5254000000"];

/// What the device of this number says it is, the same on each host that has it; none if it says nothing, or nothing that is its own.
/// A loop device has no such name, nor has a virtio disk.
pub(super) fn of(device: u64) -> Option<String> {
    let number = format!("{}:{}", major(device), minor(device));
    // Through the link, for a partition lies in its disk's folder.
    of_folder(&fs::canonicalize(Path::new(BLOCK_DEVICES).join(number)).ok()?)
}

/// What tells a block device from others of this host, as long as that is up.
pub(super) fn here(boot_id: &str, device: u64) -> String {
    format!("{boot_id} {}:{}", major(device), minor(device))
}

fn of_folder(folder: &Path) -> Option<String> {
    if text(folder, "partition").is_some() {
        let (start, size) = (text(folder, "start")?, text(folder, "size")?);
        return Some(format!("{}[{start}+{size}]", of_folder(folder.parent()?)?));
    }
    // Its own name is copied with what it is made of, when a host is cloned: what it lies on must have one too.
    if let Some(name) = text(folder, "dm/uuid") {
        let below = fs::read_dir(folder.join("slaves")).ok()?;
        let below = below.map(|entry| of_folder(&fs::canonicalize(entry.ok()?.path()).ok()?));
        // Several paths to one disk have the same.
        let below = below.collect::<Option<BTreeSet<_>>>()?;
        let below = below.into_iter().collect::<Vec<_>>().join(",");
        return (!below.is_empty()).then(|| format!("{name}({below})"));
    }
    let name = ["wwid", "device/wwid"].iter().find_map(|file| text(folder, file))?;
    is_worldwide(&name).then_some(name)
}

fn is_worldwide(name: &str) -> bool {
    let is_unset = |name: &str| {
        name.split_once('.')
            .is_none_or(|(_, digits)| digits.trim_matches(['0', '-']).is_empty())
    };
    WORLDWIDE.iter().any(|kind| name.starts_with(kind))
        && !COMMON.iter().any(|known| name.starts_with(known))
        && !is_unset(name)
}

fn text(folder: &Path, file: &str) -> Option<String> {
    let text = fs::read_to_string(folder.join(file)).ok()?;
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A device as the kernel shows it.
    fn device(sys: &Path, name: &str, files: &[(&str, &str)]) -> std::path::PathBuf {
        let folder = sys.join(name);
        for (file, text) in files {
            let path = folder.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{text}\n")).unwrap();
        }
        folder
    }

    #[test]
    fn a_disk_is_named_by_what_is_given_to_one_in_the_world() {
        let sys = tempfile::tempdir().unwrap();
        let scsi = device(sys.path(), "sda", &[("device/wwid", "naa.5000c50015ea71ac")]);
        assert_eq!(of_folder(&scsi).as_deref(), Some("naa.5000c50015ea71ac"));
        let nvme = device(
            sys.path(),
            "nvme0n1",
            &[("wwid", "uuid.7a3e5a0c-4f0f-4b4f-93c1-5d2c0b7a9f11")],
        );
        assert!(of_folder(&nvme).is_some());
        for (number, common) in [
            "t10.ATA     QEMU HARDDISK                           QM00001",
            "nvme.1b36-6162-51454d55-00000001",
            "eui.5254000000000001",
            "naa.60000000000000000e00000000010001",
            "naa.3000000000000001",
            "uuid.00000000-0000-0000-0000-000000000000",
        ]
        .iter()
        .enumerate()
        {
            let disk = device(sys.path(), &format!("sd{number}"), &[("device/wwid", common)]);
            assert_eq!(of_folder(&disk), None, "{common}");
        }
        assert_eq!(of_folder(&device(sys.path(), "loop0", &[("size", "8")])), None);
    }

    #[test]
    fn a_partition_is_its_disk_and_where_it_lies() {
        let sys = tempfile::tempdir().unwrap();
        device(sys.path(), "sda", &[("device/wwid", "naa.5000c50015ea71ac")]);
        let files = [("partition", "2"), ("start", "2048"), ("size", "4096")];
        let partition = device(sys.path(), "sda/sda2", &files);
        assert_eq!(
            of_folder(&partition).as_deref(),
            Some("naa.5000c50015ea71ac[2048+4096]")
        );
    }

    #[test]
    fn a_volume_is_no_more_unique_than_what_it_lies_on() {
        let sys = tempfile::tempdir().unwrap();
        let volume = device(sys.path(), "dm-0", &[("dm/uuid", "LVM-abc")]);
        fs::create_dir(volume.join("slaves")).unwrap();
        assert_eq!(of_folder(&volume), None, "it lies on nothing");
        for path in ["sda", "sdb"] {
            let disk = device(sys.path(), path, &[("device/wwid", "naa.5000c50015ea71ac")]);
            symlink(disk, volume.join("slaves").join(path)).unwrap();
        }
        assert_eq!(of_folder(&volume).as_deref(), Some("LVM-abc(naa.5000c50015ea71ac)"));
        let local = device(sys.path(), "vda", &[("size", "8")]);
        symlink(local, volume.join("slaves/vda")).unwrap();
        assert_eq!(of_folder(&volume), None, "a part of it is on a disk without a name");
    }
}
