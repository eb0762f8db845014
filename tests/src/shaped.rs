//! A second network beside that of the calling thread, and a link of some rate between them, as between two hosts.

use std::path::PathBuf;

use anyhow::Result;

use crate::host::Host;
use crate::network::{Network, call};
use crate::pair::Pair;

/// The link's address on the calling thread's side, where host `a` is.
pub const NEAR: &str = "198.51.100.1";

/// Its address on the other side, where host `b` is.
pub const FAR: &str = "198.51.100.2";

/// The ends of the link, as their networks name them.
const NEAR_END: &str = "near";
const FAR_END: &str = "far";

/// A network of its own, joined to that of the calling thread. It goes as a [`Network`] does.
#[derive(Debug)]
pub struct ShapedLink {
    far: Network,
}

impl ShapedLink {
    /// Makes the network and the link, which carries so much in each direction: `1gbit`, as `tc` has it. The calling thread is in a network of its own.
    ///
    /// # Errors
    /// If they cannot be made: this needs root, and iproute2.
    pub fn join(rate: &str) -> Result<Self> {
        let link = Self { far: Network::make()? };
        call(&["ip", "link", "add", NEAR_END, "type", "veth", "peer", "name", FAR_END])?;
        link.far.take(FAR_END)?;
        call(&["ip", "address", "add", &format!("{NEAR}/24"), "dev", NEAR_END])?;
        let far = |words: &[&str]| link.far.call(words);
        far(&["ip", "address", "add", &format!("{FAR}/24"), "dev", FAR_END])?;
        far(&["ip", "link", "set", FAR_END, "up"])?;
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
        self.far.call(&shape(FAR_END))
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

    /// The other network.
    #[must_use]
    pub fn far(&self) -> &Network {
        &self.far
    }

    /// The other network, as a file.
    #[must_use]
    pub fn namespace(&self) -> PathBuf {
        self.far.namespace()
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
}

impl Drop for ShapedLink {
    fn drop(&mut self) {
        // Whoever is still in the other network is cut off.
        let _ = call(&["ip", "link", "delete", NEAR_END]);
    }
}
