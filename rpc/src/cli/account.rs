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
mod tests {
    use ferry_proto::agent::v1::DirtyPart;

    use super::super::progress::tests::info;
    use super::*;

    #[test]
    fn the_last_line_always_says_where_the_guest_is() {
        let last = |info: &MigrationInfo| account(info).lines().last().unwrap().to_owned();
        let done = MigrationInfo {
            guest_location: Some("b".into()),
            ..info("completed")
        };
        assert_eq!(last(&done), "web is on b");
        let failed = MigrationInfo {
            guest_location: Some("a".into()),
            error: Some("link cut".into()),
            ..info("failed")
        };
        assert_eq!(last(&failed), "web is on a");
        assert!(account(&failed).starts_with("migration m failed: link cut"));
        assert_eq!(last(&info("indeterminate")), "nobody knows whether web is on a or on b");
        assert_eq!(last(&info("error")), "web is lost");
        let ended = MigrationInfo {
            guest_ended: Some("powered-off".into()),
            ..info("failed")
        };
        assert_eq!(last(&ended), "web ended by itself: powered-off");
    }

    #[test]
    fn what_was_undone_is_told_of_one_that_did_not_arrive() {
        let failed = MigrationInfo {
            step: "copy".into(),
            undone: vec!["copy: it runs on".into(), "prepare: it was told".into()],
            guest_location: Some("a".into()),
            ..info("failed")
        };
        let text = account(&failed);
        assert!(
            text.contains("it came to step copy\nundone: copy: it runs on\nundone: prepare: it was told\nweb is on a"),
            "{text}"
        );
        let done = MigrationInfo {
            step: "confirm".into(),
            ..info("completed")
        };
        assert!(!account(&done).contains("step"));
    }

    #[test]
    fn what_was_compressed_is_told() {
        let told = |wanted: &str, method: Option<&str>, compressed_frames| {
            let compression = Compressed {
                delta_pages: compressed_frames * 20,
                wanted: wanted.to_owned(),
                method: method.map(str::to_owned),
                frames: 1200,
                compressed_frames,
                bytes_before: 4 << 20,
                bytes_after: 1 << 20,
                ..Compressed::default()
            };
            account(&MigrationInfo {
                compression: Some(compression),
                ..info("completed")
            })
        };
        let by_itself = told("auto", Some("zstd:1"), 1000);
        assert!(
            by_itself.contains("compressed, in the end with zstd:1: 1,000 of 1,200 frames"),
            "{by_itself}"
        );
        assert!(
            by_itself.contains(", 20,000 pages of it told by what they changed"),
            "{by_itself}"
        );
        assert!(told("auto", None, 1).contains("compressed, in the end not: 1 of"));
        assert!(told("lz4", Some("lz4"), 7).contains("compressed with lz4: 7 of"));
        assert!(told("lz4", Some("lz4"), 0).contains("compressed with lz4: nothing got any smaller by it"));
        assert!(!told("auto", None, 0).contains("compressed"));
    }

    #[test]
    fn what_was_compared_is_told() {
        let told = |ranges_sent_again| {
            let verified = Verified {
                pages: 20_000,
                ranges_sent_again,
                blackout_ms: 1.5,
            };
            account(&MigrationInfo {
                verified: Some(verified),
                ..info("completed")
            })
        };
        assert!(
            told(0).contains("verified: 20,000 pages are what was sent; "),
            "{}",
            told(0)
        );
        assert!(
            told(1).contains("are what was sent, 1 range sent again; "),
            "{}",
            told(1)
        );
        assert!(!account(&info("completed")).contains("verified"));
    }

    #[test]
    fn late_pages_that_were_checked_are_told() {
        let told = |late_sent_again| {
            account(&MigrationInfo {
                late_verified: Some(9000),
                late_sent_again,
                ..info("completed")
            })
        };
        let whole = "verified: 9,000 pages that came late are what the source had";
        assert!(told(Some(0)).contains(&format!("{whole}\n")), "{}", told(Some(0)));
        let again = told(Some(256));
        assert!(
            again.contains(&format!("{whole}, 256 of them asked for again")),
            "{again}"
        );
    }

    #[test]
    fn pages_that_come_late_and_waits_for_them_are_told() {
        let underway = MigrationInfo {
            late_pages: Some(20_000),
            late_missing: Some(5_000),
            decision: Some("the guest waits for pages: no route".into()),
            ..info(POST_COPY)
        };
        let over = MigrationInfo {
            late_missing: Some(0),
            late_ms: Some(120.5),
            late_waits_log2_us: vec![0, 0, 0, 0, 0, 0, 0, 12, 0, 0, 0, 3],
            late_median_wait_ms: Some(0.12),
            late_longest_wait_ms: Some(1.5),
            status: "completed".into(),
            ..underway
        };
        let told = "20,000 pages came late, all of them 120.5 ms after the handover; \
                    the guest waited 15 times, 0.12 ms in the median and 1.50 ms at most";
        for text in [account(&over), report(&over)] {
            assert!(text.contains(told), "{text}");
        }
        let lost = MigrationInfo {
            late_missing: Some(5_000),
            status: "error".into(),
            ..over.clone()
        };
        let told = "15,000 pages came late, 5,000 never did";
        assert!(account(&lost).contains(told), "{}", account(&lost));
        let waits = "waits for pages that came late: 12 under 128 µs · 3 under 2.05 ms";
        assert!(report(&over).contains(waits), "{}", report(&over));
        assert!(!report(&info("completed")).contains("late"));
    }

    #[test]
    fn who_wrote_and_where_is_told_of_each_round() {
        let decided = MigrationDecision {
            round: 1,
            deed: "continue".into(),
            words: "over the budget".into(),
            round_ms: Some(500.0),
            written_by_vcpu: vec![512, 0],
            dirty_parts: vec![DirtyPart {
                address: 128 << 20,
                bytes: 128 << 20,
                dirty_pages: 256,
            }],
            ..MigrationDecision::default()
        };
        let retuned = MigrationDecision {
            round_ms: None,
            deed: "retune".into(),
            ..decided.clone()
        };
        let text = report(&MigrationInfo {
            decisions: vec![decided, retuned],
            ..info("running")
        });
        let written = "\n  written: vCPU 0 4 MiB/s · vCPU 1 0 B/s · 0x8000000 to 0x10000000 2 MiB/s\n";
        assert_eq!(text.matches(written).count(), 1, "{text}");
        assert_eq!(text.matches("written").count(), 1, "{text}");
    }

    #[test]
    fn gaps_that_are_known_are_told() {
        let gap = |sent_ms, received_ms| NetworkGap {
            mac: "02:00:5e:10:00:01".to_owned(),
            sent_ms,
            received_ms,
        };
        let moved = MigrationInfo {
            network_gaps: vec![gap(Some(5.0), Some(204.5)), gap(None, Some(7.5))],
            ..info("completed")
        };
        for text in [account(&moved), report(&moved)] {
            assert!(
                text.contains(
                    "network gap of 02:00:5e:10:00:01: no frame from it for 5.00 ms · no frame for it for 204.5 ms"
                ),
                "{text}"
            );
            assert!(text.contains(": no frame for it for 7.50 ms"), "{text}");
        }
        assert!(!account(&info("completed")).contains("network gap"));
    }
}
