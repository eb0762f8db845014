//! One sending thread: takes pages from the feed, leaves out those that are zero, and writes frames.

use std::io::{self, IoSlice, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use crate::compress::{Compressor, GuestIs, How, Measured, PackedFrame, Packing};
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
    /// The table as it was, while another one is made of it.
    table_before: Vec<(FrameRun, Content)>,
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
            let sent = self.send(&mut frames, chunk, &mut contents, &mut compressor)?;
            let mut totals = self.totals.lock().unwrap_or_else(PoisonError::into_inner);
            *totals = totals.plus(sent);
            drop(totals);
            self.memory.sent(&runs);
            yielding.give_way(self.memory);
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
        contents: &mut Contents,
        compressor: &mut Compressor,
    ) -> Result<StreamTotals, SendError> {
        let pages = contents.pages();
        let guest = match chunk.pace {
            Pace::Unlimited => GuestIs::Waiting,
            Pace::Yielding | Pace::Hurried => GuestIs::NotWaiting,
        };
        let copies = self.packing.sent_pages();
        if let Some(copies) = copies.filter(|_| chunk.round > 1) {
            contents.zero_runs().for_each(|run| copies.forget(run));
        }
        if pages == 0 {
            let prefix = frames.pages(chunk.round, contents.table.iter().copied());
            return self.write(chunk, contents, prefix, Payload::Memory);
        }
        let plan = self.packing.plan(pages, chunk.round, guest);
        let first = contents.data.first().map_or(0, |run| run.first);
        let deltas = copies.filter(|copies| plan.deltas && copies.keeps(first));
        let sampled = match plan.sample {
            Some(method) => compressor
                .sample(self.memory, &contents.data, method)
                .map_err(SendError::Guest)?,
            None => None,
        };
        let how = How {
            method: plan.method,
            deltas: deltas.zip(Some((chunk.round, guest))),
        };
        let packed = match how {
            How {
                method: None,
                deltas: None,
            } => PackedFrame::default(),
            _ => compressor
                .pack(self.memory, &contents.data, how)
                .map_err(SendError::Guest)?,
        };
        contents.tell_deltas(packed.told);
        let (runs, began) = (contents.table.iter().copied(), Instant::now());
        let sent = match (packed.block, packed.method) {
            (Some(block), Some(method)) => {
                let prefix = frames.compressed(chunk.round, runs, (block.len(), method.codec()));
                self.write(chunk, contents, prefix, Payload::Block(block))?
            }
            // What is kept as sent is what is sent, and not what the guest has written there since.
            _ if deltas.is_some() => {
                let prefix = frames.pages(chunk.round, runs);
                self.write(chunk, contents, prefix, Payload::Copied(packed.plain))?
            }
            _ => self.write(chunk, contents, frames.pages(chunk.round, runs), Payload::Memory)?,
        };
        let bytes = pages * FRAME_SIZE;
        let measured = Measured {
            bytes,
            sent: packed.block.map_or(bytes, |block| block.len() as u64),
            method: packed.method,
            copies: packed.copies,
            deltas: packed.told.iter().map(|run| run.count).sum(),
            compressing: packed.took.time,
            worked: packed.took.work,
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
        payload: Payload<'_>,
    ) -> Result<StreamTotals, SendError> {
        let sent = match payload {
            Payload::Block(block) => contents.totals_of(prefix.len() + block.len()),
            Payload::Memory | Payload::Copied(_) => contents.totals(prefix.len()),
        };
        if chunk.pace != Pace::Unlimited {
            self.bandwidth.wait(sent.bytes);
        }
        let written = match payload {
            Payload::Block(bytes) | Payload::Copied(bytes) => write_both(self.socket, prefix, bytes),
            Payload::Memory => self.memory.send(self.socket.as_fd(), prefix, &contents.data),
        };
        written.map_err(SendError::from_pages)?;
        Ok(sent)
    }
}

/// What follows a frame's table.
#[derive(Clone, Copy)]
enum Payload<'a> {
    /// Its pages, straight out of the guest's memory.
    Memory,
    /// Its pages, as they were copied.
    Copied(&'a [u8]),
    /// What stands for them.
    Block(&'a [u8]),
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
        self.zero_runs().for_each(|run| digests.note_zero(run));
        digests.take(memory, &self.data, &mut self.digests)
    }

    fn zero_runs(&self) -> impl Iterator<Item = FrameRun> {
        let zero = self.table.iter().filter(|(_, content)| *content == Content::Zero);
        zero.map(|&(run, _)| run)
    }

    /// These pages are told by what they changed: runs that ascend, each inside one run of pages.
    fn tell_deltas(&mut self, told: &[FrameRun]) {
        if told.is_empty() {
            return;
        }
        std::mem::swap(&mut self.table, &mut self.table_before);
        self.table.clear();
        let mut told = told.iter().copied().peekable();
        for &(run, content) in &self.table_before {
            if content != Content::Data {
                self.table.push((run, content));
                continue;
            }
            let mut next = run.first;
            while let Some(delta) = told.next_if(|delta| delta.first < run.end()) {
                push_whole(&mut self.table, next, delta.first);
                self.table.push((delta, Content::Delta));
                next = delta.end();
            }
            push_whole(&mut self.table, next, run.end());
        }
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
    data.extend(push_whole(table, first, end));
}

/// The pages from one up to another, if there are any.
fn push_whole(table: &mut Vec<(FrameRun, Content)>, first: u64, end: u64) -> Option<FrameRun> {
    let run = (first < end).then(|| FrameRun {
        first,
        count: end - first,
    })?;
    table.push((run, Content::Data));
    Some(run)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(first: u64, count: u64) -> FrameRun {
        FrameRun { first, count }
    }

    #[test]
    fn what_is_told_by_what_it_changed_is_parted_from_what_is_whole() {
        use Content::{Data, Delta, Zero};
        let mut contents = Contents {
            // Two regions are side by side.
            table: vec![
                (run(0, 8), Data),
                (run(8, 2), Zero),
                (run(10, 4), Data),
                (run(14, 4), Data),
                (run(20, 1), Data),
            ],
            ..Contents::default()
        };
        contents.tell_deltas(&[run(2, 1), run(4, 4), run(12, 2), run(14, 1), run(20, 1)]);
        assert_eq!(
            contents.table,
            [
                (run(0, 2), Data),
                (run(2, 1), Delta),
                (run(3, 1), Data),
                (run(4, 4), Delta),
                (run(8, 2), Zero),
                (run(10, 2), Data),
                (run(12, 2), Delta),
                (run(14, 1), Delta),
                (run(15, 3), Data),
                (run(20, 1), Delta),
            ]
        );
        let before = contents.table.clone();
        contents.tell_deltas(&[]);
        assert_eq!(contents.table, before);
    }
}
