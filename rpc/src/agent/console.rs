//! What the guest printed, and what it prints from now on.

use std::fs::File;
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ferry_proto::agent::v1::ConsoleOutput;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{SeekFrom, inotify, seek};
use rustix::io::Errno;
use rustix::time::Timespec;
use tokio::sync::mpsc;
use tonic::Status;

use super::failure::Failure;

/// Whether to go on after the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Follow {
    /// End where the file ends.
    No,
    /// Go on until the file is removed or the reader leaves.
    Yes,
}

/// The most bytes of one message.
const PIECE: usize = 64 << 10;

/// How long a change is let grow before it is read.
const BURST: Duration = Duration::from_millis(2);

/// How often a follower looks whether its reader left, while nothing is printed.
const LOOK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 500_000_000,
};

/// Streams a log of an instance. Each reader has a thread: files and their changes are waited for by blocking.
pub(crate) fn stream(path: PathBuf, follow: Follow) -> mpsc::Receiver<Result<ConsoleOutput, Status>> {
    let (sender, receiver) = mpsc::channel(16);
    tokio::task::spawn_blocking(move || {
        if let Err(error) = copy(&path, follow, &sender) {
            let failure = Failure::host(format!("failed to read {}", path.display()))(error);
            let _ = sender.blocking_send(Err(failure.into()));
        }
    });
    receiver
}

fn copy(path: &Path, follow: Follow, to: &mpsc::Sender<Result<ConsoleOutput, Status>>) -> io::Result<()> {
    let mut file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    // Watched before it is read, so that nothing falls between.
    let changes = match follow {
        Follow::Yes => Some(watch(path)?),
        Follow::No => None,
    };
    let mut buffer = vec![0; PIECE];
    let mut removed = false;
    loop {
        loop {
            skip_hole(&file)?;
            let count = file.read(&mut buffer)?;
            if count == 0 {
                break;
            }
            if to
                .blocking_send(Ok(ConsoleOutput {
                    bytes: buffer[..count].to_vec(),
                }))
                .is_err()
            {
                return Ok(());
            }
        }
        // What was written up to the removal was still to be read.
        let Some(changes) = changes.as_ref().filter(|_| !removed) else {
            return Ok(());
        };
        while !wait(changes)? {
            if to.is_closed() {
                return Ok(());
            }
        }
        // A guest prints byte by byte: without a rest each would be a message of its own.
        std::thread::sleep(BURST);
        removed = was_removed(changes)?;
    }
}

/// What is too old of a log is a hole: whoever reads goes on behind it.
fn skip_hole(file: &File) -> io::Result<()> {
    let here = seek(file, SeekFrom::Current(0))?;
    match seek(file, SeekFrom::Data(here)) {
        // At the end, or on a file system that has no holes.
        Ok(_) | Err(Errno::NXIO | Errno::INVAL | Errno::OPNOTSUPP) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn watch(path: &Path) -> io::Result<OwnedFd> {
    let inotify = inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC)?;
    // An open file that is unlinked has its link count changed; it is deleted only when nobody holds it.
    let wanted = inotify::WatchFlags::MODIFY | inotify::WatchFlags::ATTRIB;
    inotify::add_watch(&inotify, path, wanted)?;
    Ok(inotify)
}

/// Waits a moment for a change.
fn wait(inotify: &OwnedFd) -> io::Result<bool> {
    match poll(&mut [PollFd::new(inotify, PollFlags::IN)], Some(&LOOK)) {
        Ok(ready) => Ok(ready > 0),
        Err(Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Takes the changes that are there; true if the file was unlinked.
fn was_removed(inotify: &OwnedFd) -> io::Result<bool> {
    let mut space = [MaybeUninit::uninit(); 4096];
    let mut events = inotify::Reader::new(inotify, &mut space);
    let mut removed = false;
    loop {
        match events.next() {
            Ok(event) => removed |= event.events().contains(inotify::ReadFlags::ATTRIB),
            Err(Errno::AGAIN) => return Ok(removed),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[tokio::test]
    async fn what_was_let_go_of_a_log_is_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console.log");
        let log = File::create(&path).unwrap();
        log.write_all_at(b"the end", 64 << 20).unwrap();
        let mut pieces = stream(path, Follow::No);
        let mut read = Vec::new();
        while let Some(piece) = pieces.recv().await {
            read.extend(piece.unwrap().bytes);
        }
        assert_eq!(read, b"the end");
    }
}
