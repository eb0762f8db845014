//! A migration while it runs, in words, and many in a table.

use ferry_proto::agent::v1::MigrationInfo;

use super::account::still_missing;
use super::output::{Table, human_bytes, human_ms, human_rate, note, or_dash};
use super::terminal::LiveLine;
use crate::agent::POST_COPY;

/// Tells how a migration goes: one redrawn line on a terminal; elsewhere a line per phase, and one where rounds do not lead to its end.
#[derive(Debug)]
pub(super) struct Progress {
    line: LiveLine,
    status: String,
    /// What was told last of rounds that do not lead to the end.
    trouble: Option<(String, u32)>,
}

impl Progress {
    pub(super) fn new() -> Self {
        Self {
            line: LiveLine::new(),
            status: String::new(),
            trouble: None,
        }
    }

    /// Takes the newest snapshot.
    pub(super) fn snapshot(&mut self, info: &MigrationInfo) {
        let trouble = trouble(info);
        if self.line.is_live() {
            self.line.draw(&moment(info));
        } else if self.status != info.status || trouble.is_some() && self.trouble != trouble {
            note(&moment(info));
        }
        self.status.clone_from(&info.status);
        self.trouble = trouble.or(self.trouble.take());
    }

    /// Ends the redrawn line.
    pub(super) fn end(&mut self) {
        self.line.clear();
    }
}

/// What was decided last, if rounds do not lead to the end by themselves, and how much vCPUs are throttled.
fn trouble(info: &MigrationInfo) -> Option<(String, u32)> {
    let last = info.decisions.last()?;
    let is_trouble = matches!(last.deed.as_str(), "throttle" | "infeasible" | "pause");
    is_trouble.then(|| (last.deed.clone(), last.throttle_percent))
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
    if info.status == POST_COPY {
        parts.extend(info.late_missing.map(still_missing));
        parts.extend(info.decision.clone());
    }
    parts.extend(info.error.clone());
    parts.join(" · ")
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

/// How much of the way is behind it.
fn bar(percent: u32) -> String {
    const WIDTH: u32 = 16;
    let full = (percent.min(100) * WIDTH + 50) / 100;
    let text: String = (0..WIDTH).map(|at| if at < full { '█' } else { '░' }).collect();
    format!("{text} {percent:>3} %")
}

#[cfg(test)]
pub(super) mod tests {
    use ferry_proto::agent::v1::MigrationDecision;

    use super::*;

    /// One from a to b.
    pub(in crate::cli) fn info(status: &str) -> MigrationInfo {
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
    fn rounds_that_do_not_lead_to_the_end_are_trouble() {
        let decided = |deed: &str, throttle_percent| MigrationDecision {
            deed: deed.into(),
            throttle_percent,
            ..MigrationDecision::default()
        };
        let after = |decisions: Vec<MigrationDecision>| {
            trouble(&MigrationInfo {
                decisions,
                ..info("running")
            })
        };
        assert_eq!(after(Vec::new()), None);
        assert_eq!(after(vec![decided("infeasible", 0), decided("continue", 0)]), None);
        assert_eq!(after(vec![decided("infeasible", 0)]), Some(("infeasible".into(), 0)));
        assert_eq!(after(vec![decided("throttle", 30)]), Some(("throttle".into(), 30)));
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

    #[test]
    fn a_guest_that_waits_for_late_pages_is_told_of() {
        let underway = MigrationInfo {
            late_missing: Some(5_000),
            decision: Some("the guest waits for pages: no route".into()),
            ..info(POST_COPY)
        };
        let text = moment(&underway);
        let told = "5,000 pages still to come · the guest waits for pages: no route";
        assert!(text.ends_with(told), "{text}");
    }
}
