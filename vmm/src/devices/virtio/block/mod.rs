//! The block device (virtio 1.2, 5.2): a file or a block device of the host as a disk, one queue. Requests that come together are under way
//! together where the kernel has io_uring, and else carried out one after the other.

mod bounce;
#[cfg(test)]
mod bursts;
mod carrying_out;
mod device;
mod holding_back;
mod request;
mod service;
mod state;
#[cfg(test)]
mod tests;
mod together;
#[cfg(test)]
mod waiting;
mod written;

pub(crate) use self::device::Block;
pub use self::holding_back::WriteWaits;
pub use self::written::WrittenBlocks;

/// The device type (virtio 1.2, 5.2.1).
pub(super) const KIND: u32 = 2;

/// The unit of everything in a request.
const SECTOR: u64 = 512;

/// The queue of a disk.
const QUEUE: usize = 0;

/// The largest queue: as many requests as a driver may have in flight with indirect descriptors.
const QUEUE_SIZE: u16 = 256;

/// Feature bits (virtio 1.2, 5.2.3).
mod feature {
    pub(super) const SEG_MAX: u64 = 1 << 2;
    pub(super) const RO: u64 = 1 << 5;
    pub(super) const BLK_SIZE: u64 = 1 << 6;
    pub(super) const FLUSH: u64 = 1 << 9;
    pub(super) const DISCARD: u64 = 1 << 13;
    pub(super) const WRITE_ZEROES: u64 = 1 << 14;
}
