//! Between the engine's terms and what is said to an agent.

use std::num::{NonZeroU32, NonZeroU64};
use std::time::{Duration, Instant};

use ferry_migration::guest::{DiskWaits, FRAME_SIZE, FrameRun, GuestEnd, GuestWas};
use ferry_migration::handover::{Attempt, Epoch};
use ferry_migration::postcopy::Lateness;
use ferry_migration::source::{
    Amounts, Copied, Decided, Manner, NewTerms, OnTimeout, Overhead, Parked, RoundSummary, SourceParameters,
    SourceSummary, Verified,
};
use ferry_migration::{Compression, ParseCompressionError, Tally};
use ferry_proto::vmm::v1 as wire;
use ferry_proto::{InvalidField, required, wire_uuid};
use ferry_vmm::MOST_PERCENT as MOST_THROTTLE_PERCENT;
use rustix::time::{ClockId, clock_gettime};
use uuid::Uuid;

use super::frames;
use super::guest::LocalGuest;

/// Reads an attempt.
pub(crate) fn attempt_from_wire(attempt: Option<wire::Attempt>) -> Result<Attempt, InvalidField> {
    let attempt = required("attempt", attempt)?;
    Ok(Attempt {
        instance: wire_uuid("attempt.instance", &attempt.instance)?,
        migration: wire_uuid("attempt.migration", &attempt.migration)?,
        attempt: attempt.attempt,
        epoch: Epoch(attempt.epoch),
    })
}

/// Writes an attempt.
pub(crate) fn attempt_to_wire(attempt: Attempt) -> wire::Attempt {
    wire::Attempt {
        instance: attempt.instance.to_string(),
        migration: attempt.migration.to_string(),
        attempt: attempt.attempt,
        epoch: attempt.epoch.0,
    }
}

/// Milliseconds with their fraction.
pub(crate) fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// CLOCK_MONOTONIC, in nanoseconds: comparable between the processes of one host.
pub(crate) fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

/// An instant of this process as CLOCK_MONOTONIC.
pub(super) fn instant_ns(instant: Instant) -> u64 {
    let ago = u64::try_from(instant.elapsed().as_nanos()).unwrap_or(u64::MAX);
    monotonic_ns().saturating_sub(ago)
}

/// What the engine is told about one outgoing migration.
pub(super) fn source_parameters(send: &wire::Send, instance: Uuid) -> Result<SourceParameters, InvalidField> {
    Ok(SourceParameters {
        instance,
        migration: wire_uuid("migration", &send.migration)?,
        epoch: Epoch(send.epoch),
        manner: manner(send),
        lateness: lateness(&send.lateness)?,
        timeout: Duration::from_millis(send.timeout_ms),
        on_timeout: match send.pause_on_timeout {
            true => OnTimeout::Pause,
            false => OnTimeout::Abort,
        },
        most_throttle: NonZeroU32::new(send.max_throttle_percent.min(MOST_THROTTLE_PERCENT)),
        bandwidth: NonZeroU64::new(send.bandwidth_bytes_per_s),
        guest_was: guest_was(send.user_paused),
        digests: send.digests,
        verify: send.verify,
        compression: compression(&send.compress)?,
        one_host: send.one_host,
        overhead: send.overhead.map(overhead).unwrap_or_default(),
        liveness: Default::default(),
        resume_window: Duration::from_millis(send.resume_window_ms),
    })
}

fn overhead(measured: wire::Overhead) -> Overhead {
    Overhead {
        stop: Duration::from_micros(measured.stop_us),
        start: Duration::from_micros(measured.start_us),
    }
}

/// What its user changes of a migration under way.
pub(super) fn new_terms(retune: &wire::Retune) -> NewTerms {
    NewTerms {
        max_downtime: retune.max_downtime_us.map(Duration::from_micros),
        timeout: retune.timeout_ms.map(Duration::from_millis),
        bandwidth: retune.bandwidth_bytes_per_s.map(NonZeroU64::new),
    }
}

fn manner(send: &wire::Send) -> Manner {
    if send.cold {
        return Manner::Cold;
    }
    Manner::Live {
        max_downtime: Duration::from_micros(send.max_downtime_us),
    }
}

/// An agent that says nothing is of a build without.
fn compression(text: &str) -> Result<Compression, InvalidField> {
    if text.is_empty() {
        return Ok(Compression::Off);
    }
    text.parse().map_err(|error: ParseCompressionError| InvalidField {
        field: "compress",
        problem: error.to_string(),
    })
}

fn lateness(word: &str) -> Result<Lateness, InvalidField> {
    match word {
        "" => Ok(Lateness::Never),
        "at-once" => Ok(Lateness::AtOnce),
        "when-it-pays" => Ok(Lateness::WhenItPays),
        "when-it-must-end" => Ok(Lateness::WhenItMustEnd),
        other => Err(InvalidField {
            field: "lateness",
            problem: format!("{other:?} is not one of at-once, when-it-pays, when-it-must-end"),
        }),
    }
}

/// Whether the user had paused the guest.
pub(super) fn guest_was(user_paused: bool) -> GuestWas {
    if user_paused {
        GuestWas::PausedByUser
    } else {
        GuestWas::Running
    }
}

/// How a guest ended, in the words of the protocol.
pub(super) fn guest_ended(end: &GuestEnd) -> wire::GuestEnded {
    let (how, reason) = match end {
        GuestEnd::PoweredOff => ("powered-off", String::new()),
        GuestEnd::Panicked => ("panicked", "the guest announced a panic".to_owned()),
        GuestEnd::Crashed(reason) if reason == "triple fault" => ("triple-fault", reason.clone()),
        GuestEnd::Crashed(reason) => ("failed", reason.clone()),
    };
    wire::GuestEnded {
        how: how.to_owned(),
        reason,
    }
}

/// What was measured so far.
pub(super) fn progress(summary: &SourceSummary) -> wire::Progress {
    let (mut rounds, mut decisions) = (Vec::new(), Vec::new());
    summary.rounds.iter().for_each(|done| add(&mut rounds, round(done)));
    let decided = summary.decisions.iter().map(decision);
    decided.for_each(|decided| add(&mut decisions, decided));
    wire::Progress {
        rounds,
        decisions,
        bytes_sent: summary.bytes_sent,
        zero_pages: summary.zero_pages,
        hinted_pages: summary.hinted_pages,
        remaining_pages: 0,
        throughput_bytes_per_s: summary.throughput_bytes_per_s.unwrap_or(0) as f64,
        dirty_bytes_per_s: summary.dirty_bytes_per_s.unwrap_or(0) as f64,
        streams: summary.streams,
        throttle_percent: summary.throttle,
        copied: summary.copied.map(copied),
        verified: summary.verified.map(verified),
        compression: Some(compressed(&summary.compression)),
        disk_waits: Some(disk_waits(summary.disk_waits)),
        ..wire::Progress::default()
    }
}

/// What came of compression.
fn compressed(tally: &Tally) -> wire::Compressed {
    wire::Compressed {
        wanted: tally.wanted.to_string(),
        method: tally.method.map(|method| method.to_string()),
        why: tally.why.clone(),
        frames: tally.frames,
        compressed_frames: tally.compressed_frames,
        incompressible_frames: tally.incompressible_frames,
        bytes_before: tally.bytes_before,
        bytes_after: tally.bytes_after,
        switched_on: tally.switched_on,
        switched_off: tally.switched_off,
        delta_pages: tally.delta_pages,
    }
}

/// What came of comparing digests.
fn verified(verified: Verified) -> wire::Verified {
    wire::Verified {
        pages: verified.pages,
        ranges_sent_again: verified.ranges_sent_again,
        blackout_ms: ms(verified.blackout),
    }
}

/// How long writes to copied disks waited.
pub(super) fn disk_waits(waits: DiskWaits) -> wire::DiskWaits {
    wire::DiskWaits {
        count: waits.count,
        longest_ms: ms(waits.longest),
        total_ms: ms(waits.total),
    }
}

/// How far a copy is.
pub(super) fn copied(copied: Copied) -> wire::Copied {
    let amounts = |amounts: Amounts| wire::Amounts {
        total: amounts.total,
        processed: amounts.processed,
        remaining: amounts.remaining,
    };
    wire::Copied {
        memory: Some(amounts(copied.memory)),
        disk: Some(amounts(copied.disk)),
        percent: copied.percent,
    }
}

/// The most rounds that are told of one migration, and the most decisions. A guest that waits long for its grant makes many small ones.
const MOST_ROUNDS: usize = 64;

/// Adds a round, or a decision; of many, the first ones and the last are kept.
pub(super) fn add<T>(told: &mut Vec<T>, one: T) {
    if told.len() >= MOST_ROUNDS {
        told.remove(MOST_ROUNDS / 2);
    }
    told.push(one);
}

/// One decision.
pub(super) fn decision(decided: &Decided) -> wire::Decision {
    let forecast = &decided.forecast;
    wire::Decision {
        round: decided.round,
        deed: decided.deed.to_owned(),
        words: decided.words.clone(),
        blackout_ms: decided.blackout.map(ms),
        throughput_bytes_per_s: forecast.bytes_per_second.map(|rate| rate as f64),
        dirty_bytes_per_s: forecast.dirty_bytes_per_second.map(|rate| rate as f64),
        predicted_rounds: forecast.rounds,
        predicted_blackout_ms: forecast.blackout.map(ms),
        predicted_total_ms: forecast.total.map(ms),
        predicted_bytes: forecast.bytes,
        throttle_percent: decided.throttle,
        written_by_vcpu: decided.written.by_vcpu.clone(),
        dirty_parts: decided.written.parts.iter().map(dirty_part).collect(),
        round_ms: decided.took.map(ms),
    }
}

fn dirty_part(&(part, dirty_pages): &(FrameRun, u64)) -> wire::DirtyPart {
    wire::DirtyPart {
        address: part.first * FRAME_SIZE,
        bytes: part.bytes(),
        dirty_pages,
    }
}

/// One round.
pub(super) fn round(round: &RoundSummary) -> wire::Round {
    wire::Round {
        pages: round.pages,
        bytes: round.bytes,
        ms: ms(round.elapsed),
        dirty_pages: round.dirty_pages,
    }
}

/// The source's part of the blackout, of a guest whose GO was sent.
pub(super) fn go_sent(parked: &Parked<LocalGuest>) -> wire::GoSent {
    let summary = parked.summary();
    let mut go = wire::GoSent {
        attempt: Some(attempt_to_wire(parked.attempt())),
        progress: Some(progress(summary)),
        round_trip_ms: summary.round_trip.map(ms).unwrap_or_default(),
        late_pages: summary.late_pages,
        ..wire::GoSent::default()
    };
    if let Some(blackout) = &summary.blackout {
        go.pause_ms = ms(blackout.stop.pause);
        go.drain_ms = ms(blackout.stop.drain);
        go.last_pages_ms = ms(blackout.last_pages);
        go.state_ms = ms(blackout.state);
        go.pause_began_ns = instant_ns(blackout.pause_began);
        go.go_ns = instant_ns(blackout.go_sent);
        go.frames = frames::before(parked.guest().machine.traffic(), blackout.pause_began);
    }
    go
}
