use proptest::prelude::*;

use super::*;
use crate::compress::{Block, Codec, Codecs};
use crate::guest::{FrameRun, MemoryShape, Region};

const STREAM: u16 = 3;

fn shape() -> MemoryShape {
    MemoryShape::new(vec![
        Region {
            start_frame: 16,
            frames: 4096,
        },
        Region {
            start_frame: 1 << 20,
            frames: 4096,
        },
    ])
    .unwrap()
}

fn identity() -> StreamIdentity {
    StreamIdentity {
        instance: Uuid::from_u128(1),
        migration: Uuid::from_u128(2),
        epoch: Epoch(3),
        streams: 4,
        session: 5,
    }
}

fn run(first: u64, count: u64) -> FrameRun {
    FrameRun { first, count }
}

fn frame(runs: &[(FrameRun, Content)]) -> Vec<u8> {
    FrameWriter::new(STREAM).pages(7, runs.iter().copied()).to_vec()
}

fn read(bytes: &[u8]) -> Result<(u32, Vec<FrameRun>, Vec<FrameRun>), FrameError> {
    let mut reader = FrameReader::new(STREAM);
    let pages = reader.pages(&mut &*bytes, &shape())?.expect("a frame");
    Ok((pages.round, pages.data.to_vec(), pages.zero.to_vec()))
}

/// The frame with its checksum made right again after a change.
fn resealed(mut bytes: Vec<u8>, change: impl FnOnce(&mut [u8])) -> Vec<u8> {
    change(&mut bytes);
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&bytes[..CHECKED_BYTES]);
    hasher.update(&bytes[HEADER_BYTES..]);
    bytes[CHECKED_BYTES..HEADER_BYTES].copy_from_slice(&hasher.finalize().to_le_bytes());
    bytes
}

fn two_runs() -> Vec<u8> {
    frame(&[(run(16, 2), Content::Data), (run(20, 5), Content::Zero)])
}

/// Ascending runs inside the first region, at most a frame's worth.
fn table() -> impl Strategy<Value = Vec<(FrameRun, Content)>> {
    let content = prop_oneof![Just(Content::Data), Just(Content::Zero)];
    prop::collection::vec((0u64..4, 1u64..4, content), 1..100).prop_map(|steps| {
        let mut end = 16;
        let place = |(gap, count, content)| {
            let placed = (run(end + gap, count), content);
            end += gap + count;
            placed
        };
        steps.into_iter().map(place).collect()
    })
}

proptest! {
    #[test]
    fn a_table_comes_out_as_it_went_in(table in table()) {
        let of = |wanted| table.iter().filter(|(_, content)| *content == wanted).map(|&(run, _)| run).collect::<Vec<_>>();
        let (round, data, zero) = read(&frame(&table)).unwrap();
        prop_assert_eq!((round, data, zero), (7, of(Content::Data), of(Content::Zero)));
    }

    #[test]
    fn a_table_with_what_pages_changed_comes_out_as_it_went_in(table in table(), told in prop::collection::vec(any::<bool>(), 100)) {
        let is_data = |content| content == Content::Data;
        let table: Vec<_> = table.iter().zip(told).map(|(&(run, content), told)| match told && is_data(content) {
            true => (run, Content::Delta),
            false => (run, content),
        }).collect();
        let bytes = FrameWriter::new(STREAM).compressed(7, table.iter().copied(), (100, Codec::Lz4)).to_vec();
        let mut reader = FrameReader::new(STREAM).with_codecs(Codecs::ours());
        let of = |wanted: &[Content]| table.iter().filter(|(_, content)| wanted.contains(content)).map(|&(run, _)| run).collect::<Vec<_>>();
        match reader.pages(&mut &*bytes, &shape()) {
            Ok(pages) => {
                let pages = pages.expect("a frame");
                prop_assert_eq!(pages.data, of(&[Content::Data, Content::Delta]));
                prop_assert_eq!(pages.delta, of(&[Content::Delta]));
                prop_assert_eq!(pages.zero, of(&[Content::Zero]));
            }
            Err(error) => prop_assert!(false, "{error}"),
        }
    }

    #[test]
    fn hostile_bytes_are_an_error_and_no_panic(bytes in prop::collection::vec(any::<u8>(), 1..2000)) {
        prop_assert!(FrameReader::new(STREAM).pages(&mut &*bytes, &shape()).is_err());
        prop_assert!(FrameReader::new(STREAM).open(&mut &*bytes, &identity()).is_err());
    }

    #[test]
    fn hostile_tables_with_a_right_checksum_never_leave_guest_memory(table in prop::collection::vec(any::<u8>(), 32)) {
        let bytes = resealed(two_runs(), |bytes| bytes[HEADER_BYTES..].copy_from_slice(&table));
        if let Ok((_, data, zero)) = read(&bytes) {
            prop_assert!(data.iter().chain(&zero).all(|&run| shape().contains(run)));
        }
    }

    #[test]
    fn a_flipped_bit_is_noticed(bit in 0usize..64 * 8) {
        let mut bytes = two_runs();
        bytes[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(read(&bytes).is_err());
    }
}

#[test]
fn an_opening_frame_must_name_this_migration() {
    let bytes = FrameWriter::new(STREAM).open(&identity()).to_vec();
    let other = StreamIdentity {
        epoch: Epoch(4),
        ..identity()
    };
    assert!(matches!(
        FrameReader::new(STREAM).open(&mut &*bytes, &identity()),
        Ok(Some(()))
    ));
    assert!(matches!(
        FrameReader::new(STREAM).open(&mut &*bytes, &other),
        Err(FrameError::Identity(_))
    ));
}

#[test]
fn an_opening_frame_has_nothing_compressed() {
    let bytes = resealed(FrameWriter::new(STREAM).open(&identity()).to_vec(), |bytes| {
        bytes[7] = 1
    });
    let mut reader = FrameReader::new(STREAM).with_codecs(Codecs::ours());
    assert!(matches!(
        reader.open(&mut &*bytes, &identity()),
        Err(FrameError::Reserved(1))
    ));
}

#[test]
fn a_compressed_frame_stands_for_what_its_table_says() {
    let runs = [(run(16, 2), Content::Data), (run(20, 5), Content::Zero)];
    let bytes = FrameWriter::new(STREAM)
        .compressed(7, runs.into_iter(), (100, Codec::Zstd))
        .to_vec();
    let mut reader = FrameReader::new(STREAM).with_codecs(Codecs::ours());
    let pages = reader.pages(&mut &*bytes, &shape()).unwrap().unwrap();
    let block = Block {
        sequence: 0,
        codec: Codec::Zstd,
        sent: 100,
        pages: 8192,
    };
    assert_eq!((pages.block, pages.payload), (Some(block), 100));
    let many = [(run(16, 513), Content::Data)];
    let bytes = FrameWriter::new(STREAM)
        .compressed(7, many.into_iter(), (100, Codec::Zstd))
        .to_vec();
    let mut reader = FrameReader::new(STREAM).with_codecs(Codecs::ours());
    assert!(matches!(
        reader.pages(&mut &*bytes, &shape()),
        Err(FrameError::TooLong(length)) if length == 513 << 12
    ));
}

#[test]
fn what_pages_changed_is_in_a_block_and_only_where_that_was_agreed_on() {
    let runs = [
        (run(16, 2), Content::Delta),
        (run(18, 1), Content::Data),
        (run(20, 5), Content::Zero),
    ];
    let mut writer = FrameWriter::new(STREAM);
    let bytes = writer.compressed(7, runs.into_iter(), (100, Codec::Lz4)).to_vec();
    let mut reader = FrameReader::new(STREAM).with_codecs(Codecs::ours());
    let pages = reader.pages(&mut &*bytes, &shape()).unwrap().unwrap();
    assert_eq!(
        (pages.data, pages.delta),
        (&[run(16, 2), run(18, 1)][..], &[run(16, 2)][..])
    );
    assert_eq!(pages.block.unwrap().pages, 3 << 12);

    let mut reader = FrameReader::new(STREAM).with_codecs(Codecs::ours().without_deltas());
    let refused = reader.pages(&mut &*bytes, &shape());
    assert!(matches!(refused, Err(FrameError::RunKind(4))), "{refused:?}");
    let bytes = FrameWriter::new(STREAM).pages(7, runs.into_iter()).to_vec();
    let mut reader = FrameReader::new(STREAM).with_codecs(Codecs::ours());
    let refused = reader.pages(&mut &*bytes, &shape());
    assert!(matches!(refused, Err(FrameError::RunKind(4))), "{refused:?}");
}

/// A late frame with its sum, read by who expects one or does not.
fn read_late(bytes: &[u8], sums: Sums) -> Result<Option<u64>, FrameError> {
    let mut reader = FrameReader::new(STREAM).with_sums(sums);
    Ok(reader.pages(&mut &*bytes, &shape())?.expect("a frame").sum)
}

#[test]
fn what_the_pages_of_a_late_frame_add_up_to_comes_out_as_it_went_in() {
    let runs = [(run(16, 2), Content::Data), (run(20, 5), Content::Zero)];
    let late = |sum| FrameWriter::new(STREAM).late(runs.into_iter(), None, sum).to_vec();
    assert_eq!(read_late(&late(Some(u64::MAX)), Sums::Told).unwrap(), Some(u64::MAX));
    assert_eq!(read_late(&late(None), Sums::Absent).unwrap(), None);
}

#[test]
fn a_frame_with_a_sum_where_none_is_expected_or_without_is_refused() {
    let with = FrameWriter::new(STREAM)
        .late([(run(16, 2), Content::Data)].into_iter(), None, Some(1))
        .to_vec();
    // Its place is that of a run, which is none.
    assert!(matches!(
        read_late(&with, Sums::Absent),
        Err(FrameError::OutsideMemory { .. })
    ));
    assert!(matches!(read_late(&two_runs(), Sums::Told), Err(FrameError::NoSum)));
    let only_a_run = frame(&[(run(16, 2), Content::Data)]);
    assert!(matches!(
        read_late(&only_a_run, Sums::Told),
        Err(FrameError::Entries(1))
    ));
    let counted = resealed(with, |bytes| bytes[HEADER_BYTES + ENTRY_BYTES + 8] = 1);
    assert!(matches!(read_late(&counted, Sums::Told), Err(FrameError::NoSum)));
}

#[test]
fn a_stream_may_end_between_frames_only() {
    let bytes = two_runs();
    assert!(matches!(
        FrameReader::new(STREAM).pages(&mut &bytes[..0], &shape()),
        Ok(None)
    ));
    assert!(matches!(read(&bytes[..10]), Err(FrameError::Truncated)));
    assert!(matches!(read(&bytes[..40]), Err(FrameError::Truncated)));
}

#[test]
fn a_frame_of_another_stream_or_place_is_refused() {
    let bytes = two_runs();
    assert!(matches!(
        FrameReader::new(0).pages(&mut &*bytes, &shape()),
        Err(FrameError::Stream {
            found: STREAM,
            expected: 0
        })
    ));
    let twice = [bytes.clone(), bytes].concat();
    let mut source = &*twice;
    let mut reader = FrameReader::new(STREAM);
    assert!(reader.pages(&mut source, &shape()).is_ok());
    assert!(matches!(
        reader.pages(&mut source, &shape()),
        Err(FrameError::Sequence { found: 0, expected: 1 })
    ));
}

#[test]
fn each_lie_of_a_header_is_named() {
    let header = |change: fn(&mut [u8])| read(&resealed(two_runs(), change)).unwrap_err();
    assert!(matches!(header(|bytes| bytes[0] = 0), FrameError::Magic(_)));
    assert!(matches!(header(|bytes| bytes[4] = 9), FrameError::Version(9)));
    assert!(matches!(
        header(|bytes| bytes[6] = 1),
        FrameError::Kind { found: 1, expected: 2 }
    ));
    assert!(matches!(
        header(|bytes| bytes[7] = 1),
        FrameError::Codec { sequence: 0, number: 1 }
    ));
    assert!(matches!(header(|bytes| bytes[10..12].fill(0)), FrameError::Entries(0)));
    assert!(matches!(
        header(|bytes| bytes[10..12].fill(0xff)),
        FrameError::Entries(0xffff)
    ));
    assert!(matches!(
        header(|bytes| bytes[24..28].fill(0xff)),
        FrameError::TooLong(0xffff_ffff)
    ));
    assert!(matches!(
        header(|bytes| bytes[25] = 0),
        FrameError::Length { header: 0, table: 8192 }
    ));
}

#[test]
fn each_lie_of_a_table_is_named() {
    let table = |runs: &[(FrameRun, Content)]| read(&frame(runs)).unwrap_err();
    let outside = table(&[(run(4111, 2), Content::Data)]);
    assert!(matches!(outside, FrameError::OutsideMemory { first: 4111, count: 2 }));
    let overlap = table(&[(run(16, 3), Content::Data), (run(18, 1), Content::Zero)]);
    assert!(matches!(overlap, FrameError::Order { first: 18 }));
    let kind = read(&resealed(two_runs(), |bytes| bytes[HEADER_BYTES + 12] = 9)).unwrap_err();
    assert!(matches!(kind, FrameError::RunKind(9)));
}

#[test]
fn what_is_asked_for_comes_out_as_it_went_in() {
    let mut writer = FrameWriter::new(3);
    let wishes = [
        (run(20, 1), Wish::Touched),
        (run(21, 11), Wish::Beside),
        (run(40, 2), Wish::Touched),
    ];
    let mut bytes = writer.asked(wishes.into_iter()).to_vec();
    bytes.extend_from_slice(writer.asked([(run(16, 1), Wish::Touched)].into_iter()));
    let (mut reader, mut source) = (FrameReader::new(3), &*bytes);
    let asked = reader.asked(&mut source, &shape()).unwrap().unwrap();
    assert_eq!(
        (asked.touched, asked.beside),
        (&[run(20, 1), run(40, 2)][..], &[run(21, 11)][..])
    );
    assert_eq!(
        reader.asked(&mut source, &shape()).unwrap().unwrap().touched,
        [run(16, 1)]
    );
    assert_eq!(reader.asked(&mut source, &shape()).unwrap(), None);
}

#[test]
fn pages_and_what_asks_for_them_are_not_taken_for_each_other() {
    let mut writer = FrameWriter::new(3);
    let asked = writer.asked([(run(20, 1), Wish::Touched)].into_iter()).to_vec();
    let mut reader = FrameReader::new(3);
    assert!(matches!(
        reader.pages(&mut &*asked, &shape()),
        Err(FrameError::Kind { found: 3, expected: 2 })
    ));
    let longer = resealed(asked, |bytes| bytes[25] = 16);
    assert!(matches!(
        FrameReader::new(3).asked(&mut &*longer, &shape()),
        Err(FrameError::Length { header: 4096, table: 0 })
    ));
}
