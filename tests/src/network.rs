//! Networks beside that of the calling thread.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::waiting::{CALL, until};

/// A network of its own. It is there for as long as a process is in it, and goes with its last one: dropping this, or the end of this process
/// however it comes, ends the one that holds it.
#[derive(Debug)]
pub struct Network {
    holder: Child,
}

impl Network {
    /// Makes one, with nothing in it but a loopback that is up.
    ///
    /// # Errors
    /// If it cannot be made: this needs root, and iproute2.
    pub fn make() -> Result<Self> {
        // It waits for its standard input to end, which it does with this process at the latest.
        let holder = Command::new("unshare")
            .args(["--net", "sh", "-c", "read nothing"])
            .stdin(Stdio::piped())
            .spawn()
            .context("failed to start unshare")?;
        let network = Self { holder };
        let here = fs::read_link("/proc/thread-self/ns/net")?;
        until("there is another network", CALL, || {
            Ok((fs::read_link(network.namespace())? != here).then_some(()))
        })?;
        network.call(&["ip", "link", "set", "lo", "up"])?;
        Ok(network)
    }

    /// It, as a file.
    #[must_use]
    pub fn namespace(&self) -> PathBuf {
        format!("/proc/{}/ns/net", self.holder.id()).into()
    }

    /// Takes an interface out of the calling thread's network.
    ///
    /// # Errors
    /// What `ip` says.
    pub fn take(&self, interface: &str) -> Result<()> {
        call(&["ip", "link", "set", interface, "netns", &self.holder.id().to_string()])
    }

    /// Calls a program in it.
    ///
    /// # Errors
    /// What the program says.
    pub fn call(&self, words: &[&str]) -> Result<()> {
        let namespace = format!("--net={}", self.namespace().display());
        call(&[&["nsenter", &namespace], words].concat())
    }

    /// Does something on a thread that is in it: sockets and threads that come of it stay there.
    ///
    /// # Errors
    /// The thread cannot go there, or what it does fails.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let namespace = File::open(self.namespace()).context("the network is gone")?;
        std::thread::scope(|scope| {
            let there = scope.spawn(move || {
                move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
                work()
            });
            there.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

/// Calls a program in the calling thread's network.
///
/// # Errors
/// What the program says.
pub(crate) fn call(words: &[&str]) -> Result<()> {
    let [program, arguments @ ..] = words else {
        return Ok(());
    };
    let output = Command::new(program).args(arguments).output();
    let output = output.with_context(|| format!("failed to call {program}"))?;
    let told = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "`{}`: {}", words.join(" "), told.trim());
    Ok(())
}
