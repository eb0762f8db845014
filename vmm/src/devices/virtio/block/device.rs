//! The disk: what it offers, and what it does with requests.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{FallocateFlags, fallocate, fdatasync};
use vm_memory::{Bytes, GuestAddress};

use super::super::super::DeviceStateError;
use super::super::device::{Broken, Device, Turn, Wake};
use super::super::queue::{Chain, DeviceQueue};
use super::request::{Extent, MOST_EXTENTS, Request, split};
use super::{QUEUE_SIZE, SECTOR, WrittenBlocks, bounce, feature, state};
use crate::machine::{DiskAccess, DiskBackend};
use crate::memory::{GuestMemory, total};

/// A disk on a file.
pub(crate) struct Block {
    file: File,
    access: DiskAccess,
    serial: String,
    sectors: u64,
    written: WrittenBlocks,
    /// The last request failed, and that was said: a guest that asks again and again does not fill the log.
    fails: Cell<bool>,
    lost: Arc<AtomicBool>,
}

/// Status of a request.
const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

/// Bytes of the serial number.
const SERIAL_BYTES: usize = 20;

impl Block {
    /// A disk on what was opened; its size is that of now. Nothing is read.
    ///
    /// # Errors
    /// The size cannot be told, or there is not a single sector.
    pub(crate) fn new(backend: DiskBackend) -> io::Result<Self> {
        // A block device has no length in its metadata.
        let bytes = (&backend.file).seek(SeekFrom::End(0))?;
        if bytes < SECTOR {
            return Err(io::Error::other(format!("the disk has {bytes} bytes, not one sector")));
        }
        Ok(Self::of_size(backend, bytes / SECTOR))
    }

    /// A disk of so many sectors.
    pub(in super::super) fn of_size(backend: DiskBackend, sectors: u64) -> Self {
        let DiskBackend {
            file,
            access,
            serial,
            lost,
        } = backend;
        Self {
            lost,
            file,
            access,
            serial,
            sectors,
            written: WrittenBlocks::new(sectors * SECTOR),
            fails: Cell::new(false),
        }
    }

    /// Which blocks the guest writes.
    pub(crate) fn written(&self) -> WrittenBlocks {
        self.written.clone()
    }

    /// Carries a request out; returns its status and how many bytes of data were written to the guest.
    fn carry_out(&self, request: &Request, memory: &GuestMemory) -> (u8, u32) {
        let writes = matches!(
            request,
            Request::Write { .. } | Request::Discard(_) | Request::WriteZeroes(_)
        );
        if writes && self.access == DiskAccess::ReadOnly {
            return (IO_ERROR, 0);
        }
        let (done, written) = match request {
            Request::Read { offset, data } => (self.read(*offset, memory, data), total(data)),
            Request::Write { offset, data } => (self.write(*offset, memory, data), 0),
            Request::Flush if self.access == DiskAccess::ReadOnly => (Ok(()), 0),
            Request::Flush => (self.flush(), 0),
            Request::Serial { data } => (self.tell_serial(memory, data), total(data).min(SERIAL_BYTES as u64)),
            Request::Discard(extents) => (self.each(extents, FallocateFlags::PUNCH_HOLE), 0),
            Request::WriteZeroes(extents) => (self.write_zeroes(extents), 0),
            Request::Unsupported => return (UNSUPPORTED, 0),
            Request::Impossible => return (IO_ERROR, 0),
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
            Ok(()) => {
                self.fails.set(false);
                (OK, written as u32)
            }
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => (UNSUPPORTED, 0),
            Err(error) => {
                if !self.fails.replace(true) {
                    tracing::warn!(?request, %error, "a disk request failed: the guest is told of an I/O error");
                }
                (IO_ERROR, 0)
            }
        }
    }

    fn read(&self, offset: u64, memory: &GuestMemory, data: &[crate::memory::Span]) -> io::Result<()> {
        match memory.read_file_at(self.file.as_fd(), offset, data) {
            Err(error) if is_misaligned(&error) => bounce::read(&self.file, offset, memory, data),
            other => other,
        }
    }

    fn write(&self, offset: u64, memory: &GuestMemory, data: &[crate::memory::Span]) -> io::Result<()> {
        match memory.write_file_at(self.file.as_fd(), offset, data) {
            Err(error) if is_misaligned(&error) => bounce::write(&self.file, offset, memory, data),
            other => other,
        }
    }

    fn flush(&self) -> io::Result<()> {
        fdatasync(&self.file)?;
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
            self.each(std::slice::from_ref(extent), how)
        })
    }

    fn each(&self, extents: &[Extent], how: FallocateFlags) -> io::Result<()> {
        let parts = extents.iter().filter(|extent| extent.len > 0);
        for Extent { offset, len, .. } in parts {
            fallocate(&self.file, how | FallocateFlags::KEEP_SIZE, *offset, *len)?;
        }
        Ok(())
    }

    fn tell_serial(&self, memory: &GuestMemory, data: &[crate::memory::Span]) -> io::Result<()> {
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

    fn serve(&self, chain: &Chain, memory: &GuestMemory) -> Result<u32, Broken> {
        let (request, status) = Request::parse(chain, memory, self.sectors)?;
        let (code, written) = self.carry_out(&request, memory);
        memory
            .tracked()
            .write_obj(code, GuestAddress(status.address))
            .map_err(Broken::new)?;
        Ok(written.saturating_add(1))
    }
}

impl Device for Block {
    fn kind(&self) -> u32 {
        2
    }

    fn features(&self) -> u64 {
        let always = feature::SEG_MAX | feature::BLK_SIZE | feature::FLUSH;
        match self.access {
            DiskAccess::ReadOnly => always | feature::RO,
            DiskAccess::ReadWrite => always | feature::DISCARD | feature::WRITE_ZEROES,
        }
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE]
    }

    /// `struct virtio_blk_config` (virtio 1.2, 5.2.4).
    fn config(&self) -> Vec<u8> {
        let largest = u32::MAX.to_le_bytes();
        let extents = (MOST_EXTENTS as u32).to_le_bytes();
        let mut config = vec![0; 60];
        let mut put = |offset: usize, bytes: &[u8]| config[offset..offset + bytes.len()].copy_from_slice(bytes);
        put(0, &self.sectors.to_le_bytes());
        put(12, &(u32::from(QUEUE_SIZE) - 2).to_le_bytes());
        put(20, &(SECTOR as u32).to_le_bytes());
        // Discard: sectors and extents of a request, alignment in sectors.
        put(36, &largest);
        put(40, &extents);
        put(44, &8u32.to_le_bytes());
        // Write zeroes: the same, and that it may unmap.
        put(48, &largest);
        put(52, &extents);
        put(56, &[1]);
        config
    }

    fn activate(&mut self, _features: u64) {}

    fn reset(&mut self) {}

    fn wake(&mut self, wake: Wake, queues: &mut [DeviceQueue], turn: &Turn<'_>) -> Result<(), Broken> {
        let Wake::Queue(index) = wake else { return Ok(()) };
        queues[index].serve(turn, |chain| self.serve(chain, turn.memory))
    }

    fn save(&self) -> Vec<u8> {
        state::to_saved(self.sectors, self.access, &self.serial)
    }

    fn restore(&mut self, saved: &[u8]) -> Result<(), DeviceStateError> {
        (self.sectors, self.serial) = state::check(saved, self.sectors, self.access)?;
        Ok(())
    }
}

/// Direct I/O says so of buffers that do not lie as it wants them; spans outside memory never get here.
fn is_misaligned(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EINVAL)
}
