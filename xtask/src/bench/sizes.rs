//! `cargo xtask bench --sizes`: what the blackout has to do with the size of a guest that does nothing.

use std::fs;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use serde_json::json;

use super::table::{self, Contender};
use super::workload::{SIZES, Workload};
use super::{Options, Sample, WARM_BESIDE_GUEST_MIB, clock, ferry, in_turn, write_record};

/// Moves each size in turn, and prints the table.
///
/// # Errors
/// If nothing builds, or there is no room for any of them.
pub(super) fn run(options: &Options) -> Result<ExitCode> {
    let wanted = |workload: &&Workload| {
        let text = options.workload.as_deref();
        text.is_none_or(|text| workload.name.contains(text))
    };
    let available = available_mib()?;
    let (sizes, left_out): (Vec<_>, Vec<_>) = SIZES
        .iter()
        .filter(wanted)
        .partition(|workload| needed_mib(workload) <= available);
    let left_out = left_out.iter().map(|workload| {
        let needed = needed_mib(workload);
        format!(
            "{} is left out: it needs {needed} MiB, {available} are available",
            workload.name
        )
    });
    let left_out: Vec<_> = left_out.collect();
    left_out.iter().for_each(|line| eprintln!("{line}"));
    if sizes.is_empty() {
        let names: Vec<_> = SIZES.iter().map(|w| w.name).collect();
        bail!("none of these sizes is left: {}", names.join(", "));
    }
    let ferry = ferry::build()?;
    let tsc_khz = clock::tsc_khz()?;
    let further: &[&str] = if options.verify { &["--verify"] } else { &[] };
    let mut contenders: Vec<_> = sizes.iter().map(|workload| Contender::new(workload.name)).collect();
    for round in 1..=options.runs {
        eprintln!("sizes: run {round} of {}", options.runs);
        for turn in in_turn(sizes.len(), round) {
            contenders[turn].add(ferry.run(sizes[turn], tsc_khz, super::Measured::Time, further));
        }
    }
    let moved = if options.verify { ", moved with --verify" } else { "" };
    println!("\nidle guests, all of their memory populated with random data{moved}");
    table::print_rows(contenders.iter());
    left_out.iter().for_each(|line| println!("{line}"));
    compare_ends(&contenders);
    if let Some(undisturbed) = table::undisturbed(&contenders) {
        compare_ends(&undisturbed);
    }
    let all: Vec<_> = contenders.iter().map(Contender::to_json).collect();
    write_record(
        options,
        vec![json!({ "workload": "sizes", "arguments": further, "contenders": all, "left_out": left_out })],
    )?;
    let failed = contenders.iter().any(Contender::has_failed);
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn compare_ends(contenders: &[Contender]) {
    if let [smallest, .., largest] = contenders {
        compare("gap", [smallest, largest], |s| Some(s.gap_ms));
        compare("reported blackout", [smallest, largest], |s| s.reported_downtime_ms);
    }
}

fn compare(what: &str, [smallest, largest]: [&Contender; 2], of: fn(&Sample) -> Option<f64>) {
    if let (Some(small), Some(large)) = (smallest.median(of), largest.median(of)) {
        println!(
            "{what}: {large:.1} ms of {}, {:.2} times that of {}",
            largest.name(),
            large / small,
            smallest.name()
        );
    }
}

/// Source and destination have the guest's memory at the same time, and what is warmed for the destination is given back before that.
fn needed_mib(workload: &Workload) -> u64 {
    2 * workload.touched_mib + 2 * WARM_BESIDE_GUEST_MIB
}

fn available_mib() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo").context("failed to ask for free memory")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().split(' ').next()?.parse::<u64>().ok());
    Ok(kib.context("the kernel does not tell free memory")? >> 10)
}
