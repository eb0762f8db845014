//! The guest's serial console, kept in the instance's folder.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use ferry_vmm::ConsoleOutput;

/// The file below an instance's folder that holds what the guest printed on this host.
pub(crate) const CONSOLE_LOG: &str = "console.log";

/// Appends what the guest prints to its console log, unbuffered: a reader sees each byte at once.
#[derive(Clone, Debug)]
pub(super) struct ConsoleLog {
    file: Arc<File>,
    failed: bool,
}

impl ConsoleLog {
    /// Opens the log, after what an earlier VMM of this instance wrote.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub(super) fn open(folder: &Path) -> io::Result<Self> {
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(folder.join(CONSOLE_LOG))?;
        Ok(Self {
            file: Arc::new(file),
            failed: false,
        })
    }
}

impl ConsoleOutput for ConsoleLog {
    fn write(&mut self, bytes: &[u8]) {
        // A full disk must not stop the guest: output is lost, and that is said once until it works again.
        match (&*self.file).write_all(bytes) {
            Ok(()) => self.failed = false,
            Err(error) if !self.failed => {
                self.failed = true;
                tracing::warn!(%error, "console output is lost");
            }
            Err(_) => {}
        }
    }
}
