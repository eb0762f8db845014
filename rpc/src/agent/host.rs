//! What this host is, read from the kernel.

use std::fs;
use std::path::Path;

use super::marks;

/// The id of this boot: another one after each reboot.
///
/// # Errors
/// /proc is not there.
pub(crate) fn boot_id() -> std::io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// A field of /proc/meminfo, in bytes; 0 where the kernel does not tell.
pub(crate) fn meminfo(field: &str) -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    text.lines()
        .find_map(|line| {
            line.strip_prefix(field)?
                .strip_prefix(':')?
                .trim()
                .strip_suffix(" kB")?
                .trim()
                .parse()
                .ok()
        })
        .map_or(0, |kib: u64| kib * 1024)
}

/// Removes what an agent that was killed left outside its data directory, which must be there still. For laboratories
/// that end an agent for good, with its guests.
pub(crate) fn remove_leftovers(data_dir: &Path) {
    let data_dir = fs::canonicalize(data_dir).unwrap_or_else(|_| data_dir.to_owned());
    for folder in marks::folders(&data_dir) {
        // In most of them it is not there.
        let _ = fs::remove_dir_all(folder);
    }
    for entry in fs::read_dir(data_dir.join("instances")).into_iter().flatten().flatten() {
        super::spawn::remove_cgroup(&entry.file_name().to_string_lossy());
    }
}
