//! Ferry's own turn: two agents of the release build, driven through the command line as a user would.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use ferry_tests::witness::Beat as WitnessBeat;
use ferry_tests::{Answer, Guest, Migration, Pair, ShapedLink, Witness, until};

use super::console::{Beat, Times, compare, usual_rate};
use super::recovery::back_at;
use super::workload::Workload;
use super::{BEATS_AFTER, BEATS_BEFORE, Late, Measured, Sample, Within, two_hosts, warm};
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
        let ready = Ready::of(self, None, workload, tsc_khz)?;
        let agents = [&ready.pair.a, &ready.pair.b].map(|host| host.pid().context("an agent is gone"));
        let [source, destination] = agents;
        let meter = measured.meter([source?, destination?]);
        let times = Times::ordered_now(ready.calm);
        let answer = ready.pair.begin_migrate("g", further)?.wait_for(LONGEST)?;
        let cpu_s = meter.map(|meter| meter.stop().iter().sum());
        let sample = ready.judge(answer, times)?;
        Ok(Sample { cpu_s, ..sample })
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
        let ready = Ready::of(self, Some(link), workload, tsc_khz)?;
        let times = Times::ordered_now(ready.calm);
        let answer = ready.pair.begin_migrate("g", further)?.wait_for(LONGEST)?;
        ready.judge(answer, times)
    }

    /// The same, waited for so long: what still goes on then is ended with its hosts.
    ///
    /// # Errors
    /// As [`Binary::run`].
    pub(super) fn run_within(
        &self,
        patience: Duration,
        link: &ShapedLink,
        workload: &Workload,
        tsc_khz: u64,
        further: &[&str],
    ) -> Result<Within> {
        let ready = Ready::of(self, Some(link), workload, tsc_khz)?;
        let times = Times::ordered_now(ready.calm);
        match ready.pair.begin_migrate("g", further)?.wait_for(patience) {
            Ok(answer) => Ok(Within::Ended(Box::new(ready.judge(answer, times)?))),
            Err(error) => ready.goes_on().map(Within::GoesOn).map_err(|_| error),
        }
    }
}

/// Two hosts, and on one of them a guest that beats, right before it is moved.
struct Ready {
    pair: Pair,
    witness: Witness,
    tsc_khz: u64,
    /// Until then nothing was prepared for the move.
    calm: Instant,
}

impl Ready {
    fn of(ferry: &Binary, link: Option<&ShapedLink>, workload: &Workload, tsc_khz: u64) -> Result<Self> {
        let mut pair = two_hosts(&ferry.file)?;
        if let Some(link) = link {
            link.part(&mut pair);
        }
        pair.a.start()?;
        pair.b.start()?;
        let guest = Guest::new("g")
            .memory_mib(workload.memory_mib)
            .work(&workload.full_cmdline(tsc_khz));
        pair.a.ferry(&guest.arguments(&pair.kernel()))?.exit(0)?;
        let witness = Witness::of(&[&pair.a, &pair.b]);
        witness.wait_ready_within(LONGEST + PER_GIB * (workload.touched_mib >> 10) as u32)?;
        let before = beats(&witness, "a").len();
        wait_for_beats(&witness, "a", before + BEATS_BEFORE)?;
        let calm = Instant::now();
        warm(workload)?;
        Ok(Self {
            pair,
            witness,
            tsc_khz,
            calm,
        })
    }

    /// What the move came to, once the guest was listened to for a while after its last page came.
    fn judge(&self, answer: Answer, times: Times) -> Result<Sample> {
        let Self {
            ref witness, tsc_khz, ..
        } = *self;
        let moved = answer.exit(0)?.migration()?.is("completed", "b")?;
        wait_for_beats(witness, "b", beats(witness, "b").len() + BEATS_AFTER)?;
        witness.check()?;

        let (before, after) = (beats(witness, "a"), beats(witness, "b"));
        let seen = compare(&before, &after, tsc_khz, times)?;
        let handover = ["state", "claim", "start"].map(|part| moved.number(&format!("downtime_ms.{part}")).ok());
        let late = moved.number("late_bytes").ok().filter(|&bytes| bytes > 0.0);
        let back = || {
            let back = usual_rate(&before, tsc_khz, times.calm).and_then(|usual| back_at(&after, usual, tsc_khz))?;
            Some(back.saturating_duration_since(started_at(&moved)?).as_secs_f64() * 1e3)
        };
        Ok(Sample {
            reported_downtime_ms: moved.number("downtime_ms.total").ok(),
            handover_ms: handover.into_iter().sum(),
            // The record counts those apart.
            bytes: moved.number("bytes_sent").ok().map(|bytes| bytes + late.unwrap_or(0.0)),
            late: late.map(|bytes| Late {
                bytes,
                ms: moved.number("late_ms").unwrap_or(f64::NAN),
                wait_ms: moved.number("late_median_wait_ms").ok(),
                back_ms: back(),
            }),
            ..Sample::of(moved.number("total_ms")?, seen)
        })
    }

    /// What is said of a move that goes on, while the guest runs where it was.
    fn goes_on(&self) -> Result<String> {
        let guest = self.pair.a.show("g")?;
        let id = guest["migration"].as_str().context("no migration")?;
        let moves = self.pair.a.ferry(&["migration", "show", id])?.exit(0)?.migration()?;
        ensure!(
            guest["status"] == "running" && moves.text("status")? == "running",
            "{}",
            moves.record
        );
        self.witness.check()?;
        Ok(moves.text("decision")?.to_owned())
    }
}

/// When the guest started at the destination: `RUNNING` was heard at the source when the migration's time ended, and the bound of the blackout
/// says how much later that was.
fn started_at(moved: &Migration) -> Option<Instant> {
    let number = |field| moved.number(field).ok();
    let heard_ms = number("total_ms")? - (number("downtime_ms.upper_bound")? - number("downtime_ms.total")?);
    let accepted = humantime::parse_rfc3339(moved.text("started").ok()?).ok()?;
    let started = accepted + Duration::try_from_secs_f64(heard_ms / 1e3).ok()?;
    Instant::now().checked_sub(SystemTime::now().duration_since(started).ok()?)
}

/// How long a move may take that is to end: 8 GiB on a host that is far from quiet, or a peer's.
pub(super) const LONGEST: Duration = Duration::from_secs(120);

/// How much longer a guest may take to fill its memory there.
const PER_GIB: Duration = Duration::from_secs(60);

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
