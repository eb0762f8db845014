//! The hosts as this agent sees them: what they say of themselves, and when they were heard last.

use std::sync::Arc;

use ferry_proto::agent::v1::{HostInfo, HostStatus};

use super::scheduler::Candidate;
use crate::agent::context::RequestContext;
use crate::agent::host;
use crate::agent::instances::Agent;
use crate::agent::peers::{Heard, Peer};

impl Agent {
    /// What this host is like now.
    pub(crate) async fn host_info(&self) -> HostInfo {
        let (limit, claimed) = (self.claims_limit(), self.claimed().await);
        HostInfo {
            host: self.host().to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            rpc_version: self.config.rpc_cap.to_string(),
            advertise: self.url.clone(),
            data_address: self.data_address.clone(),
            memory_total_bytes: host::meminfo("MemTotal"),
            memory_available_bytes: host::meminfo("MemAvailable"),
            cpus: std::thread::available_parallelism().map_or(1, |cpus| cpus.get() as u32),
            instances: self.instances.all().len() as u32,
            peers: self
                .peers
                .all()
                .map(|peer| format!("{}={}", peer.host, peer.url))
                .collect(),
            boot_id: self.boot_id.clone(),
            memory_limit_bytes: limit.memory_bytes,
            memory_claimed_bytes: claimed.memory_bytes,
            vcpus_limit: limit.vcpus,
            vcpus_claimed: claimed.vcpus,
            migrations_out: self.outgoing.count() as u32,
            migrations_in: self.incoming.count() as u32,
            journal: self.journal.id().to_string(),
        }
    }

    /// This host and its peers, each asked now, all at once.
    pub(super) async fn hosts(&self, context: &RequestContext) -> Vec<HostStatus> {
        let asked = ask_all(context, self.peers.all());
        let mut hosts = vec![HostStatus {
            host: self.host().to_owned(),
            url: self.url.clone(),
            up: true,
            last_heard: Some(crate::agent::outgoing::now_text()),
            error: None,
            info: Some(self.host_info().await),
        }];
        for (peer, _) in asked.await {
            hosts.push(status_of(&peer, peer.heard()));
        }
        hosts
    }

    /// Every host that an instance could go to, this one among them, with what it said when it was asked just now. A host
    /// that does not answer counts as up while it was heard lately: what it said then is what is known of it.
    pub(super) async fn candidates(self: &Arc<Self>, context: &RequestContext) -> Vec<Candidate> {
        let asked = ask_all(context, self.peers.all());
        let mut candidates = vec![Candidate {
            host: self.host().to_owned(),
            answer: Ok(self.host_info().await),
        }];
        for (peer, answer) in asked.await {
            let heard = peer.heard();
            let answer = match (answer, heard.info.clone()) {
                (Ok(info), _) => Ok(info),
                (Err(_), Some(info)) if heard.is_up() => Ok(info),
                (Err(silence), _) => Err(silence),
            };
            candidates.push(Candidate {
                host: peer.host,
                answer,
            });
        }
        candidates
    }
}

/// Asks these peers how they are. They are asked from now on, also while what is returned is not waited for.
fn ask_all<'a>(
    context: &'a RequestContext,
    peers: impl Iterator<Item = &'a Peer>,
) -> impl Future<Output = Vec<(Peer, Result<HostInfo, String>)>> {
    let asked: Vec<_> = peers
        .cloned()
        .map(|peer| {
            let (asking, context) = (peer.clone(), context.clone());
            let answer =
                tokio::spawn(async move { asking.host_info(&context).await.map_err(|error| error.to_string()) });
            (peer, answer)
        })
        .collect();
    async move {
        let mut answers = Vec::new();
        for (peer, answer) in asked {
            let answer = answer.await.unwrap_or_else(|error| Err(error.to_string()));
            answers.push((peer, answer));
        }
        answers
    }
}

fn status_of(peer: &Peer, heard: Heard) -> HostStatus {
    let last = heard
        .last_heard()
        .map(|at| humantime::format_rfc3339_millis(at).to_string());
    HostStatus {
        host: peer.host.clone(),
        url: peer.url.clone(),
        up: heard.is_up(),
        last_heard: last,
        error: heard.silence,
        info: heard.info,
    }
}
