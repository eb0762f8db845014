//! One sending thread: takes pages from the feed, leaves out those that are zero, and writes frames.

use std::io::{self, IoSlice, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use crate::compress::{Compressor, GuestIs, Measured, Packing, Took};
use crate::guest::{DirtyClearer, FRAME_SIZE, FrameRun, GuestError, GuestMemory};
use crate::precopy::bandwidth::Bandwidth;
use crate::precopy::feed::{Chunk, Feed, Pace, Standing};
use crate::verify::PageDigests;
use crate::wire::{Content, FrameWriter, StreamIdentity, StreamTotals};
use crate::yielding::Yielding;

/// Why a sending thread ended before it was sent home.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SendError {
    /// The connection failed.
    #[error("the connection failed")]
    Connection(#[source] io::Error),
    /// This side's own guest failed.
    #[error(transparent)]
    Guest(GuestError),
}

impl SendError {
    /// What it means that pages could not be written to the connection.
    fn from_pages(error: io::Error) -> Self {
        GuestError::of_transfer(error).map_or_else(Self::Connection, Self::Guest)
    }
}

/// One page stream's sending side.
pub(crate) struct Sender<'a, M, C> {
    pub(crate) stream: u16,
    /// How many there are.
    pub(crate) streams: u32,
    pub(crate) socket: &'a TcpStream,
    pub(crate) memory: &'a M,
    pub(crate) feed: &'a Feed<C>,
    pub(crate) bandwidth: &'a Bandwidth,
    pub(crate) packing: &'a Packing,
    pub(crate) totals: &'a Mutex<StreamTotals>,
    pub(crate) digests: Option<&'a PageDigests>,
}

/// What goes into the frame that is being made; kept to save allocations.
#[derive(Default)]
pub(crate) struct Contents {
    zero: Vec<FrameRun>,
    pub(crate) table: Vec<(FrameRun, Content)>,
    pub(crate) data: Vec<FrameRun>,
    digests: Vec<u64>,
}

impl<M: GuestMemory, C: DirtyClearer> Sender<'_, M, C> {
    /// Sends until the feed is closed; calls `round_done` whenever this thread sent the last pages of a round.
    ///
    /// # Errors
    /// The first failure; nothing is sent after it.
    pub(crate) fn run(&self, identity: &StreamIdentity, mut round_done: impl FnMut()) -> Result<(), SendError> {
        let mut frames = FrameWriter::new(self.stream);
        let mut socket = self.socket;
        socket.write_all(frames.open(identity)).map_err(SendError::Connection)?;
        let (mut runs, mut contents) = (Vec::new(), Contents::default());
        let (mut yielding, mut compressor) = (Yielding::default(), Compressor::default());
        loop {
            // Whoever waits may be woken for the last pages, and must not be kept from a processor then.
            let chunk = self
                .feed
                .next(&mut runs, self.packing.most_pages(), || {
                    yielding.set(false, self.memory)
                })
                .map_err(SendError::Guest)?;
            let Some(chunk) = chunk else { return Ok(()) };
            if runs.is_empty() {
                if self.feed.sent() == Standing::Done {
                    round_done();
                }
                continue;
            }
            let guest_runs = chunk.pace == Pace::Yielding;
            yielding.set(guest_runs, self.memory);
            contents.split(self.memory, &runs, 1).map_err(SendError::Guest)?;
            if let Some(digests) = self.digests {
                let taken = contents.digest(self.memory, digests);
                taken.map_err(SendError::Guest)?;
            }
            let sent = self.send(&mut frames, chunk, &contents, &mut compressor)?;
            let mut totals = self.totals.lock().unwrap_or_else(PoisonError::into_inner);
            *totals = totals.plus(sent);
            drop(totals);
            self.memory.sent(&runs);
            yielding.give_way();
            if self.feed.sent() == Standing::Done {
                round_done();
            }
        }
    }

    /// Sends a frame, compressed if that is wanted and makes it any smaller.
    fn send(
        &self,
        frames: &mut FrameWriter,
        chunk: Chunk,
        contents: &Contents,
        compressor: &mut Compressor,
    ) -> Result<StreamTotals, SendError> {
        let pages = contents.pages();
        let guest = match chunk.pace {
            Pace::Unlimited => GuestIs::Waiting,
            Pace::Yielding | Pace::Hurried => GuestIs::NotWaiting,
        };
        if pages == 0 {
            let prefix = frames.pages(chunk.round, contents.table.iter().copied());
            return self.write(chunk, contents, prefix, None);
        }
        let plan = self.packing.plan(pages, guest);
        let sampled = match plan.sample {
            Some(method) => compressor
                .sample(self.memory, &contents.data, method)
                .map_err(SendError::Guest)?,
            None => None,
        };
        let (block, compressing) = match plan.method {
            Some(method) => {
                let packed = compressor.pack(self.memory, &contents.data, method);
                let packed = packed.map_err(SendError::Guest)?;
                (packed.block.zip(Some(method.codec())), packed.took)
            }
            None => (None, Took::default()),
        };
        let runs = contents.table.iter().copied();
        let began = Instant::now();
        let sent = match block {
            Some((bytes, codec)) => {
                let prefix = frames.compressed(chunk.round, runs, (bytes.len(), codec));
                self.write(chunk, contents, prefix, Some(bytes))?
            }
            None => self.write(chunk, contents, frames.pages(chunk.round, runs), None)?,
        };
        let bytes = pages * FRAME_SIZE;
        let measured = Measured {
            bytes,
            sent: block.map_or(bytes, |(block, _)| block.len() as u64),
            method: plan.method,
            compressing: compressing.time,
            worked: compressing.work,
            sending: began.elapsed(),
            sampled,
            streams: self.streams,
            cap: self.bandwidth.cap(),
        };
        self.packing.sent(&measured, guest);
        Ok(sent)
    }

    /// Writes header and table, and then the pages or what stands for them.
    fn write(
        &self,
        chunk: Chunk,
        contents: &Contents,
        prefix: &[u8],
        block: Option<&[u8]>,
    ) -> Result<StreamTotals, SendError> {
        let sent = match block {
            Some(block) => contents.totals_of(prefix.len() + block.len()),
            None => contents.totals(prefix.len()),
        };
        if chunk.pace != Pace::Unlimited {
            self.bandwidth.wait(sent.bytes);
        }
        let written = match block {
            Some(block) => write_both(self.socket, prefix, block),
            None => self.memory.send(self.socket.as_fd(), prefix, &contents.data),
        };
        written.map_err(SendError::from_pages)?;
        Ok(sent)
    }
}

/// Writes one after the other, in one call as far as the connection takes it.
pub(crate) fn write_both(mut socket: &TcpStream, first: &[u8], second: &[u8]) -> io::Result<()> {
    let mut parts = [IoSlice::new(first), IoSlice::new(second)];
    let mut left = &mut parts[..];
    while !left.is_empty() {
        match socket.write_vectored(left) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => IoSlice::advance_slices(&mut left, written),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

impl Contents {
    /// Splits `runs`, whole units of so many pages, into units that hold something and units that are zero.
    pub(crate) fn split(&mut self, memory: &impl GuestMemory, runs: &[FrameRun], unit: u64) -> Result<(), GuestError> {
        self.table.clear();
        self.data.clear();
        for &run in runs {
            self.zero.clear();
            memory.zero_pages(run, &mut self.zero)?;
            let mut next = run.first;
            for zero in self.zero.iter().filter_map(|&zero| whole_units(zero, unit)) {
                push_data(&mut self.table, &mut self.data, next, zero.first);
                self.table.push((zero, Content::Zero));
                next = zero.end();
            }
            push_data(&mut self.table, &mut self.data, next, run.end());
        }
        Ok(())
    }

    /// Digests them as they are now, which is after their range was re-armed: whoever writes one from here on makes it dirty.
    fn digest(&mut self, memory: &impl GuestMemory, digests: &PageDigests) -> Result<(), GuestError> {
        let zero = self.table.iter().filter(|(_, content)| *content == Content::Zero);
        zero.for_each(|&(run, _)| digests.note_zero(run));
        digests.take(memory, &self.data, &mut self.digests)
    }

    /// What a frame of them carries, given the bytes before its pages.
    pub(crate) fn totals(&self, prefix: usize) -> StreamTotals {
        self.totals_of(prefix + (self.pages() * FRAME_SIZE) as usize)
    }

    /// Pages that are not zero.
    fn pages(&self) -> u64 {
        self.data.iter().map(|run| run.count).sum()
    }

    /// What a frame of them carries that has so many bytes in all.
    fn totals_of(&self, bytes: usize) -> StreamTotals {
        let pages = self.pages();
        let told: u64 = self.table.iter().map(|(run, _)| run.count).sum();
        StreamTotals {
            frames: 1,
            pages,
            zero_pages: told - pages,
            bytes: bytes as u64,
        }
    }
}

/// The units that lie in this run, if any.
fn whole_units(run: FrameRun, unit: u64) -> Option<FrameRun> {
    let first = run.first.next_multiple_of(unit);
    let end = run.end() - run.end() % unit;
    (first < end).then(|| FrameRun {
        first,
        count: end - first,
    })
}

fn push_data(table: &mut Vec<(FrameRun, Content)>, data: &mut Vec<FrameRun>, first: u64, end: u64) {
    if first < end {
        let run = FrameRun {
            first,
            count: end - first,
        };
        table.push((run, Content::Data));
        data.push(run);
    }
}
