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

/// Where started marks may be: on tmpfs, gone when the host is.
const MARK_ROOTS: [&str; 3] = ["/run", "/dev/shm", "/tmp"];

/// The folder for the started marks of the agent with this data directory. It is there while a migration needs it.
///
/// # Errors
/// This host has none of the places where it could be.
pub(crate) fn mark_folder(data_dir: &Path) -> std::io::Result<PathBuf> {
    let name = mark_name(data_dir);
    let is_writable = |root: &&&str| rustix::fs::access(**root, rustix::fs::Access::WRITE_OK).is_ok();
    let root = MARK_ROOTS
        .iter()
        .find(is_writable)
        .ok_or(std::io::ErrorKind::NotFound)?;
    Ok(Path::new(root).join(name))
}

fn mark_name(data_dir: &Path) -> String {
    format!(
        "ferry-{}",
        &blake3::hash(data_dir.as_os_str().as_encoded_bytes()).to_hex()[..16]
    )
}

/// Removes what an agent that was killed left outside its data directory, which must be there still. For laboratories
/// that end an agent for good, with its guests.
pub(crate) fn remove_leftovers(data_dir: &Path) {
    let data_dir = fs::canonicalize(data_dir).unwrap_or_else(|_| data_dir.to_owned());
    for root in MARK_ROOTS {
        // In most of them it is not there.
        let _ = fs::remove_dir_all(Path::new(root).join(mark_name(&data_dir)));
    }
    for entry in fs::read_dir(data_dir.join("instances")).into_iter().flatten().flatten() {
        super::spawn::remove_cgroup(&entry.file_name().to_string_lossy());
    }
}
