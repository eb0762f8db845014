//! `cargo xtask probe`: the test guest as a file.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::workspace;

/// What `cargo xtask probe` takes.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Where to write it [default: target/probe.elf].
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// Writes the probe and prints where.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let file = match &options.output {
        Some(file) => file.clone(),
        None => workspace::target().join("probe.elf"),
    };
    fs::write(&file, ferry_probe::PROBE_ELF).with_context(|| format!("failed to write {}", file.display()))?;
    println!("{}", file.display());
    Ok(ExitCode::SUCCESS)
}
