//! What was measured, as the migration's record shows it.

use std::time::Duration;

use ferry_migration::handover::Decision;
use ferry_proto::agent::v1::{DestinationPart, DowntimeMs, Round};
use ferry_proto::vmm::v1 as wire;

use super::handle::now_ms;
use super::script::Script;
use crate::vmm_process::ms;

impl Script {
    /// The VMM's last word on how far it is.
    pub(super) fn note_progress(&mut self, progress: &wire::Progress) {
        let info = &mut self.row.info;
        let round = |round: &wire::Round| Round {
            pages: round.pages,
            bytes: round.bytes,
            ms: round.ms,
            dirty_pages: round.dirty_pages,
        };
        info.rounds = progress
            .rounds
            .iter()
            .filter(|round| is_sane(round.ms))
            .map(round)
            .collect();
        info.bytes_sent = progress.bytes_sent;
        info.zero_pages = progress.zero_pages;
        info.remaining_pages = progress.remaining_pages;
        // Never measured is told as 0 by the VMM, and as unknown to users.
        info.throughput_bytes_per_s =
            Some(progress.throughput_bytes_per_s).filter(|&measured| measured > 0.0 && is_sane(measured));
        info.dirty_bytes_per_s =
            (!progress.rounds.is_empty() && is_sane(progress.dirty_bytes_per_s)).then_some(progress.dirty_bytes_per_s);
        if !progress.decision.is_empty() {
            info.decision = Some(progress.decision.clone());
        }
    }

    /// The blackout, once both parts are known: A's by A's clock, B's by B's, and half a round trip between them.
    pub(super) fn note_figures(&mut self, decision: Decision, part: Option<DestinationPart>, heard_ns: u64) {
        if decision != Decision::Running {
            return;
        }
        let info = &mut self.row.info;
        if info.total_ms.is_none() {
            // An agent that restarted meanwhile has the wall clock's word for when it accepted.
            let since_began = || Duration::from_millis(u64::try_from(now_ms() - self.row.began).unwrap_or(0));
            let measured = self.accepted_ns.map(|accepted| between(accepted, heard_ns));
            info.total_ms = Some(measured.unwrap_or_else(|| ms(since_began())));
        }
        let (Some(go), Some(part)) = (&self.go, part) else {
            return;
        };
        let told = [
            go.pause_ms,
            go.drain_ms,
            go.last_pages_ms,
            go.state_ms,
            go.round_trip_ms,
        ];
        let told_there = [part.load_ms, part.claim_ms, part.start_ms, part.total_ms];
        if !told.iter().chain(&told_there).all(|&figure| is_sane(figure)) {
            tracing::warn!(migration = %self.row.id, "the parts of the blackout that were told are no figures");
            return;
        }
        let upper_bound = between(go.pause_began_ns, heard_ns);
        let estimate = between(go.pause_began_ns, go.go_ns) + go.round_trip_ms / 2.0 + part.total_ms;
        info.downtime_ms = Some(DowntimeMs {
            // The way of GO is estimated, its bound is measured.
            total: estimate.min(upper_bound),
            upper_bound,
            pause: go.pause_ms,
            drain: go.drain_ms,
            last_pages: go.last_pages_ms,
            state: go.state_ms + part.load_ms,
            claim: part.claim_ms,
            start: part.start_ms,
        });
        info.memory_digest = Some(part.memory_digest).filter(|digest| !digest.is_empty());
        info.state_digest = Some(part.state_digest).filter(|digest| !digest.is_empty());
    }
}

/// What JSON can hold, and time can be.
fn is_sane(figure: f64) -> bool {
    figure.is_finite() && figure >= 0.0
}

fn between(from_ns: u64, to_ns: u64) -> f64 {
    ms(Duration::from_nanos(to_ns.saturating_sub(from_ns)))
}
