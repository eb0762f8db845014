//! Ferry's chores: tests, guests as files, benchmarks.
#![forbid(unsafe_code)]

mod bench;
mod echo;
mod linux;
mod probe;
mod test;
mod watched;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Ferry's chores.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// Everything that must be green: fmt, clippy, docs, unit tests, doctests, scenarios on real KVM.
    Test(test::Options),
    /// Writes the probe guest as an ELF file that boots in Ferry, QEMU microvm and Cloud Hypervisor.
    Probe(probe::Options),
    /// Builds a small Linux guest into a cache outside the tree and prints how to run it.
    Linux(linux::Options),
    /// Talks to the Linux guest's echo server over one connection and says what it noticed.
    Echo(echo::Options),
    /// Runs the benchmark, a peer in turn with Ferry where one is named.
    Bench(bench::Options),
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().chore {
        Chore::Test(options) => test::run(&options),
        Chore::Probe(options) => probe::run(&options),
        Chore::Linux(options) => linux::run(&options),
        Chore::Echo(options) => echo::run(&options),
        Chore::Bench(options) => watched::run(|| bench::run(&options)),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}
