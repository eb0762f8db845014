//! The disk: one raw file for all contenders, written beforehand, so that nobody pays for its blocks.

use std::fs;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};
use ferry_probe::device_work::{STAMPED_BYTES, disk_stamp};
use ferry_probe::rng::Rng;
use rustix::fs::{Advice, FallocateFlags, fadvise, fallocate};
use tempfile::NamedTempFile;

use crate::workspace;

/// The file. Dropping it removes it.
pub(super) struct Image {
    file: NamedTempFile,
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
        let folder = workspace::target();
        fs::create_dir_all(&folder).with_context(|| format!("failed to make {}", folder.display()))?;
        let file = tempfile::Builder::new()
            .prefix("bench-disk-")
            .tempfile_in(&folder)
            .with_context(|| format!("failed to make a disk in {}", folder.display()))?;
        let image = Self { file };
        image.fill().context("failed to write the disk")?;
        Ok(image)
    }

    fn fill(&self) -> Result<()> {
        let mut file = self.file.as_file();
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

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        self.file.path()
    }
}
