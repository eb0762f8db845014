//! Medians, and ratios to the best of the peer's modes.

use anyhow::Result;
use serde_json::{Value, json};

use super::workload::Workload;
use super::{Sample, Turns, Within, Work};

/// One way of moving the guest, with its samples.
#[derive(Debug)]
pub(super) struct Contender {
    name: &'static str,
    samples: Vec<Sample>,
    processor_seconds: Vec<f64>,
    /// What those said of themselves that did not end by themselves in the time they had.
    unended: Vec<String>,
    failures: Vec<String>,
}

impl Contender {
    /// A contender without samples.
    pub(super) fn new(name: &'static str) -> Self {
        Self {
            name,
            samples: Vec::new(),
            processor_seconds: Vec::new(),
            unended: Vec::new(),
            failures: Vec::new(),
        }
    }

    /// Takes a run's outcome. A failed run is told and counted; it stops nothing.
    pub(super) fn add(&mut self, outcome: Result<Sample>) {
        match outcome {
            Ok(sample) => {
                let stolen = sample.stolen_ms.filter(|&ms| ms > 0.0);
                let stolen = stolen.map_or_else(String::new, |ms| format!(", {ms:.0} ms stolen"));
                eprintln!(
                    "  {:<WIDTH$} {:8.1} ms, gap {:6.1} ms{stolen}",
                    self.name, sample.total_ms, sample.gap_ms
                );
                self.samples.push(sample);
            }
            Err(error) => {
                eprintln!("  {:<WIDTH$} failed: {error:#}", self.name);
                self.failures.push(format!("{error:#}"));
            }
        }
    }

    /// Takes the outcome of a run that was waited for so long and no longer. One that did not end is told and counted, and is no failure.
    pub(super) fn add_within(&mut self, outcome: Result<Within>) {
        match outcome {
            Ok(Within::Ended(sample)) => self.add(Ok(*sample)),
            Ok(Within::GoesOn(told)) => {
                eprintln!("  {:<WIDTH$} does not end: {told}", self.name);
                self.unended.push(told);
            }
            Err(error) => self.add(Err(error)),
        }
    }

    /// Takes the outcome of a run that counted processor time; its other figures are disturbed by that.
    pub(super) fn add_processor_time(&mut self, outcome: Result<Sample>) {
        match outcome {
            Ok(sample) => self.processor_seconds.extend(sample.cpu_s),
            Err(error) => {
                eprintln!("  {:<WIDTH$} failed: {error:#}", self.name);
                self.failures.push(format!("{error:#}"));
            }
        }
    }

    /// Whether a run failed.
    pub(super) fn has_failed(&self) -> bool {
        !self.failures.is_empty()
    }

    /// Every sample and every failure.
    pub(super) fn to_json(&self) -> Value {
        let samples = self.samples.iter().map(|sample| {
            json!({
                "total_ms": sample.total_ms,
                "gap_ms": sample.gap_ms,
                "stolen_ms": sample.stolen_ms,
                "reported_downtime_ms": sample.reported_downtime_ms,
                "reader_gap_ms": sample.reader_gap_ms,
                "bytes": sample.bytes,
                "clock_lost_ms": sample.clock_lost_ms,
                "state_claim_start_ms": sample.handover_ms,
                "page_writes_per_s": sample.work.map(|work| json!({ "before": work.before, "during": work.during, "after": work.after })),
                "late": sample.late.map(|late| json!({
                    "bytes": late.bytes,
                    "ms": late.ms,
                    "median_wait_ms": late.wait_ms,
                    "throughput_back_after_ms": late.back_ms,
                })),
            })
        });
        json!({
            "name": self.name,
            "median_total_ms": self.median(|s| Some(s.total_ms)),
            "median_gap_ms": self.median(|s| Some(s.gap_ms)),
            "gap_95th_percentile_ms": self.percentile(95, |s| Some(s.gap_ms)),
            "median_state_claim_start_ms": self.median(|s| s.handover_ms),
            "processor_s": self.processor_seconds,
            "samples": samples.collect::<Vec<_>>(),
            "unended": self.unended,
            "failures": self.failures,
        })
    }

    /// Its name in the table.
    pub(super) fn name(&self) -> &'static str {
        self.name
    }

    /// The middle of what its samples have of this; `None` if none has it.
    pub(super) fn median(&self, of: impl Fn(&Sample) -> Option<f64>) -> Option<f64> {
        median(self.samples.iter().filter_map(of).collect())
    }

    /// The same with those samples only from which nothing is known to have been stolen: its gaps are its own.
    fn undisturbed(&self) -> Self {
        let samples = self
            .samples
            .iter()
            .filter(|sample| sample.stolen_ms.is_none_or(|ms| ms == 0.0));
        Self {
            samples: samples.cloned().collect(),
            ..Self::new(self.name)
        }
    }

    fn percentile(&self, percent: usize, of: impl Fn(&Sample) -> Option<f64>) -> Option<f64> {
        percentile(self.samples.iter().filter_map(of).collect(), percent)
    }

    /// The median of its processor times, in seconds.
    pub(super) fn processor_seconds(&self) -> Option<f64> {
        median(self.processor_seconds.clone())
    }
}

/// Prints one workload's table; the first contender is Ferry.
pub(super) fn print(workload: &Workload, turns: &Turns) {
    print_head(workload);
    print_rows(turns.all());
    let [ferry, peers @ ..] = &turns.contenders[..] else {
        return;
    };
    ratio("total time", ferry, peers, |s| Some(s.total_ms));
    ratio("gap", ferry, peers, |s| Some(s.gap_ms));
    gap_ratios(ferry, peers);
    if let Some([ferry, peers @ ..]) = undisturbed(&turns.contenders).as_deref() {
        gap_ratios(ferry, peers);
    }
    print_work(&turns.contenders);
    processor_ratio(ferry, peers);
    let total = |contender: &Contender| contender.median(|s| Some(s.total_ms));
    if let (Some(own), Some(over_grpc)) = (total(ferry), total(&turns.over_grpc)) {
        println!(
            "over gRPC the same takes {over_grpc:.1} ms: {:.2} times as long",
            over_grpc / own
        );
    }
    if let (Some(own), Some(raw)) = (total(ferry), total(&turns.limit)) {
        println!(
            "a raw copy of as much takes {raw:.1} ms: {:.2} of what it moves a second",
            raw / own
        );
    }
}

/// Prints what is moved.
pub(super) fn print_head(workload: &Workload) {
    println!(
        "\n{} ({} MiB guest, {})",
        workload.name, workload.memory_mib, workload.work
    );
}

/// Prints what each contender came to.
pub(super) fn print_rows<'a>(contenders: impl Iterator<Item = &'a Contender>) {
    println!(
        "{:<WIDTH$} {:>4} {:>9} {:>8} {:>8} {:>10} {:>11} {:>11} {:>9} {:>10} {:>6}",
        "medians of",
        "runs",
        "total ms",
        "gap ms",
        "gap 95%",
        "reader gap",
        "reported ms",
        "st+cl+start",
        "MiB sent",
        "clock lost",
        "CPU s"
    );
    for contender in contenders {
        let shown = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.1}"));
        let show = |of: fn(&Sample) -> Option<f64>| shown(contender.median(of));
        println!(
            "{:<WIDTH$} {:>4} {:>9} {:>8} {:>8} {:>10} {:>11} {:>11} {:>9} {:>10} {:>6}",
            contender.name,
            contender.samples.len(),
            show(|s| Some(s.total_ms)),
            show(|s| Some(s.gap_ms)),
            shown(contender.percentile(95, |s| Some(s.gap_ms))),
            show(|s| s.reader_gap_ms),
            show(|s| s.reported_downtime_ms),
            show(|s| s.handover_ms),
            show(|s| s.bytes.map(|bytes| bytes / f64::from(1 << 20))),
            show(|s| s.clock_lost_ms),
            contender
                .processor_seconds()
                .map_or_else(|| "-".to_owned(), |seconds| format!("{seconds:.2}")),
        );
        if let Some(told) = contender.unended.last() {
            let times = contender.unended.len();
            println!("{:<WIDTH$} does not end ({times} times): {told}", contender.name);
        }
        for failure in &contender.failures {
            println!("{:<WIDTH$} failed: {failure}", contender.name);
        }
    }
}

/// Says what this contender's total time is of another's.
pub(super) fn compare_totals(ferry: &Contender, others: &[Contender]) {
    ratio("total time", ferry, others, |s| Some(s.total_ms));
}

fn ratio(what: &str, ferry: &Contender, peers: &[Contender], of: fn(&Sample) -> Option<f64>) {
    let best = peers.iter().filter_map(|peer| Some((peer.median(of)?, peer.name)));
    let Some((peer, name)) = best.min_by(|a, b| a.0.total_cmp(&b.0)) else {
        return;
    };
    if let Some(own) = ferry.median(of) {
        println!(
            "{what}: {own:.1} ms, {:.2} of the best peer ({name}, {peer:.1} ms)",
            own / peer
        );
    }
}

/// What each contender's guest got done, where it writes pages: what the move cost it besides its gap.
fn print_work(contenders: &[Contender]) {
    for contender in contenders {
        let of = |part: fn(Work) -> f64| contender.median(|s| s.work.map(part));
        let (before, during, after) = (of(|work| work.before), of(|work| work.during), of(|work| work.after));
        if let (Some(before), Some(during), Some(after)) = (before, during, after) {
            println!(
                "pages written a second, {}: {before:.0} before, {:.2} of that during the move, {:.2} after it",
                contender.name,
                during / before,
                after / before
            );
        }
    }
}

/// The contenders with those moves only from which the host's own host took no processor time, where it took some from others; prints their gaps.
pub(super) fn undisturbed(contenders: &[Contender]) -> Option<Vec<Contender>> {
    let calm: Vec<_> = contenders.iter().map(Contender::undisturbed).collect();
    if calm
        .iter()
        .zip(contenders)
        .all(|(calm, all)| calm.samples.len() == all.samples.len())
    {
        return None;
    }
    println!("moves from which no processor time was stolen:");
    for (calm, all) in calm.iter().zip(contenders) {
        let of = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.1}"));
        println!(
            "  {:<WIDTH$} {} of {}, gap {} ms, 95% {} ms",
            calm.name,
            calm.samples.len(),
            all.samples.len(),
            of(calm.median(|s| Some(s.gap_ms))),
            of(calm.percentile(95, |s| Some(s.gap_ms)))
        );
    }
    Some(calm)
}

/// What Ferry's gaps are of each peer's: aims name some of a peer's modes.
fn gap_ratios(ferry: &Contender, peers: &[Contender]) {
    let gap = |contender: &Contender| {
        let middle = contender.median(|s| Some(s.gap_ms))?;
        Some((middle, contender.percentile(95, |s| Some(s.gap_ms))?))
    };
    for peer in peers {
        if let (Some((own, own_95)), Some((of_peer, of_peer_95))) = (gap(ferry), gap(peer)) {
            println!(
                "gap beside {}: {:.2} in the median, {:.2} in the 95th percentile",
                peer.name,
                own / of_peer,
                own_95 / of_peer_95
            );
        }
    }
}

fn processor_ratio(ferry: &Contender, peers: &[Contender]) {
    let best = peers
        .iter()
        .filter_map(|peer| Some((peer.processor_seconds()?, peer.name)));
    if let (Some(own), Some((peer, name))) = (ferry.processor_seconds(), best.min_by(|a, b| a.0.total_cmp(&b.0))) {
        println!(
            "processor time: {own:.2} s, {:.2} of the best peer ({name}, {peer:.2} s)",
            own / peer
        );
    }
}

/// The middle of the values; `None` without any.
pub(super) fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(values[middle]),
        _ => Some(f64::midpoint(values[middle - 1], values[middle])),
    }
}

/// The value that so many percent of all are not above; `None` without any. Of fewer than 20 the 95th is the largest.
fn percentile(mut values: Vec<f64>, percent: usize) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let rank = (values.len() * percent).div_ceil(100);
    values.get(rank.checked_sub(1)?).copied()
}

/// Of the first column.
const WIDTH: usize = 21;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 3.0, 2.0]), Some(2.5));
    }

    #[test]
    fn the_95th_percentile_of_50_leaves_two_above_it() {
        let upwards = |count: u32| (1..=count).rev().map(f64::from).collect::<Vec<_>>();
        assert_eq!(percentile(upwards(50), 95), Some(48.0));
        assert_eq!(percentile(upwards(100), 95), Some(95.0));
        assert_eq!(percentile(upwards(3), 95), Some(3.0));
        assert_eq!(percentile(vec![], 95), None);
    }
}
