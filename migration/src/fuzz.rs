//! Ways in for the fuzz targets, which see only what is public. The tests feed them too.

use std::io::{Cursor, Seek, SeekFrom};

use ferry_proto::stream::v1::{self, from_destination, from_source};
use uuid::Uuid;

use crate::PageSet;
use crate::compress::{Block, Codec, Codecs, Decompressor};
use crate::guest::{FRAME_SIZE, FrameRun, MemoryShape, Region};
use crate::handover::Epoch;
use crate::postcopy::Table;
use crate::source::{Holding, Unacknowledged};
use crate::verify::Ranges;
use crate::wire::{
    FrameReader, Holdings, StreamIdentity, Sums, Versions, attempt_from_wire, check_hello, digest_from_wire,
    read_message, runs_from_wire, summed_up,
};

fn shape() -> MemoryShape {
    let region = |start_frame, frames| Region { start_frame, frames };
    MemoryShape::new(vec![region(0, 4096), region(1 << 20, 1000)]).expect("in order and not empty")
}

fn identity() -> StreamIdentity {
    StreamIdentity {
        instance: Uuid::nil(),
        migration: Uuid::nil(),
        epoch: Epoch(1),
        streams: 1,
        session: 0,
    }
}

/// A page stream whose frames sum up: whatever is accepted lies in guest memory. And what asks for late pages.
pub fn page_frames(bytes: &[u8]) {
    let (bytes, shape) = (summed_up(bytes), shape());
    let (mut reader, mut source) = (FrameReader::new(0), Cursor::new(&bytes));
    while let Ok(Some(asked)) = reader.asked(&mut source, &shape) {
        let runs = asked.touched.iter().chain(asked.beside);
        assert!(runs.into_iter().all(|&run| shape.contains(run)));
    }
    for sums in [Sums::Absent, Sums::Told] {
        pages_of_frames(&bytes, sums, &shape);
    }
}

fn pages_of_frames(bytes: &[u8], sums: Sums, shape: &MemoryShape) {
    let reader = || FrameReader::new(0).with_codecs(Codecs::ours()).with_sums(sums);
    let (mut reader_opened, mut source) = (reader(), Cursor::new(bytes));
    let mut decompressor = Decompressor::default();
    if !matches!(reader_opened.open(&mut source, &identity()), Ok(Some(()))) {
        (reader_opened, source) = (reader(), Cursor::new(bytes));
    }
    while let Ok(Some(pages)) = reader_opened.pages(&mut source, shape) {
        assert_eq!(pages.sum.is_some(), sums == Sums::Told);
        assert!(pages.data.iter().chain(pages.zero).all(|&run| shape.contains(run)));
        assert!(pages.delta.iter().all(|run| pages.data.contains(run)));
        assert!(pages.delta.is_empty() || pages.block.is_some());
        let data: u64 = pages.data.iter().map(|run| run.count * FRAME_SIZE).sum();
        if let Some(block) = pages.block {
            match decompressor.unpack(&mut source, block) {
                Ok(unpacked) => assert_eq!(unpacked.len() as u64, data),
                Err(_) => return,
            }
            continue;
        }
        if source.seek(SeekFrom::Current(data.cast_signed())).is_err() {
            return;
        }
    }
}

/// The compressed pages of a frame. The first byte says in which format they are and how many pages they stand for; their checksum is made right.
pub fn compressed_pages(bytes: &[u8]) {
    let Some((&first, packed)) = bytes.split_first() else {
        return;
    };
    let codec = if first % 2 == 0 { Codec::Lz4 } else { Codec::Zstd };
    let pages = (usize::from(first / 2) + 1) * 4 * FRAME_SIZE as usize;
    let sent = [&crc32fast::hash(packed).to_le_bytes(), packed].concat();
    let block = Block {
        sequence: 0,
        codec,
        sent: sent.len(),
        pages,
    };
    if let Ok(unpacked) = Decompressor::default().unpack(&mut &*sent, block) {
        assert_eq!(unpacked.len(), pages);
    }
}

/// The control stream, read by either side.
pub fn control_messages(bytes: &[u8]) {
    let (shape, mut source) = (shape(), Cursor::new(bytes));
    let mut tables = LateTables::new(&shape);
    while let Ok(message) = read_message::<v1::FromSource>(&mut source) {
        let said = message.message.into_iter();
        said.for_each(|said| from_a_source(said, &shape, &mut tables));
    }
    let (mut source, mut heard) = (Cursor::new(bytes), Heard::new(&shape));
    while let Ok(message) = read_message::<v1::FromDestination>(&mut source) {
        let said = message.message.into_iter();
        said.for_each(|said| from_a_destination(said, &shape, &mut heard));
    }
}

/// What a source has heard of a destination.
struct Heard {
    tables: LateTables,
    reply: v1::HelloReply,
    holdings: Holdings,
    ranges: Ranges,
}

impl Heard {
    fn new(shape: &MemoryShape) -> Self {
        Self {
            tables: LateTables::new(shape),
            reply: v1::HelloReply::default(),
            holdings: Holdings::new(shape),
            ranges: Ranges::new(shape),
        }
    }

    /// Takes in a part of what the destination holds; with the last one follows what is due of a round that was cut.
    fn holds(&mut self, part: &v1::Holding, shape: &MemoryShape) {
        let Ok(true) = self.holdings.take(part, shape) else {
            return;
        };
        let holding = Holding {
            round: self.reply.round,
            session: self.reply.held_session,
            held: std::mem::replace(&mut self.holdings, Holdings::new(shape)).held(),
        };
        assert!(holding.held.runs().all(|run| shape.contains(run)));
        let mut set = PageSet::new(shape);
        set.insert(shape.regions()[0].run());
        let cut = Unacknowledged {
            session: 1,
            round: 1,
            set: set.clone(),
        };
        if let Ok(due) = cut.due(&holding) {
            let mut rest = set.clone();
            rest.subtract(&holding.held);
            // What came over another link is no part of the round that was cut.
            match (holding.round, holding.session) {
                (1, 1) => assert_eq!(due, rest),
                _ => assert!(due.is_empty() || due == set),
            }
        }
    }
}

fn from_a_destination(said: from_destination::Message, shape: &MemoryShape, heard: &mut Heard) {
    use from_destination::Message as Said;
    match said {
        Said::HelloReply(reply) => {
            let known = Codecs::from_wire(&reply.codecs);
            assert_eq!(Codecs::from_wire(&known.to_wire()), known);
            heard.reply = reply;
        }
        Said::Holding(part) => heard.holds(&part, shape),
        Said::Compared(v1::Compared { attempt, ranges }) => {
            drop(attempt_from_wire(attempt));
            if heard.ranges.are_some(&ranges) {
                let run = |&number: &u32| heard.ranges.run(number as usize);
                let runs: Vec<FrameRun> = ranges.iter().filter_map(run).collect();
                assert_eq!(runs.len(), ranges.len());
                assert!(runs.iter().all(|&run| shape.contains(run)));
                assert!(runs.windows(2).all(|pair| pair[0].end() <= pair[1].first));
            }
        }
        Said::Missing(part) => heard.tables.take(&part, shape),
        Said::Refused(refused) => drop(refused.reasons.concat()),
        // A number that is compared with the open round's, or nothing at all.
        Said::BarrierReached(_) | Said::PopulationReady(_) | Said::AllHere(_) | Said::Ping(_) | Said::Pong(_) => {}
    }
}

/// Tables of late pages as their parts come in: of a guest whose pages come one by one, and of one whose second region is a disk and whose memory is of huge pages.
struct LateTables([Table; 2]);

impl LateTables {
    fn new(shape: &MemoryShape) -> Self {
        Self([Table::new(shape), Table::new(shape)])
    }

    fn take(&mut self, part: &v1::Missing, shape: &MemoryShape) {
        let [by_page, by_huge_page] = &mut self.0;
        let is_disk = |region: Region| region.start_frame > 0;
        let _ = by_page.take_of(part, shape, 1, |_| false);
        let _ = by_huge_page.take_of(part, shape, 512, is_disk);
        for (table, unit) in [(by_page, 1), (by_huge_page, 512)] {
            let runs = table.as_whole().into_iter().flat_map(|set| set.runs());
            runs.for_each(|run| assert!(shape.contains(run) && run.is_of_whole(unit)));
        }
    }
}

fn from_a_source(said: from_source::Message, shape: &MemoryShape, tables: &mut LateTables) {
    use from_source::Message as Said;
    match said {
        Said::Hello(hello) => {
            let _ = check_hello(&hello, &identity(), shape, Versions::OURS, |_| Vec::new());
        }
        Said::Population(v1::Population { populated, huge, .. }) => {
            for runs in [populated, huge] {
                let runs = runs_from_wire(&runs, shape).unwrap_or_default();
                assert!(runs.into_iter().all(|run| shape.contains(run)));
            }
        }
        Said::Missing(part) => tables.take(&part, shape),
        Said::State(v1::State { attempt, .. })
        | Said::DigestRequest(v1::DigestRequest { attempt, .. })
        | Said::Compare(v1::Compare { attempt, .. })
        | Said::Disarm(v1::Disarm { attempt, .. }) => drop(attempt_from_wire(attempt)),
        Said::Go(v1::Go { manifest }) => {
            let manifest = manifest.unwrap_or_default();
            let _ = attempt_from_wire(manifest.attempt);
            let digests = manifest.digests.unwrap_or_default();
            for digest in [manifest.state_checksum, digests.memory, digests.state] {
                assert_eq!(digest_from_wire(&digest, "it").is_ok(), digest.len() == 16);
            }
        }
        Said::Barrier(_) | Said::Abort(_) | Said::Ping(_) | Said::Pong(_) | Said::Proceed(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use ferry_fuzz_inputs::feed;

    use super::*;
    use crate::guest::Population;
    use crate::handover::Attempt;
    use crate::wire::{Content, FrameWriter, Wishes, attempt_to_wire, hello, population_to_wire, written_plainly};

    fn run(first: u64, count: u64) -> FrameRun {
        FrameRun { first, count }
    }

    #[test]
    fn page_frames_are_read_or_refused() {
        let mut writer = FrameWriter::new(0);
        let mut opened = writer.open(&identity()).to_vec();
        let data = [(run(3, 1), Content::Data), (run(1 << 20, 1), Content::Data)];
        opened.extend(writer.pages(0, data.into_iter()));
        opened.extend(vec![7; 2 * FRAME_SIZE as usize]);
        opened.extend(writer.pages(1, [(run(0, 4096), Content::Zero)].into_iter()));
        let many = (0..500).map(|index| (run(index * 2, 1), Content::Zero));
        let not_opened = FrameWriter::new(0).pages(9, many).to_vec();
        let packed = lz4_flex::block::compress(&[7; 2 * FRAME_SIZE as usize]);
        let mut writer = FrameWriter::new(0);
        let mut compressed = writer
            .compressed(1, data.into_iter(), (packed.len() + 4, Codec::Lz4))
            .to_vec();
        let block = [&crc32fast::hash(&packed).to_le_bytes()[..], &packed].concat();
        compressed.extend(&block);
        compressed.extend(writer.pages(1, [(run(0, 4096), Content::Zero)].into_iter()));
        assert_eq!(summed_up(&compressed), compressed);
        let told = [(run(3, 1), Content::Delta), (run(1 << 20, 1), Content::Data)];
        let mut changes = FrameWriter::new(0)
            .compressed(1, told.into_iter(), (packed.len() + 4, Codec::Lz4))
            .to_vec();
        changes.extend(&block);
        let late = FrameWriter::new(0)
            .late(data.into_iter(), None, Some(u64::MAX))
            .to_vec();
        feed(
            "page_frames",
            &[opened, not_opened, compressed, changes, late],
            page_frames,
        );
    }

    #[test]
    fn compressed_pages_are_unpacked_or_refused() {
        let pages: Vec<u8> = (0..16 << 10).map(|index: u32| (index / 96) as u8).collect();
        let mut zstd = vec![0; 16 << 10];
        let len = zstd_safe::compress(&mut zstd[..], &pages, 3).expect("there is room");
        let sample = |first: u8, packed: &[u8]| [&[first], packed].concat();
        let lz4 = sample(0, &lz4_flex::block::compress(&pages));
        compressed_pages(&lz4);
        feed("compressed_pages", &[lz4, sample(1, &zstd[..len])], compressed_pages);
    }

    #[test]
    fn sums_are_made_right() {
        let mut frame = FrameWriter::new(0)
            .pages(0, [(run(3, 1), Content::Zero)].into_iter())
            .to_vec();
        let whole = frame.clone();
        frame[28] ^= 1;
        assert_eq!(summed_up(&frame), whole);
    }

    #[test]
    fn control_messages_are_read_or_refused() {
        use from_source::Message as Said;
        let attempt = Some(attempt_to_wire(Attempt {
            instance: Uuid::nil(),
            migration: Uuid::nil(),
            attempt: 1,
            epoch: Epoch(1),
        }));
        let population = Population {
            populated: vec![run(1, 5), run(100, 1000), run(1 << 20, 1000)],
            huge: vec![run(512, 512)],
        };
        let totals = vec![v1::StreamTotals {
            frames: 1,
            pages: 2,
            zero_pages: 3,
            bytes: 9000,
        }];
        let digests = v1::Digests {
            memory: vec![1; 16],
            state: vec![2; 16],
        };
        let manifest = v1::Manifest {
            attempt: attempt.clone(),
            rounds: 3,
            totals: totals.clone(),
            state_checksum: vec![3; 16],
            paused_by_user: false,
            digests: Some(digests),
            late: Some(v1::LateTable::default()),
        };
        let wishes = Wishes {
            late_streams: 2,
            verify: true,
            codecs: Codecs::ours(),
        };
        let mut said = vec![Said::Hello(hello(&identity(), &shape(), vec![1, 2, 3], wishes))];
        said.extend(population_to_wire(&population).into_iter().map(Said::Population));
        said.extend([
            Said::Barrier(v1::Barrier {
                round: 1,
                totals: totals.clone(),
            }),
            Said::Missing(v1::Missing {
                attempt: attempt.clone(),
                runs: vec![1, 5, 100, 1000],
                last: true,
            }),
            Said::State(v1::State {
                attempt: attempt.clone(),
                machine_state: vec![5; 100],
            }),
            Said::DigestRequest(v1::DigestRequest {
                attempt: attempt.clone(),
                totals: totals.clone(),
            }),
            Said::Compare(v1::Compare {
                attempt: attempt.clone(),
                totals,
                sums: vec![1 << 60, 2, 3],
            }),
            Said::Go(v1::Go {
                manifest: Some(manifest),
            }),
            Said::Disarm(v1::Disarm {
                attempt,
                reason: "late".to_owned(),
            }),
        ]);
        let written = |said: Said| written_plainly(&v1::FromSource { message: Some(said) });
        let each: Vec<Vec<u8>> = said.into_iter().map(written).collect();
        let mut samples = vec![each.concat()];
        samples.extend(each);
        samples.extend(said_by_a_destination());
        feed("control_messages", &samples, control_messages);
    }

    /// Each for itself, and what a source hears when a link is made again.
    fn said_by_a_destination() -> Vec<Vec<u8>> {
        let refused = from_destination::Message::Refused(v1::Refused {
            reasons: vec!["cpu".to_owned(), "memory".to_owned()],
        });
        let reply = from_destination::Message::HelloReply(v1::HelloReply {
            protocol: crate::PROTOCOL,
            begun: true,
            round: 1,
            held_session: 1,
            codecs: Codecs::ours().to_wire(),
            ..v1::HelloReply::default()
        });
        let compared = from_destination::Message::Compared(v1::Compared {
            attempt: None,
            ranges: vec![0, 7, 8],
        });
        let holding = from_destination::Message::Holding(v1::Holding {
            runs: vec![1, 5, 100, 1000],
            last: true,
        });
        let missing = from_destination::Message::Missing(v1::Missing {
            attempt: None,
            runs: vec![0, 512, 0, 512],
            last: true,
        });
        let each = [reply, holding, refused, compared, missing];
        let written = |message| written_plainly(&v1::FromDestination { message: Some(message) });
        let each = each.map(written);
        let mut samples = vec![each[..2].concat()];
        samples.extend(each);
        samples
    }
}
