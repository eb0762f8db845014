//! What goes before the pages, read and checked.

use std::io::{self, Read};

use uuid::Uuid;
use zerocopy::FromBytes;

use super::{
    ENTRY_BYTES, Entry, FrameError, HEADER_BYTES, Header, KIND_ASKED, KIND_OPEN, KIND_PAGES, MAGIC, MAX_DATA_PAGES,
    MAX_RUNS, OPENING_ENTRIES, Opening, RUN_BESIDE, RUN_DATA, RUN_DELTA, RUN_TOUCHED, RUN_ZERO, SUM, StreamIdentity,
    VERSION, checksum,
};
use crate::compress::{Block, Codec, Codecs};
use crate::guest::{FRAME_SIZE, FrameRun, MemoryShape};
use crate::handover::Epoch;

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

/// Fills `bytes`, or tells that the stream ended before the first of them.
pub(crate) fn read_or_end(source: &mut impl Read, bytes: &mut [u8]) -> Result<bool, FrameError> {
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
