//! A peer of another version, and frames that are wrong: refused by name, the guest runs on at the source, and the
//! destination is left with nothing.

use anyhow::{Result, ensure};
use ferry_tests::{Guest, Pair, Tampering, passing::HEADER, passing::reseal};
use libtest_mimic::Trial;

use crate::postcopy::{BUSY, completes};
use crate::scenario::{between, expect_a_lost_peer, has_nothing, on_kvm};

pub(crate) fn trials() -> Vec<Trial> {
    on_kvm![
        a_message_of_an_unknown_rpc_version_is_sent_again_at_one_that_is_known,
        a_peer_of_another_protocol_version_is_refused_by_name,
        a_page_stream_of_another_layout_is_refused_by_name,
        a_frame_with_a_wrong_checksum_ends_the_migration,
        a_frame_with_a_wrong_length_ends_the_migration,
        a_frame_beyond_the_limit_ends_the_migration,
        a_frame_of_pages_outside_memory_ends_the_migration,
        a_doubled_frame_ends_the_migration,
        what_pages_changed_that_were_never_sent_ends_the_migration,
        what_pages_changed_outside_a_block_ends_the_migration,
        a_late_frame_with_a_wrong_checksum_costs_a_link_and_no_page,
        a_late_frame_of_pages_outside_memory_costs_a_link_and_no_page,
        an_answer_that_is_doubled_costs_a_link_and_no_page,
    ]
}

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
    let says = ["protocol version", "the source speaks 8 to 9", "this host 1 to 2"];
    stays(pair, Tampering::Hello(speak_8_to_9), &says)
}

fn a_page_stream_of_another_layout_is_refused_by_name(pair: &mut Pair) -> Result<()> {
    let says = ["page stream 0", "frame version 2, this build reads 1"];
    stays(pair, frame(0, 0, |frame| frame[4] = 2), &says)
}

fn a_frame_with_a_wrong_checksum_ends_the_migration(pair: &mut Pair) -> Result<()> {
    let says = ["page stream 1", "the checksum of a frame's header"];
    stays(pair, frame(1, 3, |frame| frame[28] ^= 0x10), &says)
}

fn a_frame_with_a_wrong_length_ends_the_migration(pair: &mut Pair) -> Result<()> {
    let one_page_less = |frame: &mut [u8]| set_length(frame, length(frame) - 4096);
    stays(
        pair,
        frame(0, 3, one_page_less),
        &["page stream 0", "a frame length of"],
    )
}

fn a_frame_beyond_the_limit_ends_the_migration(pair: &mut Pair) -> Result<()> {
    let a_page_too_many = |frame: &mut [u8]| set_length(frame, (2 << 20) + 4096);
    let says = ["page stream 1", "a frame of 2101248 bytes of pages, at most 2097152"];
    stays(pair, frame(1, 2, a_page_too_many), &says)
}

fn a_frame_of_pages_outside_memory_ends_the_migration(pair: &mut Pair) -> Result<()> {
    let says = ["page stream 0", "from page 0x12345678 on are not guest memory"];
    stays(pair, frame(0, 2, outside_memory), &says)
}

fn a_doubled_frame_ends_the_migration(pair: &mut Pair) -> Result<()> {
    let says = ["page stream 0", "frame 2 of the stream where 3 is next"];
    stays(pair, frame(0, 3, as_the_second), &says)
}

fn what_pages_changed_that_were_never_sent_ends_the_migration(pair: &mut Pair) -> Result<()> {
    let says = [
        "page stream 0",
        "are told by what they changed, of which there is no copy here",
    ];
    stays_with(pair, ("text", "lz4"), frame(0, 3, of_changes), &says)
}

fn what_pages_changed_outside_a_block_ends_the_migration(pair: &mut Pair) -> Result<()> {
    let says = ["page stream 0", "a run of unknown kind 4"];
    stays_with(pair, ("random", "lz4"), frame(0, 3, of_changes), &says)
}

/// A migration in which this is tampered with fails and says so; the guest stays, B has nothing, and the next one succeeds.
fn stays(pair: &mut Pair, tampering: Tampering, says: &[&str]) -> Result<()> {
    stays_with(pair, ("random", "auto"), tampering, says)
}

/// The same of a guest that is full of this, and whose pages are compressed so.
fn stays_with(pair: &mut Pair, (full_of, how): (&str, &str), tampering: Tampering, says: &[&str]) -> Result<()> {
    expect_a_lost_peer(pair);
    let relay = between(pair, tampering)?;
    let work = format!("fill={full_of} fill_mib=48 work=uniform work_mib=8 rate=1000 heartbeat_ms=20");
    let witness = pair.run(&Guest::new("g").work(&work))?;

    let ways = ["--digests", "--streams", "2", "--compress", how];
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

/// With one page stream: one of those on which pages are asked for, and the one on which the others are pushed.
const ANSWERS: u16 = 2;
const PUSHED: u16 = 4;

fn a_late_frame_with_a_wrong_checksum_costs_a_link_and_no_page(pair: &mut Pair) -> Result<()> {
    let says = "the checksum of a frame's header";
    comes_all_the_same(pair, frame(PUSHED, 10, |frame| frame[28] ^= 0x10), says)
}

fn a_late_frame_of_pages_outside_memory_costs_a_link_and_no_page(pair: &mut Pair) -> Result<()> {
    comes_all_the_same(pair, frame(PUSHED, 5, outside_memory), "are not guest memory")
}

fn an_answer_that_is_doubled_costs_a_link_and_no_page(pair: &mut Pair) -> Result<()> {
    let says = "frame 2 of the stream where 3 is next";
    comes_all_the_same(pair, frame(ANSWERS, 3, as_the_second), says)
}

/// The guest runs at B already, and what is tampered with may have been for it: the link is given up, and the page comes over the next one.
fn comes_all_the_same(pair: &mut Pair, tampering: Tampering, says: &str) -> Result<()> {
    expect_a_lost_peer(pair);
    pair.expect_complaint("late");
    let relay = between(pair, tampering)?;
    let witness = pair.run(&Guest::new("g").work(BUSY).vcpus(2))?;

    let slow = ["--mode", "postcopy", "--streams", "1", "--bandwidth", "320Mbit"];
    let told = pair.migrate("g", &slow)?.exit(0)?;

    ensure!(relay.has_tampered(), "nothing was tampered with: {told}");
    let moved = told.migration()?.is("completed", "b")?;
    ensure!(
        moved.number("late_pages")? > 0.0 && moved.number("late_missing")? == 0.0,
        "{told}"
    );
    completes(pair, moved.text("id")?, &witness)?;
    let logged = pair.b.ferry(&["logs", "g"])?.exit(0)?;
    logged.says("a session of late pages is lost")?.says(says).map(drop)
}

fn frame(stream: u16, number: u64, change: fn(&mut [u8])) -> Tampering {
    Tampering::Frame { stream, number, change }
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

/// Versions 8 to 9 instead of 1 to 2: the first two fields of the message in the message.
fn speak_8_to_9(hello: &mut [u8]) {
    let versions = hello.windows(4).position(|window| window == [0x08, 2, 0x10, 1]);
    let at = versions.expect("the first message names the versions");
    hello[at + 1] = 9;
    hello[at + 3] = 8;
}

fn length(frame: &[u8]) -> u32 {
    u32::from_le_bytes(frame[24..28].try_into().expect("four bytes are four bytes"))
}

fn set_length(frame: &mut [u8], length: u32) {
    frame[24..28].copy_from_slice(&length.to_le_bytes());
    reseal(frame);
}
