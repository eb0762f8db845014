//! A copy into here whose link is lost: its VMM keeps what came and waits, and agent A asks for another link.

use std::time::{Duration, SystemTime};

use ferry_migration::handover::Decision;
use ferry_proto::agent::v1::{LateLinkReply, LateLinkRequest};
use ferry_proto::vmm::v1 as wire;
use tokio::sync::oneshot;

use super::driver::{Driver, SILENCE};
use super::late::{OF_A_SESSION, Use};
use crate::vmm_process::monotonic_ns;

impl Driver {
    /// After how long without a word from agent A the guest stays with it. Before anything is expected, the link may be lost for as long as
    /// its user allows, and that of the agents with it.
    pub(super) fn patience(&self) -> Duration {
        match self.core.decision() {
            None => SILENCE + Duration::from_millis(self.row.options.resume_window_ms),
            Some(_) => SILENCE,
        }
    }

    /// Agent A asks for another link of its copy. There is no use in one once the guest was given away, or will not come.
    pub(super) fn another_link(&mut self, request: &LateLinkRequest, reply: oneshot::Sender<LateLinkReply>) {
        let mut answer = LateLinkReply::default();
        let is_copied = matches!(self.core.decision(), None | Some(Decision::Open));
        if is_copied && !self.row.over {
            let streams = u16::try_from(request.streams).unwrap_or(OF_A_SESSION);
            let late_streams = request.late_streams;
            answer.needed = true;
            answer.secret = self.incoming.secret.to_vec();
            answer.data_address.clone_from(&self.agent.data_address);
            answer.first_index = self.late_session.next(streams, Use::Copy { late_streams }).into();
        } else {
            let why = self.reason.clone();
            answer.ended = why.unwrap_or_else(|| "the guest is not copied there any more".to_owned());
        }
        // Agent A may have given up waiting, and asks again.
        let _ = reply.send(answer);
    }

    /// The VMM has no link on which pages come, and waits for another one.
    pub(super) async fn link_lost(&mut self, lost: wire::LinkLost) {
        let left = Duration::from_nanos(lost.until_ns.saturating_sub(monotonic_ns()));
        tracing::info!(migration = %self.row.id, reason = lost.reason, ?left, "the link of a copy into here is lost");
        self.row.info.link_lost_until = Some(humantime::format_rfc3339_millis(SystemTime::now() + left).to_string());
        self.row.info.decision = Some(format!("another link is waited for: {}", lost.reason));
        self.save_late().await;
    }

    /// Pages come again.
    pub(super) async fn link_back(&mut self) {
        tracing::info!(migration = %self.row.id, "a copy into here goes on over another link");
        self.row.info.link_lost_until = None;
        self.row.info.decision = None;
        self.row.info.resumed_links += 1;
        self.save_late().await;
    }
}
