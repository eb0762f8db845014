//! Disk images of guests, and who has them.

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, fcntl_lock};
use serde_json::Value;

/// A sparse image of so many bytes in a folder.
///
/// # Errors
/// It cannot be made.
pub fn sparse(folder: &Path, name: &str, bytes: u64) -> Result<PathBuf> {
    let path = folder.join(name);
    File::create(&path)?.set_len(bytes)?;
    Ok(path)
}

/// What an image's lock file says.
///
/// # Errors
/// There is none, or it is not JSON.
pub fn holder(image: &Path) -> Result<Value> {
    let text = fs::read_to_string(format!("{}.ferry-lock", image.display()))?;
    serde_json::from_str(&text).with_context(|| format!("not JSON: {text:?}"))
}

/// Whether somebody has a lock on the image.
///
/// # Errors
/// It cannot be opened, or its file system does not lock.
pub fn is_locked(image: &Path) -> Result<bool> {
    let file = OpenOptions::new().read(true).write(true).open(image)?;
    // The lock of a process conflicts with that of an open file, and goes when the process closes the file.
    match fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(false),
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::ACCESS) => Ok(true),
        Err(error) => Err(error.into()),
    }
}
