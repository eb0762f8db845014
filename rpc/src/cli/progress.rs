//! A migration in words: the line while it runs, and the account when it is over.

use ferry_proto::agent::v1::{Compressed, DowntimeMs, MigrationDecision, MigrationInfo, NetworkGap, Round, Verified};

use super::output::{Table, human_bytes, human_count, human_ms, human_rate, note, or_dash};
use super::terminal::LiveLine;

/// Tells how a migration goes: one redrawn line on a terminal, a line per phase elsewhere.
#[derive(Debug)]
pub(super) struct Progress {
    line: LiveLine,
    status: String,
}

impl Progress {
    pub(super) fn new() -> Self {
        Self {
            line: LiveLine::new(),
            status: String::new(),
        }
    }

    /// Takes the newest snapshot.
    pub(super) fn snapshot(&mut self, info: &MigrationInfo) {
        if self.line.is_live() {
            self.line.draw(&moment(info));
        } else if self.status != info.status {
            note(&moment(info));
        }
        self.status.clone_from(&info.status);
    }

    /// Ends the redrawn line.
    pub(super) fn end(&mut self) {
        self.line.clear();
    }
}

/// Where a migration stands, on one line.
pub(super) fn moment(info: &MigrationInfo) -> String {
    let mut parts = vec![format!(
        "{} {} → {}: {}",
        info.name, info.source, info.destination, info.status
    )];
    let copying = matches!(info.status.as_str(), "running" | "running (link lost)" | "switching");
    if copying && info.bytes_sent > 0 {
        parts.extend(info.progress_percent.map(bar));
        parts.push(format!("round {}", info.rounds.len() + 1));
        parts.push(format!("{} sent", human_bytes(info.bytes_sent)));
        let left = info
            .memory_remaining
            .map(|memory| memory + info.disk_remaining.unwrap_or(0));
        parts.extend(left.map(|left| format!("{} left", human_bytes(left))));
        parts.extend(info.throughput_bytes_per_s.map(human_rate));
        let dirty = info.dirty_bytes_per_s.filter(|&rate| rate > 0.0);
        parts.extend(dirty.map(|rate| format!("guest writes {}", human_rate(rate))));
        let until = info.link_lost_until.as_ref();
        parts.extend(until.map(|until| format!("no link, waited for until {until}")));
        parts.extend(info.decision.clone());
    }
    parts.extend(info.error.clone());
    parts.join(" · ")
}

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
    lines.extend(info.decisions.iter().map(decision));
    let downtime = info.downtime_ms.as_ref();
    lines.extend(downtime.map(|downtime| format!("blackout {}", blackout(downtime))));
    lines.extend(info.network_gaps.iter().map(network_gap));
    lines.push(whereabouts(info));
    lines.join("\n")
}

fn decision(decision: &MigrationDecision) -> String {
    format!("after round {}: {}: {}", decision.round, decision.deed, decision.words)
}

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

/// Migrations as a table.
pub(super) fn table(migrations: &[MigrationInfo]) -> Table {
    let headings = [
        "ID",
        "INSTANCE",
        "FROM",
        "TO",
        "STATUS",
        ">TOTAL",
        ">BLACKOUT",
        "STARTED",
        "GUEST ON",
    ];
    let mut table = Table::new(&headings);
    for info in migrations {
        table.row([
            info.id.clone(),
            info.name.clone(),
            info.source.clone(),
            info.destination.clone(),
            info.status.clone(),
            or_dash(info.total_ms.map(human_ms)),
            or_dash(info.downtime_ms.as_ref().map(|downtime| human_ms(downtime.total))),
            or_dash(info.started.as_ref()),
            or_dash(info.guest_location.as_ref()),
        ]);
    }
    table
}

fn reason(info: &MigrationInfo) -> String {
    info.error
        .as_ref()
        .map(|error| format!(": {error}"))
        .unwrap_or_default()
}

/// How much of the way is behind it.
fn bar(percent: u32) -> String {
    const WIDTH: u32 = 16;
    let full = (percent.min(100) * WIDTH + 50) / 100;
    let text: String = (0..WIDTH).map(|at| if at < full { '█' } else { '░' }).collect();
    format!("{text} {percent:>3} %")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(status: &str) -> MigrationInfo {
        MigrationInfo {
            id: "m".into(),
            name: "web".into(),
            source: "a".into(),
            destination: "b".into(),
            status: status.into(),
            ..Default::default()
        }
    }

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

    #[test]
    fn a_moment_tells_what_is_known_and_no_more() {
        assert_eq!(moment(&info("preparing")), "web a → b: preparing");
        let running = MigrationInfo {
            bytes_sent: 1 << 20,
            memory_remaining: Some(1 << 20),
            disk_remaining: Some(1 << 19),
            progress_percent: Some(50),
            ..info("running")
        };
        let text = moment(&running);
        assert!(
            text.contains("████████░░░░░░░░  50 %") && text.contains("round 1 · 1 MiB sent · 1.50 MiB left"),
            "{text}"
        );
        let of_an_older_vmm = MigrationInfo {
            progress_percent: None,
            ..running
        };
        assert!(!moment(&of_an_older_vmm).contains('%'));
    }
}
