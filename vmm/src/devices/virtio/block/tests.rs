//! The disk behind its registers and queues, driven as a guest would.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use proptest::prelude::*;

use super::super::registers::{VERSION_1, offset, status};
use super::super::testing::{Driver, NEXT, Raw, WRITE};
use super::bursts::{self, answers, at_once};
use super::{Block, feature};
use crate::machine::{DiskAccess, DiskBackend, Losses};
use crate::memory::Span;

const HEADER: u64 = 0x1000;
const DATA: u64 = 0x2000;
const STATUS: u64 = 0x9000;

/// What a driver takes that flushes.
pub(super) const FLUSHES: u64 = feature::FLUSH;

pub(super) fn image(sectors: u64) -> File {
    let file = tempfile::tempfile().expect("file");
    file.set_len(sectors * 512).expect("size");
    file
}

pub(super) fn disk(file: &File, access: DiskAccess) -> Box<Block> {
    let backend = DiskBackend {
        file: file.try_clone().expect("descriptor"),
        access,
        serial: "serial-of-a-disk-that-is-long".to_owned(),
        losses: Default::default(),
    };
    Box::new(Block::new(backend).expect("disk"))
}

fn driver(file: &File) -> Driver {
    let mut driver = Driver::new(disk(file, DiskAccess::ReadWrite));
    driver.set_up(FLUSHES);
    driver
}

pub(super) fn span(address: u64, len: u32) -> Span {
    Span { address, len }
}

/// Gives a request whose data the device reads or writes.
fn give(driver: &mut Driver, kind: u32, sector: u64, data: &[(Span, bool)]) {
    let mut header = kind.to_le_bytes().to_vec();
    header.extend([0; 4]);
    header.extend(sector.to_le_bytes());
    driver.put(HEADER, &header);
    driver.put(STATUS, &[0xaa]);
    let mut chain = vec![(span(HEADER, 16), false)];
    chain.extend(data);
    chain.push((span(STATUS, 1), true));
    driver.give(0, &chain);
}

/// Gives a request and returns its status and how many bytes were written.
fn ask(driver: &mut Driver, kind: u32, sector: u64, data: &[(Span, bool)]) -> (u8, u32) {
    give(driver, kind, sector, data);
    let written = driver.used(0).expect("an answer");
    (driver.look(STATUS, 1)[0], written)
}

#[test]
fn what_is_written_is_in_the_file_and_read_back() {
    let file = image(64);
    let mut driver = driver(&file);
    driver.put(DATA, &[7; 1024]);
    let halves = [(span(DATA, 100), false), (span(DATA + 100, 924), false)];
    assert_eq!(ask(&mut driver, 1, 3, &halves), (0, 1));
    let mut found = [0; 1024];
    file.read_exact_at(&mut found, 3 * 512).expect("file");
    assert_eq!(found, [7; 1024]);
    assert_eq!(ask(&mut driver, 4, 0, &[]), (0, 1));
    assert_eq!(ask(&mut driver, 0, 3, &[(span(DATA + 4096, 1024), true)]), (0, 1025));
    assert_eq!(driver.look(DATA + 4096, 1024), [7; 1024]);
}

/// The null device takes every write and cannot make one last.
#[test]
fn a_driver_that_does_not_flush_has_each_write_made_to_last() {
    let null = File::options().read(true).write(true).open("/dev/null").expect("null");
    for (features, status) in [(FLUSHES, 0), (0, 1)] {
        let backend = DiskBackend {
            file: null.try_clone().expect("descriptor"),
            access: DiskAccess::ReadWrite,
            serial: String::new(),
            losses: Default::default(),
        };
        let mut driver = Driver::new(Box::new(Block::of_size(backend, 8).expect("disk")));
        driver.set_up(features);
        driver.put(DATA, &[7; 512]);
        assert_eq!(ask(&mut driver, 1, 0, &[(span(DATA, 512), false)]).0, status);
    }
}

#[test]
fn what_is_not_on_the_disk_is_an_io_error() {
    let mut driver = driver(&image(8));
    assert_eq!(ask(&mut driver, 0, 7, &[(span(DATA, 1024), true)]).0, 1);
    assert_eq!(ask(&mut driver, 1, u64::MAX, &[(span(DATA, 512), false)]).0, 1);
    assert_eq!(ask(&mut driver, 0, 0, &[(span(DATA, 100), true)]).0, 1);
    assert_eq!(ask(&mut driver, 99, 0, &[]).0, 2);
}

#[test]
fn image_that_shrank_is_an_io_error_and_nothing_more() {
    let file = image(8);
    let mut driver = driver(&file);
    file.set_len(1024).expect("size");
    assert_eq!(ask(&mut driver, 0, 6, &[(span(DATA, 512), true)]).0, 1);
    assert_eq!(ask(&mut driver, 0, 0, &[(span(DATA, 512), true)]).0, 0);
}

#[test]
fn read_only_disk_is_not_written() {
    let file = image(8);
    let mut driver = Driver::new(disk(&file, DiskAccess::ReadOnly));
    driver.set_up(FLUSHES);
    driver.put(DATA, &[7; 512]);
    assert_eq!(ask(&mut driver, 1, 0, &[(span(DATA, 512), false)]).0, 1);
    assert_eq!(ask(&mut driver, 4, 0, &[]).0, 0);
    let mut found = [1; 512];
    file.read_exact_at(&mut found, 0).expect("file");
    assert_eq!(found, [0; 512]);
}

#[test]
fn serial_number_is_cut_at_twenty_bytes() {
    let mut driver = driver(&image(8));
    assert_eq!(ask(&mut driver, 8, 0, &[(span(DATA, 20), true)]), (0, 21));
    assert_eq!(driver.look(DATA, 20), b"serial-of-a-disk-tha");
}

#[test]
fn discarded_and_zeroed_sectors_read_as_zeroes() {
    let file = image(64);
    file.write_all_at(&[9; 64 * 512], 0).expect("file");
    let mut driver = driver(&file);
    for (kind, sector) in [(11u32, 8u64), (13, 24)] {
        let mut extent = sector.to_le_bytes().to_vec();
        extent.extend(8u32.to_le_bytes());
        extent.extend(0u32.to_le_bytes());
        driver.put(DATA, &extent);
        let (status, _) = ask(&mut driver, kind, 0, &[(span(DATA, 16), false)]);
        let mut found = [1; 8 * 512];
        file.read_exact_at(&mut found, sector * 512).expect("file");
        // A file system may know neither, and then says so.
        assert!(status == 2 || status == 0 && found == [0; 8 * 512], "status {status}");
    }
}

/// Has the next request ask for these extents: first sector, sectors, and that their space may be given back.
fn put_extents(driver: &Driver, extents: &[(u64, u32)]) -> (Span, bool) {
    let bytes: Vec<u8> = extents
        .iter()
        .flat_map(|(sector, count)| [sector.to_le_bytes(), (u64::from(*count) | 1 << 32).to_le_bytes()].concat())
        .collect();
    driver.put(DATA, &bytes);
    (span(DATA, bytes.len() as u32), false)
}

#[test]
fn driver_is_offered_zeroing_by_64_mib_and_discarding_without_limit() {
    let driver = driver(&image(8));
    assert_eq!(
        [36, 40, 48, 52].map(|field| driver.read(offset::CONFIG + field)),
        [u32::MAX, 16, (64 << 20) / 512, 1]
    );
}

/// As a guest may ask for that an earlier build set up.
#[test]
fn more_than_is_offered_is_zeroed_all_the_same() {
    const SECTORS: u64 = (200 << 20) / 512;
    let file = image(SECTORS);
    let places = [0, SECTORS * 512 / 2, (SECTORS - 1) * 512];
    for place in places {
        file.write_all_at(&[9; 512], place).expect("file");
    }
    let disk = disk(&file, DiskAccess::ReadWrite);
    let written = disk.written();
    written.start();
    let mut driver = Driver::new(disk);
    driver.set_up(FLUSHES);
    let half = (SECTORS / 2) as u32;
    let extents = put_extents(&driver, &[(0, half), (SECTORS / 2, half)]);
    assert_eq!(ask(&mut driver, 13, 0, &[extents]), (0, 1));
    for place in places {
        let mut found = [1; 512];
        file.read_exact_at(&mut found, place).expect("file");
        assert_eq!(found, [0; 512]);
    }
    assert_eq!(written.take(), [u64::MAX; (SECTORS / 8 / 64) as usize]);
}

#[test]
fn a_disk_rests_between_two_pieces_and_whoever_goes_on_begins_again() {
    // 65,536 pieces.
    const SECTORS: u64 = (256 << 30) / 512;
    for has_ring in [true, false] {
        let file = image(SECTORS);
        let mut there = disk(&file, DiskAccess::ReadWrite);
        if !has_ring {
            there.ring = None;
        }
        let written = there.written();
        written.start();
        let mut driver = Driver::new(there);
        driver.set_up(FLUSHES);
        let all = (0, SECTORS as u32);
        let extents = put_extents(&driver, &[all; 16]);
        give(&mut driver, 11, 0, &[extents]);
        while written.take().iter().all(|word| *word == 0) {
            assert!(!driver.has_used(0), "it is over before it was seen to begin");
        }
        assert!(driver.rest());
        assert_eq!((driver.has_used(0), driver.look(STATUS, 1)), (false, vec![0xaa]));

        let mut after = driver.moved_to(disk(&file, DiskAccess::ReadWrite));
        assert_eq!(after.device.save().transport, driver.device.save().transport);
        after.device.go_on();
        assert_eq!((after.used(0), after.look(STATUS, 1)), (Some(1), vec![0]));
    }
}

/// A disk of which somebody else finds that what was written back did not reach it.
fn with_losses(features: u64) -> (Driver, Arc<Losses>) {
    let losses = Arc::new(Losses::default());
    let backend = DiskBackend {
        file: image(64),
        access: DiskAccess::ReadWrite,
        serial: String::new(),
        losses: Arc::clone(&losses),
    };
    let mut driver = Driver::new(Box::new(Block::new(backend).expect("disk")));
    driver.set_up(features);
    (driver, losses)
}

fn lose(losses: &Losses) {
    let failed = losses.write_back(|| Err(std::io::ErrorKind::StorageFull.into()));
    failed.expect_err("it fails");
}

#[test]
fn what_was_lost_fails_the_next_flush_and_no_other_request() {
    let (mut driver, losses) = with_losses(FLUSHES);
    assert_eq!(ask(&mut driver, 4, 0, &[]), (0, 1));
    lose(&losses);
    assert_eq!(ask(&mut driver, 0, 0, &[(span(DATA, 512), true)]).0, 0);
    assert_eq!(ask(&mut driver, 1, 0, &[(span(DATA, 512), false)]).0, 0);
    losses.write_back(|| Ok(())).expect_err("nobody was told");
    assert_eq!(ask(&mut driver, 4, 0, &[]), (1, 1));
    assert_eq!(ask(&mut driver, 4, 0, &[]), (0, 1));
    losses.write_back(|| Ok(())).expect("it was told");
}

#[test]
fn what_was_lost_fails_one_flush_among_other_requests() {
    let (mut driver, losses) = with_losses(FLUSHES);
    lose(&losses);
    at_once(&mut driver, |driver| {
        bursts::give(driver, 0, 0, 3);
        bursts::give(driver, 1, 1, 8);
        bursts::give(driver, 2, 4, 0);
    });
    answers(&mut driver, 3);
    assert_eq!([0, 1, 2].map(|number| bursts::status(&driver, number)), [0, 0, 1]);
    assert_eq!(ask(&mut driver, 4, 0, &[]), (0, 1));
}

#[test]
fn what_was_lost_fails_the_next_write_of_a_driver_that_does_not_flush() {
    let (mut driver, losses) = with_losses(0);
    lose(&losses);
    assert_eq!(ask(&mut driver, 1, 0, &[(span(DATA, 512), false)]).0, 1);
    assert_eq!(ask(&mut driver, 1, 0, &[(span(DATA, 512), false)]).0, 0);
}

#[test]
fn capacity_is_told() {
    assert_eq!(driver(&image(4711)).read(offset::CONFIG), 4711);
}

#[test]
fn chain_in_circles_breaks_the_device_until_it_is_reset() {
    let mut driver = driver(&image(8));
    let to_itself = Raw {
        span: span(HEADER, 16),
        flags: NEXT,
        next: 0,
    };
    driver.give_raw(0, &[to_itself]);
    assert!(driver.breaks());
    driver.set_up(FLUSHES);
    assert_eq!(ask(&mut driver, 4, 0, &[]), (0, 1));
}

#[test]
fn buffer_outside_memory_breaks_the_device() {
    let mut driver = driver(&image(8));
    give(&mut driver, 0, 0, &[(span(1 << 40, 512), true)]);
    assert!(driver.breaks());
}

#[test]
fn request_without_room_for_its_status_breaks_the_device() {
    let mut driver = driver(&image(8));
    driver.give(0, &[(span(HEADER, 16), false)]);
    assert!(driver.breaks());
}

#[test]
fn available_index_that_leaps_breaks_the_device() {
    let driver = driver(&image(8));
    driver.set_available(0, 1000);
    assert!(driver.breaks());
}

#[test]
fn resting_disk_leaves_requests_where_they_are_for_whoever_goes_on() {
    let file = image(64);
    let mut before = driver(&file);
    before.put(DATA, &[5; 512]);
    assert_eq!(ask(&mut before, 1, 0, &[(span(DATA, 512), false)]).0, 0);
    assert!(before.rest());
    give(&mut before, 1, 9, &[(span(DATA, 512), false)]);
    assert!(!before.has_used(0));

    let mut after = before.moved_to(disk(&file, DiskAccess::ReadWrite));
    assert_eq!(after.device.save(), before.device.save());
    after.device.go_on();
    assert_eq!(after.used(0), Some(1));
    assert!(!before.has_used(0) || after.look(STATUS, 1) == [0]);
    let mut found = [0; 512];
    file.read_exact_at(&mut found, 9 * 512).expect("file");
    assert_eq!(found, [5; 512]);
}

#[test]
fn smaller_disk_is_not_the_guests() {
    let before = driver(&image(10));
    assert!(before.rest());
    let other = Driver::new(disk(&image(9), DiskAccess::ReadWrite));
    let error = other.device.restore(&before.device.save()).expect_err("another disk");
    assert!(error.to_string().contains("sectors"), "{error}");
    let larger = before.moved_to(disk(&image(11), DiskAccess::ReadWrite));
    assert_eq!(larger.read(offset::CONFIG), 10);
}

#[test]
fn queues_that_cannot_be_break_the_device_and_the_driver_is_told() {
    let driver = Driver::new(disk(&image(8), DiskAccess::ReadWrite));
    driver.write(offset::STATUS, 3);
    driver.write(offset::DRIVER_FEATURES_SELECT, 1);
    driver.write(offset::DRIVER_FEATURES, (VERSION_1 >> 32) as u32);
    driver.write(offset::STATUS, 3 | status::FEATURES_OK);
    driver.write(offset::QUEUE_SIZE, 16);
    // Far beyond the memory.
    driver.write(offset::QUEUE_DESCRIPTORS + 4, 1);
    driver.write(offset::QUEUE_READY, 1);
    assert_eq!(driver.read(offset::INTERRUPT_STATUS), 0);
    driver.write(offset::STATUS, 3 | status::FEATURES_OK | status::DRIVER_OK);
    assert_ne!(driver.read(offset::STATUS) & status::NEEDS_RESET, 0);
    assert_eq!(driver.read(offset::INTERRUPT_STATUS), 2, "the configuration changed");
    driver.write(offset::STATUS, 0);
    assert_eq!(
        (driver.read(offset::STATUS), driver.read(offset::INTERRUPT_STATUS)),
        (0, 0)
    );
}

#[test]
fn rings_that_overlap_never_end_and_still_let_the_disk_rest() {
    let mut driver = driver(&image(8));
    // The used ring is the available one: each answer looks like another request.
    driver.lay_used_over_available();
    give(&mut driver, 4, 0, &[]);
    assert!(driver.rest());
    driver.device.reset();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    /// Whatever a guest writes into the ring: the device answers or breaks, and can be reset and used afterwards.
    #[test]
    fn no_descriptor_harms_the_host(
        raw in prop::collection::vec((any::<u16>(), 0u64..0x40_0000, 0u32..0x3000, any::<u16>()), 1..6),
        header in any::<[u8; 16]>(),
    ) {
        let file = image(8);
        let mut driver = driver(&file);
        driver.put(HEADER, &header);
        let descriptors: Vec<Raw> = raw
            .into_iter()
            .map(|(next, address, len, flags)| Raw {
                span: span(if flags & 0x100 == 0 { HEADER } else { address }, len),
                flags: flags & (NEXT | WRITE | 4),
                next: next % 8,
            })
            .collect();
        driver.give_raw(0, &descriptors);
        prop_assert!(driver.rest());
        driver.set_up(FLUSHES);
        prop_assert_eq!(driver.read(offset::STATUS) & 64, 0);
    }
}
