//! A disk that hangs when a test wants it to: whoever reads its image waits in the kernel until it is let go.
//!
//! By permission events of fanotify(7): the kernel asks before each read, and does not answer the reader before the test has answered
//! the kernel. To the reader it is a disk that does not answer.

use std::os::fd::AsFd;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::fanotify::{EventFFlags, Fanotify, FanotifyResponse, InitFlags, MarkFlags, MaskFlags, Response};

use crate::waiting::{CALL, until};

/// An image whose reads can be held. Dropping it lets all of them go.
pub struct HangingDisk {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    hangs: bool,
    /// Whether a read waits.
    holds: bool,
    over: bool,
}

impl HangingDisk {
    /// Takes this image over; it does not hang yet. Needs CAP_SYS_ADMIN.
    ///
    /// # Errors
    /// The kernel has no permission events, or does not allow them here.
    pub fn on(image: &Path) -> Result<Self> {
        let flags = InitFlags::FAN_CLASS_CONTENT | InitFlags::FAN_CLOEXEC | InitFlags::FAN_NONBLOCK;
        let asked = Fanotify::init(flags, EventFFlags::O_RDONLY | EventFFlags::O_CLOEXEC)
            .context("failed to ask for permission events")?;
        asked
            .mark(
                MarkFlags::FAN_MARK_ADD,
                MaskFlags::FAN_ACCESS_PERM,
                nix::fcntl::AT_FDCWD,
                Some(image),
            )
            .with_context(|| format!("failed to ask for the reads of {}", image.display()))?;
        let shared = Arc::new(Shared::default());
        let answering = Arc::clone(&shared);
        let thread = thread::spawn(move || answering.answer(&asked));
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// From now on it hangs; returns when somebody waits for it.
    ///
    /// # Errors
    /// Nobody reads.
    pub fn hang(&self) -> Result<()> {
        self.shared.lock().hangs = true;
        until("somebody waits for the disk", CALL, || {
            Ok(self.shared.lock().holds.then_some(()))
        })
    }

    /// It answers again.
    pub fn let_go(&self) {
        self.shared.lock().hangs = false;
        self.shared.changed.notify_all();
    }
}

impl Drop for HangingDisk {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        (state.hangs, state.over) = (false, true);
        drop(state);
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Allows every read, but none while the disk hangs. Closing `asked`, at the end, allows what is left.
    fn answer(&self, asked: &Fanotify) {
        while !self.lock().over {
            let mut ready = [PollFd::new(asked.as_fd(), PollFlags::POLLIN)];
            // Looks again whether it is over.
            if !matches!(poll(&mut ready, PollTimeout::from(20u8)), Ok(1..)) {
                continue;
            }
            for event in asked.read_events().unwrap_or_default() {
                self.wait_while_it_hangs();
                if let Some(file) = event.fd() {
                    // The reader may be gone.
                    let _ = asked.write_response(FanotifyResponse::new(file, Response::FAN_ALLOW));
                }
            }
        }
    }

    fn wait_while_it_hangs(&self) {
        let mut state = self.lock();
        while state.hangs {
            state.holds = true;
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.holds = false;
    }
}
