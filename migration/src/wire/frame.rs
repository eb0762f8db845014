//! Frames of the page streams: a fixed header, a table of page runs, then the pages. `docs/wire.md` draws them.
//!
//! Header and table carry a checksum; pages do not, because the guest may write one while it is being sent. Compressed ones
//! were copied before, and do. A frame is at most [`MAX_RUNS`] runs and [`MAX_DATA_PAGES`] pages, and everything a peer says is checked before it is used.

mod error;

use std::io::{self, Read};

use uuid::Uuid;
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

#[cfg(any(fuzzing, test))]
use crate::compress::COMPRESSED_SUM_BYTES;
use crate::compress::{Block, Codec, Codecs};
use crate::guest::{FRAME_SIZE, FrameRun, MemoryShape};
use crate::handover::Epoch;
pub use error::FrameError;

/// The most entries in a frame's table.
pub(crate) const MAX_RUNS: usize = 512;
/// The most pages whose bytes follow one table: 2 MiB.
pub(crate) const MAX_DATA_PAGES: u64 = 512;

/// The first bytes of every frame, `FPAG` in ASCII.
const MAGIC: u32 = u32::from_le_bytes(*b"FPAG");
/// The version of this layout.
const VERSION: u16 = 1;

const KIND_OPEN: u8 = 1;
const KIND_PAGES: u8 = 2;
const KIND_ASKED: u8 = 3;
const RUN_DATA: u32 = 1;
const RUN_ZERO: u32 = 2;
/// No run: in the place of a page's number, what the pages of the frame add up to.
const SUM: u32 = 3;
/// What the pages changed since they were sent last follows in the block.
const RUN_DELTA: u32 = 4;
/// In a frame that asks.
const RUN_TOUCHED: u32 = 1;
const RUN_BESIDE: u32 = 2;

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Header {
    magic: U32,
    version: U16,
    kind: u8,
    /// How the pages are compressed; 0: they are not.
    codec: u8,
    stream: U16,
    /// Entries of 16 bytes in the table.
    entries: U16,
    round: U32,
    /// Frames on this stream before this one.
    sequence: U64,
    /// Bytes after the table.
    payload: U32,
    /// CRC-32 of the header up to here and of the table.
    checksum: U32,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Entry {
    first: U64,
    count: U32,
    kind: U32,
}

/// The table of an opening frame: three entries' worth.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Opening {
    instance: [u8; 16],
    migration: [u8; 16],
    epoch: U64,
    streams: U32,
    session: U32,
}

const HEADER_BYTES: usize = size_of::<Header>();
const ENTRY_BYTES: usize = size_of::<Entry>();
const CHECKED_BYTES: usize = HEADER_BYTES - size_of::<U32>();
const OPENING_ENTRIES: u16 = 3;
const _: () = assert!(HEADER_BYTES == 32 && ENTRY_BYTES == 16);
const _: () = assert!(size_of::<Opening>() == ENTRY_BYTES * OPENING_ENTRIES as usize);

/// What a page stream says about itself in its first frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StreamIdentity {
    pub(crate) instance: Uuid,
    pub(crate) migration: Uuid,
    pub(crate) epoch: Epoch,
    pub(crate) streams: u32,
    /// Which link of the migration it is, from 0.
    pub(crate) session: u32,
}

/// What a run of a table tells about its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// Their bytes follow the table, in the table's order.
    Data,
    /// They are all zero.
    Zero,
    /// What they changed since they were sent last follows, in the table's order: the bytes that they had xor those that they have. In a block only.
    Delta,
}

/// Why pages that come late are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wish {
    /// Somebody waits for them.
    Touched,
    /// They are beside one that somebody waits for.
    Beside,
}

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
            let count = u32::try_from(run.count).expect("a run of one frame is far below 2^32 pages");
            let entry = Entry {
                first: run.first.into(),
                count: count.into(),
                kind: kind.into(),
            };
            self.buffer.extend_from_slice(entry.as_bytes());
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
            let count = u32::try_from(run.count).expect("a run of one frame is far below 2^32 pages");
            let entry = Entry {
                first: run.first.into(),
                count: count.into(),
                kind: kind.into(),
            };
            self.buffer.extend_from_slice(entry.as_bytes());
            entries += 1;
        }
        self.seal(KIND_ASKED, 0, entries, (0, None))
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

/// A checked table of late pages that are asked for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct AskedPages<'a> {
    /// Runs that somebody waits for, ascending.
    pub(crate) touched: &'a [FrameRun],
    /// Runs beside them, ascending.
    pub(crate) beside: &'a [FrameRun],
}

/// Reads the frames of one stream up to their pages.
#[derive(Debug)]
pub(crate) struct FrameReader {
    stream: u16,
    /// What pages may be compressed with.
    codecs: Codecs,
    /// Whether frames say what their pages add up to.
    sums: Sums,
    sequence: u64,
    table: Vec<u8>,
    data: Vec<FrameRun>,
    delta: Vec<FrameRun>,
    zero: Vec<FrameRun>,
    sum: Option<u64>,
}

/// Whether frames of pages say what these add up to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Sums {
    /// None does.
    #[default]
    Absent,
    /// Each does.
    Told,
}

/// A checked table. The bytes of `data`, or the block that stands for them, are next on the stream.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Pages<'a> {
    pub(crate) round: u32,
    /// Runs whose pages follow, or what they changed, ascending.
    pub(crate) data: &'a [FrameRun],
    /// Those of them of which the block has what they changed.
    pub(crate) delta: &'a [FrameRun],
    /// Runs that are zero, ascending.
    pub(crate) zero: &'a [FrameRun],
    /// Bytes of header and table.
    pub(crate) overhead: u64,
    /// Bytes after them, at most 2 MiB.
    pub(crate) payload: u64,
    /// If the pages are compressed.
    pub(crate) block: Option<Block>,
    /// What they add up to, where that is told.
    pub(crate) sum: Option<u64>,
}

impl FrameReader {
    pub(crate) fn new(stream: u16) -> Self {
        let table = vec![0; MAX_RUNS * ENTRY_BYTES];
        Self {
            stream,
            codecs: Codecs::default(),
            sums: Sums::Absent,
            sequence: 0,
            table,
            data: Vec::with_capacity(MAX_RUNS),
            delta: Vec::new(),
            zero: Vec::with_capacity(MAX_RUNS),
            sum: None,
        }
    }

    /// Pages may be compressed with these formats, as was agreed on.
    pub(crate) fn with_codecs(self, codecs: Codecs) -> Self {
        Self { codecs, ..self }
    }

    /// Whether frames of pages say what these add up to, as was agreed on.
    pub(crate) fn with_sums(self, sums: Sums) -> Self {
        Self { sums, ..self }
    }

    /// Reads the stream's first frame. `None` if the stream ended before it.
    pub(crate) fn open(&mut self, source: &mut impl Read, expected: &StreamIdentity) -> Result<Option<()>, FrameError> {
        let Some(header) = self.header(source, KIND_OPEN)? else {
            return Ok(None);
        };
        if header.entries.get() != OPENING_ENTRIES {
            return Err(FrameError::Entries(header.entries.get()));
        }
        if header.payload.get() != 0 {
            return Err(FrameError::Length {
                header: header.payload.get().into(),
                table: 0,
            });
        }
        let table = self.table(source, &header)?;
        let opening = Opening::read_from_bytes(table).map_err(|_| FrameError::Entries(header.entries.get()))?;
        let found = StreamIdentity {
            instance: Uuid::from_bytes(opening.instance),
            migration: Uuid::from_bytes(opening.migration),
            epoch: Epoch(opening.epoch.get()),
            streams: opening.streams.get(),
            session: opening.session.get(),
        };
        if found != *expected {
            return Err(FrameError::Identity(found.migration));
        }
        self.sequence += 1;
        Ok(Some(()))
    }

    /// Reads header and table of the next frame of pages. `None` if the stream ended before it.
    pub(crate) fn pages(
        &mut self,
        source: &mut impl Read,
        shape: &MemoryShape,
    ) -> Result<Option<Pages<'_>>, FrameError> {
        let Some(header) = self.header(source, KIND_PAGES)? else {
            return Ok(None);
        };
        let length = u64::from(header.payload.get());
        if length > MAX_DATA_PAGES * FRAME_SIZE {
            return Err(FrameError::TooLong(length));
        }
        self.table(source, &header)?;
        let runs = self.take_sum(header.entries.get())?;
        self.sort_runs(runs, shape)?;
        let table = self.data.iter().map(|run| run.bytes()).sum();
        let sequence = self.sequence;
        let block = match header.codec {
            0 if length != table => return Err(FrameError::Length { header: length, table }),
            // What it unpacks to is all the same what the table says.
            _ if table > MAX_DATA_PAGES * FRAME_SIZE => return Err(FrameError::TooLong(table)),
            // Plain pages are as they are.
            0 if !self.delta.is_empty() => return Err(FrameError::RunKind(RUN_DELTA)),
            0 => None,
            number => {
                let agreed = |&codec: &Codec| self.codecs.contains(codec);
                let codec = Codec::from_number(number).filter(agreed);
                Some(Block {
                    sequence,
                    codec: codec.ok_or(FrameError::Codec { sequence, number })?,
                    sent: length as usize,
                    pages: table as usize,
                })
            }
        };
        self.sequence += 1;
        let overhead = (HEADER_BYTES + usize::from(header.entries.get()) * ENTRY_BYTES) as u64;
        Ok(Some(Pages {
            round: header.round.get(),
            data: &self.data,
            delta: &self.delta,
            zero: &self.zero,
            overhead,
            payload: length,
            block,
            sum: self.sum,
        }))
    }

    /// Reads the next frame that asks for late pages. `None` if the stream ended before it.
    pub(crate) fn asked(
        &mut self,
        source: &mut impl Read,
        shape: &MemoryShape,
    ) -> Result<Option<AskedPages<'_>>, FrameError> {
        let Some(header) = self.header(source, KIND_ASKED)? else {
            return Ok(None);
        };
        if header.payload.get() != 0 {
            return Err(FrameError::Length {
                header: header.payload.get().into(),
                table: 0,
            });
        }
        self.table(source, &header)?;
        self.sort_runs(header.entries.get(), shape)?;
        self.sequence += 1;
        // The kinds of runs have the numbers of those in a frame of pages.
        const { assert!(RUN_TOUCHED == RUN_DATA && RUN_BESIDE == RUN_ZERO) };
        Ok(Some(AskedPages {
            touched: &self.data,
            beside: &self.zero,
        }))
    }

    fn header(&self, source: &mut impl Read, kind: u8) -> Result<Option<Header>, FrameError> {
        let mut bytes = [0; HEADER_BYTES];
        if !read_or_end(source, &mut bytes)? {
            return Ok(None);
        }
        let header = Header::read_from_bytes(&bytes).map_err(|_| FrameError::Truncated)?;
        if header.magic.get() != MAGIC {
            return Err(FrameError::Magic(header.magic.get()));
        }
        if header.version.get() != VERSION {
            return Err(FrameError::Version(header.version.get()));
        }
        let entries = header.entries.get();
        if entries == 0 || usize::from(entries) > MAX_RUNS {
            return Err(FrameError::Entries(entries));
        }
        if header.kind != kind {
            return Err(FrameError::Kind {
                found: header.kind,
                expected: kind,
            });
        }
        Ok(Some(header))
    }

    /// Reads the table and then trusts the header: checksum first, everything that it guards after.
    fn table(&mut self, source: &mut impl Read, header: &Header) -> Result<&[u8], FrameError> {
        let table = &mut self.table[..usize::from(header.entries.get()) * ENTRY_BYTES];
        source.read_exact(table).map_err(FrameError::from_pages)?;
        let computed = checksum(header, table);
        if header.checksum.get() != computed {
            return Err(FrameError::Checksum {
                header: header.checksum.get(),
                computed,
            });
        }
        if header.codec != 0 && header.kind != KIND_PAGES {
            return Err(FrameError::Reserved(header.codec.into()));
        }
        if header.stream.get() != self.stream {
            return Err(FrameError::Stream {
                found: header.stream.get(),
                expected: self.stream,
            });
        }
        if header.sequence.get() != self.sequence {
            return Err(FrameError::Sequence {
                found: header.sequence.get(),
                expected: self.sequence,
            });
        }
        Ok(table)
    }

    /// What the pages add up to is the last entry, where it is told. How many entries are runs.
    fn take_sum(&mut self, entries: u16) -> Result<u16, FrameError> {
        self.sum = None;
        if self.sums == Sums::Absent {
            return Ok(entries);
        }
        // Of a table without runs there is nothing to add up.
        let runs = entries.checked_sub(1).filter(|&runs| runs > 0);
        let runs = runs.ok_or(FrameError::Entries(entries))?;
        let at = usize::from(runs) * ENTRY_BYTES;
        let entry = Entry::read_from_bytes(&self.table[at..at + ENTRY_BYTES]).map_err(|_| FrameError::Truncated)?;
        if entry.kind.get() != SUM || entry.count.get() != 0 {
            return Err(FrameError::NoSum);
        }
        self.sum = Some(entry.first.get());
        Ok(runs)
    }

    fn sort_runs(&mut self, entries: u16, shape: &MemoryShape) -> Result<(), FrameError> {
        self.data.clear();
        self.delta.clear();
        self.zero.clear();
        let mut end = 0;
        for bytes in self.table[..usize::from(entries) * ENTRY_BYTES].chunks_exact(ENTRY_BYTES) {
            let entry = Entry::read_from_bytes(bytes).map_err(|_| FrameError::Truncated)?;
            let run = FrameRun {
                first: entry.first.get(),
                count: entry.count.get().into(),
            };
            if !shape.contains(run) {
                return Err(FrameError::OutsideMemory {
                    first: run.first,
                    count: run.count,
                });
            }
            if run.first < end {
                return Err(FrameError::Order { first: run.first });
            }
            end = run.end();
            match entry.kind.get() {
                RUN_DATA => self.data.push(run),
                RUN_ZERO => self.zero.push(run),
                RUN_DELTA if self.codecs.has_deltas() => {
                    self.data.push(run);
                    self.delta.push(run);
                }
                other => return Err(FrameError::RunKind(other)),
            }
        }
        Ok(())
    }
}

fn checksum(header: &Header, table: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&header.as_bytes()[..CHECKED_BYTES]);
    hasher.update(table);
    hasher.finalize()
}

/// The same bytes with the checksum of each frame in them made right, as far as they are frames: a hostile peer's sum up, too.
#[cfg(any(fuzzing, test))]
pub(crate) fn summed_up(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let mut rest = bytes.as_mut_slice();
    while let Some((frame, after)) = rest.split_at_mut_checked(HEADER_BYTES) {
        let Ok(mut header) = Header::read_from_bytes(frame) else {
            break;
        };
        let table = usize::from(header.entries.get()) * ENTRY_BYTES;
        let Some((table, pages)) = after.split_at_mut_checked(table) else {
            break;
        };
        header.checksum = checksum(&header, table).into();
        frame.copy_from_slice(header.as_bytes());
        let Some((payload, next)) = pages.split_at_mut_checked(header.payload.get() as usize) else {
            break;
        };
        if header.codec != 0
            && let Some((sum, block)) = payload.split_at_mut_checked(COMPRESSED_SUM_BYTES)
        {
            sum.copy_from_slice(&crc32fast::hash(block).to_le_bytes());
        }
        rest = next;
    }
    bytes
}

/// Fills `bytes`, or tells that the stream ended before the first of them.
pub(super) fn read_or_end(source: &mut impl Read, bytes: &mut [u8]) -> Result<bool, FrameError> {
    let first = loop {
        match source.read(bytes) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => break result.map_err(FrameError::Io)?,
        }
    };
    if first == 0 {
        return Ok(false);
    }
    source.read_exact(&mut bytes[first..]).map_err(FrameError::from_pages)?;
    Ok(true)
}

#[cfg(test)]
mod tests;
