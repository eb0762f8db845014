//! `cargo xtask bench --control`: what the control plane costs, against what is promised of it.
//!
//! Each part has a pair of hosts of its own. Nothing here is a test: a figure that misses its target is told as such, and the run
//! goes on. Targets that are a sum of other figures (one fsync and one round trip) are measured in the same run.

mod agent;
mod casts;
mod fsyncs;
mod records;
mod restart;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use serde_json::{Value, json};

use super::{Options, ferry, write_record};

/// One figure.
struct Figure {
    what: String,
    /// None: it is told for its own sake.
    target: Option<f64>,
    measured: f64,
    unit: &'static str,
}

impl Figure {
    fn new(what: impl Into<String>, measured: f64, unit: &'static str) -> Self {
        let what = what.into();
        Self {
            what,
            target: None,
            measured,
            unit,
        }
    }

    /// It is to be this at most.
    fn at_most(self, target: f64) -> Self {
        Self {
            target: Some(target),
            ..self
        }
    }

    fn is_met(&self) -> Option<bool> {
        self.target.map(|target| self.measured <= target)
    }

    fn to_json(&self) -> Value {
        json!({
            "what": self.what,
            "target_at_most": self.target,
            "measured": self.measured,
            "unit": self.unit,
            "met": self.is_met(),
        })
    }
}

/// One part: what it measures of this binary.
type Measure = fn(&Path) -> Result<Vec<Figure>>;

/// Measures everything and prints a table.
pub(super) fn run(options: &Options) -> Result<ExitCode> {
    let ferry = match std::env::var_os("FERRY_BINARY") {
        Some(file) => PathBuf::from(file),
        None => ferry::build()?.file().to_owned(),
    };
    let parts: [(&str, Measure); 4] = [
        ("casts", casts::measure),
        ("records", records::measure),
        ("restart", restart::measure),
        ("fsyncs", fsyncs::measure),
    ];
    let mut figures = Vec::new();
    for (name, measure) in parts {
        if options.workload.as_deref().is_some_and(|text| !name.contains(text)) {
            continue;
        }
        eprintln!("{name}");
        figures.extend(measure(&ferry)?);
    }
    print(&figures);
    write_record(options, figures.iter().map(Figure::to_json).collect())?;
    Ok(ExitCode::SUCCESS)
}

fn print(figures: &[Figure]) {
    let width = figures
        .iter()
        .map(|figure| figure.what.chars().count())
        .max()
        .unwrap_or(0);
    println!("{:<width$}  {:>12}  {:>12}  met", "", "target", "measured");
    for figure in figures {
        let target = figure
            .target
            .map_or_else(|| "-".to_owned(), |target| shown(target, figure.unit));
        let met = match figure.is_met() {
            Some(true) => "yes",
            Some(false) => "NO",
            None => "",
        };
        let measured = shown(figure.measured, figure.unit);
        println!("{:<width$}  {target:>12}  {measured:>12}  {met}", figure.what);
    }
}

fn shown(number: f64, unit: &str) -> String {
    match unit {
        "" => format!("{number:.0}"),
        unit => format!("{number:.2} {unit}"),
    }
}

/// The value below which this share of the samples is.
fn quantile(samples: &[f64], share: f64) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().saturating_sub(1);
    let at = (last as f64 * share).ceil() as usize;
    sorted.get(at.min(last)).copied().unwrap_or(f64::NAN)
}

fn median(samples: &[f64]) -> f64 {
    quantile(samples, 0.5)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_samples() {
        let samples = [5.0, 1.0, 4.0, 2.0, 3.0];
        assert_eq!((median(&samples), quantile(&samples, 0.99)), (3.0, 5.0));
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn a_figure_says_whether_its_target_is_met() {
        let figure = |measured| Figure::new("x", measured, "ms").at_most(2.0);
        assert_eq!((figure(2.0).is_met(), figure(2.1).is_met()), (Some(true), Some(false)));
        assert_eq!(Figure::new("x", 1.0, "").is_met(), None);
    }
}
