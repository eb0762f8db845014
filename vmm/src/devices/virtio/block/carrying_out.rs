//! Requests, one at a time: what each does to the file, and what the guest is told of it.
//!
//! Discarding and writing zeroes are one system call for any number of bytes, and where neither the device nor the file system has a short way, the
//! kernel writes every one of them meanwhile. So it is done in pieces, and a machine that is to stand still waits for one piece: the
//! request is then in its queue again, and is done from its beginning by whoever runs the machine next. A piece that is done twice comes to the
//! same: the guest was not answered, and nothing behind the request was begun.

use std::io;
use std::os::fd::AsFd;
use std::time::Instant;

use rustix::fs::{FallocateFlags, fallocate, fdatasync};
use vm_memory::{Bytes, GuestAddress};

use super::super::device::Turn;
use super::request::{Extent, Request, split};
use super::{Block, bounce};
use crate::machine::DiskAccess;
use crate::memory::{GuestMemory, Span, total};

/// What the guest is told of a request: its status, and how many bytes of data it gets.
pub(super) type Answer = (u8, u32);

/// Status of a request.
const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

/// Bytes that a driver may have zeroed by one request, of one extent: a disk that has to write them (`blkdev_issue_zeroout` in the kernel's
/// `block/blk-lib.c`) and makes 100 MB/s is held up for 0.7 seconds, not for the minutes after which a guest takes its disk for dead. Where zeroing
/// has a short way, the calls for a terabyte are 16,384 of some microseconds each.
///
/// It is offered and not insisted on: the driver of a guest that an earlier build set up, on this host or another, read that it may have 2 TiB zeroed at
/// once, in 16 extents.
pub(super) const MOST_ZEROED: u64 = 64 << 20;

/// Bytes of a piece: where they are written, a disk of 100 MB/s takes 42 ms for so much, which a blackout has time for.
const PIECE: u64 = 4 << 20;

/// The same where space is given back, which is never done by writing; so a whole disk is no more calls than it has GiB, times 16.
const HOLE_PIECE: u64 = 64 << 20;

/// Bytes of the serial number.
const SERIAL_BYTES: usize = 20;

impl Block {
    /// Carries a request out. `None` if the turn is to end in the middle of it: then it is to be put back into its queue.
    pub(super) fn carry_out(&self, request: &Request, turn: &Turn<'_>) -> Option<Answer> {
        if let Some(answer) = self.refusal(request) {
            return Some(answer);
        }
        let memory = turn.memory;
        let done = match request {
            Request::Read { offset, data } => self.read(*offset, memory, data),
            Request::Write { offset, data } => self.write(*offset, memory, data).and_then(|()| self.write_through()),
            Request::Flush if self.access == DiskAccess::ReadOnly => Ok(()),
            Request::Flush => fdatasync(&self.file).map_err(io::Error::from),
            Request::Serial { data } => self.tell_serial(memory, data),
            // It is advice: what is no whole block of the disk stays.
            Request::Discard(extents) => match self.discard(extents, turn) {
                Ok(Progress::Interrupted) => return None,
                Err(error) if is_misaligned(&error) => Ok(()),
                done => done.map(drop),
            },
            Request::WriteZeroes(extents) => match self.write_zeroes(extents, turn) {
                Ok(Progress::Interrupted) => return None,
                done => done.and_then(|_| self.write_through()),
            },
            Request::Unsupported | Request::Impossible => Ok(()),
        };
        Some(self.conclude(request, done))
    }

    /// The answer to a request for which nothing needs to be done.
    pub(super) fn refusal(&self, request: &Request) -> Option<Answer> {
        match request {
            Request::Write { .. } | Request::Discard(_) | Request::WriteZeroes(_)
                if self.access == DiskAccess::ReadOnly =>
            {
                Some((IO_ERROR, 0))
            }
            Request::Unsupported => Some((UNSUPPORTED, 0)),
            Request::Impossible => Some((IO_ERROR, 0)),
            _ => None,
        }
    }

    /// Takes note of what came of a request, whoever did it: it is over.
    pub(super) fn conclude(&self, request: &Request, done: io::Result<()>) -> Answer {
        let (done, given) = match request {
            Request::Read { data, .. } => (done, total(data)),
            Request::Serial { data } => (done, total(data).min(SERIAL_BYTES as u64)),
            Request::Flush if self.access == DiskAccess::ReadWrite => (done.and_then(|()| self.look_for_losses()), 0),
            _ => (done, 0),
        };
        // Also of one that failed: part of it may be on the disk. What goes in pieces is marked piece by piece.
        if let Request::Write { offset, data } = request {
            self.written.mark(*offset, total(data));
        }
        match done {
            // A chain has at most 4 GiB, its status byte included.
            Ok(()) => (OK, given as u32),
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => (UNSUPPORTED, 0),
            Err(error) => {
                if let Some(untold) = self.failures.add(Instant::now()) {
                    tracing::warn!(?request, %error, untold, "a disk request failed: the guest is told of an I/O error");
                }
                (IO_ERROR, 0)
            }
        }
    }

    fn read(&self, offset: u64, memory: &GuestMemory, data: &[Span]) -> io::Result<()> {
        match memory.read_file_at(self.file.as_fd(), offset, data) {
            Err(error) if is_misaligned(&error) => bounce::read(&self.file, offset, memory, data),
            other => other,
        }
    }

    fn write(&self, offset: u64, memory: &GuestMemory, data: &[Span]) -> io::Result<()> {
        match memory.write_file_at(self.file.as_fd(), offset, data) {
            Err(error) if is_misaligned(&error) => bounce::write(&self.file, offset, memory, data),
            other => other,
        }
    }

    /// What was written is to last, for a driver that will not ask for it.
    fn write_through(&self) -> io::Result<()> {
        if !self.writes_through {
            return Ok(());
        }
        fdatasync(&self.file)?;
        self.look_for_losses()
    }

    /// What was written is durable as far as this process knows; somebody else may have lost some.
    fn look_for_losses(&self) -> io::Result<()> {
        if self.losses.take() {
            return Err(io::Error::other("what the guest wrote did not reach the disk"));
        }
        Ok(())
    }

    fn discard(&self, extents: &[Extent], turn: &Turn<'_>) -> io::Result<Progress> {
        self.each(extents.iter().map(|extent| (*extent, How::Hole)), turn)
    }

    fn write_zeroes(&self, extents: &[Extent], turn: &Turn<'_>) -> io::Result<Progress> {
        let how = |extent: &Extent| if extent.unmap { How::Hole } else { How::Zeroes };
        let done = self.each(extents.iter().map(|extent| (*extent, how(extent))), turn);
        // A device with larger blocks does not do that by sectors: the guest then writes the zeroes itself.
        done.map_err(|error| match is_misaligned(&error) {
            true => io::Error::from_raw_os_error(libc::EOPNOTSUPP),
            false => error,
        })
    }

    /// Does this to each extent, at least to the first piece.
    fn each(&self, extents: impl Iterator<Item = (Extent, How)>, turn: &Turn<'_>) -> io::Result<Progress> {
        let pieces = extents.flat_map(|(extent, how)| pieces(extent, how.piece()).map(move |piece| (piece, how)));
        for (index, ((offset, len), how)) in pieces.enumerate() {
            if index > 0 && turn.is_to_end() {
                return Ok(Progress::Interrupted);
            }
            let done = fallocate(&self.file, how.flag() | FallocateFlags::KEEP_SIZE, offset, len);
            // Whatever came of it: part of it may be on the disk.
            self.written.mark(offset, len);
            done?;
        }
        Ok(Progress::Done)
    }

    fn tell_serial(&self, memory: &GuestMemory, data: &[Span]) -> io::Result<()> {
        let mut serial = [0; SERIAL_BYTES];
        let len = self.serial.len().min(SERIAL_BYTES);
        serial[..len].copy_from_slice(&self.serial.as_bytes()[..len]);
        let (room, _) = split(data, SERIAL_BYTES as u64);
        let mut rest = &serial[..];
        for span in room {
            let (part, after) = rest.split_at(span.len as usize);
            let told = memory.tracked().write_slice(part, GuestAddress(span.address));
            told.map_err(io::Error::other)?;
            rest = after;
        }
        Ok(())
    }
}

/// What is done to an extent.
#[derive(Debug, Clone, Copy)]
enum How {
    /// Its space is given back.
    Hole,
    /// It is made zero, and keeps its space.
    Zeroes,
}

impl How {
    fn flag(self) -> FallocateFlags {
        match self {
            Self::Hole => FallocateFlags::PUNCH_HOLE,
            Self::Zeroes => FallocateFlags::ZERO_RANGE,
        }
    }

    fn piece(self) -> u64 {
        match self {
            Self::Hole => HOLE_PIECE,
            Self::Zeroes => PIECE,
        }
    }
}

/// How far a request that goes in pieces came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    Done,
    /// The turn is to end: up to some piece.
    Interrupted,
}

/// Offset and length of the pieces of an extent, cut where the disk has whole pieces, so that no block of a file system is cut.
fn pieces(extent: Extent, most: u64) -> impl Iterator<Item = (u64, u64)> {
    let end = extent.offset + extent.len;
    let mut next = extent.offset;
    std::iter::from_fn(move || {
        let start = next;
        next = end.min((start / most + 1) * most);
        (start < end).then(|| (start, next - start))
    })
}

/// Direct I/O says so of buffers that do not lie as it wants them, fallocate of what is no whole block of a device; spans outside memory
/// never get here.
fn is_misaligned(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EINVAL)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(offset: u64, len: u64) -> Vec<(u64, u64)> {
        let unmap = false;
        pieces(Extent { offset, len, unmap }, PIECE).collect()
    }

    #[test]
    fn an_extent_is_cut_where_the_disk_has_whole_pieces() {
        assert_eq!(cut(0, 0), []);
        assert_eq!(cut(512, 512), [(512, 512)]);
        assert_eq!(cut(0, PIECE), [(0, PIECE)]);
        assert_eq!(
            cut(PIECE - 512, PIECE + 1024),
            [(PIECE - 512, 512), (PIECE, PIECE), (2 * PIECE, 512)]
        );
    }
}
