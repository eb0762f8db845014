//! The balloon (virtio 1.2, 5.5): memory that the guest does without, because it was asked to or because it is free anyway.
//!
//! What the guest gives up goes back to the host at once, so that nobody sends it: the first pass of a migration looks only at what the
//! host has backed. Free pages are reported by the guest itself (VIRTIO_BALLOON_F_REPORTING), a few seconds after they became free.

mod device;
mod level;
mod state;
#[cfg(test)]
mod tests;

pub(crate) use self::device::Balloon;
pub use self::level::BalloonLevel;

/// The queues that matter with the features that are offered; that of deflating, between them, asks for nothing.
const INFLATE: usize = 0;
const REPORTING: usize = 2;

/// Feature bits (virtio 1.2, 5.5.3).
mod feature {
    pub(super) const DEFLATE_ON_OOM: u64 = 1 << 2;
    pub(super) const REPORTING: u64 = 1 << 5;
}

/// The most page numbers in one request; Linux gives 256.
const MOST_PAGES: u64 = 4096;
