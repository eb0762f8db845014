//! What is told of the rounds while they go on.

use std::time::{Duration, Instant};

use crate::guest::{FRAME_SIZE, SourceGuest};
use crate::source::rounds::Copy;
use crate::source::{Decided, Progress, RoundSummary, SourceReport};
use crate::wire::StreamTotals;

/// How often progress is told.
const PROGRESS: Duration = Duration::from_millis(250);

impl<G: SourceGuest> Copy<'_, '_, G> {
    pub(super) fn note(&mut self, round: RoundSummary, decided: Decided) {
        let StreamTotals { bytes, zero_pages, .. } = self.sum();
        self.summary.bytes_sent = bytes;
        self.summary.zero_pages = zero_pages;
        self.summary.compression = self.streams.packing.tally();
        self.summary.throttle = decided.throttle;
        self.summary.throughput_bytes_per_s = per_second(bytes, self.copying_for());
        self.summary.dirty_bytes_per_s = per_second(round.dirty_pages * FRAME_SIZE, round.elapsed);
        self.summary.rounds.push(round);
        self.conversation.lasting.note(decided.clone());
        self.conversation.asked.report(SourceReport::Round {
            round,
            copied: self.so_far.meter.copied(),
            disk_waits: self.summary.disk_waits,
            decided,
        });
    }

    pub(super) fn tell_progress(&mut self) {
        let (at, bytes) = self.so_far.told;
        let elapsed = at.elapsed();
        if elapsed < PROGRESS {
            return;
        }
        let sum = self.sum();
        let remaining_pages = self.streams.feed.remaining();
        self.so_far.meter.is_at(remaining_pages);
        self.summary.copied = Some(self.so_far.meter.copied());
        self.so_far.told = (Instant::now(), sum.bytes);
        self.summary.disk_waits = self.guest.disk_waits();
        self.conversation.asked.report(SourceReport::Progress(Progress {
            round: self.so_far.round,
            remaining_pages,
            copied: self.so_far.meter.copied(),
            disk_waits: self.summary.disk_waits,
            bytes_sent: sum.bytes,
            zero_pages: sum.zero_pages,
            hinted_pages: self.summary.hinted_pages + self.streams.feed.left_out(),
            throughput_bytes_per_s: per_second(sum.bytes - bytes, elapsed).unwrap_or(0),
        }));
    }
}

/// A rate; `None` where no time passed.
fn per_second(bytes: u64, elapsed: Duration) -> Option<u64> {
    let seconds = elapsed.as_secs_f64();
    (seconds > 0.0).then(|| (bytes as f64 / seconds) as u64)
}
