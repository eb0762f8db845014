//! What came of a migration, in words.

use ferry_proto::agent::v1::{Compressed, DowntimeMs, MigrationDecision, MigrationInfo, NetworkGap, Round, Verified};

use super::output::{Table, human_bytes, human_count, human_ms, human_rate};
use crate::agent::POST_COPY;

/// What happened, for people; the last line says where the guest is.
pub(super) fn account(info: &MigrationInfo) -> String {
    let mut lines = vec![format!("migration {} {}{}", info.id, info.status, reason(info))];
    if !info.rounds.is_empty() {
        lines.push(rounds(&info.rounds).to_string().trim_end().to_owned());
    }
    if info.bytes_sent > 0 || info.total_ms.is_some() {
        lines.push(sums(info));
    }
    lines.extend(
        info.downtime_ms
            .as_ref()
            .map(|downtime| format!("blackout {}", blackout(downtime))),
    );
    lines.extend(info.network_gaps.iter().map(network_gap));
    lines.extend(late(info));
    lines.extend(info.compression.as_ref().and_then(compressed));
    lines.extend(info.verified.as_ref().map(verified));
    lines.extend(
        info.late_verified
            .map(|pages| verified_late(pages, info.late_sent_again)),
    );
    if let (Some(memory), Some(state)) = (&info.memory_digest, &info.state_digest) {
        lines.push(format!("digests equal on both sides: memory {memory}, state {state}"));
    }
    lines.extend(steps(info));
    lines.push(whereabouts(info));
    lines.join("\n")
}

/// What came after the guest was handed over, and how it waited for that.
fn late(info: &MigrationInfo) -> Option<String> {
    let pages = info.late_pages.filter(|&pages| pages > 0)?;
    let missing = info.late_missing.unwrap_or_default();
    let mut words = format!("{} pages came late", human_count(pages.saturating_sub(missing)));
    match info.late_ms {
        _ if missing > 0 && info.status == POST_COPY => words = format!("{words}, {}", still_missing(missing)),
        _ if missing > 0 => words = format!("{words}, {} never did", human_count(missing)),
        Some(ms) => words = format!("{words}, all of them {} after the handover", human_ms(ms)),
        None => {}
    }
    let waits: u64 = info.late_waits_log2_us.iter().sum();
    let times = info.late_median_wait_ms.zip(info.late_longest_wait_ms);
    if let Some((median, longest)) = times.filter(|_| waits > 0) {
        let (median, longest) = (human_ms(median), human_ms(longest));
        words = format!(
            "{words}; the guest waited {} times, {median} in the median and {longest} at most",
            human_count(waits)
        );
    }
    Some(words)
}

pub(super) fn still_missing(pages: u64) -> String {
    format!("{} pages still to come", human_count(pages))
}

/// The waits for pages that came late, by how long they were.
fn late_waits(info: &MigrationInfo) -> Option<String> {
    let waits = info.late_waits_log2_us.iter().enumerate();
    let waits: Vec<_> = waits
        .filter(|&(_, &count)| count > 0)
        .map(|(log2, &count)| format!("{} under {}", human_count(count), human_us(log2)))
        .collect();
    (!waits.is_empty()).then(|| format!("waits for pages that came late: {}", waits.join(" · ")))
}

/// Two to this power, of microseconds.
fn human_us(log2: usize) -> String {
    match u32::try_from(log2).ok().and_then(|log2| 1u64.checked_shl(log2)) {
        Some(us) if us < 1000 => format!("{us} µs"),
        Some(us) => human_ms(us as f64 / 1e3),
        None => "ever".to_owned(),
    }
}

/// What the network noticed of the move.
fn network_gap(gap: &NetworkGap) -> String {
    let directions = [("from it", gap.sent_ms), ("for it", gap.received_ms)];
    let known = directions.iter().filter_map(|(which, ms)| Some((which, (*ms)?)));
    let known: Vec<_> = known
        .map(|(which, ms)| format!("no frame {which} for {}", human_ms(ms)))
        .collect();
    format!("network gap of {}: {}", gap.mac, known.join(" · "))
}

/// What came of compression. Nobody is told of what he did not ask for and did not happen.
fn compressed(compressed: &Compressed) -> Option<String> {
    if compressed.compressed_frames == 0 {
        let is_asked_for = !matches!(&*compressed.wanted, "auto" | "off");
        return is_asked_for.then(|| format!("compressed with {}: nothing got any smaller by it", compressed.wanted));
    }
    let how = match (&*compressed.wanted, &compressed.method) {
        ("auto", Some(method)) => format!(", in the end with {method}"),
        ("auto", None) => ", in the end not".to_owned(),
        (wanted, _) => format!(" with {wanted}"),
    };
    let deltas = match compressed.delta_pages {
        0 => String::new(),
        pages => format!(", {} pages of it told by what they changed", human_count(pages)),
    };
    Some(format!(
        "compressed{how}: {} of {} frames, {} to {}{deltas}",
        human_count(compressed.compressed_frames),
        human_count(compressed.frames),
        human_bytes(compressed.bytes_before),
        human_bytes(compressed.bytes_after)
    ))
}

/// What came of comparing.
fn verified(verified: &Verified) -> String {
    let again = match verified.ranges_sent_again {
        0 => String::new(),
        1 => ", 1 range sent again".to_owned(),
        ranges => format!(", {} ranges sent again", human_count(ranges)),
    };
    format!(
        "verified: {} pages are what was sent{again}; {} of the blackout",
        human_count(verified.pages),
        human_ms(verified.blackout_ms)
    )
}

/// What came of checking pages that came late.
fn verified_late(pages: u64, sent_again: Option<u64>) -> String {
    let again = match sent_again.unwrap_or_default() {
        0 => String::new(),
        1 => ", 1 of them asked for again".to_owned(),
        pages => format!(", {} of them asked for again", human_count(pages)),
    };
    format!(
        "verified: {} pages that came late are what the source had{again}",
        human_count(pages)
    )
}

/// How far one came that did not arrive, and what was undone of it.
fn steps(info: &MigrationInfo) -> Vec<String> {
    if info.step.is_empty() || info.status == "completed" {
        return Vec::new();
    }
    let undone = info.undone.iter().map(|line| format!("undone: {line}"));
    [format!("it came to step {}", info.step)]
        .into_iter()
        .chain(undone)
        .collect()
}

/// The sentence that comes last, always.
pub(super) fn whereabouts(info: &MigrationInfo) -> String {
    let name = if info.name.is_empty() {
        &info.instance
    } else {
        &info.name
    };
    match (&info.guest_ended, &info.guest_location) {
        (Some(how), Some(host)) => format!("{name} ended by itself on {host}: {how}"),
        (Some(how), None) => format!("{name} ended by itself: {how}"),
        (None, Some(host)) => format!("{name} is on {host}"),
        (None, None) if info.status == "indeterminate" => {
            format!(
                "nobody knows whether {name} is on {} or on {}",
                info.source, info.destination
            )
        }
        (None, None) => format!("{name} is lost"),
    }
}

/// The blackout and its parts.
pub(super) fn blackout(downtime: &DowntimeMs) -> String {
    let parts = [
        ("pause", downtime.pause),
        ("drain", downtime.drain),
        ("last pages", downtime.last_pages),
        ("state", downtime.state),
        ("claim", downtime.claim),
        ("start", downtime.start),
    ];
    let parts = parts.map(|(part, ms)| format!("{part} {}", human_ms(ms))).join(" · ");
    format!(
        "{} (at most {}): {parts}",
        human_ms(downtime.total),
        human_ms(downtime.upper_bound)
    )
}

/// How it went, or goes: the rounds, and what was decided on them and why. The last line says where the guest is.
pub(super) fn report(info: &MigrationInfo) -> String {
    let mut lines = vec![format!("migration {} {}{}", info.id, info.status, reason(info))];
    if !info.rounds.is_empty() {
        lines.push(rounds(&info.rounds).to_string().trim_end().to_owned());
    }
    for decided in &info.decisions {
        lines.push(decision(decided));
        lines.extend(written(decided));
    }
    let downtime = info.downtime_ms.as_ref();
    lines.extend(downtime.map(|downtime| format!("blackout {}", blackout(downtime))));
    lines.extend(late(info));
    lines.extend(late_waits(info));
    lines.extend(info.network_gaps.iter().map(network_gap));
    lines.push(whereabouts(info));
    lines.join("\n")
}

fn decision(decision: &MigrationDecision) -> String {
    format!("after round {}: {}: {}", decision.round, decision.deed, decision.words)
}

/// Who wrote in the round that a decision was made on, and where, as far as that is known.
fn written(decision: &MigrationDecision) -> Option<String> {
    let seconds = decision.round_ms.filter(|&ms| ms > 0.0)? / 1e3;
    let rate = |pages: u64| human_rate(pages as f64 * PAGE / seconds);
    let by_vcpu = decision.written_by_vcpu.iter().enumerate();
    let by_vcpu = by_vcpu.map(|(vcpu, &pages)| format!("vCPU {vcpu} {}", rate(pages)));
    let parts = decision.dirty_parts.iter().map(|part| {
        let (first, end) = (part.address, part.address.saturating_add(part.bytes));
        format!("{first:#x} to {end:#x} {}", rate(part.dirty_pages))
    });
    let written: Vec<_> = by_vcpu.chain(parts).collect();
    (!written.is_empty()).then(|| format!("  written: {}", written.join(" · ")))
}

/// Bytes of one.
const PAGE: f64 = 4096.0;

/// The rounds as a table.
pub(super) fn rounds(rounds: &[Round]) -> Table {
    let mut table = Table::new(&[">ROUND", ">PAGES", ">BYTES", ">TIME", ">DIRTY AFTERWARDS"]);
    for (at, round) in rounds.iter().enumerate() {
        let (pages, dirty) = (human_count(round.pages), human_count(round.dirty_pages));
        table.row([
            (at + 1).to_string(),
            pages,
            human_bytes(round.bytes),
            human_ms(round.ms),
            dirty,
        ]);
    }
    table
}

/// Totals on one line.
pub(super) fn sums(info: &MigrationInfo) -> String {
    let mut parts = vec![format!(
        "total {}",
        info.total_ms.map_or_else(|| "-".to_owned(), human_ms)
    )];
    parts.push(format!("{} sent", human_bytes(info.bytes_sent)));
    parts.push(format!("{} zero pages told", human_count(info.zero_pages)));
    if info.memory_hinted > 0 {
        parts.push(format!("{} free by the guest's word", human_bytes(info.memory_hinted)));
    }
    let by = if info.transport == "grpc" { " over gRPC" } else { "" };
    parts.push(format!("{} streams{by}", info.streams));
    parts.extend(info.throughput_bytes_per_s.map(human_rate));
    parts.extend(held_back(info));
    parts.join(" · ")
}

/// How long writes to copied disks waited, if any did.
fn held_back(info: &MigrationInfo) -> Option<String> {
    let count = info.disk_writes_held_back.filter(|&count| count > 0)?;
    let (longest, total) = (info.disk_longest_wait_ms?, info.disk_waited_ms?);
    Some(format!(
        "{} writes to copied disks waited {}, {} at most",
        human_count(count),
        human_ms(total),
        human_ms(longest)
    ))
}

fn reason(info: &MigrationInfo) -> String {
    info.error
        .as_ref()
        .map(|error| format!(": {error}"))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests;
