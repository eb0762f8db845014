//! Medians, and ratios to the best of the peer's modes.

use anyhow::Result;
use serde_json::{Value, json};

use super::contender::Contender;
use super::row::Row;
use crate::bench::table::median;

/// One run, measured by the guest.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sample {
    /// Requests or frames a second.
    pub(super) operations_per_s: f64,
    /// Bytes a second.
    pub(super) bytes_per_s: f64,
    /// From offering to done, in µs: the median.
    pub(super) median_us: Option<f64>,
    /// The 99th percentile of that.
    pub(super) p99_us: Option<f64>,
}

/// A contender's runs.
#[derive(Debug)]
pub(super) struct Runs {
    name: &'static str,
    samples: Vec<Sample>,
    failures: Vec<String>,
}

impl Runs {
    /// None yet.
    pub(super) fn of(contender: Contender) -> Self {
        Self {
            name: contender.name(),
            samples: Vec::new(),
            failures: Vec::new(),
        }
    }

    /// Takes a run's outcome. A failed run is told and counted; it stops nothing.
    pub(super) fn add(&mut self, outcome: Result<Sample>) {
        match outcome {
            Ok(sample) => {
                eprintln!("  {:<16} {:10.0} a second", self.name, sample.operations_per_s);
                self.samples.push(sample);
            }
            Err(error) => {
                eprintln!("  {:<16} failed: {error:#}", self.name);
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
                "operations_per_s": sample.operations_per_s,
                "bytes_per_s": sample.bytes_per_s,
                "median_us": sample.median_us,
                "p99_us": sample.p99_us,
            })
        });
        json!({
            "name": self.name,
            "median_operations_per_s": self.median(|s| Some(s.operations_per_s)),
            "median_bytes_per_s": self.median(|s| Some(s.bytes_per_s)),
            "samples": samples.collect::<Vec<_>>(),
            "failures": self.failures,
        })
    }

    fn median(&self, of: impl Fn(&Sample) -> Option<f64>) -> Option<f64> {
        median(self.samples.iter().filter_map(of).collect())
    }
}

/// Prints one row's table; the first is Ferry.
pub(super) fn print(row: &Row, all: &[Runs]) {
    println!("\n{} ({})", row.name, row.work);
    println!(
        "{:<16} {:>5} {:>12} {:>10} {:>12} {:>12}",
        "medians of", "runs", "a second", "MiB/s", "median us", "p99 us"
    );
    for runs in all {
        let show = |of: fn(&Sample) -> Option<f64>, digits: usize| match runs.median(of) {
            Some(value) => format!("{value:.digits$}"),
            None => "-".to_owned(),
        };
        println!(
            "{:<16} {:>5} {:>12} {:>10} {:>12} {:>12}",
            runs.name,
            runs.samples.len(),
            show(|s| Some(s.operations_per_s), 0),
            show(|s| Some(s.bytes_per_s / f64::from(1 << 20)), 1),
            show(|s| s.median_us, 1),
            show(|s| s.p99_us, 1),
        );
        for failure in &runs.failures {
            println!("{:<16} failed: {failure}", runs.name);
        }
    }
    let [ferry, peers @ ..] = all else { return };
    let rate = |runs: &Runs| runs.median(|s| Some(s.operations_per_s));
    let rated = peers.iter().filter_map(|peer| Some((rate(peer)?, peer.name)));
    let best = rated.max_by(|a, b| a.0.total_cmp(&b.0));
    if let (Some(own), Some((peer, name))) = (rate(ferry), best) {
        println!("rate: {:.2} of the best peer ({name})", own / peer);
    }
}
