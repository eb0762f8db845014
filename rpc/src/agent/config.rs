//! What an agent is told when it starts.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::bail;

use super::claims::AllocationRatios;
use super::versions::RpcVersion;
use super::vmm_user::UserRange;

/// The configuration of one agent.
#[derive(Clone, Debug)]
pub struct AgentConfig {
    /// The host's name among its peers.
    pub host_id: String,
    /// Where gRPC is served.
    pub listen: SocketAddr,
    /// Where the data port listens.
    pub data_listen: SocketAddr,
    /// The URL by which peers reach this agent; the listening address where it is none.
    pub advertise: Option<String>,
    /// Where journal and instances are kept.
    pub data_dir: PathBuf,
    /// The other agents: host id and URL.
    pub peers: Vec<(String, String)>,
    /// On an address that is not loopback: where kernels, initrds and disks must lie.
    pub image_dirs: Vec<PathBuf>,
    /// Allows other addresses than loopback, although peers do not authenticate each other.
    pub insecure_network: bool,
    /// The users that VMMs become, where the agent is root.
    pub vmm_users: UserRange,
    /// For tests: the newest version of the agent-VMM protocol that the VMMs of this agent speak.
    pub vmm_protocol_cap: Option<u32>,
    /// The newest version of the RPCs that it speaks and understands: Nova's upgrade_levels.
    pub rpc_cap: RpcVersion,
    /// How much of this host its guests may claim.
    pub allocation: AllocationRatios,
    /// Migrations out of here at the same time; the others are queued.
    pub max_outgoing: usize,
    /// Migrations into here at the same time; the others wait at their sources.
    pub max_incoming: usize,
}

impl AgentConfig {
    /// Checks what can be checked before anything is opened.
    ///
    /// # Errors
    /// An address that needs `--insecure-network`, or a host id that cannot be one.
    pub fn check(&self) -> anyhow::Result<()> {
        if !is_name(&self.host_id) {
            bail!(
                "host id {:?} is not a name: letters, digits, '.', '_' and '-', 63 at most",
                self.host_id
            );
        }
        for (flag, address) in [("--listen", self.listen), ("--data-listen", self.data_listen)] {
            if !address.ip().is_loopback() && !self.insecure_network {
                bail!(
                    "{flag} {address} is not a loopback address, and agents do not authenticate each other yet: anyone who \
                     reaches it owns this host's guests; add --insecure-network to accept that"
                );
            }
        }
        if self.rpc_cap < RpcVersion::OLDEST || self.rpc_cap > RpcVersion::NEWEST {
            bail!(
                "--rpc-cap {}: this agent speaks RPC versions {} to {}",
                self.rpc_cap,
                RpcVersion::OLDEST,
                RpcVersion::NEWEST
            );
        }
        if let Some((peer, _)) = self.peers.iter().find(|(peer, _)| *peer == self.host_id) {
            bail!("peer {peer:?} has this agent's own host id");
        }
        Ok(())
    }

    /// Whether anything but loopback can reach this agent.
    pub(crate) fn is_exposed(&self) -> bool {
        !self.listen.ip().is_loopback() || !self.data_listen.ip().is_loopback()
    }
}

/// Whether `text` can name a host or an instance: it is shown, logged and used in file names.
pub(crate) fn is_name(text: &str) -> bool {
    let mut bytes = text.bytes();
    text.len() <= 63
        && bytes.next().is_some_and(|first| first.is_ascii_alphanumeric())
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(listen: &str) -> AgentConfig {
        AgentConfig {
            host_id: "a".to_owned(),
            listen: listen.parse().unwrap(),
            data_listen: "127.0.0.1:0".parse().unwrap(),
            advertise: None,
            data_dir: PathBuf::new(),
            peers: Vec::new(),
            image_dirs: Vec::new(),
            insecure_network: false,
            vmm_users: UserRange::default(),
            vmm_protocol_cap: None,
            rpc_cap: RpcVersion::NEWEST,
            allocation: AllocationRatios::default(),
            max_outgoing: 1,
            max_incoming: 4,
        }
    }

    #[test]
    fn another_address_than_loopback_is_refused_unless_asked_for() {
        assert!(config("127.0.0.1:7400").check().is_ok());
        assert!(config("0.0.0.0:7400").check().is_err());
        assert!(
            AgentConfig {
                insecure_network: true,
                ..config("0.0.0.0:7400")
            }
            .check()
            .is_ok()
        );
    }

    #[test]
    fn names_are_short_and_plain() {
        assert!(is_name("web-1.example"));
        assert!(!is_name("-x") && !is_name("") && !is_name("a/b") && !is_name(&"x".repeat(64)));
    }
}
