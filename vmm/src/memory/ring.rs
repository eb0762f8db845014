//! Transfers between a file and guest memory of which many are under way at once (io_uring).
//!
//! ```text
//!   read, write, sync ──► begun ──submit──► with the kernel, in any order ──land──► the work that it was for, and its outcome
//!                           ▲                          │
//!                           └──── rest of a short one ─┘
//! ```
//!
//! What the kernel is asked for here no filter on system calls sees. So a ring is restricted before it is first used
//! (IORING_REGISTER_RESTRICTIONS, `io_uring_register(2)`): it takes three operations, none of them with flags, and no further
//! registration; the kernel never lifts that. A process that is confined makes its rings before ([`keep_rings`]), and none later.

mod spare;

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;

use io_uring::{IoUring, opcode, squeue, types};
use vmm_sys_util::eventfd::EventFd;

pub(crate) use self::spare::keep_rings;
pub use self::spare::probe_rings;
use super::mapping::GuestMemory;
use super::spans::{Span, total};
use super::transfer::{MAX_BUFFERS, advance};

/// Transfers that are under way at once at most: as many as keep a fast disk busy. The kernel holds 64 bytes for each.
const DEPTH: usize = 64;

/// A further transfer is begun while those under way have fewer buffers than this altogether: what a guest can have the host hold for it.
const MOST_BUFFERS: usize = DEPTH * 128;

/// The same for bytes: what a machine that is to stand still may have to wait for. Much more than a fast disk needs to be kept busy.
const MOST_BYTES: u64 = 8 << 20;

/// A ring on one file. `T` is what a transfer is for; it comes back with the outcome.
///
/// Each transfer holds the memory that it is about: that stays mapped until the kernel is done with it, whatever becomes of the ring.
pub(crate) struct Ring<T> {
    /// There until the ring is dropped.
    ring: Option<IoUring>,
    file: Arc<File>,
    /// By the number that the kernel knows them by.
    flights: Vec<Option<Flight<T>>>,
    free: Vec<usize>,
    buffers: usize,
    bytes: u64,
    /// Begun and not with the kernel yet, oldest first.
    begun: VecDeque<usize>,
    /// The kernel takes nothing more.
    is_dead: bool,
}

struct Flight<T> {
    work: T,
    kind: Kind,
    memory: GuestMemory,
    /// Of all its buffers.
    bytes: u64,
    offset: u64,
    buffers: Buffers,
    /// Buffers before this one are done.
    next: usize,
}

enum Kind {
    /// Into these spans.
    Read(Vec<Span>),
    Write,
    Sync,
}

/// Buffers in guest memory, for the kernel only.
struct Buffers(Vec<libc::iovec>);

// SAFETY: the addresses are never followed by this process; the kernel may be given them by any of its threads.
unsafe impl Send for Buffers {}

impl<T> Ring<T> {
    /// A ring for this file.
    ///
    /// # Errors
    /// The kernel has no rings, does not restrict them, or does not allow them; or this process has made what it will need and all are in use.
    pub(crate) fn new(file: Arc<File>) -> io::Result<Self> {
        Ok(Self {
            ring: Some(spare::take()?),
            file,
            flights: (0..DEPTH).map(|_| None).collect(),
            free: (0..DEPTH).rev().collect(),
            buffers: 0,
            bytes: 0,
            begun: VecDeque::with_capacity(DEPTH),
            is_dead: false,
        })
    }

    /// How many transfers are under way.
    pub(crate) fn in_flight(&self) -> usize {
        DEPTH - self.free.len()
    }

    /// Whether so many more can be begun.
    pub(crate) fn has_room_for(&self, further: usize) -> bool {
        self.free.len() >= further && self.buffers < MOST_BUFFERS && self.bytes < MOST_BYTES && !self.is_dead
    }

    /// Whether the kernel takes nothing more: once nothing is in flight, the ring is of no more use.
    pub(crate) fn is_dead(&self) -> bool {
        self.is_dead
    }

    /// Begins to read from `offset` on into `spans`. There must be room.
    ///
    /// # Errors
    /// `InvalidInput` if a span is not wholly inside one region of guest memory; the work comes back.
    pub(crate) fn read(
        &mut self,
        work: T,
        memory: &GuestMemory,
        offset: u64,
        spans: &[Span],
    ) -> Result<(), (T, io::Error)> {
        self.begin(work, Kind::Read(spans.to_vec()), memory, offset, spans)
    }

    /// Begins to write `spans` from `offset` on. There must be room.
    ///
    /// # Errors
    /// `InvalidInput` if a span is not wholly inside one region of guest memory; the work comes back.
    pub(crate) fn write(
        &mut self,
        work: T,
        memory: &GuestMemory,
        offset: u64,
        spans: &[Span],
    ) -> Result<(), (T, io::Error)> {
        self.begin(work, Kind::Write, memory, offset, spans)
    }

    /// Begins to make durable what has been written by transfers that landed (`fdatasync`). There must be room.
    ///
    /// # Errors
    /// None that is possible; the work comes back.
    pub(crate) fn sync(&mut self, work: T, memory: &GuestMemory) -> Result<(), (T, io::Error)> {
        self.begin(work, Kind::Sync, memory, 0, &[])
    }

    fn begin(
        &mut self,
        work: T,
        kind: Kind,
        memory: &GuestMemory,
        offset: u64,
        spans: &[Span],
    ) -> Result<(), (T, io::Error)> {
        let buffers = match memory.span_buffers(spans) {
            Ok(buffers) => Buffers(buffers),
            Err(error) => return Err((work, error)),
        };
        let Some(number) = self.free.pop() else {
            return Err((work, io::ErrorKind::WouldBlock.into()));
        };
        self.buffers += spans.len();
        self.bytes += total(spans);
        self.flights[number] = Some(Flight {
            work,
            kind,
            memory: memory.clone(),
            bytes: total(spans),
            offset,
            buffers,
            next: 0,
        });
        self.hand_over(number);
        Ok(())
    }

    /// Puts what is left of a transfer where the kernel finds it.
    fn hand_over(&mut self, number: usize) {
        let (Some(flight), Some(ring)) = (&self.flights[number], &mut self.ring) else {
            return;
        };
        let entry = flight.entry(self.file.as_fd()).user_data(number as u64);
        // SAFETY: the buffers lie in guest memory, to which no reference points and of which the flight has a handle, and their list is on
        // the heap and not touched; both stay until the kernel has told the outcome, or for ever (`drop`).
        let pushed = unsafe { ring.submission().push(&entry) };
        // There is an entry for each flight, and the kernel frees it as it takes it.
        pushed.expect("the kernel's queue is as long as there are flights");
        self.begun.push_back(number);
    }

    /// Gives the kernel what was begun. What it does not take now is given again with the next call, or lands with `WouldBlock` if it
    /// never will be.
    pub(crate) fn submit(&mut self) {
        let Some(ring) = &self.ring else { return };
        while !self.begun.is_empty() && !self.is_dead {
            match ring.submit() {
                Ok(taken) if taken > 0 => drop(self.begun.drain(..taken.min(self.begun.len()))),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // It has no memory now; what lands gives some back.
                Err(error)
                    if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY))
                        && self.begun.len() < self.flights.len() - self.free.len() =>
                {
                    return;
                }
                told => {
                    tracing::error!(?told, "the kernel takes no more requests to a disk by io_uring");
                    self.is_dead = true;
                }
            }
        }
    }

    /// The next transfer that is over. The rest of one that fell short is given to the kernel.
    pub(crate) fn land(&mut self) -> Option<(T, io::Result<()>)> {
        loop {
            let (number, result) = self.completion()?;
            let Some(Some(flight)) = self.flights.get_mut(number) else {
                tracing::error!(number, "io_uring tells of a request that was not made");
                continue;
            };
            let Some(outcome) = flight.moved(result) else {
                self.hand_over(number);
                self.submit();
                continue;
            };
            let flight = self.flights[number].take()?;
            self.free.push(number);
            self.buffers -= flight.buffers.0.len();
            self.bytes -= flight.bytes;
            if let Kind::Read(spans) = &flight.kind {
                // Also of one that failed: part of it may be there.
                flight.memory.mark_spans(spans);
            }
            return Some((flight.work, outcome));
        }
    }

    /// Waits until something has landed, or the other descriptor is readable. May return early.
    pub(crate) fn wait(&self, other: Option<&EventFd>) {
        let Some(ring) = &self.ring else { return };
        let readable = |fd: RawFd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        };
        // The kernel passes over what is negative.
        let mut fds = [ring.as_raw_fd(), other.map_or(-1, AsRawFd::as_raw_fd)].map(readable);
        // An error is a signal, or no memory for a moment: whoever waits looks and comes again.
        // SAFETY: the array has as many elements as is said, and is this function's own.
        let _ = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, -1) };
    }

    fn completion(&mut self) -> Option<(usize, i32)> {
        if let Some(entry) = self.ring.as_mut()?.completion().next() {
            return Some((entry.user_data() as usize, entry.result()));
        }
        // Nobody gives these to the kernel any more: it will not look at the ring again.
        let refused = self.is_dead.then(|| self.begun.pop_front()).flatten();
        refused.map(|number| (number, -libc::EAGAIN))
    }
}

impl<T> Drop for Ring<T> {
    /// Whoever has a ring lets everything land first. Where that went wrong, a disk may hang, so it is not waited for: memory that
    /// the kernel may still write to is never given back.
    fn drop(&mut self) {
        if self.in_flight() > 0 {
            tracing::error!(
                count = self.in_flight(),
                "requests to a disk are left in flight; their memory stays"
            );
            std::mem::forget(std::mem::take(&mut self.flights));
            return;
        }
        if let Some(ring) = self.ring.take().filter(|_| !self.is_dead) {
            spare::give_back(ring);
        }
    }
}

impl<T> Flight<T> {
    fn entry(&self, file: BorrowedFd<'_>) -> squeue::Entry {
        let file = types::Fd(file.as_raw_fd());
        let rest = &self.buffers.0[self.next..];
        let count = rest.len().min(MAX_BUFFERS) as u32;
        match self.kind {
            Kind::Read(_) => opcode::Readv::new(file, rest.as_ptr(), count)
                .offset(self.offset)
                .build(),
            Kind::Write => opcode::Writev::new(file, rest.as_ptr(), count)
                .offset(self.offset)
                .build(),
            Kind::Sync => opcode::Fsync::new(file).flags(types::FsyncFlags::DATASYNC).build(),
        }
    }

    /// Takes note of what the kernel did. None if there is more to do.
    fn moved(&mut self, result: i32) -> Option<io::Result<()>> {
        if result < 0 {
            return Some(Err(io::Error::from_raw_os_error(-result)));
        }
        if matches!(self.kind, Kind::Sync) {
            return Some(Ok(()));
        }
        if result == 0 {
            return Some(Err(io::ErrorKind::UnexpectedEof.into()));
        }
        self.offset += u64::from(result.unsigned_abs());
        let left = advance(&mut self.buffers.0[self.next..], result.unsigned_abs() as usize).len();
        self.next = self.buffers.0.len() - left;
        (left == 0).then_some(Ok(()))
    }
}

#[cfg(test)]
mod tests;
