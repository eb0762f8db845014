//! The disk: one raw file for all contenders, written beforehand, so that nobody pays for its blocks.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use ferry_probe::device_work::{STAMPED_BYTES, disk_stamp};
use ferry_probe::rng::Rng;
use rustix::fs::{Advice, FallocateFlags, fadvise, fallocate};
use tempfile::TempDir;

use crate::watched;

/// The file, in a folder of its own: who locks it may put something beside it. Dropping it removes both.
pub(super) struct Image {
    path: PathBuf,
    _folder: TempDir,
}

/// Much more than a disk's cache and anybody's read-ahead.
const BYTES: u64 = 1 << 30;

/// Written at a time.
const PIECE: u64 = 4 << 20;

impl Image {
    /// Writes it: noise, and at the begin of each page what the probe looks for.
    ///
    /// # Errors
    /// If there is no room.
    pub(super) fn write() -> Result<Self> {
        let folder = watched::room();
        fs::create_dir_all(&folder).with_context(|| format!("failed to make {}", folder.display()))?;
        let own = tempfile::Builder::new()
            .prefix("bench-disk-")
            .tempdir_in(&folder)
            .with_context(|| format!("failed to make a folder in {}", folder.display()))?;
        let path = own.path().join("disk");
        let file = File::create_new(&path).with_context(|| format!("failed to make {}", path.display()))?;
        fill(&file).with_context(|| format!("failed to write {}", path.display()))?;
        Ok(Self { path, _folder: own })
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

fn fill(mut file: &File) -> Result<()> {
    fallocate(file, FallocateFlags::empty(), 0, BYTES)?;
    let mut rng = Rng::new(1, 0);
    let mut piece: Vec<u8> = (0..PIECE / 8).flat_map(|_| rng.word().to_le_bytes()).collect();
    for first in (0..BYTES / STAMPED_BYTES).step_by((PIECE / STAMPED_BYTES) as usize) {
        for (page, number) in piece.chunks_mut(STAMPED_BYTES as usize).zip(first..) {
            page[..8].copy_from_slice(&disk_stamp(number).to_le_bytes());
        }
        file.write_all(&piece)?;
    }
    file.sync_all()?;
    // Nobody is to find it in the page cache.
    fadvise(file, 0, None, Advice::DontNeed)?;
    Ok(())
}
