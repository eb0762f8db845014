//! `cargo xtask bench --linux`: what comes with a real guest: the boot of Linux, idle devices in a switchover, a disk that moves along.

mod boot;
mod disk_copy;
mod switchover;

use std::process::ExitCode;

use anyhow::{Result, bail};
use serde_json::{Value, json};

use super::table::median;
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
    let mut failed = false;
    for (name, measure) in rows {
        println!("\n{name}");
        match measure(options, &ferry) {
            Ok(all) => {
                let contenders: Vec<_> = all.iter().map(Samples::to_json).collect();
                record.push(json!({ "workload": name, "contenders": contenders }));
            }
            // What was measured of other rows is not lost with it.
            Err(error) => {
                println!("{name}: failed: {error:#}");
                record.push(json!({ "workload": name, "failure": format!("{error:#}") }));
                failed = true;
            }
        }
    }
    write_record(options, record)?;
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
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

    fn median(&self) -> f64 {
        median(self.values.clone()).unwrap_or(f64::NAN)
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
