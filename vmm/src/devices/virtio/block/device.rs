//! The disk: what it is made on, and what it offers.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use super::super::super::DeviceStateError;
use super::super::device::{Broken, Device, Interest, Turn, Wake};
use super::super::failures::Failures;
use super::super::queue::DeviceQueue;
use super::carrying_out::MOST_ZEROED;
use super::request::MOST_EXTENTS;
use super::together::Together;
use super::{KIND, QUEUE, QUEUE_SIZE, SECTOR, WrittenBlocks, feature, state};
use crate::machine::{DiskAccess, DiskBackend, Losses};
use crate::memory::Ring;

/// A disk on a file.
pub(crate) struct Block {
    pub(super) file: Arc<File>,
    /// Where the kernel has such: requests that come together go to it together.
    pub(super) ring: Option<Ring<Together>>,
    /// Requests came while another was carried out: the guest has several at a time.
    pub(super) is_crowded: Cell<bool>,
    pub(super) access: DiskAccess,
    pub(super) serial: String,
    pub(super) sectors: u64,
    pub(super) written: WrittenBlocks,
    /// The request that is next in the queue was looked at, and has to wait.
    pub(super) is_held_back: bool,
    /// The driver did not take FLUSH: it counts on every write to last once it is told of it (virtio 1.2, 5.2.6.2).
    pub(super) writes_through: bool,
    pub(super) failures: Failures,
    pub(super) losses: Arc<Losses>,
}

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
        Self::of_size(backend, bytes / SECTOR)
    }

    /// A disk of so many sectors.
    ///
    /// # Errors
    /// The process has no descriptors left.
    pub(in super::super) fn of_size(backend: DiskBackend, sectors: u64) -> io::Result<Self> {
        let DiskBackend {
            file,
            access,
            serial,
            losses,
        } = backend;
        let file = Arc::new(file);
        let ring = Ring::new(Arc::clone(&file));
        if let Err(error) = &ring {
            tracing::info!(%error, "no io_uring here: requests to a disk go to the kernel one after the other");
        }
        Ok(Self {
            ring: ring.ok(),
            is_crowded: Cell::new(false),
            losses,
            file,
            access,
            serial,
            sectors,
            written: WrittenBlocks::new(sectors * SECTOR)?,
            is_held_back: false,
            writes_through: false,
            failures: Failures::default(),
        })
    }

    /// Which blocks the guest writes.
    pub(crate) fn written(&self) -> WrittenBlocks {
        self.written.clone()
    }
}

impl Device for Block {
    fn kind(&self) -> u32 {
        KIND
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
        // Only what is given back: it takes the same time, however much it is.
        let most_discarded = u32::MAX.to_le_bytes();
        let extents = (MOST_EXTENTS as u32).to_le_bytes();
        let most_zeroed = ((MOST_ZEROED / SECTOR) as u32).to_le_bytes();
        let mut config = vec![0; 60];
        let mut put = |offset: usize, bytes: &[u8]| config[offset..offset + bytes.len()].copy_from_slice(bytes);
        put(0, &self.sectors.to_le_bytes());
        put(12, &(u32::from(QUEUE_SIZE) - 2).to_le_bytes());
        put(20, &(SECTOR as u32).to_le_bytes());
        // Discard: sectors and extents of a request, alignment in sectors.
        put(36, &most_discarded);
        put(40, &extents);
        put(44, &8u32.to_le_bytes());
        // Write zeroes: sectors and extents, and that it may unmap.
        put(48, &most_zeroed);
        put(52, &1u32.to_le_bytes());
        put(56, &[1]);
        config
    }

    fn activate(&mut self, features: u64) {
        self.writes_through = features & feature::FLUSH == 0;
    }

    fn reset(&mut self) {
        self.is_held_back = false;
        self.written.nobody_waits();
    }

    fn wake(&mut self, wake: Wake, queues: &mut [DeviceQueue], turn: &Turn<'_>) -> Result<(), Broken> {
        match wake {
            Wake::Queue(index) => self.serve(&mut queues[index], turn),
            Wake::Backend | Wake::Timer => {
                self.written.heard();
                match self.is_held_back {
                    true => self.serve(&mut queues[QUEUE], turn),
                    false => Ok(()),
                }
            }
        }
    }

    fn backend(&self) -> Option<BorrowedFd<'_>> {
        Some(self.written.bell())
    }

    fn interest(&self) -> Interest {
        Interest {
            readable: self.is_held_back,
            writable: false,
        }
    }

    fn due(&self) -> Option<Instant> {
        self.written.until().filter(|_| self.is_held_back)
    }

    fn save(&self) -> Vec<u8> {
        state::to_saved(self.sectors, self.access, &self.serial)
    }

    fn restore(&mut self, saved: &[u8]) -> Result<(), DeviceStateError> {
        (self.sectors, self.serial) = state::check(saved, self.sectors, self.access)?;
        Ok(())
    }
}
