//! How far from the blackout frames passed the guest's network cards: this side's part of what its network noticed.

use std::time::{Duration, Instant};

use ferry_proto::vmm::v1 as wire;
use ferry_vmm::CardTraffic;

use super::convert::{instant_ns, ms};

/// A card that no frame passed for so long before the blackout was not in use: how long its silence lasted says nothing of the move.
const IN_USE: Duration = Duration::from_secs(1);

/// From the last frames to the begin of the pause, of each card.
pub(super) fn before(traffic: &[CardTraffic], pause_began: Instant) -> Vec<wire::Frames> {
    let to_pause = |last: Instant| match last.checked_duration_since(pause_began) {
        // What the devices still had to send when the vCPUs stood still.
        Some(late) => Some(-ms(late)),
        None => Some(pause_began - last).filter(|&ago| ago <= IN_USE).map(ms),
    };
    let of_card = |card: &CardTraffic| wire::Frames {
        sent_ms: card.sent().and_then(|passed| to_pause(passed.last)),
        received_ms: card.received().and_then(|passed| to_pause(passed.last)),
    };
    traffic.iter().map(of_card).collect()
}

/// From the first KVM_RUN (CLOCK_MONOTONIC) to the first frames, of each card.
pub(super) fn after(traffic: &[CardTraffic], entered_ns: u64) -> Vec<wire::Frames> {
    let from_start = |first: Instant| {
        let at = instant_ns(first);
        match at.checked_sub(entered_ns) {
            Some(later) => ms(Duration::from_nanos(later)),
            // Devices begin before vCPUs do.
            None => -ms(Duration::from_nanos(entered_ns - at)),
        }
    };
    let of_card = |card: &CardTraffic| wire::Frames {
        sent_ms: card.sent().map(|passed| from_start(passed.first)),
        received_ms: card.received().map(|passed| from_start(passed.first)),
    };
    traffic.iter().map(of_card).collect()
}
