//! `cargo xtask bench`: Ferry's benchmark, and the same guest and workload in a peer, in turn in one run: migrations, with `--devices`
//! disks and network cards, with `--linux` what a guest with an operating system costs, with `--control` the control plane, with `--link` migrations over
//! a slow link, plain and compressed, and of a guest that writes faster than it. With `--sizes` and `--verify` Ferry beside itself: guests of several sizes,
//! and what digests cost.
//!
//! One run of each contender, then the next round, which another one begins: what disturbs the host then disturbs all alike.
//! Two runs an hour apart compare nothing.

mod clock;
mod cloud_hypervisor;
mod console;
mod control;
mod devices;
mod ferry;
mod link;
mod linux;
mod qemu;
mod raw;
mod recovery;
mod sizes;
mod stolen;
mod table;
mod verify;
mod workload;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use ferry_tests::Pair;
use ferry_vmm::measuring::{CpuMeter, warm_host_memory};
use serde_json::{Value, json};

use console::Seen;
use table::Contender;
use workload::Workload;

/// What `cargo xtask bench` takes.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Also run this peer, in turn.
    #[arg(long)]
    peer: Option<Peer>,
    /// Disks and network cards of a guest that stays, instead of migrations. Needs root, for a network of its own.
    #[arg(long)]
    devices: bool,
    /// What comes with a real guest: the boot of Linux (with a peer, also in that), what an idle disk and card add to a switchover, and a disk that
    /// moves along. Needs root, for networks and mounts of its own.
    #[arg(long, conflicts_with = "devices")]
    linux: bool,
    /// The control plane: receipts of casts, the agent's memory, long lists, restarts, fsyncs of a switchover. `--workload` names a part.
    #[arg(long, conflicts_with_all = ["devices", "linux", "peer"])]
    control: bool,
    /// Migrations over a link of this rate, as `tc` has it, between two network namespaces: with and without compression, and of a guest that writes
    /// faster than that. Needs root.
    #[arg(long, value_name = "RATE", num_args = 0..=1, default_missing_value = "1gbit", conflicts_with_all = ["devices", "linux", "control"])]
    link: Option<String>,
    /// Idle guests of 1, 2, 4 and 8 GiB, all of it populated: whether the blackout grows with memory.
    #[arg(long, conflicts_with_all = ["devices", "linux", "control", "link", "peer"])]
    sizes: bool,
    /// What `migrate --verify` costs: each workload with it and without, and one whose pages come late. With `--sizes`, whether what it adds
    /// to the blackout grows with memory.
    #[arg(long, conflicts_with_all = ["devices", "linux", "control", "link", "peer"])]
    verify: bool,
    /// Runs of each.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// Only workloads with this in their name.
    #[arg(long, value_name = "TEXT")]
    workload: Option<String>,
    /// Also write every sample to this file, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Peer {
    /// QEMU 10, `-M microvm`.
    Qemu,
    /// Cloud Hypervisor 51 or later, four connections. Untried: the program was not at hand.
    CloudHypervisor,
}

/// One way in which a peer moves the guest.
#[derive(Clone, Copy, Debug)]
enum Mode {
    Qemu(qemu::Mode),
    CloudHypervisor,
}

impl Peer {
    /// Fails if it is not here.
    fn check(self) -> Result<()> {
        match self {
            Self::Qemu => qemu::check(),
            Self::CloudHypervisor => cloud_hypervisor::check(),
        }
    }

    fn modes(self) -> Vec<Mode> {
        match self {
            Self::Qemu => qemu::MODES.map(Mode::Qemu).to_vec(),
            Self::CloudHypervisor => vec![Mode::CloudHypervisor],
        }
    }
}

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Self::Qemu(mode) => mode.name(),
            Self::CloudHypervisor => cloud_hypervisor::NAME,
        }
    }

    fn run(self, workload: &Workload, tsc_khz: u64, measured: Measured) -> Result<Sample> {
        match self {
            Self::Qemu(mode) => qemu::run(mode, workload, tsc_khz, measured),
            Self::CloudHypervisor => cloud_hypervisor::run(workload, tsc_khz, measured),
        }
    }
}

/// What a run is for. Who counts processor time reads it again and again, and disturbs the guest: that is done in runs of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Measured {
    /// Times and gaps.
    Time,
    /// Processor time.
    Processor,
}

impl Measured {
    /// Begins to count for these processes, the source's and the destination's, if that is what the run is for.
    fn meter(self, processes: [u32; 2]) -> Option<CpuMeter> {
        (self == Self::Processor).then(|| CpuMeter::start(processes))
    }
}

/// Runs of each contender in which processor time is counted.
const PROCESSOR_RUNS: u32 = 3;

/// One migration, measured.
#[derive(Clone, Debug, Default)]
struct Sample {
    /// From the order to migrate until the destination was known to run.
    total_ms: f64,
    /// The largest gap that the guest saw between two looks at its clock, by the host's clock.
    gap_ms: f64,
    /// The blackout as the migrating side reports it.
    reported_downtime_ms: Option<f64>,
    /// What of it were the guest's state, the claim and the start.
    handover_ms: Option<f64>,
    /// Processor time that the host's own host took from it meanwhile, of each processor.
    stolen_ms: Option<f64>,
    /// The longest time between two heartbeats as a reader saw them, both consoles joined.
    reader_gap_ms: Option<f64>,
    /// Bytes sent.
    bytes: Option<f64>,
    /// How much the guest's clock lost over the move.
    clock_lost_ms: Option<f64>,
    /// Seconds of processor time on both sides, without the threads that run the guest; counted in runs of its own.
    cpu_s: Option<f64>,
    /// What the guest got done, where it writes pages.
    work: Option<Work>,
    /// The pages that came late, where some did.
    late: Option<Late>,
}

/// Pages that a guest wrote a second, by its own clock.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Work {
    /// In the half second before anything was prepared for the move.
    before: f64,
    /// From the order until it had beaten twice at the destination.
    during: f64,
    /// From then on, while it was listened to.
    after: f64,
}

/// Pages that came once the guest ran at the destination, and what that was like for it.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Late {
    /// Bytes sent for them.
    bytes: f64,
    /// From the handover to the last of them.
    ms: f64,
    /// The median of the guest's waits for one of them.
    wait_ms: Option<f64>,
    /// From the start at the destination until it got as much done as before; `None` if that was not seen.
    back_ms: Option<f64>,
}

impl Sample {
    /// Of a move that took so long; what else its contender tells is added by the caller.
    fn of(total_ms: f64, seen: Seen) -> Self {
        Self {
            total_ms,
            gap_ms: seen.gap_ms,
            stolen_ms: seen.stolen_ms,
            reader_gap_ms: Some(seen.reader_gap_ms),
            clock_lost_ms: Some(seen.clock_lost_ms),
            work: seen.work,
            ..Self::default()
        }
    }
}

/// What came of a move that was waited for so long and no longer.
enum Within {
    /// It ended.
    Ended(Box<Sample>),
    /// It goes on; what it says of that.
    GoesOn(String),
}

/// Builds, warms the memory, runs in turn, prints the table.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    if options.peer == Some(Peer::CloudHypervisor) && (options.devices || options.linux || options.link.is_some()) {
        bail!(
            "only migrations over loopback are compared with Cloud Hypervisor; --devices, --linux and --link know QEMU"
        );
    }
    if options.devices {
        return devices::run(options);
    }
    if options.linux {
        return linux::run(options);
    }
    if options.control {
        return control::run(options);
    }
    if let Some(rate) = &options.link {
        return link::run(options, rate);
    }
    if options.sizes {
        return sizes::run(options);
    }
    if options.verify {
        return verify::run(options);
    }
    let Some(peer) = options.peer else {
        return own_bench(options, &ferry::build()?);
    };
    let workloads: Vec<_> = workload::ALL
        .iter()
        .filter(|w| options.workload.as_deref().is_none_or(|text| w.name.contains(text)))
        .collect();
    if workloads.is_empty() {
        let names: Vec<_> = workload::ALL.iter().map(|w| w.name).collect();
        bail!("no workload has that in its name; there are {}", names.join(", "));
    }
    peer.check()?;
    let ferry = ferry::build()?;
    let mut record = Vec::new();
    let mut failed = false;
    for workload in workloads {
        let turns = measure(workload, options, &ferry)?;
        table::print(workload, &turns);
        failed |= turns.all().any(Contender::has_failed);
        record.push(json!({
            "workload": workload.name,
            "contenders": turns.contenders.iter().map(Contender::to_json).collect::<Vec<_>>(),
            "over_grpc": turns.over_grpc.to_json(),
            "limit": turns.limit.to_json(),
        }));
    }
    write_record(options, record)?;
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Writes the file that was asked for.
fn write_record(options: &Options, record: Vec<Value>) -> Result<()> {
    let Some(file) = &options.json else { return Ok(()) };
    let text = format!("{:#}\n", Value::from(record));
    fs::write(file, text).with_context(|| format!("failed to write {}", file.display()))
}

/// Without a peer, `ferry bench` says more about itself: CPU seconds of each side, memory, the guest's clock.
fn own_bench(options: &Options, ferry: &ferry::Binary) -> Result<ExitCode> {
    let mut bench = Command::new(ferry.file());
    bench.arg("bench").args(["--runs", &options.runs.to_string()]);
    if let Some(workload) = &options.workload {
        bench.args(["--workload", workload]);
    }
    if let Some(file) = &options.json {
        let file = File::create(file).with_context(|| format!("failed to write {}", file.display()))?;
        bench.args(["-o", "json"]).stdout(file);
    }
    let status = bench
        .stdin(Stdio::null())
        .status()
        .context("failed to start ferry bench")?;
    Ok(if status.success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// What was run in turn.
struct Turns {
    /// Ferry first, then the peer's modes.
    contenders: Vec<Contender>,
    /// Ferry again, with `--transport grpc`: what that costs.
    over_grpc: Contender,
    /// What the host could do at best.
    limit: Contender,
}

impl Turns {
    fn all(&self) -> impl Iterator<Item = &Contender> {
        self.contenders.iter().chain([&self.over_grpc, &self.limit])
    }

    /// Whose turn this is, as [`Bench`] counts them.
    fn of(&mut self, turn: usize) -> &mut Contender {
        let peers = self.contenders.len();
        match turn {
            _ if turn < peers => &mut self.contenders[turn],
            _ if turn == peers => &mut self.over_grpc,
            _ => &mut self.limit,
        }
    }
}

/// As `ferry migrate` has it.
const OVER_GRPC: [&str; 2] = ["--transport", "grpc"];

fn measure(workload: &Workload, options: &Options, ferry: &ferry::Binary) -> Result<Turns> {
    let modes = options.peer.map(Peer::modes).unwrap_or_default();
    let mut contenders = vec![Contender::new("ferry")];
    contenders.extend(modes.iter().map(|mode| Contender::new(mode.name())));
    let mut turns = Turns {
        contenders,
        over_grpc: Contender::new("ferry over gRPC"),
        limit: Contender::new("raw copy"),
    };
    let bench = Bench {
        workload,
        ferry,
        modes: &modes,
        tsc_khz: clock::tsc_khz()?,
    };
    for round in 1..=options.runs {
        eprintln!("{}: run {round} of {}", workload.name, options.runs);
        for turn in in_turn(modes.len() + 3, round) {
            let sample = bench.run(turn, Measured::Time);
            turns.of(turn).add(sample);
        }
    }
    eprintln!("{}: processor time", workload.name);
    for round in 1..=PROCESSOR_RUNS.min(options.runs) {
        // All but the raw copy, which is the last one.
        for turn in in_turn(modes.len() + 2, round) {
            let sample = bench.run(turn, Measured::Processor);
            turns.of(turn).add_processor_time(sample);
        }
    }
    Ok(turns)
}

/// The order of a round: another one is first in each, so that nobody always comes after the same one, into memory and caches as that left them.
fn in_turn(count: usize, round: u32) -> impl Iterator<Item = usize> {
    let first = round as usize - 1;
    (0..count).map(move |turn| (first + turn) % count)
}

/// What a round consists of, by number: Ferry, the peer's modes, Ferry over gRPC, the raw copy.
struct Bench<'a> {
    workload: &'a Workload,
    ferry: &'a ferry::Binary,
    modes: &'a [Mode],
    tsc_khz: u64,
}

impl Bench<'_> {
    fn run(&self, turn: usize, measured: Measured) -> Result<Sample> {
        let Self { workload, tsc_khz, .. } = *self;
        match turn.checked_sub(1) {
            None => self.ferry.run(workload, tsc_khz, measured, &[]),
            Some(mode) if mode < self.modes.len() => self.modes[mode].run(workload, tsc_khz, measured),
            Some(after) if after == self.modes.len() => self.ferry.run(workload, tsc_khz, measured, &OVER_GRPC),
            Some(_) => raw::run(workload),
        }
    }
}

/// Has the host back as much memory as the destination will use, right before a move: on a nested host the first touch
/// is twenty times slower than any later one, and memory that was free for two seconds goes back to the outer host
/// (free page reporting), so that once for all of them is not enough.
fn warm(workload: &Workload) -> Result<()> {
    let bytes = (workload.touched_mib + WARM_BESIDE_GUEST_MIB) << 20;
    warm_host_memory(bytes).context("failed to touch memory first")
}

/// What the receiving process and sockets use, and what a populated block has more than its guest touched.
const WARM_BESIDE_GUEST_MIB: u64 = 512;

/// Two hosts whose moves are as a user gets them who asks for nothing. Tests have what moves compared; that costs, and the peers compare nothing.
/// Its price is what `ferry bench --verify` tells.
fn two_hosts(ferry: &Path) -> Result<Pair> {
    let mut pair = Pair::prepare_with(ferry)?;
    pair.verifies = false;
    Ok(pair)
}

/// Heartbeats before and after a move: enough that some are read without delay.
const BEATS_BEFORE: usize = 60;
const BEATS_AFTER: usize = 50;
