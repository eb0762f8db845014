//! Two hundred casts at once to one agent: when their receipts come, in which order they are carried out, what the agent's memory is.
//!
//! The first migration is held while it has the only place among those that run, so that receipts are measured beside nothing else;
//! then it is called off and the queue moves.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ferry_proto::agent::v1::{ListMigrationsRequest, MigrationInfo, MigrationRequest};
use ferry_tests::Pair;
use tokio::runtime::Runtime;
use tokio::task::JoinSet;

use super::agent::{Agent, fsyncs, ms, pss_mib};
use super::{Figure, median, quantile};
use crate::bench::two_hosts;

const AT_ONCE: usize = 200;
/// Casts one after the other before that, each of which finds an idle agent.
const ALONE: usize = 30;
/// How long the whole queue may take.
const PATIENCE: Duration = Duration::from_secs(1200);
/// An agent's memory with all of them, in MiB.
const MEMORY: f64 = 100.0;

pub(super) fn measure(ferry: &Path) -> Result<Vec<Figure>> {
    let mut pair = two_hosts(ferry)?;
    for host in [&mut pair.a, &mut pair.b] {
        // Small, paused guests; what they claim is not what is measured.
        host.arguments
            .extend(["--cpu-allocation-ratio", "1000"].map(str::to_owned));
        host.start()?;
    }
    Runtime::new()?.block_on(all(&pair))
}

async fn all(pair: &Pair) -> Result<Vec<Figure>> {
    let agent = Agent::connect(&pair.a).await?;
    let mut instances = Vec::new();
    let began = Instant::now();
    for number in 0..1 + ALONE + AT_ONCE {
        let run = agent.run_paused(&format!("g{number}"), &pair.kernel()).await;
        instances.push(run.with_context(|| format!("guest {number}"))?);
    }
    eprintln!(
        "{} guests after {:.1} s",
        instances.len(),
        began.elapsed().as_secs_f64()
    );
    let ids: Vec<String> = (0..instances.len()).map(id).collect();
    let watch = Watch::begin(pair.a.pid().context("agent a runs")?);

    agent.cast(&ids[0], &instances[0], "b", "queued").await?;
    let mut trips = Vec::new();
    let mut alone = Vec::new();
    for at in 1..=ALONE {
        trips.push(agent.round_trip().await?);
        alone.push(agent.cast(&ids[at], &instances[at], "b", "").await?);
    }
    let synced = fsyncs(pair.folder(), 100)?;

    let began = Instant::now();
    let mut casts = JoinSet::new();
    for at in 1 + ALONE..instances.len() {
        let (agent, id, instance) = (agent.clone(), ids[at].clone(), instances[at].clone());
        casts.spawn(async move { agent.cast(&id, &instance, "b", "").await });
    }
    let mut at_once = Vec::new();
    while let Some(receipt) = casts.join_next().await {
        at_once.push(receipt??);
    }
    let all_after = ms(began.elapsed());
    let journalled = migrations(&agent).await?.len();

    let first = MigrationRequest {
        migration: ids[0].clone(),
        forwarded: false,
    };
    agent.conductor().abort_migration(first).await?;
    let began = Instant::now();
    let done = wait_for_all(&agent, instances.len()).await?;
    let queue = began.elapsed().as_secs_f64();
    let memory = watch.end()?;

    let (fsync, trip) = (median(&synced), median(&trips));
    Ok(vec![
        Figure::new("one write and fsync of 4 KiB, median", fsync, "ms"),
        Figure::new("one round trip, median", trip, "ms"),
        Figure::new("receipt of a cast to an idle agent, median", median(&alone), "ms").at_most(fsync + trip),
        Figure::new("receipt of a cast to an idle agent, p99", quantile(&alone, 0.99), "ms"),
        Figure::new(
            format!("receipts of {AT_ONCE} casts at once, median"),
            median(&at_once),
            "ms",
        ),
        Figure::new(
            format!("receipts of {AT_ONCE} casts at once, p99"),
            quantile(&at_once, 0.99),
            "ms",
        ),
        Figure::new(format!("all {AT_ONCE} receipts after"), all_after, "ms").at_most(AT_ONCE as f64 * (fsync + trip)),
        Figure::new(
            "casts with a receipt that are not journalled",
            (instances.len() - journalled) as f64,
            "",
        )
        .at_most(0.0),
        Figure::new("migrations that were not completed", not_completed(&done) as f64, "").at_most(0.0),
        Figure::new("migrations that overtook an older one", overtaken(&done) as f64, "").at_most(0.0),
        Figure::new(
            "seconds for each migration of the queue",
            queue / done.len() as f64,
            "s",
        ),
        Figure::new("agent's memory (PSS), largest seen", memory, "MiB").at_most(MEMORY),
    ])
}

/// A migration's id, in the order of the casts.
fn id(number: usize) -> String {
    format!("00000000-0000-4000-8000-{number:012x}")
}

async fn migrations(agent: &Agent) -> Result<Vec<MigrationInfo>> {
    let all = ListMigrationsRequest::default();
    Ok(agent.conductor().list_migrations(all).await?.into_inner().migrations)
}

async fn wait_for_all(agent: &Agent, count: usize) -> Result<Vec<MigrationInfo>> {
    let began = Instant::now();
    loop {
        let all = migrations(agent).await?;
        ensure!(all.len() == count, "{} migrations of {count}", all.len());
        if all.iter().all(|info| info.ended.is_some()) {
            return Ok(all);
        }
        if began.elapsed() > PATIENCE {
            bail!("the queue is not done after {} s", PATIENCE.as_secs());
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// But for the first, which was called off.
fn not_completed(done: &[MigrationInfo]) -> usize {
    let later = done.iter().filter(|info| info.id != id(0));
    later.filter(|info| info.status != "completed").count()
}

/// How many ended after one that was accepted later, and not in the same moment: casts that come at once are accepted in any order.
fn overtaken(done: &[MigrationInfo]) -> usize {
    const MOMENT_MS: i64 = 100;
    let later = done.iter().filter(|info| info.id != id(0));
    let spans: Vec<(i64, i64)> = later
        .filter_map(|info| Some((ms_of_day(info.started.as_deref()?)?, ms_of_day(info.ended.as_deref()?)?)))
        .collect();
    let is_overtaken = |one: &&(i64, i64)| spans.iter().any(|other| other.0 > one.0 + MOMENT_MS && other.1 < one.1);
    spans.iter().filter(is_overtaken).count()
}

/// The time of `2026-11-26T01:05:57.123Z`, in milliseconds since midnight.
fn ms_of_day(time: &str) -> Option<i64> {
    let time = time.split_once('T')?.1.strip_suffix('Z')?;
    let mut parts = time.split([':', '.']).map(str::parse::<i64>);
    let mut next = || parts.next()?.ok();
    let (hours, minutes, seconds, ms) = (next()?, next()?, next()?, next()?);
    Some(((hours * 60 + minutes) * 60 + seconds) * 1000 + ms)
}

/// Looks at a process's memory until it is told to end.
struct Watch {
    over: Arc<AtomicBool>,
    looking: thread::JoinHandle<Result<f64>>,
}

impl Watch {
    fn begin(process: u32) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&over);
        let looking = thread::spawn(move || {
            let mut largest = 0.0_f64;
            while !told.load(Ordering::Relaxed) {
                largest = largest.max(pss_mib(process)?);
                thread::sleep(Duration::from_millis(200));
            }
            Ok(largest)
        });
        Self { over, looking }
    }

    fn end(self) -> Result<f64> {
        self.over.store(true, Ordering::Relaxed);
        self.looking.join().expect("looking does not panic")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_was_overtaken_is_counted_and_neighbours_are_not() {
        let migration = |number, started: &str, ended: &str| MigrationInfo {
            id: id(number),
            started: Some(format!("2026-11-26T01:05:{started}Z")),
            ended: Some(format!("2026-11-26T01:05:{ended}Z")),
            ..MigrationInfo::default()
        };
        let mut done = vec![migration(1, "10.000", "11.000"), migration(2, "10.001", "10.900")];
        assert_eq!(overtaken(&done), 0);
        done.push(migration(3, "10.500", "10.950"));
        assert_eq!(overtaken(&done), 1);
    }
}
