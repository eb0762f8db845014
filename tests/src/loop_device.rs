//! A real block device: the kernel's loop over an image of the test.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// A block device on an image. Dropping it gives it back to the kernel.
pub struct LoopDevice {
    path: PathBuf,
}

impl LoopDevice {
    /// Whether this host lets a test have some.
    #[must_use]
    pub fn can_be_had() -> bool {
        let asked = Command::new("losetup").arg("--find").output();
        asked.is_ok_and(|output| output.status.success())
    }

    /// A device on this image whose sectors have so many bytes.
    ///
    /// # Errors
    /// The host has no loop devices, or gives this process none.
    pub fn on(image: &Path, sector_bytes: u32) -> Result<Self> {
        let output = Command::new("losetup")
            .args(["--find", "--show", "--sector-size", &sector_bytes.to_string()])
            .arg(image)
            .output()
            .context("failed to call losetup, which these scenarios need")?;
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "no loop device on {}: {told}", image.display());
        let path = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
        Ok(Self { path })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // While somebody has it open still, it goes with the last who has.
        let _ = Command::new("losetup").arg("--detach").arg(&self.path).status();
    }
}
