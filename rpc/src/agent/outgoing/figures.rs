//! What was measured, as the migration's record shows it.

use std::time::{Duration, Instant};

use ferry_migration::guest::FRAME_SIZE;
use ferry_migration::handover::Decision;
use ferry_migration::source::MOST_BEFORE_THE_END;
use ferry_proto::agent::v1::{
    Compressed, DestinationPart, DirtyPart, DowntimeMs, MigrationDecision, MigrationInfo, Round, Verified,
};
use ferry_proto::vmm::v1 as wire;

use super::handle::now_ms;
use super::script::Script;
use crate::agent::journal::RowWrite;
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
        info.memory_hinted = progress.hinted_pages.saturating_mul(PAGE);
        info.remaining_pages = progress.remaining_pages;
        info.throttle_percent = progress.throttle_percent.min(100);
        // Never measured is told as 0 by the VMM, and as unknown to users.
        info.throughput_bytes_per_s =
            Some(progress.throughput_bytes_per_s).filter(|&measured| measured > 0.0 && is_sane(measured));
        info.dirty_bytes_per_s =
            (!progress.rounds.is_empty() && is_sane(progress.dirty_bytes_per_s)).then_some(progress.dirty_bytes_per_s);
        if !progress.decision.is_empty() {
            info.decision = Some(progress.decision.clone());
        }
        let decisions = progress.decisions.iter().take(MOST_DECISIONS);
        info.decisions = decisions.filter_map(decision).collect();
        info.verified = progress.verified.as_ref().and_then(verified);
        info.compression = progress.compression.as_ref().and_then(compressed);
        note_copied(info, progress.copied.as_ref());
        note_disk_waits(info, progress.disk_waits.as_ref());
    }

    /// What the VMM said last goes to the journal now and then, while nothing is being switched over: it is what is known of a migration
    /// whose VMM and agent both end.
    pub(super) async fn journal_report(&mut self) {
        if self.reported.elapsed() < BETWEEN_REPORTS {
            return;
        }
        self.reported = Instant::now();
        if let Err(failure) = self.save(RowWrite::SourceStatus).await {
            tracing::warn!(migration = %self.row.id, error = failure.chain(), "failed to journal how far a migration is");
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

/// Bytes in a page of a guest.
const PAGE: u64 = 4096;

/// How often how far a copy is goes to the journal: a write there is an fsync.
const BETWEEN_REPORTS: Duration = Duration::from_secs(5);

/// The most decisions that are taken of a VMM, and the longest words: what it says goes into the journal again and again.
const MOST_DECISIONS: usize = 64;
const LONGEST_WORDS: usize = 1000;

/// The most vCPUs, and parts of memory, of which a decision tells.
const MOST_VCPUS: usize = 254;
const MOST_PARTS: usize = 8;

/// A decision, if its figures are some.
fn decision(told: &wire::Decision) -> Option<MigrationDecision> {
    let figures = [
        told.blackout_ms,
        told.throughput_bytes_per_s,
        told.dirty_bytes_per_s,
        told.predicted_blackout_ms,
        told.predicted_total_ms,
        told.round_ms,
    ];
    let cut = |text: &str| text.chars().take(LONGEST_WORDS).collect();
    let are_sane = figures.into_iter().flatten().all(is_sane);
    are_sane.then(|| MigrationDecision {
        round: told.round,
        deed: cut(&told.deed),
        words: cut(&told.words),
        blackout_ms: told.blackout_ms,
        throughput_bytes_per_s: told.throughput_bytes_per_s,
        dirty_bytes_per_s: told.dirty_bytes_per_s,
        predicted_rounds: told.predicted_rounds,
        predicted_blackout_ms: told.predicted_blackout_ms,
        predicted_total_ms: told.predicted_total_ms,
        predicted_bytes: told.predicted_bytes,
        throttle_percent: told.throttle_percent.min(100),
        written_by_vcpu: told.written_by_vcpu.iter().take(MOST_VCPUS).copied().collect(),
        dirty_parts: told.dirty_parts.iter().take(MOST_PARTS).map(dirty_part).collect(),
        round_ms: told.round_ms,
    })
}

fn dirty_part(part: &wire::DirtyPart) -> DirtyPart {
    DirtyPart {
        address: part.address,
        bytes: part.bytes,
        dirty_pages: part.dirty_pages,
    }
}

/// What came of comparing, if its figure is one.
fn verified(told: &wire::Verified) -> Option<Verified> {
    is_sane(told.blackout_ms).then_some(Verified {
        pages: told.pages,
        ranges_sent_again: told.ranges_sent_again,
        blackout_ms: told.blackout_ms,
    })
}

/// What came of compression, if its figures can be.
fn compressed(told: &wire::Compressed) -> Option<Compressed> {
    let tried = told.compressed_frames.checked_add(told.incompressible_frames)?;
    let are_in_them = told.delta_pages <= told.bytes_before / FRAME_SIZE;
    (tried <= told.frames && told.bytes_after <= told.bytes_before && are_in_them).then(|| Compressed {
        wanted: told.wanted.clone(),
        method: told.method.clone(),
        why: told.why.clone(),
        frames: told.frames,
        compressed_frames: told.compressed_frames,
        incompressible_frames: told.incompressible_frames,
        bytes_before: told.bytes_before,
        bytes_after: told.bytes_after,
        switched_on: told.switched_on,
        switched_off: told.switched_off,
        delta_pages: told.delta_pages,
    })
}

/// How far the copy is. A VMM of a version that does not tell leaves it unknown.
fn note_copied(info: &mut MigrationInfo, copied: Option<&wire::Copied>) {
    let Some(copied) = copied else { return };
    if let Some(memory) = &copied.memory {
        info.memory_total = Some(memory.total);
        info.memory_processed = Some(memory.processed);
        info.memory_remaining = Some(memory.remaining);
    }
    if let Some(disk) = &copied.disk {
        info.disk_total = Some(disk.total);
        info.disk_processed = Some(disk.processed);
        info.disk_remaining = Some(disk.remaining);
    }
    // The VMM keeps it from running backwards; that it says no more than it may is checked here.
    let percent = copied.percent.min(MOST_BEFORE_THE_END);
    info.progress_percent = info.progress_percent.max(Some(percent));
}

/// How long writes to copied disks waited, if the figures are some.
fn note_disk_waits(info: &mut MigrationInfo, waits: Option<&wire::DiskWaits>) {
    let Some(waits) = waits.filter(|waits| is_sane(waits.longest_ms) && is_sane(waits.total_ms)) else {
        return;
    };
    info.disk_writes_held_back = Some(waits.count);
    info.disk_longest_wait_ms = Some(waits.longest_ms);
    info.disk_waited_ms = Some(waits.total_ms);
}

/// All of it is there.
pub(crate) fn note_completed(info: &mut MigrationInfo) {
    info.status = "completed".to_owned();
    info.memory_remaining = info.memory_remaining.map(|_| 0);
    info.disk_remaining = info.disk_remaining.map(|_| 0);
    info.progress_percent = Some(100);
}

/// What JSON can hold, and time can be.
fn is_sane(figure: f64) -> bool {
    figure.is_finite() && figure >= 0.0
}

fn between(from_ns: u64, to_ns: u64) -> f64 {
    ms(Duration::from_nanos(to_ns.saturating_sub(from_ns)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn told(percent: u32) -> wire::Copied {
        let amounts = |total| wire::Amounts {
            total,
            processed: 1,
            remaining: 2,
        };
        wire::Copied {
            memory: Some(amounts(8)),
            disk: Some(amounts(0)),
            percent,
        }
    }

    #[test]
    fn nothing_is_known_of_a_vmm_that_does_not_tell() {
        let mut info = MigrationInfo::default();
        note_copied(&mut info, None);
        assert_eq!(
            (info.memory_total, info.disk_total, info.progress_percent),
            (None, None, None)
        );
        note_completed(&mut info);
        assert_eq!((info.memory_remaining, info.progress_percent), (None, Some(100)));
    }

    proptest! {
        /// Also of a VMM that lies.
        #[test]
        fn progress_never_runs_backwards_and_ends_at_100_only_when_completed(reports in prop::collection::vec(any::<u32>(), 0..20)) {
            let mut info = MigrationInfo::default();
            let mut last = 0;
            for percent in reports {
                note_copied(&mut info, Some(&told(percent)));
                let now = info.progress_percent.unwrap();
                prop_assert!(now >= last && now < 100, "{last} then {now}");
                last = now;
            }
            note_completed(&mut info);
            prop_assert_eq!(info.progress_percent, Some(100));
            prop_assert!(info.memory_remaining.is_none_or(|remaining| remaining == 0));
        }
    }
}
