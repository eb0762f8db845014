//! One receiving thread: reads frames, checks them, and puts their pages into guest memory.

use std::io;
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::compress::{Codecs, Decompressor, apply_delta};
use crate::destination::population::Backing;
use crate::destination::received::Received;
use crate::guest::{FrameRun, GuestError, GuestMemory};
use crate::link::Sockets;
use crate::verify::PageDigests;
use crate::wire::{FrameError, FrameReader, Pages, StreamIdentity, StreamTotals};
use crate::yielding::Yielding;

/// Everything but what the guest wrote meanwhile comes in it. How fast later rounds arrive decides how long the guest
/// stands still: their pages are received without yielding.
const FIRST_ROUND: u32 = 1;

/// What one stream delivered, and what the script waits for.
#[derive(Debug, Default)]
pub(super) struct Delivered(Mutex<Count>);

#[derive(Debug, Default)]
struct Count {
    totals: StreamTotals,
    /// The script wants to be told once so many frames are here.
    wanted: Option<u64>,
}

/// Whether the script will be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Arrival {
    /// So many frames are here already, or more.
    Here,
    /// The receiving thread will tell.
    Awaited,
}

impl Delivered {
    /// Asks to be told once `frames` frames are here.
    pub(super) fn want(&self, frames: u64) -> Arrival {
        let mut count = self.lock();
        if count.totals.frames >= frames {
            return Arrival::Here;
        }
        count.wanted = Some(frames);
        Arrival::Awaited
    }

    pub(super) fn totals(&self) -> StreamTotals {
        self.lock().totals
    }

    /// Adds a frame. True if the script waits for it.
    fn add(&self, frame: StreamTotals) -> bool {
        let mut count = self.lock();
        count.totals = count.totals.plus(frame);
        let frames = count.totals.frames;
        count.wanted.take_if(|wanted| frames >= *wanted).is_some()
    }

    fn lock(&self) -> MutexGuard<'_, Count> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why a receiving thread ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReceiveError {
    /// The stream or what it carried.
    #[error(transparent)]
    Frame(FrameError),
    /// This side's own memory failed.
    #[error(transparent)]
    Guest(GuestError),
}

impl ReceiveError {
    /// What it means that a frame's pages could not be read from the connection.
    fn from_pages(error: io::Error) -> Self {
        let in_frame = |error| Self::Frame(FrameError::from_pages(error));
        GuestError::of_transfer(error).map_or_else(in_frame, Self::Guest)
    }
}

/// What a receiving thread keeps from frame to frame to save allocations.
#[derive(Default)]
struct Scratch {
    digests: Vec<u64>,
    /// What pages were, that are told by what they changed.
    before: Vec<u8>,
    decompressor: Decompressor,
}

/// One page stream's receiving side.
pub(super) struct Receiver<'a, M> {
    pub(super) stream: u16,
    pub(super) socket: &'a TcpStream,
    pub(super) sockets: &'a Sockets,
    pub(super) memory: &'a M,
    pub(super) received: &'a Received,
    pub(super) whole: &'a Received,
    pub(super) backing: &'a Backing,
    pub(super) delivered: &'a Delivered,
    pub(super) digests: Option<&'a PageDigests>,
    /// What pages may be compressed with.
    pub(super) codecs: Codecs,
    /// The round whose barrier comes next.
    pub(super) round: &'a AtomicU32,
}

impl<M: GuestMemory> Receiver<'_, M> {
    /// Receives until the stream ends; calls `arrived` whenever what the script waits for is here.
    ///
    /// # Errors
    /// The first failure; nothing is read after it.
    pub(super) fn run(&self, identity: &StreamIdentity, mut arrived: impl FnMut()) -> Result<(), ReceiveError> {
        let mut reader = FrameReader::new(self.stream).with_codecs(self.codecs);
        let mut socket = self.socket;
        let (mut yielding, mut scratch) = (Yielding::default(), Scratch::default());
        if reader
            .open(&mut socket, identity)
            .map_err(ReceiveError::Frame)?
            .is_none()
        {
            return Ok(());
        }
        loop {
            let pages = reader
                .pages(&mut socket, self.memory.shape())
                .map_err(ReceiveError::Frame)?;
            let Some(pages) = pages else { return Ok(()) };
            let expected = self.round.load(Ordering::Acquire);
            if pages.round != expected {
                return Err(ReceiveError::Frame(FrameError::Round {
                    found: pages.round,
                    expected,
                }));
            }
            self.sockets.hear();
            yielding.set(pages.round == FIRST_ROUND, self.memory);
            let frame = self.take_in(&pages, &mut scratch)?;
            self.sockets.hear();
            if self.delivered.add(frame) {
                arrived();
            }
            yielding.give_way(self.memory);
        }
    }

    fn take_in(&self, pages: &Pages<'_>, scratch: &mut Scratch) -> Result<StreamTotals, ReceiveError> {
        let Pages { data, zero, .. } = *pages;
        // Before its pages count as come, or their memory is backed: a block may be no pages at all.
        let unpacked = match pages.block {
            Some(block) => {
                let unpacked = scratch.decompressor.unpack(&mut &*self.socket, block);
                let bytes = unpacked.map_err(ReceiveError::Frame)?;
                self.apply(pages, bytes, &mut scratch.before)?;
                Some(bytes)
            }
            None => None,
        };
        // Before they are read: a stream that ends inside a frame leaves pages that hold something and count as not come.
        data.iter().for_each(|&run| self.received.insert(run));
        if !data.is_empty() {
            self.backing
                .take(data, |run| self.memory.populate(run))
                .map_err(ReceiveError::Guest)?;
            match unpacked {
                Some(bytes) => self.memory.write_pages(data, bytes).map_err(ReceiveError::Guest)?,
                None => {
                    let taken = self.memory.receive(self.socket.as_fd(), data);
                    taken.map_err(ReceiveError::from_pages)?;
                }
            }
        }
        let digests = &mut scratch.digests;
        self.digest(data, digests).map_err(ReceiveError::Guest)?;
        for &run in zero {
            let zeroed = self.received.runs_in(run, |run| {
                self.memory.write_zeroes(run)?;
                self.digest(&[run], digests)
            });
            zeroed.map_err(ReceiveError::Guest)?;
        }
        data.iter().chain(zero).for_each(|&run| self.whole.insert(run));
        let count = |runs: &[FrameRun]| runs.iter().map(|run| run.count).sum::<u64>();
        Ok(StreamTotals {
            frames: 1,
            pages: count(data),
            zero_pages: count(zero),
            bytes: pages.overhead + pages.payload,
        })
    }

    /// Makes whole pages of those of which the block has what they changed: what is here of them is what was sent last, in a round that is over.
    fn apply(&self, pages: &Pages<'_>, bytes: &mut [u8], before: &mut Vec<u8>) -> Result<(), ReceiveError> {
        let (mut deltas, mut rest) = (pages.delta.iter().peekable(), bytes);
        for &run in pages.data {
            let (changes, after) = rest.split_at_mut(run.bytes() as usize);
            rest = after;
            if deltas.next_if_eq(&&run).is_none() {
                continue;
            }
            // What is on a disk, or was never sent, nobody kept a copy of.
            if run.end() > self.memory.disks_begin() || !self.received.contains(run) {
                let FrameRun { first, count } = run;
                return Err(ReceiveError::Frame(FrameError::DeltaOfNothing { first, count }));
            }
            before.resize(changes.len(), 0);
            self.memory.read_pages(&[run], before).map_err(ReceiveError::Guest)?;
            apply_delta(before, changes);
        }
        Ok(())
    }

    /// Digests what is in memory now, where both sides compare: what it was before it was put there does not count.
    fn digest(&self, runs: &[FrameRun], scratch: &mut Vec<u64>) -> Result<(), GuestError> {
        match self.digests {
            Some(digests) => digests.take(self.memory, runs, scratch),
            None => Ok(()),
        }
    }
}
