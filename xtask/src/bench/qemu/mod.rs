//! The same guest and workload in QEMU 10: two processes on this host, a migration over loopback TCP.

mod machine;
mod qmp;

use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::console::{Times, compare};
use super::ferry::LONGEST;
use super::workload::Workload;
use super::{BEATS_AFTER, BEATS_BEFORE, Measured, Sample, Within, warm};
use ferry_tests::{ShapedLink, shaped};
pub(super) use machine::{Ended, command};
use machine::{Machine, Role};

/// How QEMU moves the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// One stream.
    Plain,
    /// Two page streams.
    Multifd2,
    /// Four page streams.
    Multifd4,
    /// Two page streams, compressed with zstd at level 1.
    Multifd2Zstd,
    /// One stream, pages that are sent again told by what they changed; copies of 256 MiB are kept, as many as Ferry keeps at most.
    Xbzrle,
}

/// Those without compression.
pub(super) const MODES: [Mode; 3] = [Mode::Plain, Mode::Multifd2, Mode::Multifd4];

impl Mode {
    /// The name in the table.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Plain => "qemu plain",
            Self::Multifd2 => "qemu multifd 2",
            Self::Multifd4 => "qemu multifd 4",
            Self::Multifd2Zstd => "qemu multifd zstd",
            Self::Xbzrle => "qemu xbzrle",
        }
    }

    fn channels(self) -> Option<u32> {
        match self {
            Self::Plain | Self::Xbzrle => None,
            Self::Multifd2 | Self::Multifd2Zstd => Some(2),
            Self::Multifd4 => Some(4),
        }
    }
}

/// Whether a QEMU is here that can be compared with.
///
/// # Errors
/// Says how to get one.
pub(super) fn check() -> Result<()> {
    let told = Command::new(machine::PROGRAM).arg("--version").output();
    let text = told
        .map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
        .unwrap_or_default();
    let version = text
        .split("version ")
        .nth(1)
        .and_then(|rest| rest.split('.').next()?.parse::<u32>().ok());
    match version {
        Some(10..) => Ok(()),
        found => {
            let found = found.map_or("no QEMU was found".to_owned(), |major| {
                format!("QEMU {major} was found")
            });
            bail!("{found}, QEMU 10 is needed. On Debian 12 it comes from bookworm-backports:\n{INSTALL}");
        }
    }
}

const INSTALL: &str =
    "    echo 'deb http://deb.debian.org/debian bookworm-backports main' > /etc/apt/sources.list.d/backports.list
    apt-get update && apt-get install -y -t bookworm-backports qemu-system-x86";

/// Moves the guest once and measures what is asked for; `tsc_khz` is what its clock runs at.
///
/// # Errors
/// If QEMU does not start, does not migrate, or the guest does not live through it.
pub(super) fn run(mode: Mode, workload: &Workload, tsc_khz: u64, measured: Measured) -> Result<Sample> {
    ended(run_between(mode, workload, tsc_khz, measured, Way::LOOPBACK)?)
}

/// The same between hosts that a link joins.
///
/// # Errors
/// As [`run`].
pub(super) fn run_across(link: &ShapedLink, mode: Mode, workload: &Workload, tsc_khz: u64) -> Result<Sample> {
    let way = Way {
        link: Some(link),
        ..Way::LOOPBACK
    };
    ended(run_between(mode, workload, tsc_khz, Measured::Time, way)?)
}

/// The same, waited for so long.
///
/// # Errors
/// As [`run`].
pub(super) fn run_within(
    patience: Duration,
    link: &ShapedLink,
    mode: Mode,
    workload: &Workload,
    tsc_khz: u64,
) -> Result<Within> {
    let link = Some(link);
    run_between(mode, workload, tsc_khz, Measured::Time, Way { link, patience })
}

/// Between which hosts a guest is moved, and how long that may take.
#[derive(Clone, Copy)]
struct Way<'a> {
    link: Option<&'a ShapedLink>,
    patience: Duration,
}

impl Way<'_> {
    const LOOPBACK: Self = Self {
        link: None,
        patience: LONGEST,
    };
}

fn ended(outcome: Within) -> Result<Sample> {
    match outcome {
        Within::Ended(sample) => Ok(*sample),
        Within::GoesOn(told) => bail!("it does not end: {told}"),
    }
}

fn run_between(mode: Mode, workload: &Workload, tsc_khz: u64, measured: Measured, way: Way<'_>) -> Result<Within> {
    let Way { link, patience } = way;
    let network = link.map(ShapedLink::namespace);
    let waits = Role::Destination {
        network: network.as_deref(),
    };
    let folder = tempfile::Builder::new()
        .prefix("ferry-q")
        .tempdir()
        .context("failed to make a folder")?;
    let mut destination = Machine::start(folder.path(), "d", workload, tsc_khz, waits).context("destination")?;
    let mut source = Machine::start(folder.path(), "s", workload, tsc_khz, Role::Source).context("source")?;
    source.console.wait_ready(Duration::from_secs(120)).context("source")?;
    source
        .console
        .wait_for_beats(BEATS_BEFORE, Duration::from_secs(120))
        .context("source")?;
    for machine in [&mut source, &mut destination] {
        prepare(machine, mode)?;
    }
    let uri = destination.listen(if link.is_some() { shaped::FAR } else { "127.0.0.1" })?;
    let calm = Instant::now();
    warm(workload)?;

    let meter = measured.meter([source.pid(), destination.pid()]);
    let times = Times::ordered_now(calm);
    source.qmp.execute("migrate", json!({ "uri": uri }))?;
    let runs = match destination.qmp.wait_for_event("RESUME", patience) {
        Ok(at) => at,
        Err(error) => return goes_on(&mut source)?.map(Within::GoesOn).ok_or(error),
    };
    let total = runs.duration_since(times.began);
    let cpu_s = meter.map(|meter| meter.stop().iter().sum());
    let report = wait_completed(&mut source)?;
    destination
        .console
        .wait_for_beats(BEATS_AFTER, Duration::from_secs(30))
        .context("destination")?;

    let (before, after) = (source.console.beats(), destination.console.beats());
    let seen = compare(&before, &after, tsc_khz, times)?;
    Ok(Within::Ended(Box::new(Sample {
        reported_downtime_ms: report["downtime"].as_f64(),
        bytes: report["ram"]["transferred"].as_f64(),
        cpu_s,
        ..Sample::of(total.as_secs_f64() * 1e3, seen)
    })))
}

/// What it says of a migration that still copies; `None` of one that does not.
fn goes_on(source: &mut Machine) -> Result<Option<String>> {
    let report = source.qmp.execute("query-migrate", json!({}))?;
    let memory = &report["ram"];
    let told = || {
        let mib = |bytes: &Value| bytes.as_f64().unwrap_or(f64::NAN) / f64::from(1 << 20);
        format!(
            "{:.0} MiB sent, {:.0} MiB left, {} pages dirtied a second, downtime of {} ms expected",
            mib(&memory["transferred"]),
            mib(&memory["remaining"]),
            memory["dirty-pages-rate"],
            report["expected-downtime"]
        )
    };
    Ok((report["status"] == "active").then(told))
}

fn prepare(machine: &mut Machine, mode: Mode) -> Result<()> {
    let mut capabilities = vec![json!({ "capability": "events", "state": true })];
    let mut parameters = json!({ "downtime-limit": 300, "max-bandwidth": UNLIMITED });
    if let Some(channels) = mode.channels() {
        capabilities.push(json!({ "capability": "multifd", "state": true }));
        parameters["multifd-channels"] = json!(channels);
        if mode == Mode::Multifd2Zstd {
            parameters["multifd-compression"] = json!("zstd");
        }
    }
    if mode == Mode::Xbzrle {
        capabilities.push(json!({ "capability": "xbzrle", "state": true }));
        parameters["xbzrle-cache-size"] = json!(256 << 20);
    }
    machine
        .qmp
        .execute("migrate-set-capabilities", json!({ "capabilities": capabilities }))?;
    machine.qmp.execute("migrate-set-parameters", parameters)?;
    Ok(())
}

fn wait_completed(source: &mut Machine) -> Result<Value> {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let report = source.qmp.execute("query-migrate", json!({}))?;
        match report["status"].as_str() {
            Some("completed") => return Ok(report),
            Some(status @ ("failed" | "cancelled")) => bail!("QEMU says {status}: {}", report["error-desc"]),
            status if Instant::now() > deadline => bail!("QEMU still says {status:?}"),
            _ => thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// Bytes a second that no stream here reaches.
const UNLIMITED: u64 = 1_000_000_000_000;
