//! Processor time that this machine wanted and its own host gave to others: what no contender can help.
//!
//! A rented machine may be held still for tens of milliseconds at a time once it has used up what it may take. A guest in it sees that as a gap, more
//! likely the longer it is looked at. So each move says how much was stolen from it, and gaps are compared among moves from which nothing was, too.

use std::fs;
use std::thread;

/// How much was stolen up to a moment.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stolen(Option<u64>);

impl Stolen {
    /// Up to now.
    pub(super) fn so_far() -> Self {
        Self(fs::read_to_string("/proc/stat").ok().as_deref().and_then(ticks))
    }

    /// How many milliseconds of each processor since then; `None` where the kernel does not tell. In steps of a tick, 10 ms of one processor.
    pub(super) fn ms_since(self) -> Option<f64> {
        let ticks = Self::so_far().0?.saturating_sub(self.0?);
        let processors = thread::available_parallelism().map_or(1, usize::from);
        Some(ticks as f64 * TICK_MS / processors as f64)
    }
}

/// `USER_HZ` is 100 on every architecture that KVM migrates guests on.
const TICK_MS: f64 = 10.0;

/// The eighth number of the first line (`Documentation/filesystems/proc.rst`, 1.7).
fn ticks(stat: &str) -> Option<u64> {
    let numbers = stat.lines().next()?.strip_prefix("cpu ")?;
    numbers.split_ascii_whitespace().nth(7)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_stolen_is_the_eighth_number() {
        let stat = "cpu  1019599 274191 1144366 877628 6857 0 8605 25172 222936 8\ncpu0 1 2 3 4 5 6 7 8 9 10\n";
        assert_eq!(ticks(stat), Some(25_172));
        assert_eq!(ticks("cpu  1 2 3\n"), None);
        assert_eq!(ticks(""), None);
    }
}
