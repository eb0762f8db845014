//! The figures of a workload: medians, and each run's own for whoever wants to know how they spread.

use std::time::Duration;

use ferry_proto::agent::v1::MigrationPrediction;
use ferry_vmm::measuring::LeastFetch;
use serde::Serialize;

use super::super::lab::Move;
use super::super::output::{Table, human_bytes, human_ms, human_rate, or_dash};
use super::clock::ClockError;
use super::workloads::Workload;
use crate::agent::Transport;

/// One timed move.
#[derive(Debug)]
pub(super) struct Run {
    pub(super) moved: Move,
    /// What had been foretold of it right before.
    pub(super) predicted: MigrationPrediction,
    /// What a page that is waited for costs at least, where pages come late.
    pub(super) least_fetch: Option<LeastFetch>,
    pub(super) cpu_source_s: f64,
    pub(super) cpu_destination_s: f64,
    pub(super) clock_error: Option<ClockError>,
}

/// What a VMM needs beside guest memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct VmmMemory {
    pub(super) idle_bytes: Option<u64>,
    pub(super) migrating_bytes: u64,
}

/// What is printed of a workload. Figures without an ending of their own are medians.
#[derive(Debug, Serialize)]
pub(super) struct Figures {
    workload: &'static str,
    /// tcp or grpc.
    transport: &'static str,
    runs: usize,
    /// One runner after each move, no heartbeat lost or doubled, no page damaged.
    pub(super) clean: bool,
    /// What was not so.
    faults: Vec<String>,
    total_ms: Option<f64>,
    blackout_ms: Option<f64>,
    blackout_upper_bound_ms: Option<f64>,
    guest_gap_ms: Option<f64>,
    reader_gap_ms: Option<f64>,
    /// Page writes a second, by the guest's clock: in the half second before the order, while it was moved, and after.
    work_before_per_s: Option<f64>,
    work_during_per_s: Option<f64>,
    work_after_per_s: Option<f64>,
    /// The part of its work that it did not get done while it was moved; unknown of a guest that writes nothing.
    slowdown: Option<f64>,
    bytes_sent: Option<f64>,
    throughput_bytes_per_s: Option<f64>,
    rounds: Option<f64>,
    /// CPU seconds of agent and VMM without vCPU threads, for each GiB sent; unknown where next to nothing was sent.
    cpu_source_s_per_gib: Option<f64>,
    cpu_destination_s_per_gib: Option<f64>,
    cpu_source_s: Option<f64>,
    cpu_destination_s: Option<f64>,
    /// A VMM's proportional set size without guest memory.
    vmm_idle_bytes: Option<u64>,
    /// The largest of either VMM's, in a move of its own.
    vmm_migrating_bytes: u64,
    /// The one of median amount; positive: the guest's clock runs ahead after the move.
    clock_error_us: Option<f64>,
    clock_uncertainty_us: Option<f64>,
    /// What was foretold, as a part of what came: medians, and each run's own.
    predicted_total_ratio: Option<f64>,
    predicted_blackout_ratio: Option<f64>,
    predicted_bytes_ratio: Option<f64>,
    predicted_total_ratio_all: Vec<f64>,
    predicted_blackout_ratio_all: Vec<f64>,
    predicted_bytes_ratio_all: Vec<f64>,
    /// Of pages that come late: the median wait for one of a move, a round trip between two processors and within one, and backing a page,
    /// before the guest was there, and the wait as a part of three round trips between two processors and the backing of a page.
    late_wait_us: Option<f64>,
    late_round_trip_us: Option<f64>,
    late_shared_round_trip_us: Option<f64>,
    late_population_us: Option<f64>,
    late_wait_ratio: Option<f64>,
    late_wait_us_all: Vec<f64>,
    late_wait_ratio_all: Vec<f64>,
    clock_error_us_all: Vec<Option<f64>>,
    total_ms_all: Vec<f64>,
    blackout_ms_all: Vec<f64>,
    guest_gap_ms_all: Vec<f64>,
    bytes_sent_all: Vec<f64>,
}

impl Figures {
    pub(super) fn of(
        (workload, transport): (&Workload, Transport),
        runs: &[Run],
        memory: VmmMemory,
        faults: Vec<String>,
    ) -> Self {
        let all = |figure: &dyn Fn(&Run) -> Option<f64>| runs.iter().filter_map(figure).collect::<Vec<f64>>();
        let total = all(&|run| run.moved.migration.total_ms);
        let downtime = |run: &Run| run.moved.migration.downtime_ms;
        let blackout = all(&|run| Some(downtime(run)?.total));
        let guest_gap = all(&|run| Some(run.moved.guest_gap_ms));
        let bytes = all(&|run| Some(run.moved.migration.bytes_sent as f64));
        let per_gib = |seconds: f64, run: &Run| {
            let sent = run.moved.migration.bytes_sent;
            (sent >= LEAST_SENT).then(|| seconds * (1_u64 << 30) as f64 / sent as f64)
        };
        let ratio = |foretold: Option<f64>, came: Option<f64>| {
            foretold
                .zip(came)
                .filter(|&(_, came)| came > 0.0)
                .map(|(foretold, came)| foretold / came)
        };
        let total_ratio = all(&|run| ratio(run.predicted.total_ms, run.moved.migration.total_ms));
        let blackout_ratio = all(&|run| ratio(run.predicted.blackout_ms, Some(downtime(run)?.total)));
        let bytes_ratio = all(&|run| {
            let foretold = run.predicted.bytes.map(|bytes| bytes as f64);
            ratio(foretold, Some(run.moved.migration.bytes_sent as f64))
        });
        let micros = |time: Duration| time.as_secs_f64() * 1e6;
        let late_wait = |run: &Run| run.moved.migration.late_median_wait_ms.map(|wait| wait * 1e3);
        let round_trip = |run: &Run| run.least_fetch?.round_trip.map(micros);
        let shared_round_trip = |run: &Run| run.least_fetch.map(|least| micros(least.shared_round_trip));
        let population = |run: &Run| run.least_fetch.map(|least| micros(least.population));
        let late_waits = all(&late_wait);
        let late_ratios = all(&|run| Some(late_wait(run)? / (3.0 * round_trip(run)? + population(run)?)));
        let clock = |part: &dyn Fn(ClockError) -> f64| all(&|run| run.clock_error.map(part));
        Self {
            workload: workload.name,
            transport: transport.as_str(),
            runs: runs.len(),
            clean: faults.is_empty(),
            faults,
            total_ms: median(&total),
            blackout_ms: median(&blackout),
            blackout_upper_bound_ms: median(&all(&|run| Some(downtime(run)?.upper_bound))),
            guest_gap_ms: median(&guest_gap),
            reader_gap_ms: median(&all(&|run| Some(run.moved.reader_gap_ms))),
            work_before_per_s: median(&all(&|run| Some(run.moved.felt.before.page_writes_per_s))),
            work_during_per_s: median(&all(&|run| Some(run.moved.felt.during.page_writes_per_s))),
            work_after_per_s: median(&all(&|run| Some(run.moved.felt.after.page_writes_per_s))),
            slowdown: median(&all(&|run| run.moved.felt.slowdown)),
            bytes_sent: median(&bytes),
            throughput_bytes_per_s: median(&all(&|run| run.moved.migration.throughput_bytes_per_s)),
            rounds: median(&all(&|run| Some(run.moved.migration.rounds.len() as f64))),
            cpu_source_s_per_gib: median(&all(&|run| per_gib(run.cpu_source_s, run))),
            cpu_destination_s_per_gib: median(&all(&|run| per_gib(run.cpu_destination_s, run))),
            cpu_source_s: median(&all(&|run| Some(run.cpu_source_s))),
            cpu_destination_s: median(&all(&|run| Some(run.cpu_destination_s))),
            vmm_idle_bytes: memory.idle_bytes,
            vmm_migrating_bytes: memory.migrating_bytes,
            clock_error_us: median_amount(&clock(&|error| error.error_us)),
            clock_uncertainty_us: median(&clock(&|error| error.uncertainty_us)),
            predicted_total_ratio: median(&total_ratio),
            predicted_blackout_ratio: median(&blackout_ratio),
            predicted_bytes_ratio: median(&bytes_ratio),
            predicted_total_ratio_all: total_ratio,
            predicted_blackout_ratio_all: blackout_ratio,
            predicted_bytes_ratio_all: bytes_ratio,
            late_wait_us: median(&late_waits),
            late_round_trip_us: median(&all(&round_trip)),
            late_shared_round_trip_us: median(&all(&shared_round_trip)),
            late_population_us: median(&all(&population)),
            late_wait_ratio: median(&late_ratios),
            late_wait_us_all: late_waits,
            late_wait_ratio_all: late_ratios,
            clock_error_us_all: runs
                .iter()
                .map(|run| run.clock_error.map(|error| error.error_us))
                .collect(),
            total_ms_all: total,
            blackout_ms_all: blackout,
            guest_gap_ms_all: guest_gap,
            bytes_sent_all: bytes,
        }
    }
}

impl Figures {
    fn clock_error(&self) -> Option<String> {
        Some(format!(
            "{:+.0} ± {:.0} µs",
            self.clock_error_us?, self.clock_uncertainty_us?
        ))
    }
}

/// The middle of what is finite; of two middles, the mean.
fn median(values: &[f64]) -> Option<f64> {
    let mut sorted: Vec<f64> = values.iter().copied().filter(|value| value.is_finite()).collect();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        count if count % 2 == 1 => Some(sorted[middle]),
        _ => Some(f64::midpoint(sorted[middle - 1], sorted[middle])),
    }
}

/// The value whose amount is the middle one: errors to either side must not cancel out.
fn median_amount(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(|one, other| one.abs().total_cmp(&other.abs()));
    sorted.get(sorted.len() / 2).copied()
}

pub(super) fn table(all: &[Figures]) -> String {
    let headings = [
        "WORKLOAD",
        ">RUNS",
        ">TOTAL",
        ">BLACKOUT",
        ">GUEST SAW",
        ">READER SAW",
        ">SLOWDOWN",
        ">SENT",
        ">THROUGHPUT",
        ">CPU SRC",
        ">CPU DST",
        ">VMM IDLE",
        ">MIGRATING",
        ">CLOCK",
        "CLEAN",
    ];
    let mut table = Table::new(&headings);
    for figures in all {
        table.row([
            figures.workload.to_owned(),
            figures.runs.to_string(),
            or_dash(figures.total_ms.map(human_ms)),
            or_dash(figures.blackout_ms.map(human_ms)),
            or_dash(figures.guest_gap_ms.map(human_ms)),
            or_dash(figures.reader_gap_ms.map(human_ms)),
            or_dash(figures.slowdown.map(|part| format!("{:.0} %", part * 100.0))),
            or_dash(figures.bytes_sent.map(|bytes| human_bytes(bytes as u64))),
            or_dash(figures.throughput_bytes_per_s.map(human_rate)),
            or_dash(figures.cpu_source_s_per_gib.map(|seconds| format!("{seconds:.2}"))),
            or_dash(figures.cpu_destination_s_per_gib.map(|seconds| format!("{seconds:.2}"))),
            or_dash(figures.vmm_idle_bytes.map(human_bytes)),
            human_bytes(figures.vmm_migrating_bytes),
            or_dash(figures.clock_error()),
            if figures.clean { "yes" } else { "NO" }.to_owned(),
        ]);
    }
    let mut text = format!("{table}{LEGEND}\n\n{}{FORETOLD}", foretold(all));
    if let Some(late) = late(all) {
        text += &format!("\n\n{late}{LATE}");
    }
    for figures in all {
        for fault in &figures.faults {
            text += &format!("\n{}: {fault}", figures.workload);
        }
    }
    text
}

/// How near what was foretold came.
fn foretold(all: &[Figures]) -> Table {
    let mut table = Table::new(&["FORETOLD", ">TOTAL", ">BLACKOUT", ">SENT"]);
    let share = |ratio: Option<f64>| or_dash(ratio.map(|ratio| format!("{ratio:.2}")));
    for figures in all {
        table.row([
            figures.workload.to_owned(),
            share(figures.predicted_total_ratio),
            share(figures.predicted_blackout_ratio),
            share(figures.predicted_bytes_ratio),
        ]);
    }
    table
}

/// How long somebody waited for a page that came late.
fn late(all: &[Figures]) -> Option<Table> {
    let mut table = Table::new(&[
        "LATE PAGES",
        ">WAIT",
        ">ROUND TRIP",
        ">WITHIN ONE",
        ">A PAGE",
        ">OF 3 TRIPS AND A PAGE",
    ]);
    let micros = |time: Option<f64>| or_dash(time.map(|time| format!("{time:.1} µs")));
    let of_late = |figures: &&Figures| figures.late_population_us.is_some();
    for figures in all.iter().filter(of_late) {
        table.row([
            figures.workload.to_owned(),
            micros(figures.late_wait_us),
            micros(figures.late_round_trip_us),
            micros(figures.late_shared_round_trip_us),
            micros(figures.late_population_us),
            or_dash(figures.late_wait_ratio.map(|ratio| format!("{ratio:.2}"))),
        ]);
    }
    all.iter().any(|figures| of_late(&figures)).then_some(table)
}

const LATE: &str = "
WAIT is the median of the guest's waits for a page in a move, ROUND TRIP a byte's way over the loopback and back between threads on two processors, as the ends of a page's way are
on two hosts, WITHIN ONE the same on one processor, where nobody is woken from idleness, A PAGE what backing one takes; all measured before the guest was there.";

const FORETOLD: &str = "
What `migrate --dry-run` said right before each move, as a part of what came of it: medians. Before the first one the link is tried, and nothing else is known of the way.";

/// With less sent than this, what a migration costs in any case would be called the cost of a GiB.
const LEAST_SENT: u64 = 256 << 20;

const LEGEND: &str = "
Medians. BLACKOUT is what the agents report, GUEST SAW the largest gap between two looks at the guest's own clock, READER SAW the longest wait for a
heartbeat (one each 20 ms), SLOWDOWN the part of its page writes that the guest did not get done while it was moved, against the half second before. CPU is seconds for each GiB sent, of agent and VMM without vCPU threads. VMM is its PSS without guest memory, idle, and
the largest while migrating. CLOCK is how far the guest's clock is ahead of the host's after a
move, against before it, and how well that can be told from when its heartbeats are read.";

pub(super) fn list(workloads: &[Workload]) -> Table {
    let mut table = Table::new(&["WORKLOAD", ">MEMORY", ">TOUCHED", ">VCPUS", "DIRTY", "WHAT IT IS"]);
    for workload in workloads {
        table.row([
            workload.name.to_owned(),
            human_bytes(workload.memory_bytes),
            human_bytes(workload.touched_bytes),
            workload.vcpus.to_string(),
            workload.dirty.to_owned(),
            workload.description.to_owned(),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_are_the_middle_of_what_is_known() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[1.0, 2.0, f64::NAN, 4.0, 3.0]), Some(2.5));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn errors_to_either_side_do_not_cancel_out() {
        assert_eq!(median_amount(&[-500.0, 480.0, 1.0]), Some(480.0));
    }
}
