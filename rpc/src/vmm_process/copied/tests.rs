use std::os::unix::net::UnixStream;

use super::*;

fn disk(bytes: u64) -> CopiedDisk {
    let file = tempfile::tempfile().unwrap();
    file.set_len(bytes).unwrap();
    CopiedDisk::new(Arc::new(file), "/srv/web.img", 1, None).unwrap()
}

fn run(first: u64, count: u64) -> FrameRun {
    FrameRun {
        first: FIRST_FRAME + DISK_FRAMES + first,
        count,
    }
}

#[test]
fn blocks_are_frames_that_no_memory_has() {
    let disk = disk(10 * 4096 + 512);
    assert_eq!(disk.region().run(), run(0, 11));
    assert!(disk.holds(run(10, 1)) && !disk.holds(run(10, 2)));
    assert!(CopiedDisk::is_disk(run(0, 1)));
    assert!(!CopiedDisk::is_disk(FrameRun {
        first: 1 << 30,
        count: 1
    }));
}

#[test]
fn holes_are_no_extents() {
    let disk = disk(64 << 20);
    assert_eq!(disk.extents(disk.region().run()).unwrap(), []);
    disk.image.write_all_at(&[1; 4096], 8 << 20).unwrap();
    let extents = disk.extents(disk.region().run()).unwrap();
    assert!(
        extents
            .iter()
            .any(|extent| extent.first <= run(2048, 1).first && extent.end() > run(2048, 1).first)
    );
    assert!(extents.iter().map(|extent| extent.count).sum::<u64>() < 1024);
    disk.write_zeroes(run(2048, 1)).unwrap();
    let mut found = [1; 4096];
    disk.image.read_exact_at(&mut found, 8 << 20).unwrap();
    assert_eq!(found, [0; 4096]);
}

#[test]
fn zeroes_of_a_device_are_found_by_reading() {
    let device = CopiedDisk {
        is_device: true,
        ..disk(600 * 4096 + 512)
    };
    device.image.write_all_at(&[7; 4096], 3 * 4096).unwrap();
    device.image.write_all_at(&[0; 4096], 511 * 4096).unwrap();
    device.image.write_all_at(&[7], 512 * 4096 + 4095).unwrap();
    let zeroes = |of: FrameRun| {
        let mut found = Vec::new();
        device.zero_runs(of, &mut found).unwrap();
        found
    };
    assert_eq!(zeroes(device.region().run()), [run(0, 3), run(4, 508), run(513, 88)]);
    assert_eq!(zeroes(run(3, 1)), []);
    assert_eq!(zeroes(run(600, 1)), [run(600, 1)]);
    assert!(!device.is_blank() && disk(4096).is_blank());
}

#[test]
fn a_disk_is_as_large_as_its_guest_knows_it() {
    let image = || {
        let file = tempfile::tempfile().unwrap();
        file.set_len(3 * 4096).unwrap();
        Arc::new(file)
    };
    let part = CopiedDisk::new(image(), "/dev/web", 0, Some(4096 + 512)).unwrap();
    assert_eq!((part.region().frames, part.bytes), (2, 4096 + 512));
    let error = CopiedDisk::new(image(), "/dev/web", 0, Some(4 * 4096))
        .unwrap_err()
        .to_string();
    assert_eq!(error, "it has 12288 bytes, and the guest's disk 16384");
}

#[test]
fn what_is_sent_arrives_with_the_odd_end() {
    let (from, to) = (disk(300 * 4096 + 512), disk(300 * 4096 + 512));
    from.image.write_all_at(&[7; 4096], 299 * 4096).unwrap();
    from.image.write_all_at(&[8; 512], 300 * 4096).unwrap();
    let (mine, theirs) = UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| from.send(mine.as_fd(), run(0, 301)).unwrap());
        to.receive(theirs.as_fd(), run(0, 301)).unwrap();
    });
    assert_eq!(from.digest(run(0, 301)).unwrap(), to.digest(run(0, 301)).unwrap());
    let blocks = |disk: &CopiedDisk| {
        let mut digests = Vec::new();
        disk.block_digests(run(298, 3), &mut digests).unwrap();
        digests
    };
    let odd_end = [[8; 512].as_slice(), &[0; 3584]].concat();
    assert_eq!(blocks(&to), [[0; 4096].as_slice(), &[7; 4096], &odd_end].map(xxh3_64));
    assert_eq!(blocks(&from), blocks(&to));
    assert_eq!(to.image.metadata().unwrap().len(), 300 * 4096 + 512);
    to.sync().unwrap();
}

#[test]
fn a_disk_that_fails_says_which_it_is_and_why() {
    let (mine, theirs) = UnixStream::pair().unwrap();
    let shrunk = disk(2 * 4096);
    shrunk.image.set_len(4096).unwrap();
    let error = shrunk.zero_runs(run(1, 1), &mut Vec::new()).unwrap_err();
    let told = crate::error_chain(&error);
    assert_eq!(
        told,
        "failed to look for data on disk /srv/web.img: it has become smaller"
    );
    let error = shrunk.send(mine.as_fd(), run(0, 2)).unwrap_err();
    let told = crate::error_chain(&error);
    assert_eq!(told, "failed to read disk /srv/web.img: it has become smaller");
    let full = CopiedDisk {
        image: Arc::new(File::options().read(true).write(true).open("/dev/full").unwrap()),
        ..disk(4096)
    };
    rustix::io::write(&mine, &[7; 4096]).unwrap();
    let error = full.receive(theirs.as_fd(), run(0, 1)).unwrap_err();
    let told = crate::error_chain(&error);
    assert!(
        told.starts_with("failed to write disk /srv/web.img: No space left"),
        "{told}"
    );
    assert!(error.downcast::<GuestError>().is_ok());
    // A connection that ends is none of a disk's doing.
    drop(mine);
    let error = full.receive(theirs.as_fd(), run(0, 1)).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
}

#[test]
fn what_is_read_is_written_elsewhere_with_the_odd_end() {
    let (from, to) = (disk(300 * 4096 + 512), disk(300 * 4096 + 512));
    from.image.write_all_at(&[7; 4096], 299 * 4096).unwrap();
    from.image.write_all_at(&[8; 512], 300 * 4096).unwrap();
    let mut bytes = vec![1; 301 * 4096];
    from.read(run(0, 301), &mut bytes).unwrap();
    assert_eq!(bytes[300 * 4096 + 512..], [0; 3584]);
    to.write(run(0, 301), &bytes).unwrap();
    assert_eq!(from.digest(run(0, 301)).unwrap(), to.digest(run(0, 301)).unwrap());
    assert_eq!(to.image.metadata().unwrap().len(), 300 * 4096 + 512);
    assert!(from.read(run(0, 301), &mut bytes[..4096]).is_err());
    assert!(to.write(run(0, 301), &bytes[..4096]).is_err());
}
