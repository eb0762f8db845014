//! The card behind its registers and queues; a pair of datagram sockets keeps frames apart as a tap does.

use std::num::NonZeroU64;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;

use super::super::device::Device;
use super::super::registers::offset;
use super::super::testing::Driver;
use super::{CONTROL, Net, RECEIVE, TRANSMIT, feature};
use crate::machine::NicBackend;
use crate::memory::Span;

const MAC: [u8; 6] = [2, 1, 2, 3, 4, 5];
const BUFFERS: u64 = 0x1_0000;

fn card() -> (Box<Net>, UnixDatagram) {
    limited_card(None)
}

fn limited_card(rate: Option<NonZeroU64>) -> (Box<Net>, UnixDatagram) {
    let (ours, theirs) = UnixDatagram::pair().expect("pair");
    ours.set_nonblocking(true).expect("socket");
    theirs
        .set_read_timeout(Some(std::time::Duration::from_secs(20)))
        .expect("socket");
    let tap = OwnedFd::from(ours);
    (Box::new(Net::new(NicBackend { tap, mac: MAC, rate })), theirs)
}

fn driver(features: u64) -> (Driver, UnixDatagram) {
    let (card, wire) = card();
    let mut driver = Driver::new(card);
    driver.set_up(features);
    (driver, wire)
}

fn span(address: u64, len: u32) -> Span {
    Span { address, len }
}

fn frame(len: usize) -> Vec<u8> {
    let mut frame = vec![0; 12];
    frame.extend((0..len).map(|index| index as u8));
    frame
}

#[test]
fn frames_go_out_as_they_were_given() {
    let (mut driver, wire) = driver(0);
    driver.put(BUFFERS, &frame(600));
    driver.give(
        TRANSMIT,
        &[(span(BUFFERS, 12), false), (span(BUFFERS + 12, 600), false)],
    );
    let mut found = [0; 2000];
    let len = wire.recv(&mut found).expect("frame");
    assert_eq!(found[..len], frame(600));
    assert_eq!(driver.used(TRANSMIT), Some(0));
}

#[test]
fn what_one_station_says_to_another_is_noted() {
    let (card, wire) = card();
    let traffic = card.traffic();
    let mut driver = Driver::new(card);
    driver.set_up(feature::MRG_RXBUF);
    driver.give(RECEIVE, &[(span(BUFFERS, 15), true)]);
    for index in 1..4 {
        driver.give(RECEIVE, &[(span(BUFFERS + index * 2000, 2000), true)]);
    }
    let to = |address: [u8; 6]| [&[0; 12], &address[..], &[0; 50]].concat();
    let send = |driver: &mut Driver, address| {
        driver.put(BUFFERS + 0x1_0000, &to(address));
        driver.give(TRANSMIT, &[(span(BUFFERS + 0x1_0000, 68), false)]);
        assert_eq!(driver.used(TRANSMIT), Some(0));
    };

    wire.send(&to([0xff; 6])).expect("frame");
    assert_eq!([driver.used(RECEIVE), driver.used(RECEIVE)], [Some(15), Some(53)]);
    wire.send(&to([2, 1, 2, 3, 4, 6])).expect("frame");
    assert_eq!(driver.used(RECEIVE), Some(68));
    send(&mut driver, [0xff; 6]);
    assert_eq!((traffic.sent(), traffic.received()), (None, None));

    send(&mut driver, MAC);
    wire.send(&to(MAC)).expect("frame");
    assert_eq!(driver.used(RECEIVE), Some(68));
    let (sent, received) = (traffic.sent().expect("frame"), traffic.received().expect("frame"));
    assert_eq!((sent.first, received.first), (sent.last, received.last));
    assert!(sent.first < received.first);

    send(&mut driver, [0x33, 0x33, 0, 0, 0, 1]);
    assert_eq!(traffic.sent(), Some(sent));
    send(&mut driver, MAC);
    let later = traffic.sent().expect("frame");
    assert!(later.first == sent.first && later.last > sent.last);
}

#[test]
fn frame_for_the_card_is_noted_also_if_its_address_is_in_two_buffers() {
    let (card, wire) = card();
    let traffic = card.traffic();
    let mut driver = Driver::new(card);
    driver.set_up(feature::MRG_RXBUF);
    driver.give(RECEIVE, &[(span(BUFFERS, 15), true)]);
    driver.give(RECEIVE, &[(span(BUFFERS + 2000, 2000), true)]);

    wire.send(&[&[0; 12], &MAC[..], &[0; 50]].concat()).expect("frame");

    assert_eq!([driver.used(RECEIVE), driver.used(RECEIVE)], [Some(15), Some(53)]);
    assert!(traffic.received().is_some());
}

#[test]
fn frame_waits_until_the_guest_has_a_buffer_for_it() {
    let (mut driver, wire) = driver(feature::MRG_RXBUF);
    wire.send(&frame(100)).expect("frame");
    driver.give(RECEIVE, &[(span(BUFFERS, 2000), true)]);
    assert_eq!(driver.used(RECEIVE), Some(112));
    let mut expected = frame(100);
    expected[10] = 1;
    assert_eq!(driver.look(BUFFERS, 112), expected);
}

#[test]
fn long_frame_is_spread_over_buffers_and_says_so() {
    let (mut driver, wire) = driver(feature::MRG_RXBUF);
    for index in 0..3 {
        driver.give(RECEIVE, &[(span(BUFFERS + index * 1000, 1000), true)]);
    }
    wire.send(&frame(1500)).expect("frame");
    assert_eq!([driver.used(RECEIVE), driver.used(RECEIVE)], [Some(1000), Some(512)]);
    assert_eq!(driver.look(BUFFERS + 10, 2), [2, 0]);
    assert_eq!(driver.look(BUFFERS + 1000, 512), frame(1500)[1000..]);
}

#[test]
fn buffers_that_no_frame_came_for_stay_the_guests_offer() {
    let (mut driver, wire) = driver(feature::MRG_RXBUF);
    driver.give(RECEIVE, &[(span(BUFFERS, 2000), true)]);
    driver.give(RECEIVE, &[(span(BUFFERS + 2000, 2000), true)]);
    wire.send(&frame(10)).expect("frame");
    assert_eq!(driver.used(RECEIVE), Some(22));
    assert!(driver.rest());

    let (card, other_wire) = card();
    let mut after = driver.moved_to(card);
    after.device.go_on();
    other_wire.send(&frame(20)).expect("frame");
    assert_eq!(after.used(RECEIVE), Some(32));
    assert_eq!(after.look(BUFFERS + 2012, 20), frame(20)[12..]);
}

#[test]
fn guest_that_arrives_is_asked_to_announce_itself_once() {
    let (driver, _wire) = driver(feature::GUEST_ANNOUNCE | feature::STATUS | feature::CTRL_VQ);
    assert!(driver.rest());
    let (card, _other_wire) = card();
    let mut after = driver.moved_to(card);
    let generation = after.read(offset::CONFIG_GENERATION);
    after.device.arrived();
    after.device.go_on();
    assert_ne!(after.read(offset::CONFIG_GENERATION), generation);
    assert_eq!(status(&after), 3);
    assert_eq!(after.read(offset::INTERRUPT_STATUS) & 2, 2);

    after.put(BUFFERS, &[3, 0, 0xff]);
    after.give(CONTROL, &[(span(BUFFERS, 2), false), (span(BUFFERS + 2, 1), true)]);
    assert_eq!(after.used(CONTROL), Some(1));
    assert_eq!(after.look(BUFFERS + 2, 1), [0]);
    assert_eq!(status(&after), 1);
}

#[test]
fn unknown_command_is_answered_with_an_error() {
    let (mut driver, _wire) = driver(feature::CTRL_VQ);
    driver.put(BUFFERS, &[0, 0, 1, 0xff]);
    driver.give(CONTROL, &[(span(BUFFERS, 3), false), (span(BUFFERS + 3, 1), true)]);
    assert_eq!(driver.used(CONTROL), Some(1));
    assert_eq!(driver.look(BUFFERS + 3, 1), [1]);
}

#[test]
fn frame_without_a_header_breaks_the_card() {
    let (mut driver, _wire) = driver(0);
    driver.give(TRANSMIT, &[(span(BUFFERS, 11), false)]);
    assert!(driver.breaks());
}

#[test]
fn address_is_the_guests_wherever_it_goes() {
    let (driver, _wire) = driver(0);
    assert!(driver.rest());
    let (ours, _theirs) = UnixDatagram::pair().expect("pair");
    let backend = NicBackend {
        tap: ours.into(),
        mac: [9; 6],
        rate: None,
    };
    let after = driver.moved_to(Box::new(Net::new(backend)));
    assert_eq!(after.read(offset::CONFIG).to_le_bytes(), MAC[..4]);
    assert_eq!(after.device.save(), driver.device.save());
}

fn status(driver: &Driver) -> u16 {
    let mut status = [0; 2];
    driver.device.read(offset::CONFIG + 6, &mut status);
    u16::from_le_bytes(status)
}

#[test]
fn saved_card_of_another_kind_is_refused() {
    let (card, _wire) = card();
    assert!(
        Net::new(NicBackend {
            tap: tempfile::tempfile().expect("file").into(),
            mac: MAC,
            rate: None,
        })
        .restore(&[0x0a, 1, 7])
        .is_err()
    );
    assert!(!card.save().is_empty());
}

/// A card of so many bytes a second, set up.
fn limited(rate: u64) -> (Driver, UnixDatagram) {
    let (card, wire) = limited_card(NonZeroU64::new(rate));
    let mut driver = Driver::new(card);
    driver.set_up(feature::MRG_RXBUF);
    (driver, wire)
}

const LONG: usize = 40_000;

fn give_long_frame(driver: &mut Driver) {
    driver.put(BUFFERS, &frame(LONG));
    driver.give(TRANSMIT, &[(span(BUFFERS, 12 + LONG as u32), false)]);
}

fn arrives(wire: &UnixDatagram) -> bool {
    let mut found = vec![0; 2 * LONG];
    wire.recv(&mut found).is_ok_and(|len| found[..len] == frame(LONG))
}

#[test]
fn limited_card_comes_to_rest_and_what_it_did_not_send_moves() {
    // After a burst of one longest frame, years.
    let (mut driver, wire) = limited(1);
    (0..3).for_each(|_| give_long_frame(&mut driver));
    assert!(arrives(&wire) && arrives(&wire));
    assert_eq!([driver.used(TRANSMIT), driver.used(TRANSMIT)], [Some(0), Some(0)]);
    assert!(driver.rest());
    assert!(!driver.has_used(TRANSMIT));

    let (card, other_wire) = card();
    let mut after = driver.moved_to(card);
    after.device.go_on();
    assert!(arrives(&other_wire));
    assert_eq!(after.used(TRANSMIT), Some(0));
}

#[test]
fn limited_card_sends_on_as_soon_as_it_may_without_being_rung() {
    let (mut driver, wire) = limited(1_000_000);
    (0..8).for_each(|_| give_long_frame(&mut driver));
    assert!((0..8).all(|_| arrives(&wire)));
    assert!((0..8).all(|_| driver.used(TRANSMIT) == Some(0)));
}

#[test]
fn limited_card_receives_on_as_soon_as_it_may() {
    let (mut driver, wire) = limited(1_000_000);
    for index in 0..16 {
        driver.give(RECEIVE, &[(span(BUFFERS + index * 0x1_0000, 0x1_0000), true)]);
    }
    for _ in 0..8 {
        wire.send(&frame(LONG)).expect("frame");
        assert_eq!(driver.used(RECEIVE), Some(12 + LONG as u32));
    }
}

#[test]
fn limited_card_leaves_in_the_tap_what_is_too_much() {
    let (mut driver, wire) = limited(1);
    for index in 0..16 {
        driver.give(RECEIVE, &[(span(BUFFERS + index * 0x1_0000, 0x1_0000), true)]);
    }
    for _ in 0..3 {
        wire.send(&frame(LONG)).expect("frame");
    }
    assert_eq!(
        [driver.used(RECEIVE), driver.used(RECEIVE)],
        [Some(12 + LONG as u32); 2]
    );
    // Each of these has the card look at its tap once more.
    for _ in 0..3 {
        assert!(driver.rest());
        driver.device.go_on();
    }
    assert!(driver.rest());
    assert!(!driver.has_used(RECEIVE));
}

#[test]
fn resetting_a_limited_card_gains_nothing() {
    let (mut driver, wire) = limited(1);
    (0..2).for_each(|_| give_long_frame(&mut driver));
    assert!(arrives(&wire) && arrives(&wire));
    assert_eq!([driver.used(TRANSMIT), driver.used(TRANSMIT)], [Some(0), Some(0)]);
    driver.set_up(feature::MRG_RXBUF);

    give_long_frame(&mut driver);
    // A turn that ended has looked at the ring.
    driver.put(BUFFERS + LONG as u64 * 2, &[0, 0, 0xff]);
    driver.give(
        CONTROL,
        &[
            (span(BUFFERS + LONG as u64 * 2, 2), false),
            (span(BUFFERS + LONG as u64 * 2 + 2, 1), true),
        ],
    );
    assert_eq!(driver.used(CONTROL), Some(1));
    assert!(driver.rest());
    assert!(!driver.has_used(TRANSMIT));
}
