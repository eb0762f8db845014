//! Memory of the host itself, for those who measure.

use std::path::Path;
use std::thread;
use std::time::Duration;

use crate::memory::{GuestMemory, HUGE_PAGE_SIZE, MemoryError, MemoryOptions};

/// Has the host hold `bytes` of free memory that an outer host has backed, as huge pages: touches as much and frees it.
///
/// On a nested host the first touch of memory is ten to twenty times slower than any later one, and with free page
/// reporting (`mm/page_reporting.rst`) what was free for two seconds goes back to the outer host. A benchmark calls this
/// right before each move, for every contender alike; small pages would not do, because what they leave behind is not
/// what is given out first as huge ones.
///
/// Reporting goes round two seconds after something large was freed, whatever was freed since: what this frees just before that would be taken
/// away under the hands of the move. So it holds the memory until a round that was due has gone by, and then frees it: the next
/// one is two seconds off. Measured with a guest of 1 GiB that moved to and fro: 540 to 1070 ms and gaps of 55 to 95 ms in every second
/// move without the wait.
///
/// # Errors
///
/// If the host has not so much memory.
pub fn warm_host_memory(bytes: u64) -> Result<(), MemoryError> {
    let memory = GuestMemory::new(MemoryOptions {
        bytes: bytes.next_multiple_of(HUGE_PAGE_SIZE),
        hugetlb: false,
        expect_incoming: false,
    })?;
    memory
        .shape()
        .runs()
        .into_iter()
        .try_for_each(|run| memory.populate(run))?;
    if Path::new(REPORTING).exists() {
        thread::sleep(REPORTING_ROUND);
    }
    Ok(())
}

/// There where the kernel can report free pages.
const REPORTING: &str = "/sys/module/page_reporting";

/// Longer than `PAGE_REPORTING_DELAY` in the kernel's mm/page_reporting.c, which is 2 s.
const REPORTING_ROUND: Duration = Duration::from_millis(2200);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_than_the_host_has_is_refused() {
        let error = warm_host_memory(1 << 50).expect_err("a petabyte");
        assert!(matches!(error, MemoryError::LargerThanHost { .. }), "{error}");
        warm_host_memory(3 << 20).expect("3 MiB");
    }
}
