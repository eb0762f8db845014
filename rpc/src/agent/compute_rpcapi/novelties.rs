//! What a request may hold that an older agent would take no notice of.

use ferry_proto::agent::v1::MigrationOptions;

use crate::agent::failure::Failure;
use crate::agent::instances::Agent;
use crate::agent::mode::{Mode, PAUSE, POSTCOPY};
use crate::agent::reason::Reason;
use crate::agent::transport::Transport;
use crate::agent::versions::RpcVersion;

impl Agent {
    /// Whether each agent that is up knows what these options ask for: messages go out at the lowest version of all.
    ///
    /// # Errors
    /// Names one that does not.
    pub(crate) fn check_all_know(&self, options: &MigrationOptions) -> Result<(), Failure> {
        let Some(what) = novelty(options) else { return Ok(()) };
        let knows = |version: RpcVersion| version.understands(RpcVersion::V4_3);
        if !knows(self.config.rpc_cap) {
            return Err(knows_not(what, self.host(), self.config.rpc_cap));
        }
        for peer in self.peers.all() {
            let heard = peer.heard();
            let told = heard
                .is_up()
                .then(|| heard.info?.rpc_version.parse::<RpcVersion>().ok());
            // Of another language none is thought of, as in `rpc_cap`.
            let is_older = |version: &RpcVersion| version.common(self.config.rpc_cap).is_some() && !knows(*version);
            if let Some(version) = told.flatten().filter(is_older) {
                return Err(knows_not(what, &peer.host, version));
            }
        }
        Ok(())
    }
}

/// What of these options an agent before 4.3 does not know; it would take no notice.
pub(super) fn novelty(options: &MigrationOptions) -> Option<&'static str> {
    let novelties = [
        (options.on_timeout == PAUSE, "a pause when the time is up"),
        (options.on_timeout == POSTCOPY, "post-copy when the time is up"),
        (options.max_throttle_percent > 0, "throttling the guest"),
        (options.resume_window_ms > 0, "waiting for a link that is lost"),
        (new_transport(&options.transport).is_some(), CARRYING),
        (options.verify, "comparing what is moved"),
        (options.no_disk_over_commit, "room for all that a disk may hold"),
        (
            !matches!(&*options.compress, "" | "auto" | "off"),
            "compressing what is moved",
        ),
    ];
    let of_options = novelties
        .into_iter()
        .find_map(|(is_asked_for, what)| is_asked_for.then_some(what));
    Mode::of(options).ok().and_then(new_mode).or(of_options)
}

/// What an agent before 4.3 does not know of this mode.
pub(super) fn new_mode(mode: Mode) -> Option<&'static str> {
    match mode {
        Mode::Precopy => None,
        Mode::Cold => Some("a cold migration"),
        Mode::Postcopy | Mode::Hybrid | Mode::Overtime => Some("a migration with pages that come late"),
    }
}

/// What an agent before 4.3 does not serve.
const CARRYING: &str = "a migration by --transport grpc";

pub(super) fn new_transport(word: &str) -> Option<&'static str> {
    (Transport::parse(word) == Ok(Transport::Grpc)).then_some(CARRYING)
}

pub(super) fn knows_not(what: &str, host: &str, version: RpcVersion) -> Failure {
    Failure::denied(
        Reason::RpcVersion,
        format!(
            "host {host} speaks RPC version {version}: {what} needs {} of every agent that is up",
            RpcVersion::V4_3
        ),
    )
}
