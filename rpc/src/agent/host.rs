//! What this host is, read from the kernel.

use std::fs;
use std::path::{Path, PathBuf};

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

/// Where the folder may be: on tmpfs, gone when the host is.
const MARK_ROOTS: [&str; 3] = ["/run", "/dev/shm", "/tmp"];

fn mark_name(data_dir: &Path) -> String {
    format!(
        "ferry-{}",
        &blake3::hash(data_dir.as_os_str().as_encoded_bytes()).to_hex()[..16]
    )
}

/// Removes what the agent of a data directory keeps outside of it. For an agent that is gone for good, with its guests;
/// `data_dir` must be there still, or be named as the agent saw it.
pub(crate) fn remove_leftovers(data_dir: &Path) {
    let data_dir = fs::canonicalize(data_dir).unwrap_or_else(|_| data_dir.to_owned());
    for root in MARK_ROOTS {
        // Most are not there.
        let _ = fs::remove_dir_all(Path::new(root).join(mark_name(&data_dir)));
    }
    for entry in fs::read_dir(data_dir.join("instances")).into_iter().flatten().flatten() {
        super::spawn::remove_cgroup(&entry.file_name().to_string_lossy());
    }
}

/// A folder on tmpfs for the started marks of the agent with this data directory.
///
/// # Errors
/// None can be made.
pub(crate) fn mark_folder(data_dir: &Path) -> std::io::Result<PathBuf> {
    let name = mark_name(data_dir);
    let mut last = std::io::Error::from(std::io::ErrorKind::NotFound);
    for root in MARK_ROOTS {
        let folder = Path::new(root).join(&name);
        match fs::create_dir_all(&folder) {
            Ok(()) => return Ok(folder),
            Err(error) => last = error,
        }
    }
    Err(last)
}
