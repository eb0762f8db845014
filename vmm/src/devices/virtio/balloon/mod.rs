//! The balloon (virtio 1.2, 5.5): memory that the guest does without, because it was asked to or because it is free anyway.
//!
//! What the guest gives up goes back to the host at once, so that nobody sends it: the first pass of a migration looks only at what the
//! host has backed. Free pages are reported by the guest itself (VIRTIO_BALLOON_F_REPORTING), a few seconds after they became free. Those that it
//! has not reported yet it names when it is asked (VIRTIO_BALLOON_F_FREE_PAGE_HINT), which is done while its memory is copied. These stay as they
//! are: it may use them again without waiting for anybody. VIRTIO_BALLOON_F_PAGE_POISON is not offered: nobody promises the guest what is in a
//! page that it called free.

mod device;
#[cfg(test)]
mod hint_tests;
mod hinting;
mod hints;
mod level;
mod state;
#[cfg(test)]
mod tests;

pub(crate) use self::device::Balloon;
pub use self::hints::FreePageHints;
pub(crate) use self::hints::HintDesk;
pub use self::level::BalloonLevel;

/// Device type (virtio 1.2, 5).
pub(super) const KIND: u32 = 5;

/// The queues that every driver has. What those behind them are for follows from the features: `Balloon::role`.
const INFLATE: usize = 0;
const DEFLATE: usize = 1;

/// How many queues there were before there were hints.
pub(super) const QUEUES_BEFORE_HINTS: usize = 3;

/// Feature bits (virtio 1.2, 5.5.3).
pub(super) mod feature {
    pub(in super::super) const DEFLATE_ON_OOM: u64 = 1 << 2;
    pub(in super::super) const FREE_PAGE_HINT: u64 = 1 << 3;
    pub(in super::super) const REPORTING: u64 = 1 << 5;
}

/// The most page numbers in one request; Linux gives 256.
const MOST_PAGES: u64 = 4096;
