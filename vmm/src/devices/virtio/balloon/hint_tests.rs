//! Free page hints, asked for and given, by drivers sound and not.

use super::super::registers::offset;
use super::super::testing::Driver;
use super::{Balloon, FreePageHints, HintDesk, feature};
use crate::memory::{FrameRun, Span};

const FEATURES: u64 = feature::FREE_PAGE_HINT | feature::REPORTING;
/// The queue of hints as Linux numbers it.
const HINTS: usize = 2;
const COMMAND: u64 = offset::CONFIG + 8;
const STOP: u32 = 0;
const DONE: u32 = 1;
/// Where commands are, and pages.
const AT: u64 = 0x1000;
const PAGES: u64 = 0x10_0000;

fn run(first: u64, count: u64) -> FrameRun {
    FrameRun { first, count }
}

struct Asked {
    driver: Driver,
    desk: HintDesk,
}

impl Asked {
    fn new(features: u64, queues: &[usize]) -> Self {
        let balloon = Box::<Balloon>::default();
        let desk = balloon.hints();
        let mut driver = Driver::new(balloon);
        driver.set_up_queues(features, queues);
        Self { driver, desk }
    }

    fn linux() -> Self {
        Self::new(FEATURES, &[0, 1, 2, 3])
    }

    /// Asks, and waits until the driver can read this id.
    fn ask(&self, id: u32) -> FreePageHints {
        let hints = self.desk.ask();
        self.driver.device.look();
        assert!(self.driver.comes_to_read(COMMAND, id), "{}", self.driver.read(COMMAND));
        hints
    }

    fn end(&self) {
        self.desk.end();
        self.driver.device.look();
        assert!(self.driver.comes_to_read(COMMAND, DONE));
    }

    /// The driver gives a command, and waits until it is back.
    fn says(&mut self, queue: usize, command: u32) {
        self.driver.put(AT, &command.to_le_bytes());
        self.driver.give(queue, &[(Span { address: AT, len: 4 }, false)]);
        assert_eq!(self.driver.used(queue), Some(0));
    }

    /// The driver names pages from `PAGES` on, and waits until they are back.
    fn names(&mut self, queue: usize, pages: u32) {
        self.puts(queue, pages);
        assert_eq!(self.driver.used(queue), Some(0));
    }

    fn puts(&mut self, queue: usize, pages: u32) {
        let named = Span {
            address: PAGES,
            len: pages * 4096,
        };
        self.driver.give(queue, &[(named, true)]);
    }
}

fn taken(hints: &FreePageHints) -> Vec<FrameRun> {
    let mut runs = Vec::new();
    hints.take(&mut runs);
    runs
}

#[test]
fn pages_that_are_named_under_the_id_are_told_and_stay_as_they_are() {
    let mut asked = Asked::linux();
    asked.driver.put(PAGES, &[7; 4096]);
    assert_eq!(asked.driver.read(COMMAND), STOP);
    let hints = asked.ask(2);
    assert_eq!(asked.driver.read(offset::INTERRUPT_STATUS) & 2, 2);
    asked.says(HINTS, 2);
    asked.names(HINTS, 4);
    assert_eq!(taken(&hints), [run(256, 4)]);
    assert_eq!(taken(&hints), []);
    assert_eq!(asked.driver.look(PAGES, 4096), [7; 4096]);
}

#[test]
fn queues_are_found_by_either_numbering() {
    let numberings: [(u64, &[usize], usize, Option<usize>); 4] = [
        (FEATURES, &[0, 1, 2, 3], 2, Some(3)),
        (FEATURES, &[0, 1, 3, 4], 3, Some(4)),
        (feature::FREE_PAGE_HINT, &[0, 1, 2], 2, None),
        (feature::FREE_PAGE_HINT, &[0, 1, 3], 3, None),
    ];
    for (features, queues, of_hints, of_reports) in numberings {
        let mut asked = Asked::new(features, queues);
        asked.driver.put(PAGES, &[7; 8192]);
        let hints = asked.ask(2);
        asked.says(of_hints, 2);
        asked.names(of_hints, 1);
        assert_eq!(taken(&hints), [run(256, 1)], "{queues:?}");
        assert_eq!(asked.driver.look(PAGES, 1), [7], "{queues:?}");
        if let Some(reports) = of_reports {
            asked.names(reports, 1);
            assert_eq!(asked.driver.look(PAGES, 1), [0], "{queues:?}");
        }
        assert_eq!(taken(&hints), [], "{queues:?}");
    }
}

#[test]
fn what_is_named_without_the_id_or_after_a_stop_is_not_heard() {
    let mut asked = Asked::linux();
    let hints = asked.ask(2);
    asked.names(HINTS, 1);
    for other in [3, 77, DONE, STOP, u32::MAX] {
        asked.says(HINTS, other);
        asked.names(HINTS, 1);
    }
    asked.says(HINTS, 2);
    asked.says(HINTS, STOP);
    asked.names(HINTS, 1);
    assert_eq!(taken(&hints), []);
}

#[test]
fn an_id_is_never_given_twice_and_an_old_one_is_not_heard() {
    let mut asked = Asked::linux();
    let old = asked.ask(2);
    asked.says(HINTS, 2);
    asked.end();
    let new = asked.ask(3);
    asked.says(HINTS, 2);
    asked.names(HINTS, 1);
    assert_eq!((taken(&old), taken(&new)), (vec![], vec![]));
    asked.says(HINTS, 3);
    asked.names(HINTS, 1);
    assert_eq!((taken(&old), taken(&new)), (vec![], vec![run(256, 1)]));
}

/// Linux writes the new id over the old one, in the buffer that is in the ring still.
#[test]
fn what_was_in_the_ring_before_the_id_was_shown_is_not_heard_though_its_command_says_the_new_one() {
    let mut asked = Asked::linux();
    asked.ask(2);
    assert!(asked.driver.rest());
    asked.driver.put(AT, &3u32.to_le_bytes());
    asked.driver.give(HINTS, &[(Span { address: AT, len: 4 }, false)]);
    asked.puts(HINTS, 1);
    let hints = asked.desk.ask();
    asked.driver.device.go_on();
    assert!(asked.driver.comes_to_read(COMMAND, 3));
    assert_eq!((asked.driver.used(HINTS), asked.driver.used(HINTS)), (Some(0), Some(0)));
    assert_eq!(taken(&hints), []);
    asked.says(HINTS, 3);
    asked.names(HINTS, 2);
    assert_eq!(taken(&hints), [run(256, 2)]);
}

#[test]
fn hints_for_who_asked_before_are_not_given_to_the_next() {
    let mut asked = Asked::linux();
    let old = asked.ask(2);
    asked.says(HINTS, 2);
    asked.names(HINTS, 1);
    let new = asked.desk.ask();
    assert_eq!((taken(&old), taken(&new)), (vec![], vec![]));
}

#[test]
fn a_driver_that_says_nothing_is_told_that_it_is_done() {
    let asked = Asked::linux();
    let hints = asked.ask(2);
    asked.end();
    assert_eq!(taken(&hints), []);
}

#[test]
fn a_driver_without_hints_is_not_asked() {
    let mut asked = Asked::new(feature::REPORTING, &[0, 1, 2]);
    asked.desk.ask();
    asked.driver.device.look();
    asked.names(HINTS, 1);
    assert_eq!(asked.driver.read(COMMAND), STOP);
}

/// One that was set up by a build that had no hints.
#[test]
fn a_driver_without_hints_goes_on_reporting_after_a_move() {
    let asked = Asked::new(feature::REPORTING, &[0, 1, 2]);
    assert!(asked.driver.rest());
    let there = Box::<Balloon>::default();
    let desk = there.hints();
    let mut after = Asked {
        driver: asked.driver.moved_to(there),
        desk,
    };
    after.driver.device.arrived();
    after.driver.device.go_on();
    after.desk.ask();
    after.driver.device.look();
    after.driver.put(PAGES, &[7; 4096]);
    after.names(HINTS, 1);
    assert_eq!(after.driver.look(PAGES, 1), [0]);
    assert_eq!(after.driver.read(COMMAND), STOP);
}

#[test]
fn a_driver_that_comes_while_hints_are_asked_for_is_asked() {
    let mut asked = Asked::linux();
    let hints = asked.ask(2);
    asked.driver.set_up_queues(FEATURES, &[0, 1, 2, 3]);
    assert!(asked.driver.comes_to_read(COMMAND, 3));
    asked.says(HINTS, 3);
    asked.names(HINTS, 1);
    assert_eq!(taken(&hints), [run(256, 1)]);
}

#[test]
fn commands_of_another_length_break_the_balloon() {
    let mut asked = Asked::linux();
    asked.ask(2);
    asked.driver.give(HINTS, &[(Span { address: AT, len: 5 }, false)]);
    assert!(asked.driver.breaks());
}

#[test]
fn pages_that_are_no_memory_break_the_balloon() {
    let mut asked = Asked::linux();
    let hints = asked.ask(2);
    asked.says(HINTS, 2);
    let far = Span {
        address: 1 << 40,
        len: 4096,
    };
    asked.driver.give(HINTS, &[(far, true)]);
    assert!(asked.driver.breaks());
    assert_eq!(taken(&hints), []);
}

#[test]
fn parts_of_pages_are_not_told_and_neighbours_are_joined() {
    let mut asked = Asked::linux();
    let hints = asked.ask(2);
    asked.says(HINTS, 2);
    let span = |address, len| (Span { address, len }, true);
    let spans = [
        span(PAGES + 0x3000, 0x1000),
        span(PAGES + 0x2000, 0x1000),
        span(PAGES + 0x4000, 0x1800),
        span(PAGES + 0x9100, 0xe00),
        span(PAGES + 0x9100, 0x1f00),
    ];
    asked.driver.give(HINTS, &spans);
    assert_eq!(asked.driver.used(HINTS), Some(0));
    assert_eq!(taken(&hints), [run(258, 3), run(266, 1)]);
}

#[test]
fn what_is_said_beyond_all_measure_is_left_out() {
    let desk = HintDesk::default();
    let hints = desk.ask();
    let time = desk.asked().expect("it is asked");
    (0..1 << 17).for_each(|frame| desk.leave(time, run(frame * 2, 1)));
    assert_eq!(taken(&hints).len(), 1 << 16);
}

/// It may have been told of the id and keep pages for it: whoever asked is not where the guest is now.
#[test]
fn a_guest_that_was_moved_while_it_was_asked_is_told_that_it_is_done_and_asked_anew_under_another_id() {
    let mut asked = Asked::linux();
    asked.ask(2);
    asked.says(HINTS, 2);
    asked.driver.write(offset::INTERRUPT_ACK, 3);
    assert!(asked.driver.rest());

    let there = Box::<Balloon>::default();
    let desk = there.hints();
    let mut after = Asked {
        driver: asked.driver.moved_to(there),
        desk,
    };
    assert_eq!(after.driver.read(COMMAND), DONE);
    after.driver.device.arrived();
    assert_eq!(after.driver.read(offset::INTERRUPT_STATUS) & 2, 2);
    after.driver.device.go_on();

    let hints = after.ask(3);
    after.says(HINTS, 3);
    after.names(HINTS, 1);
    assert_eq!(taken(&hints), [run(256, 1)]);
}

#[test]
fn a_guest_that_was_never_asked_is_told_nothing_when_it_has_moved() {
    let asked = Asked::linux();
    asked.driver.write(offset::INTERRUPT_ACK, 3);
    assert!(asked.driver.rest());
    let after = asked.driver.moved_to(Box::<Balloon>::default());
    after.device.arrived();
    assert_eq!((after.read(COMMAND), after.read(offset::INTERRUPT_STATUS)), (STOP, 0));
}

#[test]
fn only_a_guest_with_hints_needs_the_newer_version_of_the_state() {
    let versions = [
        (Asked::new(feature::REPORTING, &[0, 1, 2]), 1, 3),
        (Asked::linux(), 2, 4),
        (Asked::new(FEATURES, &[0, 1, 3, 4]), 2, 5),
    ];
    for (asked, version, queues) in versions {
        assert!(asked.driver.rest());
        let saved = asked.driver.device.save();
        assert_eq!(asked.driver.device.state_version(), version);
        assert_eq!(super::super::version_of_saved(&saved), version);
        assert_eq!(saved.transport.expect("a transport").queues.len(), queues);
    }
}
