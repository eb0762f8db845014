//! How full the balloon is, for whoever does not hold the device.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// How many pages a guest is to give up, and how many it says that it has. Clones look at the same balloon, wherever its machine is.
#[derive(Debug, Clone, Default)]
pub struct BalloonLevel(Arc<Level>);

#[derive(Debug, Default)]
struct Level {
    wanted: AtomicU32,
    actual: AtomicU32,
    driver: AtomicBool,
}

// Numbers for people and for the guest's next look: nothing else is ordered by them.
impl BalloonLevel {
    /// Pages of 4 KiB that the guest is to give up.
    #[must_use]
    pub fn wanted_pages(&self) -> u32 {
        self.0.wanted.load(Ordering::Relaxed)
    }

    /// Pages of 4 KiB that the guest says it has given up: its word, which may be any number.
    #[must_use]
    pub fn actual_pages(&self) -> u32 {
        self.0.actual.load(Ordering::Relaxed)
    }

    /// Whether the guest has a driver that could give up any.
    #[must_use]
    pub fn has_driver(&self) -> bool {
        self.0.driver.load(Ordering::Relaxed)
    }

    pub(crate) fn set_wanted(&self, pages: u32) {
        self.0.wanted.store(pages, Ordering::Relaxed);
    }

    pub(super) fn set_actual(&self, pages: u32) {
        self.0.actual.store(pages, Ordering::Relaxed);
    }

    pub(super) fn set_driver(&self, is_there: bool) {
        self.0.driver.store(is_there, Ordering::Relaxed);
    }
}
