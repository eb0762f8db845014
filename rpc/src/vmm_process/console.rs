//! The guest's serial console, kept in the instance's folder: its end, for a guest that prints for ever must not fill the disk on which
//! the journal lies, too.
//!
//! The file keeps all of its length, and what is too old becomes a hole in front. So a reader keeps its place, and the VMM, whose jail lets
//! it make no file, needs none.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use ferry_vmm::ConsoleOutput;
use rustix::fs::{FallocateFlags, fallocate};

/// The file below an instance's folder that holds what the guest printed on this host.
pub(crate) const CONSOLE_LOG: &str = "console.log";

/// At least so much of the end is kept.
const KEPT: u64 = 8 << 20;

/// What is too old is let go in pieces of this: a multiple of every file system's blocks.
const PIECE: u64 = 1 << 20;

/// Appends what the guest prints to its console log, unbuffered: a reader sees each byte at once.
#[derive(Clone, Debug)]
pub(super) struct ConsoleLog {
    /// Shared, for a machine that is built anew goes on with it.
    log: Arc<Mutex<Log>>,
}

#[derive(Debug)]
struct Log {
    file: File,
    /// Its length, holes included, and how much in front is one.
    length: u64,
    hole: u64,
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
        let log = Log {
            length: file.metadata()?.len(),
            hole: 0,
            file,
            failed: false,
        };
        Ok(Self {
            log: Arc::new(Mutex::new(log)),
        })
    }
}

impl Log {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let end = self.length + bytes.len() as u64;
        if end > self.hole + KEPT + PIECE {
            let hole = (end - KEPT) / PIECE * PIECE;
            let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            // Without it the file would grow and grow.
            fallocate(&self.file, how, 0, hole)?;
            self.hole = hole;
        }
        self.file.write_all(bytes)?;
        self.length = end;
        Ok(())
    }
}

impl ConsoleOutput for ConsoleLog {
    fn write(&mut self, bytes: &[u8]) {
        // A full disk must not stop the guest: output is lost, and that is said once until it works again.
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        match log.append(bytes) {
            Ok(()) => log.failed = false,
            Err(error) if !log.failed => {
                log.failed = true;
                tracing::warn!(%error, "console output is lost");
            }
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_guest_that_prints_for_ever_fills_no_disk() {
        let folder = tempfile::tempdir().unwrap();
        let mut log = ConsoleLog::open(folder.path()).unwrap();
        let line = [b'x'; 64 << 10];
        let printed = 4 * KEPT;
        (0..printed / line.len() as u64).for_each(|_| log.write(&line));
        log.write(b"the last line\n");
        // And a VMM that comes after this one goes on where it was.
        drop(log);
        ConsoleLog::open(folder.path()).unwrap().write(b"one more\n");

        let path = folder.path().join(CONSOLE_LOG);
        let metadata = std::fs::metadata(&path).unwrap();
        assert!(metadata.len() > printed);
        assert!(
            metadata.blocks() * 512 <= KEPT + 2 * PIECE,
            "{} blocks",
            metadata.blocks()
        );
        let bytes = std::fs::read(&path).unwrap();
        let kept = bytes.iter().filter(|&&byte| byte != 0).count() as u64;
        assert!(kept >= KEPT, "{kept} bytes are kept");
        assert!(bytes.ends_with(b"the last line\none more\n"));
    }
}
