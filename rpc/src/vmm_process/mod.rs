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

mod adapter;
mod announce;
mod backends;
mod console;
mod convert;
mod disks;
mod events;
mod guest;
mod memory;
mod migrating;
mod snapshot;
mod vmm;

pub(crate) use console::CONSOLE_LOG;
pub(crate) use convert::{attempt_from_wire, monotonic_ns, ms};

use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::mpsc;

use anyhow::Context;

/// Serves the instance in `folder` on the listening socket that standard input is. Returns only on an error.
///
/// # Errors
/// Standard input is not a listening Unix socket.
pub fn main(folder: PathBuf) -> anyhow::Result<()> {
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

    let (sender, receiver) = mpsc::channel();
    events::accept_agents(listener, sender.clone()).context("failed to start the accepting thread")?;
    tracing::info!(folder = %folder.display(), pid = std::process::id(), "VMM started");
    vmm::Vmm::new(folder, sender).serve(&receiver);
    Ok(())
}
