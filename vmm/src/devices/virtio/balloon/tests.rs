//! The balloon behind its registers and queues.

use std::time::{Duration, Instant};

use super::super::registers::offset;
use super::super::testing::Driver;
use super::{Balloon, BalloonLevel, DEFLATE, INFLATE, feature};
use crate::memory::{FrameRun, Span};

const PAGES: u64 = 0x10_0000;
const LIST: u64 = 0x1000;

/// The queue of reports, of a driver that takes no hints.
const REPORTING: usize = 2;

fn driver() -> Driver {
    let mut driver = Driver::new(Box::<Balloon>::default());
    driver.set_up(feature::REPORTING);
    driver
}

/// Writes something to the pages from `PAGES` on, so that the host backs them.
fn touch(driver: &Driver, pages: u64) {
    (0..pages).for_each(|page| driver.put(PAGES + page * 4096, &[7; 4096]));
    let _ = driver.memory.device_dirty();
}

#[test]
fn reported_pages_are_given_back_and_count_as_written() {
    let mut driver = driver();
    touch(&driver, 16);
    let reported = Span {
        address: PAGES + 100,
        len: 4 * 4096,
    };
    driver.give(REPORTING, &[(reported, true)]);
    assert_eq!(driver.used(REPORTING), Some(0));
    let dirty = driver.memory.device_dirty();
    // Whole pages only.
    assert!(
        dirty.runs().contains(&FrameRun { first: 257, count: 3 }),
        "{:?}",
        dirty.runs()
    );
    assert_eq!(driver.look(PAGES, 4096), [7; 4096]);
    assert_eq!(driver.look(PAGES + 4096, 3 * 4096), [0; 3 * 4096]);
}

#[test]
fn inflated_pages_are_given_back() {
    let mut driver = driver();
    touch(&driver, 4);
    let frames: Vec<u8> = [258u32, 256, 257]
        .iter()
        .flat_map(|frame| frame.to_le_bytes())
        .collect();
    driver.put(LIST, &frames);
    driver.give(INFLATE, &[(Span { address: LIST, len: 12 }, false)]);
    assert_eq!(driver.used(INFLATE), Some(0));
    assert_eq!(driver.look(PAGES, 3 * 4096), [0; 3 * 4096]);
    assert_eq!(driver.look(PAGES + 3 * 4096, 4096), [7; 4096]);
}

#[test]
fn frames_that_are_no_memory_break_the_balloon() {
    let mut driver = driver();
    driver.put(LIST, &u32::MAX.to_le_bytes());
    driver.give(INFLATE, &[(Span { address: LIST, len: 4 }, false)]);
    assert!(driver.breaks());
}

#[test]
fn guest_says_how_much_it_gave_up() {
    let driver = driver();
    driver.write(offset::CONFIG + 4, 77);
    assert_eq!(driver.read(offset::CONFIG + 4), 77);
    driver.write(offset::CONFIG, 5);
    assert_eq!(driver.read(offset::CONFIG), 0);
    assert!(driver.rest());
    let after = driver.moved_to(Box::<Balloon>::default());
    assert_eq!(after.read(offset::CONFIG + 4), 77);
}

/// Asks a machine that runs.
fn wish(driver: &Driver, level: &BalloonLevel, pages: u32) {
    let deadline = Instant::now() + Duration::from_secs(60);
    assert!(driver.device.change_by(deadline, || level.set_wanted(pages)));
}

#[test]
fn guest_is_told_how_much_it_is_to_give_up() {
    let balloon = Box::<Balloon>::default();
    let level = balloon.level();
    let mut driver = Driver::new(balloon);
    wish(&driver, &level, 3);
    assert!(!level.has_driver());
    driver.set_up(0);
    assert!(level.has_driver());
    assert_eq!(driver.read(offset::CONFIG), 3);

    let generation = driver.read(offset::CONFIG_GENERATION);
    wish(&driver, &level, 9);

    assert_eq!(driver.read(offset::CONFIG), 9);
    assert_ne!(driver.read(offset::CONFIG_GENERATION), generation);
    assert_eq!(driver.read(offset::INTERRUPT_STATUS) & 2, 2);
}

/// As a driver does that took DEFLATE_ON_OOM, when its guest is short of memory. When that is, it alone decides.
#[test]
fn a_guest_takes_pages_back_without_being_told_and_the_wish_stays() {
    let balloon = Box::<Balloon>::default();
    let level = balloon.level();
    let mut driver = Driver::new(balloon);
    assert_ne!(driver.read(offset::DEVICE_FEATURES) & feature::DEFLATE_ON_OOM as u32, 0);
    driver.set_up(feature::DEFLATE_ON_OOM);
    wish(&driver, &level, 4);
    touch(&driver, 4);
    let frames: Vec<u8> = (256..260u32).flat_map(u32::to_le_bytes).collect();
    driver.put(LIST, &frames);
    let list = |frames: u32| Span {
        address: LIST,
        len: 4 * frames,
    };
    driver.give(INFLATE, &[(list(4), false)]);
    assert_eq!(driver.used(INFLATE), Some(0));
    driver.write(offset::CONFIG + 4, 4);
    let generation = driver.read(offset::CONFIG_GENERATION);

    driver.give(DEFLATE, &[(list(3), false)]);
    assert_eq!(driver.used(DEFLATE), Some(0));
    driver.write(offset::CONFIG + 4, 1);
    touch(&driver, 3);

    assert_eq!(driver.look(PAGES, 4 * 4096)[..3 * 4096], [7; 3 * 4096]);
    assert_eq!(driver.look(PAGES + 3 * 4096, 4096), [0; 4096]);
    assert_eq!((level.wanted_pages(), level.actual_pages()), (4, 1));
    // Told again, it would give the pages up that it needs.
    assert_eq!(driver.read(offset::CONFIG_GENERATION), generation);
}

#[test]
fn what_is_wanted_survives_a_move_and_a_reset() {
    let balloon = Box::<Balloon>::default();
    let level = balloon.level();
    let mut driver = Driver::new(balloon);
    driver.set_up(0);
    wish(&driver, &level, 9);
    driver.write(offset::CONFIG + 4, 7);
    assert!(driver.rest());

    let other = Box::<Balloon>::default();
    let there = other.level();
    let after = driver.moved_to(other);
    assert_eq!(
        (there.wanted_pages(), there.actual_pages(), there.has_driver()),
        (9, 7, true)
    );

    after.device.reset();
    assert_eq!(
        (there.wanted_pages(), there.actual_pages(), there.has_driver()),
        (9, 0, false)
    );
    assert_eq!(after.read(offset::CONFIG), 9);
}
