//! Ferry's own turn: two agents of the release build, driven through the command line as a user would.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use ferry_tests::witness::Beat as WitnessBeat;
use ferry_tests::{Guest, ShapedLink, Witness, until};

use super::console::{Beat, compare};
use super::workload::Workload;
use super::{BEATS_AFTER, BEATS_BEFORE, Measured, Sample, two_hosts, warm};
use crate::workspace;

/// The release build of `ferry`.
pub(super) struct Binary {
    file: PathBuf,
}

/// Builds it.
///
/// # Errors
/// If it does not build.
pub(super) fn build() -> Result<Binary> {
    let mut cargo = workspace::cargo();
    let built = cargo
        .args(["build", "--release", "--package", "ferry-rpc"])
        .stdin(Stdio::null())
        .status();
    if !built.context("failed to start cargo")?.success() {
        bail!("the release build failed");
    }
    Ok(Binary {
        file: workspace::target().join("release/ferry"),
    })
}

impl Binary {
    /// Where it is.
    pub(super) fn file(&self) -> &Path {
        &self.file
    }

    /// Moves the guest once with these further arguments and measures what is asked for; `tsc_khz` is what its clock runs at.
    ///
    /// # Errors
    /// If an agent or the guest does not come up, or does not live through the move.
    pub(super) fn run(
        &self,
        workload: &Workload,
        tsc_khz: u64,
        measured: Measured,
        further: &[&str],
    ) -> Result<Sample> {
        self.run_between(workload, tsc_khz, measured, Between { link: None, further })
    }

    /// The same between hosts that a link joins.
    ///
    /// # Errors
    /// As [`Binary::run`].
    pub(super) fn run_across(
        &self,
        link: &ShapedLink,
        workload: &Workload,
        tsc_khz: u64,
        further: &[&str],
    ) -> Result<Sample> {
        let link = Some(link);
        self.run_between(workload, tsc_khz, Measured::Time, Between { link, further })
    }

    fn run_between(
        &self,
        workload: &Workload,
        tsc_khz: u64,
        measured: Measured,
        between: Between<'_>,
    ) -> Result<Sample> {
        let Between { link, further } = between;
        let mut pair = two_hosts(&self.file)?;
        if let Some(link) = link {
            link.part(&mut pair);
        }
        pair.a.start()?;
        pair.b.start()?;
        let guest = Guest::new("g")
            .memory_mib(workload.memory_mib)
            .work(&workload.full_cmdline(tsc_khz));
        let witness = pair.run(&guest)?;
        let before = beats(&witness, "a").len();
        wait_for_beats(&witness, "a", before + BEATS_BEFORE)?;
        warm(workload)?;

        let agents = [&pair.a, &pair.b].map(|host| host.pid().context("an agent is gone"));
        let [source, destination] = agents;
        let meter = measured.meter([source?, destination?]);
        let began = Instant::now();
        let moved = pair.migrate("g", further)?.exit(0)?.migration()?.is("completed", "b")?;
        let cpu_s = meter.map(|meter| meter.stop().iter().sum());
        wait_for_beats(&witness, "b", BEATS_AFTER)?;
        witness.check()?;

        let seen = compare(&beats(&witness, "a"), &beats(&witness, "b"), tsc_khz, began)?;
        let handover = ["state", "claim", "start"].map(|part| moved.number(&format!("downtime_ms.{part}")).ok());
        Ok(Sample {
            total_ms: moved.number("total_ms")?,
            gap_ms: seen.gap_ms,
            reported_downtime_ms: moved.number("downtime_ms.total").ok(),
            handover_ms: handover.into_iter().sum(),
            reader_gap_ms: Some(seen.reader_gap_ms),
            bytes: moved.number("bytes_sent").ok(),
            clock_lost_ms: Some(seen.clock_lost_ms),
            cpu_s,
        })
    }
}

/// What is between the hosts, and what `migrate` is told beside the usual.
struct Between<'a> {
    link: Option<&'a ShapedLink>,
    further: &'a [&'a str],
}

fn beats(witness: &Witness, host: &str) -> Vec<Beat> {
    let from_host = witness.beats().into_iter().filter(|beat| beat.host == host);
    from_host
        .map(|WitnessBeat { heartbeat, read_at, .. }| Beat { heartbeat, read_at })
        .collect()
}

fn wait_for_beats(witness: &Witness, host: &'static str, count: usize) -> Result<()> {
    let what = format!("{count} heartbeats from {host}");
    until(&what, Duration::from_secs(120), || {
        Ok((beats(witness, host).len() >= count).then_some(()))
    })
}
