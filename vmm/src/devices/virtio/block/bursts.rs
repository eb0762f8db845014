//! Many requests at once. Where it matters when one of them is over, a socket is the disk: a read is in flight until the other end gives
//! something, a write is done at once, and what goes there by a call with an offset fails. The ring passes offset 0, which is none.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::super::registers::{offset, status as device_status};
use super::super::testing::Driver;
use super::Block;
use super::tests::{FLUSHES, disk, image, span};
use crate::machine::{DiskAccess, DiskBackend};

pub(super) const READ: u32 = 0;
pub(super) const WRITE: u32 = 1;
pub(super) const FLUSH: u32 = 4;
pub(super) const DISCARD: u32 = 11;

/// A status that no device writes.
pub(super) const OPEN: u8 = 0xaa;

pub(super) fn header(number: u64) -> u64 {
    0x10_0000 + number * 32
}

pub(super) fn status(driver: &Driver, number: u64) -> u8 {
    driver.look(header(number) + 16, 1)[0]
}

/// Where the data of a request is, one sector.
pub(super) fn data(number: u64) -> u64 {
    0x11_0000 + number * 512
}

/// Gives request `number`, whose data is at this address.
fn give_at(driver: &mut Driver, number: u64, kind: u32, sector: u64, address: u64) {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    bytes.push(OPEN);
    driver.put(header(number), &bytes);
    let mut chain = vec![(span(header(number), 16), false)];
    match kind {
        READ => chain.push((span(address, 512), true)),
        WRITE => chain.push((span(address, 512), false)),
        DISCARD => chain.push((span(address, 16), false)),
        _ => {}
    }
    chain.push((span(header(number) + 16, 1), true));
    driver.give(0, &chain);
}

pub(super) fn give(driver: &mut Driver, number: u64, kind: u32, sector: u64) {
    give_at(driver, number, kind, sector, data(number));
}

/// So many answers come.
pub(super) fn answers(driver: &mut Driver, count: u64) {
    for _ in 0..count {
        assert!(driver.used(0).is_some(), "an answer is missing");
    }
}

/// Requests that are all there when the disk looks.
pub(super) fn at_once(driver: &mut Driver, give: impl FnOnce(&mut Driver)) {
    assert!(driver.rest());
    give(driver);
    driver.device.go_on();
}

pub(super) fn on(disk: Box<Block>) -> Driver {
    let mut driver = Driver::new(disk);
    driver.set_up(FLUSHES);
    driver
}

/// A disk of a few sectors whose contents the other end gives and gets.
fn socket_disk() -> (Driver, UnixStream) {
    let (mine, theirs) = UnixStream::pair().expect("pair");
    let backend = DiskBackend {
        file: File::from(OwnedFd::from(mine)),
        access: DiskAccess::ReadWrite,
        serial: String::new(),
        losses: Default::default(),
    };
    let disk = Block::of_size(backend, 64).expect("disk");
    assert!(
        disk.ring.is_some(),
        "this needs a host with io_uring (kernel.io_uring_disabled=0)"
    );
    (on(Box::new(disk)), theirs)
}

/// More than are in flight at once: written together, and read back together.
fn moves_a_full_queue(disk: Box<Block>, file: &File) {
    const COUNT: u64 = 80;
    let mut driver = on(disk);
    for number in 0..COUNT {
        driver.put(data(number), &[number as u8 + 1; 512]);
    }
    at_once(&mut driver, |driver| {
        (0..COUNT).for_each(|number| give(driver, number, WRITE, 2 * number))
    });
    answers(&mut driver, COUNT);
    for number in 0..COUNT {
        let mut found = [0; 512];
        file.read_exact_at(&mut found, 2 * number * 512).expect("file");
        assert_eq!((status(&driver, number), found), (0, [number as u8 + 1; 512]));
        driver.put(data(number), &[0xee; 512]);
    }
    at_once(&mut driver, |driver| {
        (0..COUNT).for_each(|number| give(driver, number, READ, 2 * (COUNT - 1 - number)))
    });
    answers(&mut driver, COUNT);
    for number in 0..COUNT {
        assert_eq!(
            driver.look(data(number), 512),
            [(COUNT - number) as u8; 512],
            "request {number}"
        );
    }
}

#[test]
fn full_queue_goes_to_the_disk_together() {
    let file = image(200);
    moves_a_full_queue(disk(&file, DiskAccess::ReadWrite), &file);
}

#[test]
fn full_queue_goes_one_after_the_other_without_io_uring() {
    let file = image(200);
    let mut disk = disk(&file, DiskAccess::ReadWrite);
    disk.ring = None;
    moves_a_full_queue(disk, &file);
}

#[test]
fn who_is_ready_first_is_answered_first_and_others_come_in_between() {
    let (mut driver, mut theirs) = socket_disk();
    at_once(&mut driver, |driver| {
        give(driver, 0, READ, 0);
        give(driver, 1, WRITE, 0);
    });
    answers(&mut driver, 1);
    assert_eq!((status(&driver, 0), status(&driver, 1)), (OPEN, 0));
    assert!(driver.is_interrupted(), "the guest is told only at the end");
    give(&mut driver, 2, WRITE, 0);
    answers(&mut driver, 1);
    assert_eq!((status(&driver, 0), status(&driver, 2)), (OPEN, 0));
    let mut written = [0; 1024];
    theirs.read_exact(&mut written).expect("what was written");
    theirs.write_all(&[7; 512]).expect("what is awaited");
    answers(&mut driver, 1);
    assert_eq!((status(&driver, 0), driver.look(data(0), 512)), (0, vec![7; 512]));
}

#[test]
fn what_follows_on_the_disk_is_one_transfer_and_each_is_answered() {
    let (mut driver, mut theirs) = socket_disk();
    for number in [0, 1, 2] {
        driver.put(data(number), &[number as u8 + 1; 512]);
    }
    at_once(&mut driver, |driver| {
        (0..3).for_each(|number| give(driver, number, WRITE, number));
        (3..6).for_each(|number| give(driver, number, READ, number - 3));
    });
    answers(&mut driver, 3);
    let mut written = [0; 3 * 512];
    theirs.read_exact(&mut written).expect("what was written");
    assert_eq!(written, *[[1; 512], [2; 512], [3; 512]].as_flattened());
    // By themselves the second and the third would have an offset, which a socket does not take.
    let all = [[4; 512], [5; 512], [6; 512]];
    theirs.write_all(all.as_flattened()).expect("what is awaited");
    answers(&mut driver, 3);
    for number in 3..6 {
        assert_eq!(
            (status(&driver, number), driver.look(data(number), 512)),
            (0, vec![number as u8 + 1; 512])
        );
    }
}

#[test]
fn rest_in_the_middle_waits_for_what_is_in_flight_and_begins_nothing() {
    let (mut driver, mut theirs) = socket_disk();
    at_once(&mut driver, |driver| {
        give(driver, 0, READ, 0);
        give(driver, 1, READ, 0);
        give(driver, 2, WRITE, 0);
    });
    answers(&mut driver, 1);
    assert!(
        !driver.device.rest(Instant::now() + Duration::from_millis(50)),
        "two reads are in flight"
    );
    give(&mut driver, 3, READ, 3);
    theirs.write_all(&[1; 1024]).expect("what is awaited");
    assert!(driver.rest());
    answers(&mut driver, 2);
    assert!(!driver.has_used(0));
    assert_eq!([0, 1, 2, 3].map(|number| status(&driver, number)), [0, 0, 0, OPEN]);

    let file = image(64);
    file.write_all_at(&[3; 512], 3 * 512).expect("file");
    let mut after = driver.moved_to(disk(&file, DiskAccess::ReadWrite));
    assert_eq!(after.device.save().transport, driver.device.save().transport);
    after.device.go_on();
    answers(&mut after, 1);
    assert_eq!((status(&after, 3), after.look(data(3), 512)), (0, vec![3; 512]));
}

#[test]
fn one_of_many_fails_alone() {
    let file = image(8);
    let mut driver = on(disk(&file, DiskAccess::ReadWrite));
    file.set_len(1024).expect("size");
    at_once(&mut driver, |driver| {
        (0..6).for_each(|number| give(driver, number, READ, number))
    });
    answers(&mut driver, 6);
    assert_eq!(
        [0, 1, 2, 3, 4, 5].map(|number| status(&driver, number)),
        [0, 0, 1, 1, 1, 1]
    );
}

#[test]
fn what_needs_the_file_for_itself_waits_for_others_and_holds_up_what_follows() {
    let (mut driver, mut theirs) = socket_disk();
    driver.put(data(2), &[0; 16]);
    at_once(&mut driver, |driver| {
        give(driver, 0, READ, 0);
        give(driver, 1, WRITE, 0);
        give(driver, 2, DISCARD, 0);
        give(driver, 3, WRITE, 1);
    });
    answers(&mut driver, 1);
    assert!(
        !driver.device.rest(Instant::now() + Duration::from_millis(50)),
        "a read is in flight"
    );
    driver.device.go_on();
    assert_eq!(
        [0, 1, 2, 3].map(|number| status(&driver, number)),
        [OPEN, 0, OPEN, OPEN]
    );
    theirs.write_all(&[1; 512]).expect("what is awaited");
    answers(&mut driver, 3);
    assert_eq!(
        (status(&driver, 0), status(&driver, 2)),
        (0, 0),
        "nothing was to be discarded"
    );
}

#[test]
fn single_request_makes_no_detour() {
    let (mut driver, mut theirs) = socket_disk();
    theirs.write_all(&[1; 512]).expect("there at once");
    give(&mut driver, 0, READ, 0);
    answers(&mut driver, 1);
    // The ring would have read it; the call with an offset cannot.
    assert_eq!(status(&driver, 0), 1);
}

#[test]
fn broken_chain_among_others_breaks_the_device_once_those_are_answered() {
    let (mut driver, mut theirs) = socket_disk();
    at_once(&mut driver, |driver| {
        give(driver, 0, READ, 0);
        give(driver, 1, WRITE, 0);
        give_at(driver, 2, READ, 1, 1 << 40);
    });
    answers(&mut driver, 1);
    assert_eq!(
        driver.read(offset::STATUS) & device_status::NEEDS_RESET,
        0,
        "a read is in flight"
    );
    theirs.write_all(&[1; 512]).expect("what is awaited");
    assert!(driver.breaks());
    assert_eq!([0, 1, 2].map(|number| status(&driver, number)), [0, 0, OPEN]);
    driver.set_up(FLUSHES);
    give(&mut driver, 3, 99, 0);
    answers(&mut driver, 1);
    assert_eq!(status(&driver, 3), 2);
}

#[test]
fn buffers_that_direct_io_does_not_take_are_moved_among_others() {
    let path = tempfile::NamedTempFile::new().expect("file");
    path.as_file().write_all_at(&[9; 64 * 512], 0).expect("file");
    let direct = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(path.path());
    // A file system without direct I/O takes any buffer.
    let file = direct.unwrap_or_else(|_| path.reopen().expect("file"));
    let mut driver = on(disk(&file, DiskAccess::ReadWrite));
    driver.put(0x12_0001, &[5; 512]);
    at_once(&mut driver, |driver| {
        (0..4).for_each(|number| give(driver, number, READ, number));
        give_at(driver, 4, READ, 4, 0x11_8003);
        give_at(driver, 5, WRITE, 32, 0x12_0001);
        give(driver, 6, FLUSH, 0);
    });
    answers(&mut driver, 7);
    assert_eq!([0, 1, 2, 3, 4, 5, 6].map(|number| status(&driver, number)), [0; 7]);
    assert_eq!(driver.look(0x11_8003, 512), [9; 512]);
    let mut found = [0; 512];
    path.as_file().read_exact_at(&mut found, 32 * 512).expect("file");
    assert_eq!(found, [5; 512]);
}

#[test]
fn what_is_written_together_is_marked() {
    let file = image(80 * 8);
    let disk = disk(&file, DiskAccess::ReadWrite);
    let written = disk.written();
    written.start();
    let mut driver = on(disk);
    at_once(&mut driver, |driver| {
        (0..70).for_each(|number| give(driver, number, WRITE, number * 8));
    });
    answers(&mut driver, 70);
    assert_eq!(written.take(), [u64::MAX, (1 << 6) - 1]);
    // What goes as one transfer, too.
    at_once(&mut driver, |driver| {
        (0..24).for_each(|number| give(driver, number, WRITE, number));
    });
    answers(&mut driver, 24);
    assert_eq!(written.take(), [7, 0]);
}
