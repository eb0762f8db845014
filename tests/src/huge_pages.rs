//! Huge pages of the host's pool (hugetlbfs), for as long as a scenario needs them.

use std::fs;
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};

/// How many the pool has. More of them are asked for by writing it, and may not be had.
const POOL: &str = "/proc/sys/vm/nr_hugepages";

/// One scenario at a time makes the pool larger.
static TAKEN: Mutex<()> = Mutex::new(());

/// A pool that was made larger. It is as large as before once this is dropped.
pub struct HugePages {
    before: u64,
    _taken: MutexGuard<'static, ()>,
}

impl HugePages {
    /// So many pages of 2 MiB more. None where this process may not have them, or the host has no memory in such pieces.
    ///
    /// # Errors
    /// If the pool cannot be read.
    pub fn more(pages: u64) -> Result<Option<Self>> {
        let taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        let before = pool()?;
        if fs::write(POOL, (before + pages).to_string()).is_err() {
            return Ok(None);
        }
        let more = Self { before, _taken: taken };
        Ok((pool()? == before + pages).then_some(more))
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        // It was written before.
        let _ = fs::write(POOL, self.before.to_string());
    }
}

fn pool() -> Result<u64> {
    let text = fs::read_to_string(POOL).context("failed to read how many huge pages there are")?;
    text.trim().parse().context("the pool of huge pages has no number")
}
