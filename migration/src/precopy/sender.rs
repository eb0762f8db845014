//! One sending thread: takes pages from the feed, leaves out those that are zero, and writes frames.

use std::io::{self, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::sync::{Mutex, PoisonError};

use crate::guest::{DirtyClearer, FRAME_SIZE, FrameRun, GuestError, GuestMemory};
use crate::precopy::bandwidth::Bandwidth;
use crate::precopy::feed::{Feed, Pace, Standing};
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

/// One page stream's sending side.
pub(crate) struct Sender<'a, M, C> {
    pub(crate) stream: u16,
    pub(crate) socket: &'a TcpStream,
    pub(crate) memory: &'a M,
    pub(crate) feed: &'a Feed<C>,
    pub(crate) bandwidth: &'a Bandwidth,
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
        let mut yielding = Yielding::default();
        loop {
            // Whoever waits may be woken for the last pages, and must not be kept from a processor then.
            let chunk = self
                .feed
                .next(&mut runs, || yielding.set(false, self.memory))
                .map_err(SendError::Guest)?;
            let Some(chunk) = chunk else { return Ok(()) };
            let guest_runs = chunk.pace == Pace::Yielding;
            yielding.set(guest_runs, self.memory);
            contents.split(self.memory, &runs).map_err(SendError::Guest)?;
            if let Some(digests) = self.digests {
                let taken = contents.digest(self.memory, digests);
                taken.map_err(SendError::Guest)?;
            }
            let prefix = frames.pages(chunk.round, contents.table.iter().copied());
            let sent = contents.totals(prefix.len());
            if chunk.pace != Pace::Unlimited {
                self.bandwidth.wait(sent.bytes);
            }
            self.memory
                .send(self.socket.as_fd(), prefix, &contents.data)
                .map_err(SendError::Connection)?;
            let mut totals = self.totals.lock().unwrap_or_else(PoisonError::into_inner);
            *totals = totals.plus(sent);
            drop(totals);
            yielding.give_way();
            if self.feed.sent() == Standing::Done {
                round_done();
            }
        }
    }
}

impl Contents {
    /// Splits `runs` into data and zero runs.
    pub(crate) fn split(&mut self, memory: &impl GuestMemory, runs: &[FrameRun]) -> Result<(), GuestError> {
        self.table.clear();
        self.data.clear();
        for &run in runs {
            self.zero.clear();
            memory.zero_pages(run, &mut self.zero)?;
            let mut next = run.first;
            for &zero in &self.zero {
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
        let pages = self.data.iter().map(|run| run.count).sum();
        let told: u64 = self.table.iter().map(|(run, _)| run.count).sum();
        StreamTotals {
            frames: 1,
            pages,
            zero_pages: told - pages,
            bytes: prefix as u64 + pages * FRAME_SIZE,
        }
    }
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
