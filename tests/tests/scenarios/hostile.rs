//! A peer of another version, and frames and messages that are wrong: refused by name, the guest runs on at the source, and the
//! destination is left with nothing. Of those that come late each costs a link, and the guest has every page all the same.

use anyhow::{Result, ensure};
use ferry_tests::messages::Speaker;
use ferry_tests::messages::from_destination::{ALL_HERE, BARRIER_REACHED, MISSING};
use ferry_tests::messages::from_source::{BARRIER, DIGEST_REQUEST, STATE};
use ferry_tests::messages::of_one_stream::{CONTROL, PUSHED, URGENT};
use ferry_tests::passing::{HEADER, reseal, reseal_message};
use ferry_tests::{Guest, Pair, Tampering};
use libtest_mimic::Trial;

use crate::postcopy::{BUSY, completes};
use crate::scenario::{self, between, expect_a_lost_peer, has_nothing, on_kvm};

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = on_kvm![
        a_message_of_an_unknown_rpc_version_is_sent_again_at_one_that_is_known,
        a_peer_of_another_protocol_version_is_refused_by_name,
        a_page_stream_of_another_layout_is_refused_by_name,
        what_pages_changed_that_were_never_sent_ends_the_migration,
        what_pages_changed_outside_a_block_ends_the_migration,
    ];
    for transport in ["tcp", "grpc"] {
        // A long message does not come by in one piece there, where it could be changed.
        let has_place = |case: &Case| transport == "tcp" || case.name != ANOTHER_STATE;
        let ends = ends_the_migration().into_iter().filter(has_place).map(|case| {
            let name = format!("scenarios::hostile::{}_ends_the_migration_over_{transport}", case.name);
            scenario::trial_on_kvm(&name, move |pair| stays(pair, transport, case.tampering, case.says))
        });
        trials.extend(ends);
        let costs = costs_a_link_and_no_page().into_iter().map(|case| {
            let name = format!(
                "scenarios::hostile::{}_costs_a_link_and_no_page_over_{transport}",
                case.name
            );
            scenario::trial_on_kvm(&name, move |pair| {
                comes_all_the_same(pair, transport, case.tampering, case.says)
            })
        });
        trials.extend(costs);
    }
    trials
}

/// What is tampered with, and what is said of it.
struct Case {
    name: &'static str,
    tampering: Tampering,
    says: &'static [&'static str],
}

fn ends_the_migration() -> Vec<Case> {
    let case = |name, tampering, says| Case { name, tampering, says };
    let outside = &["page stream 0", "from page 0x12345678 on are not guest memory"];
    vec![
        case(
            "a_frame_with_a_wrong_checksum",
            frame(1, 3, damage_a_frame),
            &["page stream 1", "the checksum of a frame's header"],
        ),
        case(
            "a_frame_with_a_wrong_length",
            frame(0, 3, a_page_less),
            &["page stream 0", "a frame length of"],
        ),
        case(
            "a_frame_beyond_the_limit",
            frame(1, 2, a_page_too_many),
            &["page stream 1", "a frame of 2101248 bytes of pages, at most 2097152"],
        ),
        case("a_frame_of_pages_outside_memory", frame(0, 2, outside_memory), outside),
        case(
            "a_doubled_frame",
            frame(0, 3, as_the_second),
            &["page stream 0", "frame 2 of the stream where"],
        ),
        case("a_damaged_barrier", message(Speaker::Source, BARRIER, damage), DAMAGED),
        case(
            "a_barrier_of_another_round",
            message(Speaker::Source, BARRIER, of_another_round),
            &["the source misbehaved: the barrier of round 2 in round 1"],
        ),
        case(
            "a_damaged_digest",
            message(Speaker::Source, DIGEST_REQUEST, damage),
            DAMAGED,
        ),
        case(
            ANOTHER_STATE,
            message(Speaker::Source, STATE, another_state),
            &["the saved state is not the one that was sent"],
        ),
        case(
            "a_damaged_word_of_the_destination",
            message(Speaker::Destination, BARRIER_REACHED, damage),
            DAMAGED,
        ),
        case(
            "a_round_reached_that_is_another",
            message(Speaker::Destination, BARRIER_REACHED, of_another_round),
            &["the destination misbehaved: unexpected: barrier reached"],
        ),
    ]
}

fn costs_a_link_and_no_page() -> Vec<Case> {
    let case = |name, tampering, says| Case { name, tampering, says };
    let word = |field| Tampering::Message {
        stream: Some(CONTROL),
        by: Speaker::Destination,
        field,
        change: damage,
    };
    vec![
        case(
            "a_late_frame_with_a_wrong_checksum",
            frame(PUSHED, 10, damage_a_frame),
            &["the checksum of a frame's header"],
        ),
        case(
            "a_late_frame_of_pages_outside_memory",
            frame(PUSHED, 5, outside_memory),
            &["are not guest memory"],
        ),
        case(
            "an_answer_that_is_doubled",
            frame(*URGENT.start(), 3, as_the_second),
            &["frame 2 of the stream where"],
        ),
        case("a_damaged_word_of_what_is_missing", word(MISSING), DAMAGED),
        case("a_damaged_word_that_all_is_here", word(ALL_HERE), DAMAGED),
    ]
}

const ANOTHER_STATE: &str = "a_machine_state_that_is_another";

/// What is said of a message with a flipped bit, by whoever heard it.
const DAMAGED: &[&str] = &["a message was damaged on its way"];

/// B refuses the message by name; A asks it once what it speaks, and sends the message at that version.
fn a_message_of_an_unknown_rpc_version_is_sent_again_at_one_that_is_known(pair: &mut Pair) -> Result<()> {
    let relay = between(pair, Tampering::RpcVersion)?;
    let witness = pair.run(&Guest::new("g"))?;

    let told = pair.migrate("g", &[])?.exit(0)?;

    ensure!(relay.has_tampered(), "nothing was tampered with: {told}");
    told.migration()?.is("completed", "b")?;
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn a_peer_of_another_protocol_version_is_refused_by_name(pair: &mut Pair) -> Result<()> {
    const HELLO: u32 = 1;
    let says = ["protocol version", "the source speaks 8 to 9", "this host 1 to 2"];
    stays(pair, "tcp", message(Speaker::Source, HELLO, speak_8_to_9), &says)
}

fn a_page_stream_of_another_layout_is_refused_by_name(pair: &mut Pair) -> Result<()> {
    let says = ["page stream 0", "frame version 2, this build reads 1"];
    stays(pair, "tcp", frame(0, 0, |frame| frame[4] = 2), &says)
}

fn what_pages_changed_that_were_never_sent_ends_the_migration(pair: &mut Pair) -> Result<()> {
    let says = [
        "page stream 0",
        "are told by what they changed, of which there is no copy here",
    ];
    stays_with(pair, ("text", &["--compress", "lz4"]), frame(0, 3, of_changes), &says)
}

fn what_pages_changed_outside_a_block_ends_the_migration(pair: &mut Pair) -> Result<()> {
    let says = ["page stream 0", "a run of unknown kind 4"];
    stays_with(pair, ("random", &["--compress", "lz4"]), frame(0, 3, of_changes), &says)
}

/// A migration in which this is tampered with fails and says so; the guest stays, B has nothing, and the next one succeeds.
fn stays(pair: &mut Pair, transport: &str, tampering: Tampering, says: &[&str]) -> Result<()> {
    stays_with(pair, ("random", &["--transport", transport]), tampering, says)
}

/// The same of a guest that is full of this, and moves this way.
fn stays_with(pair: &mut Pair, (full_of, how): (&str, &[&str]), tampering: Tampering, says: &[&str]) -> Result<()> {
    expect_a_lost_peer(pair);
    let relay = between(pair, tampering)?;
    let work = format!("fill={full_of} fill_mib=48 work=uniform work_mib=8 rate=1000 heartbeat_ms=20");
    let witness = pair.run(&Guest::new("g").work(&work))?;

    let ways = [&["--digests", "--streams", "2"], how].concat();
    let told = pair.migrate("g", &ways)?.exit(1)?;

    ensure!(relay.has_tampered(), "nothing was tampered with: {told}");
    let record = told.migration()?.is("failed", "a")?;
    for words in says {
        ensure!(record.text("error")?.contains(words), "{words:?} expected: {told}");
    }
    pair.runs_only_at(&pair.a, "g", &witness)?;
    has_nothing(&pair.b)?;
    pair.migrate("g", &["--digests", "--streams", "2"])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;
    pair.runs_only_at(&pair.b, "g", &witness)
}

/// The guest runs at B already, and what is tampered with may have been for it: the link is given up, and the page comes over the next one.
fn comes_all_the_same(pair: &mut Pair, transport: &str, tampering: Tampering, says: &[&str]) -> Result<()> {
    expect_a_lost_peer(pair);
    pair.expect_complaint("late");
    let relay = between(pair, tampering)?;
    let witness = pair.run(&Guest::new("g").work(BUSY).vcpus(2))?;

    let slow = [
        "--mode",
        "postcopy",
        "--streams",
        "1",
        "--bandwidth",
        "320Mbit",
        "--transport",
        transport,
    ];
    let told = pair.migrate("g", &slow)?.exit(0)?;

    ensure!(relay.has_tampered(), "nothing was tampered with: {told}");
    let moved = told.migration()?.is("completed", "b")?;
    ensure!(
        moved.number("late_pages")? > 0.0 && moved.number("late_missing")? == 0.0,
        "{told}"
    );
    completes(pair, moved.text("id")?, &witness)?;
    let words = [&["late pages", "lost"], says].concat();
    ensure!(pair.is_logged(&words)?, "{words:?} expected in a log");
    Ok(())
}

/// A message of the first link's control stream.
fn message(by: Speaker, field: u32, change: fn(&mut [u8])) -> Tampering {
    Tampering::Message {
        stream: None,
        by,
        field,
        change,
    }
}

fn frame(stream: u16, number: u64, change: fn(&mut [u8])) -> Tampering {
    Tampering::Frame { stream, number, change }
}

fn damage_a_frame(frame: &mut [u8]) {
    frame[28] ^= 0x10;
}

fn a_page_less(frame: &mut [u8]) {
    set_length(frame, length(frame) - 4096);
}

fn a_page_too_many(frame: &mut [u8]) {
    set_length(frame, (2 << 20) + 4096);
}

/// The first run of pages becomes one of what they changed.
fn of_changes(frame: &mut [u8]) {
    let kind = HEADER + 12;
    assert_eq!(frame[kind..kind + 4], 1u32.to_le_bytes(), "not a run of pages");
    frame[kind] = 4;
    reseal(frame);
}

fn outside_memory(frame: &mut [u8]) {
    frame[HEADER..HEADER + 8].copy_from_slice(&0x1234_5678_u64.to_le_bytes());
    reseal(frame);
}

/// It is the fourth: one comes twice.
fn as_the_second(frame: &mut [u8]) {
    frame[16..24].copy_from_slice(&2_u64.to_le_bytes());
    reseal(frame);
}

/// One bit near the beginning: of the length or the content of the only field.
fn damage(message: &mut [u8]) {
    message[2] ^= 0x04;
}

/// The number of the round is the first field of the message in the message; it is below 64.
fn of_another_round(message: &mut [u8]) {
    assert_eq!(message[2], 0x08, "not the number of a round");
    message[3] += 1;
    reseal_message(message);
}

/// One byte in the midst of the machine's state, which is nearly all of the message.
fn another_state(message: &mut [u8]) {
    message[message.len() / 2] ^= 0x04;
    reseal_message(message);
}

/// Versions 8 to 9 instead of 1 to 2: the first two fields of the message in the message.
fn speak_8_to_9(hello: &mut [u8]) {
    let versions = hello.windows(4).position(|window| window == [0x08, 2, 0x10, 1]);
    let at = versions.expect("the first message names the versions");
    hello[at + 1] = 9;
    hello[at + 3] = 8;
    reseal_message(hello);
}

fn length(frame: &[u8]) -> u32 {
    u32::from_le_bytes(frame[24..28].try_into().expect("four bytes are four bytes"))
}

fn set_length(frame: &mut [u8], length: u32) {
    frame[24..28].copy_from_slice(&length.to_le_bytes());
    reseal(frame);
}
