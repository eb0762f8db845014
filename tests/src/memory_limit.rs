//! A host that has no memory left, for one process: a cgroup with a limit.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::waiting::{CALL, until};

/// A cgroup that may hold so much memory. Dropping it removes it, once the processes in it have ended.
pub struct MemoryLimit {
    group: PathBuf,
}

impl MemoryLimit {
    /// Lets this process have so much memory from now on; what it has already does not count.
    ///
    /// # Errors
    /// If no cgroup with the memory controller can be made, which needs root.
    pub fn of(process: u32, bytes: u64) -> Result<Self> {
        let name = format!("ferry-test-{}-{process}", std::process::id());
        let (root, limit) = match Path::new("/sys/fs/cgroup/memory").is_dir() {
            true => ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
            false => ("/sys/fs/cgroup", "memory.max"),
        };
        let group = Path::new(root).join(name);
        fs::create_dir(&group).with_context(|| format!("failed to make the cgroup {}", group.display()))?;
        let limited = Self { group };
        limited.write(limit, bytes)?;
        limited.write("cgroup.procs", process)?;
        Ok(limited)
    }

    fn write(&self, file: &str, value: impl ToString) -> Result<()> {
        let file = self.group.join(file);
        fs::write(&file, value.to_string()).with_context(|| format!("failed to write {}", file.display()))
    }
}

impl Drop for MemoryLimit {
    fn drop(&mut self) {
        let _ = until("the cgroup is empty", CALL, || {
            Ok((fs::remove_dir(&self.group).is_ok() || !self.group.exists()).then_some(()))
        });
    }
}
