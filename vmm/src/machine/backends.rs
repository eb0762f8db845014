//! What a machine's virtio devices work on. Whoever makes the machine has opened it all: this crate opens no path and
//! makes no interface.

use std::fs::File;
use std::num::NonZeroU64;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::losses::Losses;

/// All of a machine's backends. The guest finds the disks first, then the network cards, each kind in this order.
#[derive(Debug, Default)]
pub struct Backends {
    /// One for each block device.
    pub disks: Vec<DiskBackend>,
    /// One for each network card.
    pub nics: Vec<NicBackend>,
}

/// A disk image or a block device.
#[derive(Debug)]
pub struct DiskBackend {
    /// Open for reading, and for writing unless `access` says otherwise; with O_DIRECT or without.
    pub file: File,
    /// Whether the guest may write.
    pub access: DiskAccess,
    /// What the guest is told as the disk's serial number: at most 20 bytes are (virtio 1.2, 5.2.6.1).
    pub serial: String,
    /// What whoever else writes the file back finds that did not reach the disk.
    pub losses: Arc<Losses>,
}

/// Whether a guest may write a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DiskAccess {
    /// It may.
    ReadWrite,
    /// It may not, and is told so.
    ReadOnly,
}

/// A network card's other end.
#[derive(Debug)]
pub struct NicBackend {
    /// A tap interface: non-blocking, IFF_NO_PI, IFF_VNET_HDR with a header of 12 bytes.
    pub tap: OwnedFd,
    /// The card's address.
    pub mac: [u8; 6],
    /// How many bytes a second the guest may send, and as many receive, at most.
    pub rate: Option<NonZeroU64>,
}
