//! Requests, one at a time: what each does to the file, and what the guest is told of it.

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::time::Instant;

use rustix::fs::{FallocateFlags, fallocate, fdatasync};
use vm_memory::{Bytes, GuestAddress};

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

/// Bytes of the serial number.
const SERIAL_BYTES: usize = 20;

impl Block {
    /// Carries a request out.
    pub(super) fn carry_out(&self, request: &Request, memory: &GuestMemory) -> Answer {
        if let Some(answer) = self.refusal(request) {
            return answer;
        }
        let done = match request {
            Request::Read { offset, data } => self.read(*offset, memory, data),
            Request::Write { offset, data } => self.write(*offset, memory, data).and_then(|()| self.write_through()),
            Request::Flush if self.access == DiskAccess::ReadOnly => Ok(()),
            Request::Flush => fdatasync(&self.file).map_err(io::Error::from),
            Request::Serial { data } => self.tell_serial(memory, data),
            // It is advice: what is no whole block of the disk stays.
            Request::Discard(extents) => match self.each(extents, FallocateFlags::PUNCH_HOLE) {
                Err(error) if is_misaligned(&error) => Ok(()),
                done => done,
            },
            Request::WriteZeroes(extents) => self.write_zeroes(extents).and_then(|()| self.write_through()),
            Request::Unsupported | Request::Impossible => Ok(()),
        };
        self.conclude(request, done)
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
        // Also of one that failed: part of it may be on the disk.
        match request {
            Request::Write { offset, data } => self.written.mark(*offset, total(data)),
            Request::Discard(extents) | Request::WriteZeroes(extents) => {
                extents
                    .iter()
                    .for_each(|extent| self.written.mark(extent.offset, extent.len));
            }
            _ => {}
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
        if self.lost.swap(false, Ordering::AcqRel) {
            return Err(io::Error::other("what the guest wrote did not reach the disk"));
        }
        Ok(())
    }

    fn write_zeroes(&self, extents: &[Extent]) -> io::Result<()> {
        extents.iter().try_for_each(|extent| {
            let how = if extent.unmap {
                FallocateFlags::PUNCH_HOLE
            } else {
                FallocateFlags::ZERO_RANGE
            };
            let done = self.each(std::slice::from_ref(extent), how);
            // A device with larger blocks does not do that by sectors: the guest then writes the zeroes itself.
            done.map_err(|error| match is_misaligned(&error) {
                true => io::Error::from_raw_os_error(libc::EOPNOTSUPP),
                false => error,
            })
        })
    }

    fn each(&self, extents: &[Extent], how: FallocateFlags) -> io::Result<()> {
        let parts = extents.iter().filter(|extent| extent.len > 0);
        for Extent { offset, len, .. } in parts {
            fallocate(&self.file, how | FallocateFlags::KEEP_SIZE, *offset, *len)?;
        }
        Ok(())
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

/// Direct I/O says so of buffers that do not lie as it wants them, fallocate of what is no whole block of a device; spans outside memory
/// never get here.
fn is_misaligned(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EINVAL)
}
