//! A second network beside that of the calling thread, and a link of some rate between them, as between two hosts.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::host::Host;
use crate::pair::Pair;
use crate::waiting::{CALL, until};

/// The link's address on the calling thread's side, where host `a` is.
pub const NEAR: &str = "198.51.100.1";

/// Its address on the other side, where host `b` is.
pub const FAR: &str = "198.51.100.2";

/// The ends of the link, as their networks name them.
const NEAR_END: &str = "near";
const FAR_END: &str = "far";

/// A network of its own, joined to that of the calling thread. It is there for as long as a process is in it, and goes with its last one: dropping this, or the
/// end of this process however it comes, ends the one that holds it.
#[derive(Debug)]
pub struct ShapedLink {
    holder: Child,
}

impl ShapedLink {
    /// Makes the network and the link, which carries so much in each direction: `1gbit`, as `tc` has it. The calling thread is in a network of its own.
    ///
    /// # Errors
    /// If they cannot be made: this needs root, and iproute2.
    pub fn join(rate: &str) -> Result<Self> {
        // It waits for its standard input to end, which it does with this process at the latest.
        let holder = Command::new("unshare")
            .args(["--net", "sh", "-c", "read nothing"])
            .stdin(Stdio::piped())
            .spawn()
            .context("failed to start unshare")?;
        let link = Self { holder };
        let here = fs::read_link("/proc/thread-self/ns/net")?;
        until("there is another network", CALL, || {
            Ok((fs::read_link(link.namespace())? != here).then_some(()))
        })?;
        let owner = link.holder.id().to_string();
        call(&["ip", "link", "add", NEAR_END, "type", "veth", "peer", "name", FAR_END])?;
        call(&["ip", "link", "set", FAR_END, "netns", &owner])?;
        call(&["ip", "address", "add", &format!("{NEAR}/24"), "dev", NEAR_END])?;
        link.call_there(&["ip", "address", "add", &format!("{FAR}/24"), "dev", FAR_END])?;
        link.call_there(&["ip", "link", "set", "lo", "up"])?;
        link.call_there(&["ip", "link", "set", FAR_END, "up"])?;
        link.heal()?;
        link.set_rate(rate)?;
        Ok(link)
    }

    /// From now on it carries so much in each direction.
    ///
    /// # Errors
    /// What `tc` says.
    pub fn set_rate(&self, rate: &str) -> Result<()> {
        let shape = |end| {
            [
                "tc", "qdisc", "replace", "dev", end, "root", "tbf", "rate", rate, "burst", "256kb", "latency", "20ms",
            ]
        };
        call(&shape(NEAR_END))?;
        self.call_there(&shape(FAR_END))
    }

    /// From now on nothing gets across.
    ///
    /// # Errors
    /// What `ip` says.
    pub fn cut(&self) -> Result<()> {
        call(&["ip", "link", "set", NEAR_END, "down"])
    }

    /// The link is up again.
    ///
    /// # Errors
    /// What `ip` says.
    pub fn heal(&self) -> Result<()> {
        call(&["ip", "link", "set", NEAR_END, "up"])
    }

    /// The other network, as a file.
    #[must_use]
    pub fn namespace(&self) -> PathBuf {
        format!("/proc/{}/ns/net", self.holder.id()).into()
    }

    /// From their next starts on, the agents of this pair are on the two sides.
    pub fn part(&self, pair: &mut Pair) {
        pair.a.move_to(NEAR, None);
        pair.b.move_to(FAR, Some(self.namespace()));
        let (near, far) = (pair.a.url(), pair.b.url());
        pair.a.set_peer("b", &far);
        pair.b.set_peer("a", &near);
        let folder = pair.folder().display().to_string();
        let allow = |host: &mut Host| {
            let words = ["--insecure-network", "--image-dir", &folder];
            host.arguments.extend(words.map(str::to_owned));
        };
        allow(&mut pair.a);
        allow(&mut pair.b);
        pair.expect_complaint("insecure-network");
    }

    fn call_there(&self, words: &[&str]) -> Result<()> {
        let namespace = format!("--net={}", self.namespace().display());
        call(&[&["nsenter", &namespace], words].concat())
    }
}

impl Drop for ShapedLink {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
        // Whoever is still in the other network is cut off.
        let _ = call(&["ip", "link", "delete", NEAR_END]);
    }
}

fn call(words: &[&str]) -> Result<()> {
    let [program, arguments @ ..] = words else {
        return Ok(());
    };
    let output = Command::new(program).args(arguments).output();
    let output = output.with_context(|| format!("failed to call {program}"))?;
    let told = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "`{}`: {}", words.join(" "), told.trim());
    Ok(())
}
