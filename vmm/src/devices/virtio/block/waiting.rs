//! Writes that wait because their disk is being copied.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use super::super::registers::offset;
use super::super::testing::Driver;
use super::bursts::{DISCARD, FLUSH, OPEN, READ, WRITE, answers, at_once, data, give, on, status};
use super::tests::{FLUSHES, disk, image};
use super::{Block, WrittenBlocks};
use crate::machine::DiskAccess;

/// Sectors of a block.
const BLOCK: u64 = 8;

/// A disk of 80 blocks of which one may be made dirty until something is sent.
fn copied(file: &File) -> (Box<Block>, WrittenBlocks) {
    let disk = disk(file, DiskAccess::ReadWrite);
    let written = disk.written();
    written.start();
    written.hold_back(Some(1));
    (disk, written)
}

/// Waits until a request waits.
fn is_waited_for(written: &WrittenBlocks) {
    let deadline = Instant::now() + super::holding_back::PATIENCE / 2;
    while written.until().is_none() {
        assert!(Instant::now() < deadline, "nothing waits");
        std::thread::yield_now();
    }
}

fn statuses<const COUNT: usize>(driver: &Driver) -> [u8; COUNT] {
    std::array::from_fn(|number| status(driver, number as u64))
}

/// The second write waits, and with it the flush and the read behind it; what is sent lets them all through, in their order.
fn waits_and_goes_on(disk: Box<Block>, written: &WrittenBlocks) {
    let mut driver = on(disk);
    at_once(&mut driver, |driver| {
        give(driver, 0, WRITE, 0);
        give(driver, 1, WRITE, BLOCK);
        give(driver, 2, FLUSH, 0);
        give(driver, 3, READ, BLOCK);
    });
    answers(&mut driver, 1);
    is_waited_for(written);
    assert_eq!(statuses(&driver), [0, OPEN, OPEN, OPEN]);
    assert!(driver.is_interrupted(), "the guest is told of what is done");
    // There is a link, and nothing of the disk went over it.
    written.sent(0, 0);
    assert!(!driver.has_used(0));
    written.sent(1, 0);
    answers(&mut driver, 3);
    assert_eq!(statuses(&driver), [0; 4]);
    assert_eq!(driver.look(data(3), 512), driver.look(data(1), 512));
    assert_eq!(written.take(), [0b11, 0]);
    assert_eq!(written.waits().count, 1);
}

#[test]
fn a_write_waits_for_what_is_sent_and_what_follows_waits_behind_it() {
    let file = image(80 * BLOCK);
    let (disk, written) = copied(&file);
    waits_and_goes_on(disk, &written);
}

#[test]
fn a_write_waits_without_io_uring_too() {
    let file = image(80 * BLOCK);
    let (mut disk, written) = copied(&file);
    disk.ring = None;
    waits_and_goes_on(disk, &written);
}

#[test]
fn a_block_that_is_dirty_already_is_written_at_once() {
    let file = image(80 * BLOCK);
    let (disk, written) = copied(&file);
    let mut driver = on(disk);
    for number in 0..20 {
        give(&mut driver, number, WRITE, number % BLOCK);
        answers(&mut driver, 1);
    }
    assert_eq!((written.take(), written.waits().count), (vec![1, 0], 0));
}

#[test]
fn a_discard_waits_and_one_that_is_refused_does_not() {
    let file = image(80 * BLOCK);
    let (disk, written) = copied(&file);
    let mut driver = on(disk);
    give(&mut driver, 0, WRITE, 0);
    answers(&mut driver, 1);
    give(&mut driver, 1, WRITE, 80 * BLOCK);
    answers(&mut driver, 1);
    assert_eq!(status(&driver, 1), 1, "it is not on the disk");
    let mut extent = (2 * BLOCK).to_le_bytes().to_vec();
    extent.extend((BLOCK as u32).to_le_bytes());
    extent.extend([0; 4]);
    driver.put(data(2), &extent);
    give(&mut driver, 2, DISCARD, 0);
    is_waited_for(&written);
    assert_eq!(written.take(), [1, 0]);
    answers(&mut driver, 1);
    assert_eq!((status(&driver, 2), written.take()), (0, vec![0b100, 0]));
}

#[test]
fn the_end_of_the_copy_lets_everything_through() {
    let file = image(80 * BLOCK);
    let (disk, written) = copied(&file);
    let mut driver = on(disk);
    at_once(&mut driver, |driver| {
        (0..40).for_each(|number| give(driver, number, WRITE, number * BLOCK));
    });
    is_waited_for(&written);
    written.stop();
    answers(&mut driver, 40);
    assert_eq!(statuses(&driver), [0; 40]);
    assert_eq!(written.waits().count, 1);
}

#[test]
fn a_machine_that_stands_still_has_what_waits_in_its_queue_and_takes_it_along() {
    let file = image(80 * BLOCK);
    let (disk_there, written) = copied(&file);
    let mut driver = on(disk_there);
    for number in 0..3 {
        driver.put(data(number), &[number as u8 + 1; 512]);
    }
    at_once(&mut driver, |driver| {
        (0..3).for_each(|number| give(driver, number, WRITE, number * BLOCK));
    });
    answers(&mut driver, 1);
    is_waited_for(&written);
    assert!(driver.rest(), "nothing is in flight");
    // Not at rest, whatever comes now.
    written.sent(10, 0);
    assert_eq!(statuses(&driver), [0, OPEN, OPEN]);

    let mut after = driver.moved_to(disk(&file, DiskAccess::ReadWrite));
    assert_eq!(after.device.save().transport, driver.device.save().transport);
    after.device.go_on();
    answers(&mut after, 2);
    assert_eq!(statuses(&after), [0; 3]);
    for number in 0..3 {
        let mut found = [0; 512];
        file.read_exact_at(&mut found, number * 4096).expect("file");
        assert_eq!(found, [number as u8 + 1; 512]);
    }
}

#[test]
fn a_switchover_that_is_called_off_goes_on_where_it_was() {
    let file = image(80 * BLOCK);
    let (disk, written) = copied(&file);
    let mut driver = on(disk);
    at_once(&mut driver, |driver| {
        (0..2).for_each(|number| give(driver, number, WRITE, number * BLOCK));
    });
    answers(&mut driver, 1);
    is_waited_for(&written);
    assert!(driver.rest());
    driver.device.go_on();
    assert!(!driver.has_used(0));
    assert_eq!(written.take(), [1, 0]);
    answers(&mut driver, 1);
    assert_eq!(statuses(&driver), [0; 2]);
}

#[test]
fn a_guest_that_resets_its_disk_leaves_nobody_waiting() {
    let file = image(80 * BLOCK);
    let (disk, written) = copied(&file);
    let mut driver = on(disk);
    at_once(&mut driver, |driver| {
        (0..2).for_each(|number| give(driver, number, WRITE, number * BLOCK));
    });
    answers(&mut driver, 1);
    is_waited_for(&written);
    driver.write(offset::STATUS, 0);
    assert_eq!(written.until(), None);
    driver.set_up(FLUSHES);
    give(&mut driver, 3, READ, 0);
    answers(&mut driver, 1);
    assert_eq!(status(&driver, 3), 0);
}
