//! `cargo xtask test`: what CI runs, and a newcomer.
//!
//! One profile and one target directory: `cargo build --all-targets` compiles the binary `ferry` and every test harness with one
//! choice of features, and the harnesses are then run from here, so that nothing is compiled twice and each result is counted.

mod harness;
mod tally;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::fs::{Access, access};

use crate::workspace;
use harness::{Kind, TestProgram};
use tally::Tally;

/// What `cargo xtask test` takes.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Only the unit tests.
    #[arg(long)]
    quick: bool,
    /// Only tests (unit and scenario) with this in their name.
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
    /// Also soaks and long matrices, and each fuzz target for a minute.
    #[arg(long)]
    long: bool,
}

impl Options {
    fn is_partial(&self) -> bool {
        self.quick || self.filter.is_some()
    }
}

/// Runs the steps and closes with the count of tests, alone on the last line.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let began = Instant::now();
    let mut report = Report::default();
    if !options.is_partial() {
        report.step("fmt", || succeed(workspace::cargo().args(["fmt", "--all", "--check"])));
        report.step("clippy", || {
            succeed(workspace::cargo().args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))
        });
        report.step("docs", || {
            let mut doc = workspace::cargo();
            succeed(
                doc.args(["doc", "--workspace", "--no-deps", "--quiet"])
                    .env("RUSTDOCFLAGS", "-D warnings"),
            )
        });
    }
    if options.long && !options.is_partial() {
        report.step("fuzz targets", check_fuzz_targets);
    }
    let mut programs = Vec::new();
    report.step("build", || {
        programs = harness::build()?;
        Ok(())
    });
    let mut tally = Tally::default();
    if report.failed.is_empty() || !programs.is_empty() {
        report.step("unit tests", || {
            run_programs(&programs, Kind::Unit, options, &mut tally)
        });
        if !options.is_partial() {
            report.step("doctests", || harness::run_doctests(&mut tally));
        }
        if !options.is_partial() && kvm().is_ok() {
            // Minutes where it is not in the cache: not to be counted as a scenario's.
            report.step("linux guest", || ferry_linux_guest::image().map(drop));
        }
        if !options.quick {
            report.step("scenario tests", || {
                run_programs(&programs, Kind::Scenario, options, &mut tally)
            });
        }
    }
    Ok(close(&report, &tally, began.elapsed()))
}

fn run_programs(programs: &[TestProgram], kind: Kind, options: &Options, tally: &mut Tally) -> Result<()> {
    let mut failed = Vec::new();
    for program in programs.iter().filter(|program| program.kind == kind) {
        if let Err(error) = program.run(options.filter.as_deref(), options.long, tally) {
            eprintln!("{error:#}");
            failed.push(program.name.clone());
        }
    }
    if failed.is_empty() {
        Ok(())
    } else {
        bail!("failed in {}", failed.join(", "))
    }
}

/// Steps that failed, by name. Later steps run all the same: one run tells everything that is wrong.
#[derive(Default)]
struct Report {
    failed: Vec<(&'static str, String)>,
}

impl Report {
    fn step(&mut self, name: &'static str, work: impl FnOnce() -> Result<()>) {
        eprintln!("── {name}");
        let began = Instant::now();
        match work() {
            Ok(()) => eprintln!("── {name}: ok, {} s", began.elapsed().as_secs()),
            Err(error) => {
                eprintln!("── {name}: FAILED after {} s: {error:#}", began.elapsed().as_secs());
                self.failed.push((name, format!("{error:#}")));
            }
        }
    }
}

fn close(report: &Report, tally: &Tally, elapsed: Duration) -> ExitCode {
    println!();
    let mut good = report.failed.is_empty() && tally.failed == 0;
    for name in &tally.failures {
        println!("failed test: {name}");
    }
    for (step, error) in &report.failed {
        println!("failed step: {step} ({error})");
    }
    match kvm() {
        Ok(()) if tally.skipped > 0 => {
            good = false;
            println!(
                "/dev/kvm is here, and yet {} tests were skipped: that is a failure",
                tally.skipped
            );
            for name in &tally.skips {
                println!("skipped test: {name}");
            }
        }
        Ok(()) => {}
        Err(why) => {
            println!(
                "KVM TESTS WERE SKIPPED: {why}. {} tests need it and say nothing here.",
                tally.skipped
            );
        }
    }
    println!("took {} s", elapsed.as_secs());
    println!(
        "{} passed, {} failed, {} skipped",
        tally.passed, tally.failed, tally.skipped
    );
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Compiles what `cargo fuzz` runs. It is not in the workspace, and what it depends on is compiled anew for it: minutes.
fn check_fuzz_targets() -> Result<()> {
    let mut check = workspace::cargo();
    check
        .args(["check", "--quiet", "--manifest-path", "fuzz/Cargo.toml", "--target-dir"])
        .arg(workspace::target().join("fuzz"))
        .env("RUSTFLAGS", "--cfg fuzzing");
    succeed(&mut check)
}

/// Whether KVM tests can run here, and if not why.
fn kvm() -> Result<(), String> {
    let device = Path::new("/dev/kvm");
    if !device.exists() {
        return Err("/dev/kvm is missing".into());
    }
    access(device, Access::READ_OK | Access::WRITE_OK).map_err(|error| format!("no right to /dev/kvm ({error})"))
}

fn succeed(command: &mut Command) -> Result<()> {
    let program = PathBuf::from(command.get_program());
    let status = command
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("failed to start {}", program.display()))?;
    if status.success() { Ok(()) } else { bail!("{status}") }
}
