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
