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

/// A folder on tmpfs for the started marks of the agent with this data directory: gone when the host is.
///
/// # Errors
/// None can be made.
pub(crate) fn mark_folder(data_dir: &Path) -> std::io::Result<PathBuf> {
    let name = format!(
        "ferry-{}",
        &blake3::hash(data_dir.as_os_str().as_encoded_bytes()).to_hex()[..16]
    );
    let mut last = std::io::Error::from(std::io::ErrorKind::NotFound);
    for root in ["/run", "/dev/shm", "/tmp"] {
        let folder = Path::new(root).join(&name);
        match fs::create_dir_all(&folder) {
            Ok(()) => return Ok(folder),
            Err(error) => last = error,
        }
    }
    Err(last)
}
