//! What goes before the pages, made.

use zerocopy::IntoBytes;

use super::{
    Content, ENTRY_BYTES, Entry, HEADER_BYTES, Header, KIND_ASKED, KIND_OPEN, KIND_PAGES, MAGIC, MAX_RUNS,
    OPENING_ENTRIES, Opening, RUN_BESIDE, RUN_DATA, RUN_DELTA, RUN_TOUCHED, RUN_ZERO, SUM, StreamIdentity, VERSION,
    Wish, checksum,
};
use crate::compress::Codec;
use crate::guest::{FRAME_SIZE, FrameRun};

/// Makes the frames of one stream: what goes before the pages.
#[derive(Debug)]
pub(crate) struct FrameWriter {
    stream: u16,
    sequence: u64,
    buffer: Vec<u8>,
}

impl FrameWriter {
    pub(crate) fn new(stream: u16) -> Self {
        Self {
            stream,
            sequence: 0,
            buffer: Vec::with_capacity(HEADER_BYTES + MAX_RUNS * ENTRY_BYTES),
        }
    }

    /// The stream's first frame.
    pub(crate) fn open(&mut self, identity: &StreamIdentity) -> &[u8] {
        let opening = Opening {
            instance: *identity.instance.as_bytes(),
            migration: *identity.migration.as_bytes(),
            epoch: identity.epoch.0.into(),
            streams: identity.streams.into(),
            session: identity.session.into(),
        };
        self.buffer.clear();
        self.buffer.resize(HEADER_BYTES, 0);
        self.buffer.extend_from_slice(opening.as_bytes());
        self.seal(KIND_OPEN, 0, OPENING_ENTRIES, (0, None))
    }

    /// Header and table of a frame of pages: 1 to [`MAX_RUNS`] runs, ascending and apart, at most [`MAX_DATA_PAGES`] pages
    /// of them data. The bytes of the data runs follow on the stream.
    pub(crate) fn pages(&mut self, round: u32, runs: impl Iterator<Item = (FrameRun, Content)>) -> &[u8] {
        self.framed(round, runs, None, None)
    }

    /// The same of pages that are compressed: so many bytes follow on the stream in their place, the checksum of the rest first.
    pub(crate) fn compressed(
        &mut self,
        round: u32,
        runs: impl Iterator<Item = (FrameRun, Content)>,
        block: (usize, Codec),
    ) -> &[u8] {
        self.framed(round, runs, Some(block), None)
    }

    /// The same of pages that come late, compressed or not; with what they add up to, where that is checked: at most one run less then.
    pub(crate) fn late(
        &mut self,
        runs: impl Iterator<Item = (FrameRun, Content)>,
        block: Option<(usize, Codec)>,
        sum: Option<u64>,
    ) -> &[u8] {
        self.framed(0, runs, block, sum)
    }

    fn framed(
        &mut self,
        round: u32,
        runs: impl Iterator<Item = (FrameRun, Content)>,
        block: Option<(usize, Codec)>,
        sum: Option<u64>,
    ) -> &[u8] {
        self.buffer.clear();
        self.buffer.resize(HEADER_BYTES, 0);
        let (mut entries, mut data_pages) = (0u16, 0);
        for (run, content) in runs {
            let kind = match content {
                Content::Data => RUN_DATA,
                Content::Zero => RUN_ZERO,
                Content::Delta => RUN_DELTA,
            };
            self.push(run, kind);
            entries += 1;
            data_pages += if content == Content::Zero { 0 } else { run.count };
        }
        if let Some(sum) = sum {
            let entry = Entry {
                first: sum.into(),
                count: 0.into(),
                kind: SUM.into(),
            };
            self.buffer.extend_from_slice(entry.as_bytes());
            entries += 1;
        }
        let plain = || ((data_pages * FRAME_SIZE) as usize, None);
        let payload = block.map_or_else(plain, |(bytes, codec)| (bytes, Some(codec)));
        self.seal(KIND_PAGES, round, entries, payload)
    }

    /// A frame that asks for late pages: 1 to [`MAX_RUNS`] runs, ascending and apart. Nothing follows it.
    pub(crate) fn asked(&mut self, runs: impl Iterator<Item = (FrameRun, Wish)>) -> &[u8] {
        self.buffer.clear();
        self.buffer.resize(HEADER_BYTES, 0);
        let mut entries = 0u16;
        for (run, wish) in runs {
            let kind = match wish {
                Wish::Touched => RUN_TOUCHED,
                Wish::Beside => RUN_BESIDE,
            };
            self.push(run, kind);
            entries += 1;
        }
        self.seal(KIND_ASKED, 0, entries, (0, None))
    }

    /// Adds a run to the table.
    fn push(&mut self, run: FrameRun, kind: u32) {
        let count = u32::try_from(run.count).expect("a run of one frame is far below 2^32 pages");
        let entry = Entry {
            first: run.first.into(),
            count: count.into(),
            kind: kind.into(),
        };
        self.buffer.extend_from_slice(entry.as_bytes());
    }

    fn seal(&mut self, kind: u8, round: u32, entries: u16, payload: (usize, Option<Codec>)) -> &[u8] {
        let (payload, codec) = payload;
        let payload = u32::try_from(payload).expect("a frame's pages are at most 2 MiB");
        let mut header = Header {
            magic: MAGIC.into(),
            version: VERSION.into(),
            kind,
            codec: codec.map_or(0, Codec::number),
            stream: self.stream.into(),
            entries: entries.into(),
            round: round.into(),
            sequence: self.sequence.into(),
            payload: payload.into(),
            checksum: 0.into(),
        };
        header.checksum = checksum(&header, &self.buffer[HEADER_BYTES..]).into();
        self.buffer[..HEADER_BYTES].copy_from_slice(header.as_bytes());
        self.sequence += 1;
        &self.buffer
    }
}
