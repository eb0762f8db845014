//! Disk images and block devices: opened, looked at from outside, and at `run` recognised.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use ferry_proto::agent::v1::DiskSpec;
use rustix::fs::{AtFlags, OFlags, StatxFlags, fcntl_getfl, fcntl_setfl, major, minor, statx};
use rustix::io::Errno;

use super::{Contents, Occasion, Whose};
use crate::agent::images;
use crate::lock_file;

/// The size of a disk is a multiple of this.
const SECTOR: u64 = 512;

/// How images begin that are not raw.
const FORMATS: [(&[u8], &str); 3] = [(b"QFI\xfb", "qcow2"), (b"KDMV", "VMDK"), (b"vhdxfile", "VHDX")];

/// An open disk.
#[derive(Debug)]
pub(super) struct OpenDisk {
    pub(super) image: File,
    /// Beside an image that is a file; of a disk that is only read, only where it is there already.
    pub(super) lock_file: Option<File>,
    /// The same of the file in which those who only read the image leave their names: made for them where that goes.
    pub(super) readers: Option<File>,
    /// The image to be written while it is copied here, if it is only read afterwards.
    pub(super) target: Option<File>,
}

/// Opens a disk: past the page cache where the guest may write it and the file system can do that by sectors, because then what the
/// guest wrote is on the disk and not in this host's memory when the guest leaves.
///
/// # Errors
/// What is wrong with it, in words.
pub(super) fn open(
    disk: &DiskSpec,
    whose: Whose,
    contents: Contents,
    allowed: Option<&[PathBuf]>,
) -> Result<OpenDisk, String> {
    let path = Path::new(&disk.path);
    if let Some(allowed) = allowed {
        images::check_place(path, allowed).map_err(|failure| failure.to_string())?;
    }
    // Before it is opened, which for a device or a FIFO could do something; and again when nobody can exchange it any more.
    let found = fs::metadata(path).map_err(cannot_open)?;
    check_kind(&found)?;
    let further = match contents {
        // What is mounted here, or a part of something, is not written over; nor mounted as long as it is the guest's.
        Contents::Come if found.file_type().is_block_device() => OFlags::EXCL,
        Contents::Come | Contents::AreHere => OFlags::empty(),
    };
    let mut image = open_image(path, disk.readonly, further)?;
    let metadata = image.metadata().map_err(cannot_open)?;
    check_kind(&metadata)?;
    check_size(size(&mut image, &metadata).map_err(cannot_open)?)?;
    if whose.occasion == Occasion::Run {
        check_format(&image)?;
    }
    let (lock_file, readers) = match metadata.is_file() {
        true => (open_lock_file(path, disk.readonly)?, open_readers(path, disk.readonly)),
        false => (None, None),
    };
    if let Some(file) = &lock_file {
        check_epoch(file, whose, &lock_file::path_of(path))?;
    }
    Ok(OpenDisk {
        image,
        lock_file,
        readers,
        target: match contents {
            Contents::Come if disk.readonly => Some(open_target(path)?),
            Contents::Come | Contents::AreHere => None,
        },
    })
}

fn cannot_open(error: io::Error) -> String {
    match error.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            format!("it cannot be opened: {error} (readonly=on opens it for reading only)")
        }
        _ => format!("it cannot be opened: {error}"),
    }
}

fn check_kind(metadata: &Metadata) -> Result<(), String> {
    let kind = metadata.file_type();
    if kind.is_file() || kind.is_block_device() {
        return Ok(());
    }
    let what = match () {
        () if kind.is_dir() => "a directory",
        () if kind.is_fifo() => "a FIFO",
        () if kind.is_socket() => "a socket",
        () => "a character device",
    };
    Err(format!("it is {what}: a disk is a raw image or a block device"))
}

/// Through the page cache, as the guest will read it.
fn open_target(path: &Path) -> Result<File, String> {
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
    let target = File::options()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(path)
        .map_err(cannot_open)?;
    check_kind(&target.metadata().map_err(cannot_open)?)?;
    let flags = fcntl_getfl(&target).map_err(|error| cannot_open(error.into()))?;
    fcntl_setfl(&target, flags - OFlags::NONBLOCK).map_err(|error| cannot_open(error.into()))?;
    Ok(target)
}

fn open_image(path: &Path, readonly: bool, further: OFlags) -> Result<File, String> {
    // A FIFO that took the image's place must not hold the agent up.
    let options = |flags: OFlags| {
        let flags = (flags | further | OFlags::NONBLOCK).bits().cast_signed();
        OpenOptions::new()
            .read(true)
            .write(!readonly)
            .custom_flags(flags)
            .to_owned()
    };
    let image = if readonly {
        options(OFlags::empty()).open(path)
    } else {
        match options(OFlags::DIRECT).open(path) {
            Err(error) if Errno::from_io_error(&error) == Some(Errno::INVAL) => {
                tracing::info!(
                    disk = %path.display(),
                    "its file system has no O_DIRECT: what the guest writes goes through the page cache"
                );
                options(OFlags::empty()).open(path)
            }
            opened => opened,
        }
    }
    .map_err(cannot_open)?;
    let mut flags = fcntl_getfl(&image).map_err(|error| cannot_open(error.into()))?;
    let unit = direct_unit(&image).map_err(cannot_open)?;
    if flags.contains(OFlags::DIRECT) && unit > SECTOR {
        tracing::info!(
            disk = %path.display(),
            unit,
            "without the page cache it takes no single sectors, and guests ask for such: what the guest writes goes through the page cache"
        );
        flags -= OFlags::DIRECT;
    }
    // With io_uring the flag would make requests fail that have to wait.
    fcntl_setfl(&image, flags - OFlags::NONBLOCK).map_err(|error| cannot_open(error.into()))?;
    Ok(image)
}

/// What offset and length of a transfer past the page cache have to be multiples of; [`SECTOR`] where nobody tells.
fn direct_unit(image: &File) -> io::Result<u64> {
    let told = statx(image, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
    // Since Linux 6.1, of some file systems only.
    if let Ok(told) = told
        && StatxFlags::from_bits_retain(told.stx_mask).contains(StatxFlags::DIOALIGN)
        && told.stx_dio_offset_align > 0
    {
        return Ok(told.stx_dio_offset_align.into());
    }
    let metadata = image.metadata()?;
    let device = match metadata.file_type().is_block_device() {
        true => metadata.rdev(),
        false => metadata.dev(),
    };
    Ok(logical_block(Path::new("/sys/dev/block"), device).unwrap_or(SECTOR))
}

/// The least that a block device transfers, by what the kernel tells of devices; none if it is not one of this host.
fn logical_block(devices: &Path, device: u64) -> Option<u64> {
    // Through the link: a partition lies in its disk's folder.
    let folder = fs::canonicalize(devices.join(format!("{}:{}", major(device), minor(device)))).ok()?;
    let told = [folder.as_path(), folder.parent()?]
        .iter()
        .find_map(|folder| fs::read_to_string(folder.join("queue/logical_block_size")).ok())?;
    told.trim().parse().ok()
}

/// The size of an image, or of the medium of a block device.
fn size(image: &mut File, metadata: &Metadata) -> io::Result<u64> {
    if metadata.is_file() {
        return Ok(metadata.len());
    }
    let size = image.seek(SeekFrom::End(0))?;
    image.rewind()?;
    Ok(size)
}

fn check_size(size: u64) -> Result<(), String> {
    match size {
        0 => Err("it is empty: make room first, for example with truncate --size=10G".to_owned()),
        size if !size.is_multiple_of(SECTOR) => Err(format!("its {size} bytes are no multiple of {SECTOR}")),
        _ => Ok(()),
    }
}

fn check_format(image: &File) -> Result<(), String> {
    // Opened again: reading past the page cache would need aligned memory.
    let again = File::open(format!("/proc/self/fd/{}", image.as_raw_fd())).map_err(cannot_open)?;
    let mut begin = [0; 8];
    let count = again
        .read_at(&mut begin, 0)
        .map_err(|error| format!("it cannot be read: {error}"))?;
    match FORMATS.iter().find(|(magic, _)| begin[..count].starts_with(magic)) {
        Some((_, format)) => Err(format!(
            "it is a {format} image, and only raw ones are understood: `qemu-img convert -O raw` makes one of it"
        )),
        None => Ok(()),
    }
}

fn open_lock_file(image: &Path, readonly: bool) -> Result<Option<File>, String> {
    let path = lock_file::path_of(image);
    let mut options = OpenOptions::new();
    // Whoever may write into the image's folder must not lead us elsewhere.
    options
        .read(true)
        .mode(0o644)
        .custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed());
    if !readonly {
        options.write(true).create(true).truncate(false);
    }
    match options.open(&path) {
        Ok(file) => Ok(Some(file)),
        Err(_) if readonly => Ok(None),
        Err(error) => Err(format!("its lock file {} cannot be opened: {error}", path.display())),
    }
}

/// The file with the names of those who read an image. It is for messages: where it cannot be had, the disk can.
fn open_readers(image: &Path, readonly: bool) -> Option<File> {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .mode(0o644)
        .custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed());
    if readonly {
        options.write(true).create(true).truncate(false);
    }
    let file = options.open(lock_file::readers_path_of(image)).ok()?;
    file.metadata().is_ok_and(|metadata| metadata.is_file()).then_some(file)
}

/// A disk that its instance had under an epoch of which this agent has never heard is one that it left: running it here
/// would go back in time.
fn check_epoch(file: &File, whose: Whose, path: &Path) -> Result<(), String> {
    match lock_file::read(file) {
        Some(holder) if holder.instance == whose.instance && holder.epoch > whose.known_epoch => Err(format!(
            "the instance had it under epoch {} on host {}, and here only epoch {} is known: this copy of the instance is stale; \
             if it is the only one that is left, remove {}",
            holder.epoch,
            holder.host,
            whose.known_epoch,
            path.display()
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;
    use uuid::Uuid;

    use super::*;
    use crate::lock_file::Holder;

    const RUN: Whose = Whose {
        instance: Uuid::from_u128(1),
        known_epoch: 3,
        occasion: Occasion::Run,
    };

    /// A folder with an image in it, and the disk that it is.
    fn image(bytes: &[u8], size: u64) -> (TempDir, DiskSpec) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("web.img");
        fs::write(&path, bytes).unwrap();
        File::options().write(true).open(&path).unwrap().set_len(size).unwrap();
        let disk = DiskSpec {
            path: path.to_str().unwrap().to_owned(),
            readonly: false,
            serial: None,
        };
        (folder, disk)
    }

    fn lock_file_of(disk: &DiskSpec) -> PathBuf {
        lock_file::path_of(Path::new(&disk.path))
    }

    #[test]
    fn an_image_is_opened_with_a_lock_file_beside_it() {
        let (_folder, disk) = image(b"", 1 << 20);
        let open = open(&disk, RUN, Contents::AreHere, None).unwrap();
        assert!(open.lock_file.is_some());
        assert!(lock_file_of(&disk).exists());
        assert!(!fcntl_getfl(&open.image).unwrap().contains(OFlags::NONBLOCK));
    }

    #[test]
    fn a_device_tells_the_least_that_it_transfers_and_a_partition_what_its_disk_does() {
        let sys = tempfile::tempdir().unwrap();
        let disk = sys.path().join("nvme0n1");
        fs::create_dir_all(disk.join("queue")).unwrap();
        fs::create_dir(disk.join("nvme0n1p1")).unwrap();
        fs::write(disk.join("queue/logical_block_size"), "4096\n").unwrap();
        std::os::unix::fs::symlink(&disk, sys.path().join("259:0")).unwrap();
        std::os::unix::fs::symlink(disk.join("nvme0n1p1"), sys.path().join("259:1")).unwrap();
        for number in [0, 1] {
            let device = rustix::fs::makedev(259, number);
            assert_eq!(logical_block(sys.path(), device), Some(4096));
        }
        assert_eq!(logical_block(sys.path(), rustix::fs::makedev(259, 2)), None);
    }

    #[test]
    fn a_disk_that_is_only_read_gets_no_lock_file_of_its_own() {
        let (_folder, mut disk) = image(b"", 1 << 20);
        disk.readonly = true;
        assert!(open(&disk, RUN, Contents::AreHere, None).unwrap().lock_file.is_none());
        assert!(!lock_file_of(&disk).exists());
        fs::write(lock_file_of(&disk), b"").unwrap();
        let open = open(&disk, RUN, Contents::AreHere, None).unwrap();
        assert!(open.lock_file.is_some());
        assert!(!fcntl_getfl(&open.image).unwrap().contains(OFlags::DIRECT));
    }

    #[test]
    fn a_disk_that_is_only_read_is_written_while_it_comes() {
        let (_folder, mut disk) = image(b"", 1 << 20);
        assert!(open(&disk, RUN, Contents::Come, None).unwrap().target.is_none());
        disk.readonly = true;
        assert!(open(&disk, RUN, Contents::AreHere, None).unwrap().target.is_none());
        let open = open(&disk, RUN, Contents::Come, None).unwrap();
        open.target.unwrap().write_all_at(b"came", 0).unwrap();
        let mut found = [0; 4];
        open.image.read_exact_at(&mut found, 0).unwrap();
        assert_eq!(&found, b"came");
        assert!(open.image.write_all_at(b"no", 0).is_err());
    }

    #[test]
    fn who_only_reads_a_disk_can_leave_a_name_and_who_writes_finds_it() {
        let (folder, mut disk) = image(b"", 1 << 20);
        assert!(open(&disk, RUN, Contents::AreHere, None).unwrap().readers.is_none());
        disk.readonly = true;
        assert!(open(&disk, RUN, Contents::AreHere, None).unwrap().readers.is_some());
        let readers = folder.path().join("web.img.ferry-readers");
        assert!(readers.exists());
        disk.readonly = false;
        assert!(open(&disk, RUN, Contents::AreHere, None).unwrap().readers.is_some());
        // What is not such a file is no reason to refuse the disk.
        fs::remove_file(&readers).unwrap();
        fs::create_dir(&readers).unwrap();
        disk.readonly = true;
        assert!(open(&disk, RUN, Contents::AreHere, None).unwrap().readers.is_none());
    }

    #[test]
    fn what_cannot_be_a_disk_is_told_by_its_kind() {
        let (folder, disk) = image(b"", 0);
        assert!(open(&disk, RUN, Contents::AreHere, None).unwrap_err().contains("empty"));
        let (_folder, odd) = image(b"", 1000);
        assert!(
            open(&odd, RUN, Contents::AreHere, None)
                .unwrap_err()
                .contains("multiple of 512")
        );

        let named = |path: &str| DiskSpec {
            path: path.to_owned(),
            ..DiskSpec::default()
        };
        let refused = |path: &str| open(&named(path), RUN, Contents::AreHere, None).unwrap_err();
        assert!(refused(folder.path().to_str().unwrap()).contains("a directory"));
        assert!(refused("/dev/null").contains("a character device"));
        assert!(refused("/nowhere/web.img").contains("No such file"));
        let fifo = folder.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        assert!(refused(fifo.to_str().unwrap()).contains("a FIFO"));
    }

    #[test]
    fn images_that_are_not_raw_are_refused_when_an_instance_is_made() {
        let (_folder, disk) = image(b"QFI\xfb\0\0\0\x03", 1 << 20);
        assert!(open(&disk, RUN, Contents::AreHere, None).unwrap_err().contains("qcow2"));
        assert!(!lock_file_of(&disk).exists());
        for occasion in [Occasion::Start, Occasion::Prepare] {
            // By now a guest may have written that itself.
            assert!(open(&disk, Whose { occasion, ..RUN }, Contents::AreHere, None).is_ok());
        }
    }

    #[test]
    fn a_disk_that_the_instance_had_under_a_later_epoch_is_not_run() {
        let (_folder, disk) = image(b"", 1 << 20);
        let later = Holder {
            host: "b".to_owned(),
            instance: RUN.instance,
            name: "web".to_owned(),
            epoch: 4,
            pid: 1,
        };
        let file = File::create(lock_file_of(&disk)).unwrap();
        lock_file::write(&file, &later).unwrap();

        let stale = open(&disk, RUN, Contents::AreHere, None).unwrap_err();
        assert!(
            stale.contains("epoch 4 on host b") && stale.contains("stale"),
            "{stale}"
        );
        let known = Whose { known_epoch: 4, ..RUN };
        assert!(open(&disk, known, Contents::AreHere, None).is_ok());
        let another = Whose {
            instance: Uuid::from_u128(2),
            ..RUN
        };
        assert!(open(&disk, another, Contents::AreHere, None).is_ok());
    }

    #[test]
    fn an_exposed_agent_opens_disks_only_where_it_may() {
        let (folder, disk) = image(b"", 1 << 20);
        assert!(open(&disk, RUN, Contents::AreHere, Some(&[folder.path().to_owned()])).is_ok());
        let elsewhere = open(&disk, RUN, Contents::AreHere, Some(&[PathBuf::from("/boot")])).unwrap_err();
        assert!(elsewhere.contains("--image-dir"), "{elsewhere}");
    }
}
