//! How long the network had nothing from or for a guest that moved.
//!
//! ```text
//!   last frame ──► pause ────────► GO ──────────► KVM_RUN ──► first frame
//!   └─ A's clock ─┘└─ the blackout, as it is told of ──┘└─ B's clock ─┘
//! ```
//!
//! A sum of times that one clock each measured; no two hosts' clocks are compared. It takes in how long the guest was silent by itself, before and
//! after, and what the network did meanwhile: frames that went to the old host, and were sent again. A card that was not in use right before the
//! blackout, and a direction in which nothing came soon after it, have no gap.

use std::time::Duration;

use ferry_migration::handover::Decision;
use ferry_proto::agent::v1::{FirstFrame, MigrationInfo, NetworkGap};
use ferry_proto::vmm::v1 as wire;

use super::script::Script;
use crate::agent::failure::Failure;

/// How long the first frames are waited for, where frames passed right before the blackout: TCP sends again what was lost after 200 ms, and then after
/// twice as long each time.
const PATIENCE: Duration = Duration::from_secs(1);

/// The pauses between two looks: from the first on each is twice the one before, up to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(2);
const LONGEST_PAUSE: Duration = Duration::from_millis(50);

/// The most that a part of a gap can be, either side of its moment, in milliseconds.
const MOST_MS: f64 = 3_600_000.0;

impl Script {
    /// Asks the destination when the first frames passed, and writes down what gaps that makes.
    pub(super) async fn note_network_gap(&mut self) {
        let is_running = self.row.said.as_deref() == Some(Decision::Running.as_str());
        let Some(before) = self.go.as_ref().map(|go| go.frames.clone()) else {
            return;
        };
        if !is_running || self.row.info.downtime_ms.is_none() || !before.iter().any(is_in_use) {
            return;
        }
        let mut after = Vec::new();
        // When the time is up, what is known by then is what is known.
        let _ = tokio::time::timeout(PATIENCE, self.wait_for_frames(&before, &mut after)).await;
        let macs = self.macs().await;
        note_gaps(&mut self.row.info, &macs, &before, &after);
    }

    /// Asks until nothing more is to come.
    async fn wait_for_frames(&self, before: &[wire::Frames], after: &mut Vec<FirstFrame>) {
        let mut pause = FIRST_PAUSE;
        loop {
            match self.first_frames().await {
                Ok(cards) if !cards.is_empty() => *after = cards,
                // The guest is not there any more.
                Ok(_) => return,
                Err(failure) => {
                    tracing::info!(migration = %self.row.id, error = failure.chain(), "the first frames are not told");
                    return;
                }
            }
            if is_whole(before, after) {
                return;
            }
            tokio::time::sleep(pause).await;
            pause = LONGEST_PAUSE.min(pause * 2);
        }
    }

    async fn first_frames(&self) -> Result<Vec<FirstFrame>, Failure> {
        let compute = self.agent.compute_rpcapi(&self.outgoing.context, &self.row.peer)?;
        compute.first_frames(self.row.id, self.agent.host()).await
    }

    async fn macs(&self) -> Vec<String> {
        let state = self.instance.state.lock().await;
        state.row.spec.nics.iter().map(|nic| nic.mac.clone()).collect()
    }
}

fn is_in_use(frames: &wire::Frames) -> bool {
    frames.sent_ms.is_some() || frames.received_ms.is_some()
}

/// Whether nothing more is waited for.
fn is_whole(before: &[wire::Frames], after: &[FirstFrame]) -> bool {
    after.len() >= before.len()
        && before.iter().zip(after).all(|(before, after)| {
            let is_there = |before: Option<f64>, after: Option<f64>| before.is_none() || after.is_some();
            is_there(before.sent_ms, after.sent_ms) && is_there(before.received_ms, after.received_ms)
        })
}

fn note_gaps(info: &mut MigrationInfo, macs: &[String], before: &[wire::Frames], after: &[FirstFrame]) {
    let Some(blackout) = info.downtime_ms.as_ref().map(|downtime| downtime.total) else {
        return;
    };
    let gap = |before: Option<f64>, after: Option<f64>| {
        let (before, after) = (before?, after?);
        let are_sane = [before, after].iter().all(|part| part.abs() <= MOST_MS);
        // Less than nothing is what two estimates make of very little.
        are_sane.then(|| (before + blackout + after).max(0.0))
    };
    let cards = macs.iter().zip(before.iter().zip(after));
    info.network_gaps = cards
        .map(|(mac, (before, after))| NetworkGap {
            mac: mac.clone(),
            sent_ms: gap(before.sent_ms, after.sent_ms),
            received_ms: gap(before.received_ms, after.received_ms),
        })
        .filter(|gap| gap.sent_ms.is_some() || gap.received_ms.is_some())
        .collect();
    let all = info.network_gaps.iter().flat_map(|gap| [gap.sent_ms, gap.received_ms]);
    info.network_gap_ms = all.flatten().reduce(f64::max);
}

#[cfg(test)]
mod tests {
    use ferry_proto::agent::v1::DowntimeMs;

    use super::*;

    fn before(sent_ms: Option<f64>, received_ms: Option<f64>) -> wire::Frames {
        wire::Frames { sent_ms, received_ms }
    }

    fn after(sent_ms: Option<f64>, received_ms: Option<f64>) -> FirstFrame {
        FirstFrame { sent_ms, received_ms }
    }

    fn gaps(before: &[wire::Frames], after: &[FirstFrame]) -> MigrationInfo {
        let mut info = MigrationInfo {
            downtime_ms: Some(DowntimeMs {
                total: 5.0,
                ..DowntimeMs::default()
            }),
            ..MigrationInfo::default()
        };
        note_gaps(&mut info, &["m0".to_owned(), "m1".to_owned()], before, after);
        info
    }

    #[test]
    fn gap_is_the_blackout_and_what_was_silent_on_both_sides_of_it() {
        let info = gaps(
            &[before(Some(1.0), Some(-0.5)), before(Some(0.5), None)],
            &[after(Some(2.0), Some(200.0)), after(Some(300.0), Some(1.0))],
        );
        let gap = |at: usize| (info.network_gaps[at].sent_ms, info.network_gaps[at].received_ms);
        assert_eq!(gap(0), (Some(8.0), Some(204.5)));
        assert_eq!(gap(1), (Some(305.5), None));
        assert_eq!(info.network_gaps[1].mac, "m1");
        assert_eq!(info.network_gap_ms, Some(305.5));
    }

    #[test]
    fn where_no_frame_passed_there_is_no_gap() {
        let info = gaps(&[before(Some(1.0), None)], &[after(None, Some(3.0))]);
        assert!(info.network_gaps.is_empty() && info.network_gap_ms.is_none());
        assert!(gaps(&[before(Some(1.0), None)], &[]).network_gaps.is_empty());
    }

    #[test]
    fn figures_that_are_none_make_no_gap() {
        for wrong in [f64::NAN, f64::INFINITY, -1e300] {
            let info = gaps(&[before(Some(wrong), Some(1.0))], &[after(Some(1.0), Some(wrong))]);
            assert!(info.network_gaps.is_empty(), "{wrong}");
        }
        let info = gaps(&[before(Some(-9.0), None)], &[after(Some(-9.0), None)]);
        assert_eq!(info.network_gap_ms, Some(0.0));
    }

    #[test]
    fn only_what_can_make_a_gap_is_waited_for() {
        let silent = before(None, None);
        assert!(!is_in_use(&silent) && is_in_use(&before(None, Some(1.0))));
        assert!(is_whole(&[silent], &[after(None, None)]));
        assert!(is_whole(&[before(Some(1.0), None)], &[after(Some(1.0), None)]));
        assert!(!is_whole(&[before(Some(1.0), Some(1.0))], &[after(Some(1.0), None)]));
        assert!(!is_whole(&[before(Some(1.0), None)], &[]));
    }
}
