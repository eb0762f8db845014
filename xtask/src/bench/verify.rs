//! `cargo xtask bench --verify`: what digests cost, with them and without in turn in one run; of pages that come in rounds, and of those that come late.

use std::process::ExitCode;

use anyhow::{Result, bail};
use serde_json::json;

use super::table::{self, Contender};
use super::workload::{self, Workload};
use super::{Measured, Options, PROCESSOR_RUNS, clock, ferry, in_turn, write_record};

/// A workload and how it is moved in any case.
struct Row {
    workload: &'static Workload,
    further: &'static [&'static str],
}

/// Those that come in rounds, by name.
const IN_ROUNDS: [&str; 2] = ["random-1g", "busy-20k"];

/// 16 MiB a second for what nobody waits for, as `ferry bench --workload late-idle-link` has it.
const LATE: &[&str] = &["--mode", "postcopy", "--bandwidth", "134.217728Mbit"];

/// With the digests and without.
const FLAGS: [(&str, &[&str]); 2] = [("ferry", &[]), ("ferry --verify", &["--verify"])];

/// Moves each workload, and prints the tables.
///
/// # Errors
/// If nothing builds.
pub(super) fn run(options: &Options) -> Result<ExitCode> {
    let rows = rows(options.workload.as_deref());
    if rows.is_empty() {
        bail!(
            "no workload has that in its name; there are {}, {}",
            IN_ROUNDS.join(", "),
            workload::LATE.name
        );
    }
    let ferry = ferry::build()?;
    let (mut record, mut failed) = (Vec::new(), false);
    for row in &rows {
        let contenders = measure(row, options, &ferry)?;
        table::print_head(row.workload);
        table::print_rows(contenders.iter());
        print_price(&contenders);
        failed |= contenders.iter().any(Contender::has_failed);
        record.push(json!({
            "workload": row.workload.name,
            "arguments": row.further,
            "contenders": contenders.each_ref().map(Contender::to_json),
        }));
    }
    write_record(options, record)?;
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn rows(text: Option<&str>) -> Vec<Row> {
    let in_rounds = workload::ALL.iter().filter(|w| IN_ROUNDS.contains(&w.name));
    let in_rounds = in_rounds.map(|workload| Row { workload, further: &[] });
    let late = Row {
        workload: &workload::LATE,
        further: LATE,
    };
    let all = in_rounds.chain([late]);
    all.filter(|row| text.is_none_or(|text| row.workload.name.contains(text)))
        .collect()
}

fn measure(row: &Row, options: &Options, ferry: &ferry::Binary) -> Result<[Contender; 2]> {
    let Row { workload, further } = *row;
    let mut contenders = FLAGS.map(|(name, _)| Contender::new(name));
    let tsc_khz = clock::tsc_khz()?;
    let moves = |turn: usize, measured| {
        let further = [further, FLAGS[turn].1].concat();
        ferry.run(workload, tsc_khz, measured, &further)
    };
    for round in 1..=options.runs {
        eprintln!("{}: run {round} of {}", workload.name, options.runs);
        for turn in in_turn(FLAGS.len(), round) {
            contenders[turn].add(moves(turn, Measured::Time));
        }
    }
    eprintln!("{}: processor time", workload.name);
    for round in 1..=PROCESSOR_RUNS.min(options.runs) {
        for turn in in_turn(FLAGS.len(), round) {
            contenders[turn].add_processor_time(moves(turn, Measured::Processor));
        }
    }
    Ok(contenders)
}

/// What it comes to with digests, as a part of what it comes to without.
fn print_price([without, with]: &[Contender; 2]) {
    let of = |what: &str, unit: &str, of: fn(&Contender) -> Option<f64>| {
        if let (Some(without), Some(with)) = (of(without), of(with)) {
            println!(
                "{what} with digests: {with:.2} {unit} instead of {without:.2}, {:.2} of it",
                with / without
            );
        }
    };
    of("total time", "ms", |c| c.median(|s| Some(s.total_ms)));
    of("gap", "ms", |c| c.median(|s| Some(s.gap_ms)));
    of("processor time", "s", Contender::processor_seconds);
    of("wait for a late page", "ms", |c| c.median(|s| s.late?.wait_ms));
    of("time of the late pages", "ms", |c| c.median(|s| Some(s.late?.ms)));
}
