//! `ferry vmm`: the process around one virtual machine.
//!
//! Threads and blocking calls, no runtime. One thread owns the machine and everything said about it (`vmm::Vmm`); others
//! feed it through one channel:
//!
//! ```text
//!   accept ──┐
//!   orders ──┤ (one reader per agent connection; only the newest counts)
//!   guest  ──┼──► events ──► Vmm ──► reports to the agent
//!   migration, snapshot ┘ (take the machine by value, give it back in their outcome)
//! ```
//!
//! The agent hands over the listening socket as standard input, so it exists before this process does, and whoever can
//! open the socket is the agent. The process ends when its agent kills it; it never ends, and never starts a guest, by itself.
//!
//! It opens what it will need of its host and then goes into its jail (`jail`), before it has a second thread and before it listens to anybody.

mod adapter;
mod announce;
mod backends;
mod console;
mod convert;
mod copied;
mod disks;
mod events;
mod frames;
mod guest;
mod jail;
mod late;
mod memory;
mod migrating;
mod reporting;
mod sampling;
mod snapshot;
mod vmm;

pub(crate) use console::CONSOLE_LOG;
pub(crate) use convert::{attempt_from_wire, monotonic_ns, ms};
pub(crate) use jail::{Part, Shortfall};

use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::mpsc;

use anyhow::Context;

use self::console::ConsoleLog;

/// What an agent tells the process that it starts.
#[derive(Debug)]
pub struct Start {
    /// The instance's folder.
    pub folder: PathBuf,
    /// Where the started mark will be, for a guest that moves in.
    pub mark_folder: Option<PathBuf>,
    /// The user, and group, that the process is to become.
    pub user: Option<u32>,
    /// The newest version of the protocol with its agent that it speaks.
    pub protocol: u32,
}

impl Start {
    fn enter_jail(&self) -> Vec<Shortfall> {
        jail::enter(jail::Confinement {
            folder: &self.folder,
            mark_folder: self.mark_folder.as_deref(),
            user: self.user,
        })
    }
}

/// Goes into the jail that `start` describes, and tells what this host does not allow. For who wants to know beforehand.
///
/// The process must have one thread, and be of no other use.
pub(crate) fn rehearse(start: &Start) -> Vec<Shortfall> {
    start.enter_jail()
}

/// Serves an instance on the listening socket that standard input is. Returns only on an error.
///
/// Called while the process has one thread.
///
/// # Errors
/// Standard input is not a listening Unix socket.
pub fn main(start: Start) -> anyhow::Result<()> {
    // A session of its own: what ends the agent's terminal or process group does not end the guest.
    if let Err(error) = rustix::process::setsid() {
        tracing::warn!(%error, "this VMM shares the agent's session");
    }
    let descriptor = std::io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .context("failed to take the socket over")?;
    let listener = UnixListener::from(descriptor);
    // Listening again puts this process's credentials on the socket: whoever connects sees who serves it.
    rustix::net::listen(&listener, 16)
        .context("standard input is not the socket that an agent passes; only agents start this")?;

    ferry_vmm::keep_host_files();
    // It stays writable in here, and nothing else of the folder does.
    let console_log = ConsoleLog::open(&start.folder);
    for Shortfall { part, reason } in start.enter_jail() {
        tracing::info!(%part, reason, "this host does not allow a part of the jail");
    }

    let (sender, receiver) = mpsc::channel();
    events::accept_agents(listener, sender.clone()).context("failed to start the accepting thread")?;
    tracing::info!(folder = %start.folder.display(), pid = std::process::id(), "VMM started");
    vmm::Vmm::new(start.folder, console_log, sender, start.protocol).serve(&receiver);
    Ok(())
}
