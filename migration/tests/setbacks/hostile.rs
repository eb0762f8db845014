//! Peers that break the protocol: each is refused by what it did.

use std::sync::mpsc;
use std::thread;

use super::BUSY;
use super::fake::raw::{self, RawFrame, RawSource};
use super::fake::scene::{attempt, destination_parameters, guest, links, memory, parameters};
use super::fake::{FakeDestination, Tracking};
use ferry_migration::ControlError;
use ferry_migration::destination::{self, DestinationError};
use ferry_migration::handover::Grants;
use ferry_migration::source::{self, SourceError, SourceOutcome};
use ferry_proto::stream::v1::{self, from_destination::Message as Reply, from_source::Message as Said};

#[test]
fn a_protocol_version_that_was_not_offered_is_misbehaviour() {
    let (near, far) = links(1);
    let (grants, (_orders_in, orders), (reports, _listener)) = (Grants::new(), mpsc::channel(), mpsc::channel());
    let reply = v1::HelloReply {
        protocol: 9,
        refusals: Vec::new(),
        ..v1::HelloReply::default()
    };
    raw::say(
        &far.control,
        &v1::FromDestination {
            message: Some(Reply::HelloReply(reply)),
        },
    );
    let outcome = source::run(
        guest(Tracking::Log, BUSY),
        near,
        &parameters(),
        &grants,
        &orders,
        &reports,
    );
    assert!(matches!(
        outcome,
        SourceOutcome::Cancelled {
            error: SourceError::Misbehaved(_),
            ..
        }
    ));
}

/// Runs a destination against a source by hand; returns how it ended and what it gave as reasons, if it did.
fn against(act: impl FnOnce(&RawSource)) -> (DestinationError, Vec<String>) {
    let (near, far) = links(1);
    let ((_orders_in, orders), (reports, _listener)) = (mpsc::channel(), mpsc::channel());
    let parameters = destination_parameters();
    let receiving = thread::spawn(move || {
        destination::run(FakeDestination::new(memory()), far, &parameters, &orders, &reports).map(|_| ())
    });
    let source = RawSource { link: near };
    act(&source);
    let reasons = std::iter::from_fn(|| source.reply()).find_map(|reply| match reply {
        Reply::Refused(refused) => Some(refused.reasons),
        Reply::HelloReply(reply) => Some(reply.refusals),
        _ => None,
    });
    drop(source);
    (receiving.join().unwrap().unwrap_err(), reasons.unwrap_or_default())
}

#[track_caller]
fn frame_is_refused(frame: &RawFrame, reason: &str) {
    let (error, reasons) = against(|source| {
        source.up_to_pages();
        source.write(0, &frame.bytes());
    });
    assert!(matches!(error, DestinationError::Frame { stream: 0, .. }), "{error}");
    assert!(reasons.len() == 1 && reasons[0].contains(reason), "{reasons:?}");
}

#[test]
fn another_protocol_version_is_refused_by_its_numbers() {
    let (error, reasons) = against(|source| {
        source.say(Said::Hello(v1::Hello {
            protocol_newest: 4,
            protocol_oldest: 3,
            ..source.hello()
        }));
    });
    assert!(matches!(error, DestinationError::Incompatible(_)));
    assert_eq!(
        reasons,
        ["protocol version: the source speaks 3 to 4, this host 1 to 2"]
    );
}

#[test]
fn a_frame_with_a_wrong_checksum_is_refused() {
    frame_is_refused(
        &RawFrame {
            checksum_flip: 1,
            ..RawFrame::page(3)
        },
        "checksum",
    );
}

#[test]
fn a_frame_with_a_wrong_length_is_refused() {
    frame_is_refused(
        &RawFrame {
            payload: 8192,
            ..RawFrame::page(3)
        },
        "a frame length of 8192 bytes",
    );
}

#[test]
fn a_frame_of_more_than_a_frame_may_carry_is_refused() {
    frame_is_refused(
        &RawFrame {
            payload: u32::MAX,
            ..RawFrame::page(3)
        },
        "4294967295 bytes",
    );
}

/// A frame of a page that is said to be compressed, after its header: a source that offered to compress so, or not.
#[track_caller]
fn block_is_refused(offered: &[u32], codec: u8, block: &[u8], reason: &str) {
    let (error, reasons) = against(|source| {
        source.up_to_pages_compressed(offered);
        let frame = RawFrame {
            codec,
            payload: block.len() as u32,
            ..RawFrame::page(3)
        };
        source.write(0, &[&frame.bytes(), block].concat());
    });
    assert!(matches!(error, DestinationError::Frame { stream: 0, .. }), "{error}");
    assert!(reasons.len() == 1 && reasons[0].contains(reason), "{reasons:?}");
}

fn with_sum(block: &[u8]) -> Vec<u8> {
    [&crc32fast::hash(block).to_le_bytes(), block].concat()
}

#[test]
fn compressed_pages_that_were_not_agreed_on_are_refused() {
    block_is_refused(
        &[],
        1,
        &[0; 100],
        "frame 1 is compressed in format 1, which was not agreed on",
    );
    block_is_refused(
        &[1],
        2,
        &[0; 100],
        "frame 1 is compressed in format 2, which was not agreed on",
    );
    block_is_refused(
        &[1, 2, 3],
        3,
        &[0; 100],
        "frame 1 is compressed in format 3, which was not agreed on",
    );
}

#[test]
fn compressed_pages_that_are_damaged_are_refused() {
    let mut block = with_sum(&lz4_flex::block::compress(&[7; 4096]));
    block[6] ^= 1;
    block_is_refused(
        &[1],
        1,
        &block,
        "the compressed pages of frame 1 do not have the checksum",
    );
}

#[test]
fn bombs_are_refused() {
    let zeroes = vec![0; 16 << 20];
    let mut zstd = vec![0; 4000];
    let len = zstd_safe::compress(&mut zstd[..], &zeroes, 3).unwrap();
    block_is_refused(
        &[2],
        2,
        &with_sum(&zstd[..len]),
        "the zstd block of frame 1 is not its 4096 bytes of pages",
    );
    let lz4 = lz4_flex::block::compress(&vec![0; 256 << 10]);
    assert!(lz4.len() < 4000);
    block_is_refused(
        &[1],
        1,
        &with_sum(&lz4),
        "the lz4 block of frame 1 is not its 4096 bytes of pages",
    );
}

#[test]
fn compressed_pages_that_save_nothing_are_refused() {
    block_is_refused(
        &[2],
        2,
        &[0; 4096],
        "frame 1 has 4096 bytes of compressed pages in the place of 4096",
    );
    block_is_refused(
        &[2],
        2,
        &[0; 4],
        "frame 1 has 4 bytes of compressed pages in the place of 4096",
    );
}

#[test]
fn a_page_outside_the_guest_is_refused() {
    frame_is_refused(&RawFrame::page(1 << 40), "0x10000000000 on are not guest memory");
}

#[test]
fn a_page_of_another_round_is_refused() {
    frame_is_refused(
        &RawFrame {
            round: 2,
            ..RawFrame::page(3)
        },
        "round 2 while round 1",
    );
}

#[test]
fn a_frame_of_another_layout_is_refused() {
    frame_is_refused(
        &RawFrame {
            version: 2,
            ..RawFrame::page(3)
        },
        "frame version 2",
    );
}

#[test]
fn something_that_is_no_frame_is_refused() {
    frame_is_refused(
        &RawFrame {
            magic: *b"HTTP",
            ..RawFrame::page(3)
        },
        "magic number",
    );
}

#[test]
fn a_page_stream_of_another_migration_is_refused() {
    let (error, _) = against(|source| {
        source.say(Said::Hello(source.hello()));
        source.reply();
        source.say(Said::Population(v1::Population {
            last: true,
            ..v1::Population::default()
        }));
        source.write(0, &raw::opening(9));
    });
    assert!(matches!(error, DestinationError::Frame { stream: 0, .. }), "{error}");
}

#[track_caller]
fn map_is_refused(parts: &[&[u64]], problem: &str) {
    let (error, _) = against(|source| {
        source.say(Said::Hello(source.hello()));
        source.reply();
        for populated in parts {
            source.say(Said::Population(v1::Population {
                populated: populated.to_vec(),
                ..v1::Population::default()
            }));
        }
    });
    assert!(
        matches!(&error, DestinationError::Misbehaved(what) if what.contains(problem)),
        "{error}"
    );
}

#[test]
fn a_population_map_that_says_nothing_for_ever_is_refused() {
    map_is_refused(&[&[]], "empty and not the last");
}

#[test]
fn a_population_map_that_names_pages_again_and_again_is_refused() {
    map_is_refused(&[&[100, 10], &[105, 10]], "not in the order of memory");
}

#[test]
fn nothing_is_believed_of_a_message_that_was_damaged_on_its_way() {
    let (error, _) = against(|source| {
        source.say(Said::Hello(source.hello()));
        source.reply();
        let map = Said::Population(v1::Population {
            last: true,
            ..v1::Population::default()
        });
        raw::say_damaged(&source.link.control, &v1::FromSource { message: Some(map) });
    });
    assert!(
        matches!(error, DestinationError::ControlLost(ControlError::Damaged { .. })),
        "{error}"
    );
}

#[test]
fn go_without_the_state_is_misbehaviour() {
    let (error, reasons) = against(|source| {
        source.up_to_pages();
        source.say(Said::Go(v1::Go::default()));
    });
    assert!(matches!(error, DestinationError::Misbehaved(_)));
    assert_eq!(reasons, ["the source misbehaved: it said go while copying"]);
}

#[test]
fn a_stale_attempt_is_misbehaviour() {
    let wire = v1::Attempt {
        instance: attempt(1).instance.as_bytes().to_vec(),
        migration: attempt(1).migration.as_bytes().to_vec(),
        attempt: 1,
        epoch: attempt(1).epoch.0,
    };
    let (error, _) = against(|source| {
        source.up_to_pages();
        source.say(Said::Disarm(v1::Disarm {
            attempt: Some(wire.clone()),
            reason: "over the budget".into(),
        }));
        source.say(Said::State(v1::State {
            attempt: Some(wire),
            machine_state: Vec::new(),
        }));
    });
    assert!(matches!(error, DestinationError::Misbehaved(what) if what.ends_with("was called off before")));
}

fn wire_attempt() -> v1::Attempt {
    v1::Attempt {
        instance: attempt(1).instance.as_bytes().to_vec(),
        migration: attempt(1).migration.as_bytes().to_vec(),
        attempt: 1,
        epoch: attempt(1).epoch.0,
    }
}

/// Up to the state of a guest without a page, by a source that wants to compare, or does not.
fn up_to_state(source: &RawSource, verify: bool) {
    source.say(Said::Hello(v1::Hello {
        protocol_newest: 2,
        verify,
        ..source.hello()
    }));
    assert!(matches!(source.reply(), Some(Reply::HelloReply(reply)) if reply.refusals.is_empty()));
    source.say(Said::Population(v1::Population {
        last: true,
        ..v1::Population::default()
    }));
    assert!(matches!(source.reply(), Some(Reply::PopulationReady(_))));
    source.write(0, &raw::opening(1));
    source.say(Said::State(v1::State {
        attempt: Some(wire_attempt()),
        machine_state: b"state".to_vec(),
    }));
}

fn compare(sums: Vec<u64>) -> Said {
    Said::Compare(v1::Compare {
        attempt: Some(wire_attempt()),
        totals: vec![v1::StreamTotals::default()],
        sums,
    })
}

#[test]
fn comparing_what_was_not_asked_to_be_digested_is_misbehaviour() {
    let (_, reasons) = against(|source| {
        up_to_state(source, false);
        source.say(compare(vec![0; 17]));
    });
    assert!(reasons[0].contains("compares what it did not ask"), "{reasons:?}");
}

#[test]
fn comparing_other_ranges_than_there_are_is_misbehaviour() {
    let (_, reasons) = against(|source| {
        up_to_state(source, true);
        source.say(compare(vec![0; 3]));
    });
    assert!(
        reasons[0].contains("compares 3 ranges where there are 17"),
        "{reasons:?}"
    );
}

#[test]
fn a_barrier_while_the_guest_stands_still_and_nothing_differs_is_misbehaviour() {
    let (_, reasons) = against(|source| {
        up_to_state(source, true);
        source.say(compare(vec![0; 17]));
        source.say(Said::Barrier(v1::Barrier {
            round: 1,
            totals: vec![v1::StreamTotals::default()],
        }));
    });
    assert!(
        reasons[0].contains("it said barrier while its guest was stopped"),
        "{reasons:?}"
    );
}

/// GO of a guest without a page, whatever was compared before.
#[track_caller]
fn go_is_refused_after(act: impl FnOnce(&RawSource)) {
    let manifest = v1::Manifest {
        attempt: Some(wire_attempt()),
        totals: vec![v1::StreamTotals::default()],
        state_checksum: xxhash_rust::xxh3::xxh3_128(b"state").to_le_bytes().to_vec(),
        ..v1::Manifest::default()
    };
    let (error, _) = against(|source| {
        up_to_state(source, true);
        act(source);
        source.say(Said::Go(v1::Go {
            manifest: Some(manifest),
        }));
    });
    assert!(
        matches!(&error, DestinationError::ManifestRefused(reasons) if reasons[0].starts_with("what is here was not compared")),
        "{error}"
    );
}

#[test]
fn go_of_what_was_not_compared_is_refused() {
    go_is_refused_after(|_| ());
}

#[test]
fn go_of_what_differs_is_refused() {
    go_is_refused_after(|source| source.say(compare([vec![7], vec![0; 16]].concat())));
}

#[test]
fn a_manifest_that_lists_other_pages_than_arrived_is_refused() {
    let wire = v1::Attempt {
        instance: attempt(1).instance.as_bytes().to_vec(),
        migration: attempt(1).migration.as_bytes().to_vec(),
        attempt: 1,
        epoch: attempt(1).epoch.0,
    };
    let totals = vec![v1::StreamTotals {
        frames: 1,
        pages: 2,
        zero_pages: 0,
        bytes: 4144,
    }];
    let manifest = v1::Manifest {
        attempt: Some(wire.clone()),
        totals,
        ..v1::Manifest::default()
    };
    let (error, _) = against(|source| {
        source.up_to_pages();
        source.write(0, &RawFrame::page(3).bytes());
        source.write(0, &[1; 4096]);
        source.say(Said::State(v1::State {
            attempt: Some(wire),
            machine_state: b"state".to_vec(),
        }));
        source.say(Said::Go(v1::Go {
            manifest: Some(manifest),
        }));
    });
    assert!(matches!(error, DestinationError::ManifestRefused(_)), "{error}");
}

#[test]
fn states_without_end_are_not_kept_while_pages_are_awaited() {
    let (error, _) = against(|source| {
        source.up_to_pages();
        let awaited = v1::StreamTotals {
            frames: 5,
            ..v1::StreamTotals::default()
        };
        source.say(Said::Barrier(v1::Barrier {
            round: 1,
            totals: vec![awaited],
        }));
        for _ in 0..3 {
            source.say(Said::State(v1::State {
                attempt: None,
                machine_state: vec![0; 7 << 20],
            }));
        }
    });
    assert!(
        matches!(&error, DestinationError::Misbehaved(what) if what.contains("without waiting")),
        "{error}"
    );
}
