//! The names that every message, journal row and stream of a switchover carries.

use std::fmt;

use uuid::Uuid;

/// A right to run one guest; never used twice, and only ever grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The epoch of a guest's first start.
    pub const FIRST: Self = Self(1);

    /// The epoch after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}", self.0)
    }
}

/// The tuple `(vm, M, n, e)`: one attempt to switch one guest over in one migration. A stale one is refused everywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Attempt {
    /// The instance that moves.
    pub instance: Uuid,
    /// The migration M.
    pub migration: Uuid,
    /// The attempt n, from 1; each arming takes the next.
    pub attempt: u32,
    /// The epoch e under which the source runs the guest; the destination would run it under the next one.
    pub epoch: Epoch,
}

impl fmt::Display for Attempt {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "attempt {} of migration {} (instance {}, epoch {})",
            self.attempt, self.migration, self.instance, self.epoch
        )
    }
}

/// An agent's leave for its VMM to run the guest under one epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Permit {
    /// The instance that may run.
    pub instance: Uuid,
    /// The right that this permit grants.
    pub epoch: Epoch,
    /// The user had paused the guest: it is taken over, but its vCPUs stay stopped.
    pub paused: bool,
}
