//! A switch between two hosts, and a client at it.
//!
//! ```text
//!   client ─ switch ─┬─ br0 of host a ─ guests' taps
//!                    └─ br0 of host b ─ guests' taps
//! ```
//!
//! Each bridge is in a network of its own, so that what a host says of a guest that came there has to get through to the switch: until then, or until the guest
//! says something, frames for it go where it was.

use anyhow::Result;

use crate::network::{Network, call};
use crate::shaped::ShapedLink;

/// The client's address, in 24 bits.
pub const CLIENT: &str = "10.9.0.1";

/// Two hosts' bridges, each with an address of its own: one without takes that of a port, and changes it when a guest comes or goes.
const BRIDGE: &str = "br0";
const ADDRESSES: [&str; 2] = ["02:00:00:00:00:0a", "02:00:00:00:00:0b"];

/// The switch. Dropping it removes it; the hosts' bridges go with their networks.
#[derive(Debug)]
pub struct Switch {
    network: Network,
}

impl Switch {
    /// Makes it, and a bridge `br0` on each side of this link.
    ///
    /// # Errors
    /// If it cannot be made: this needs root, and iproute2.
    pub fn between(link: &ShapedLink) -> Result<Self> {
        let network = Network::make()?;
        let ip = |words: &[&str]| network.call(&[&["ip"], words].concat());
        ip(&[
            "link",
            "add",
            "switch",
            "address",
            "02:00:00:00:00:01",
            "type",
            "bridge",
        ])?;
        ip(&["address", "add", &format!("{CLIENT}/24"), "dev", "switch"])?;
        ip(&["link", "set", "switch", "up"])?;
        for (port, uplink) in [("port-a", "up-a"), ("port-b", "up-b")] {
            call(&["ip", "link", "add", uplink, "type", "veth", "peer", "name", port])?;
            network.take(port)?;
            ip(&["link", "set", port, "master", "switch", "up"])?;
        }
        let [near, far] = ADDRESSES;
        bridge(call, near, "up-a")?;
        link.far().take("up-b")?;
        bridge(|words| link.far().call(words), far, "up-b")?;
        Ok(Self { network })
    }

    /// Where the client is.
    #[must_use]
    pub fn network(&self) -> &Network {
        &self.network
    }
}

/// A host's bridge, with its way to the switch.
fn bridge(call: impl Fn(&[&str]) -> Result<()>, address: &str, uplink: &str) -> Result<()> {
    call(&["ip", "link", "add", BRIDGE, "address", address, "type", "bridge"])?;
    call(&["ip", "link", "set", BRIDGE, "up"])?;
    call(&["ip", "link", "set", uplink, "master", BRIDGE, "up"])
}
