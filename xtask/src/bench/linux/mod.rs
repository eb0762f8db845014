//! `cargo xtask bench --linux`: what a guest with an operating system costs: its boot, its devices in a switchover, its disk on the way.

mod boot;
mod disk_copy;
mod switchover;

use std::process::ExitCode;

use anyhow::{Result, bail};
use serde_json::{Value, json};

use super::{Options, Peer, ferry, qemu, write_record};

/// One comparison: runs in turn, prints what came of it, and gives it for the record.
type Measure = fn(&Options, &ferry::Binary) -> Result<Vec<Samples>>;

const ROWS: [(&str, Measure); 3] = [
    ("boot", boot::measure),
    ("switchover-devices", switchover::measure),
    ("disk-copy", disk_copy::measure),
];

/// Builds, measures, prints.
pub(super) fn run(options: &Options) -> Result<ExitCode> {
    let wanted = |name: &str| options.workload.as_deref().is_none_or(|text| name.contains(text));
    let rows: Vec<_> = ROWS.iter().filter(|(name, _)| wanted(name)).collect();
    if rows.is_empty() {
        bail!(
            "no workload has that in its name; there are {}",
            ROWS.map(|(name, _)| name).join(", ")
        );
    }
    if options.peer == Some(Peer::Qemu) {
        qemu::check()?;
    }
    let ferry = ferry::build()?;
    let mut record = Vec::new();
    for (name, measure) in rows {
        println!("\n{name}");
        let all = measure(options, &ferry)?;
        let contenders: Vec<_> = all.iter().map(Samples::to_json).collect();
        record.push(json!({ "workload": name, "contenders": contenders }));
    }
    write_record(options, record)?;
    Ok(ExitCode::SUCCESS)
}

/// What was measured of one contender, in one unit.
struct Samples {
    name: String,
    unit: &'static str,
    values: Vec<f64>,
}

impl Samples {
    fn of(name: impl Into<String>, unit: &'static str) -> Self {
        Self {
            name: name.into(),
            unit,
            values: Vec::new(),
        }
    }

    /// Takes a run's outcome, and tells it.
    fn add(&mut self, value: f64) {
        eprintln!("  {:<18} {value:10.1} {}", self.name, self.unit);
        self.values.push(value);
    }

    /// The middle one, or the mean of the two in the middle.
    fn median(&self) -> f64 {
        let mut sorted = self.values.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        match sorted.len() {
            0 => f64::NAN,
            odd if odd % 2 == 1 => sorted[middle],
            _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
        }
    }

    fn print(&self) {
        let runs = self.values.len();
        println!(
            "{:<18} {runs:5} runs, median {:10.1} {}",
            self.name,
            self.median(),
            self.unit
        );
    }

    fn to_json(&self) -> Value {
        json!({ "name": self.name, "unit": self.unit, "median": self.median(), "samples": self.values })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_in_the_middle() {
        let mut samples = Samples::of("one", "ms");
        [3.0, 1.0, 9.0].into_iter().for_each(|value| samples.add(value));
        assert_eq!(samples.median(), 3.0);
        samples.add(5.0);
        assert_eq!(samples.median(), 4.0);
    }
}
