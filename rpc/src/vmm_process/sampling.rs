//! Looking at what a running guest writes, for a few seconds, so that somebody can tell what its migration would come to.
//!
//! The guest stays where it is, with the thread that owns it: every order is obeyed meanwhile, and one that takes the guest away ends the sample.
//! Whatever ends it, tracking is off afterwards. It costs the guest a fault for the first write to each page, as later rounds of a
//! migration do.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use ferry_migration::{Compression, SampledWay, Watched};
use ferry_proto::vmm::v1::report::Report as Body;
use ferry_proto::vmm::v1::{self as wire};
use ferry_vmm::{Arming, DirtyBitmap, FrameRun, Machine, PAGE_SIZE, Population, RunState};

use super::memory::{SharedMemory, to_engine};
use super::vmm::{Holding, Vmm};

/// The longest sample: it slows the guest down.
const LONGEST: Duration = Duration::from_secs(30);

/// How often it is looked what was written, and by what each look is later than the one before it. The first one is after some hundredths of the time: as
/// long as the last rounds of a migration.
const LOOKS: i32 = 6;
const LATER: f64 = 3.0;

/// How many pages are looked at to tell the share of those that are zero, and how many of them together: in 2 ms.
const LOOKED_AT: u64 = 4096;
const TOGETHER: u64 = 64;

/// The smallest part of memory of which is told what it holds, and the most parts.
const PART_BYTES: u64 = 128 << 20;
const MOST_PARTS: u64 = 256;

/// A sample that is being taken.
pub(super) struct Sampling {
    /// The order that is to be answered.
    number: u64,
    began: Instant,
    /// When it is to be looked, from the beginning on.
    looks: VecDeque<Duration>,
    /// All that was written.
    found: DirtyBitmap,
    /// Whether, and which, pages are looked at once more, for what they change.
    watched: Watching,
    /// What each vCPU had written before.
    before: Option<Vec<u64>>,
    population: Population,
    sampled: wire::Sampled,
}

/// What pages change that are written again.
enum Watching {
    /// Nobody asked.
    No,
    /// Nothing was written yet.
    NotYet,
    /// These, since then.
    Since(Watched),
}

impl Sampling {
    fn begin(machine: &mut Machine, number: u64, (time, compression): (Duration, Compression)) -> anyhow::Result<Self> {
        let population = machine.memory().populated()?;
        let looked_at = LookedAt::of(machine, &population)?;
        let tried = try_ways(machine, &looked_at, compression)?;
        let is_paused = machine.run_state() == RunState::Paused;
        let mut looks = VecDeque::new();
        if !time.is_zero() && !is_paused {
            machine.start_dirty_tracking(Arming::All)?;
            looks.extend((0..LOOKS).rev().map(|before| time.div_f64(LATER.powi(before))));
        }
        Ok(Self {
            number,
            began: Instant::now(),
            looks,
            found: DirtyBitmap::empty(machine.memory().shape()),
            watched: match compression {
                Compression::Off => Watching::No,
                Compression::Auto | Compression::Always(_) => Watching::NotYet,
            },
            before: machine.written_by_vcpu(),
            sampled: wire::Sampled {
                populated_pages: population.runs.iter().map(|run| run.count).sum(),
                looked_at_pages: count(&looked_at.all),
                zero_pages: count(&looked_at.zero),
                tried,
                paused: is_paused,
                ..Default::default()
            },
            population,
        })
    }

    /// How long nothing is to be done.
    pub(super) fn rest(&self) -> Duration {
        let next = self.looks.front().copied().unwrap_or_default();
        next.saturating_sub(self.began.elapsed())
    }

    /// Looks what was written so far.
    fn look(&mut self, machine: &mut Machine) -> anyhow::Result<()> {
        let after = self.began.elapsed();
        self.found.merge(&machine.fetch_dirty()?);
        self.sampled.written.push(wire::WrittenPages {
            after_us: u64::try_from(after.as_micros()).unwrap_or(u64::MAX),
            pages: self.found.count(),
        });
        let memory = || SharedMemory::new(machine.memory().clone(), Vec::new());
        match &self.watched {
            // Enough of them, or the last look before the last one.
            Watching::NotYet if self.looks.len() == 1 || self.found.count() >= TOGETHER && !self.looks.is_empty() => {
                let found: Vec<_> = self.found.runs().into_iter().map(to_engine).collect();
                self.watched = Watching::Since(Watched::take(&memory(), &found)?);
            }
            Watching::Since(watched) if self.looks.is_empty() => {
                self.sampled.rewritten = Some(tried(&watched.changes(&memory())?)).filter(|way| way.bytes > 0);
            }
            Watching::No | Watching::NotYet | Watching::Since(_) => {}
        }
        Ok(())
    }

    fn into_sampled(mut self, machine: &Machine) -> wire::Sampled {
        if let Some((before, after)) = self.before.zip(machine.written_by_vcpu()) {
            let since = after
                .iter()
                .zip(&before)
                .map(|(after, before)| after.saturating_sub(*before));
            self.sampled.by_vcpu = since.collect();
        }
        let regions = machine.memory().shape().runs();
        let end = regions.last().map_or(0, FrameRun::end) * PAGE_SIZE;
        self.sampled.part_bytes = PART_BYTES.max((end / MOST_PARTS).next_power_of_two());
        let pages = self.sampled.part_bytes / PAGE_SIZE;
        let parts = (0..end.div_ceil(self.sampled.part_bytes)).map(|part| FrameRun {
            first: part * pages,
            count: pages,
        });
        let in_part = |part: FrameRun| {
            let populated = self.population.runs.iter().filter_map(|run| run.intersection(part));
            wire::SampledPart {
                address: part.first * PAGE_SIZE,
                populated_pages: populated.map(|run| run.count).sum(),
                written_pages: count(&self.found.runs_in(part)),
            }
        };
        let holds_something = |part: &wire::SampledPart| part.populated_pages + part.written_pages > 0;
        self.sampled.parts = parts.map(in_part).filter(holds_something).collect();
        self.sampled
    }
}

impl Vmm {
    /// Begins a sample, whose answer comes when it is over; or answers at once where there is nothing to wait for.
    pub(super) fn sample(&mut self, number: u64, order: wire::Sample) -> anyhow::Result<Option<Body>> {
        self.check_user_order(order.epoch)?;
        self.late.check_whole()?;
        ensure!(self.sampling.is_none(), "the guest is being sampled already");
        let time = Duration::from_millis(order.ms.into());
        ensure!(
            time <= LONGEST,
            "a sample takes {}s at most, not {}s",
            LONGEST.as_secs(),
            time.as_secs_f64()
        );
        let Holding::Here(guest) = &mut self.holding else {
            anyhow::bail!("the guest is {}", self.machine_word());
        };
        let compression = match order.compress.as_str() {
            "" => Compression::Off,
            text => text.parse()?,
        };
        let sampling =
            Sampling::begin(&mut guest.machine, number, (time, compression)).context("failed to sample the guest")?;
        if sampling.looks.is_empty() {
            return Ok(Some(Body::Sampled(sampling.into_sampled(&guest.machine))));
        }
        tracing::info!(ms = order.ms, "looking at what the guest writes");
        self.sampling = Some(sampling);
        Ok(None)
    }

    /// It is time to look at what was written.
    pub(super) fn look_at_sample(&mut self) {
        let (Some(sampling), Holding::Here(guest)) = (&mut self.sampling, &mut self.holding) else {
            return self.end_sample("the guest is not here any more");
        };
        if !sampling.rest().is_zero() {
            return;
        }
        sampling.looks.pop_front();
        if let Err(error) = sampling.look(&mut guest.machine) {
            return self.end_sample(&format!("failed to tell what the guest wrote: {error:#}"));
        }
        if !sampling.looks.is_empty() {
            return;
        }
        let number = sampling.number;
        let sampled = self.stop_sampling().map(Body::Sampled);
        sampled.into_iter().for_each(|body| self.report(number, body));
    }

    /// Ends a sample before its time, if one is being taken.
    pub(super) fn end_sample(&mut self, why: &str) {
        let Some(number) = self.sampling.as_ref().map(|sampling| sampling.number) else {
            return;
        };
        let _ = self.stop_sampling();
        tracing::info!(why, "a sample was ended before its time");
        self.report(number, Body::Refused(wire::Refused { reason: why.to_owned() }));
    }

    /// The one way out of a sample: writes are tracked no more.
    fn stop_sampling(&mut self) -> Option<wire::Sampled> {
        let sampling = self.sampling.take()?;
        let Holding::Here(guest) = &mut self.holding else {
            return None;
        };
        if let Err(error) = guest.machine.stop_dirty_tracking() {
            tracing::warn!(%error, "failed to stop dirty tracking: the guest runs on, more slowly");
        }
        Some(sampling.into_sampled(&guest.machine))
    }
}

/// Pages that were looked at, evenly over all that is populated, and those of them that are zero.
struct LookedAt {
    all: Vec<FrameRun>,
    zero: Vec<FrameRun>,
}

impl LookedAt {
    fn of(machine: &Machine, population: &Population) -> anyhow::Result<Self> {
        let all = spread(&population.runs);
        let mut zero = Vec::new();
        for &run in &all {
            machine.memory().zero_pages(run, &mut zero)?;
        }
        Ok(Self { all, zero })
    }

    /// What is not zero.
    fn with_data(&self) -> Vec<FrameRun> {
        let mut found = Vec::new();
        for run in &self.all {
            let mut first = run.first;
            let zero = self.zero.iter().filter_map(|zero| zero.intersection(*run));
            let end = FrameRun {
                first: run.end(),
                count: 0,
            };
            for zero in zero.chain([end]) {
                if first < zero.first {
                    found.push(FrameRun {
                        first,
                        count: zero.first - first,
                    });
                }
                first = zero.end();
            }
        }
        found
    }
}

/// What ways to compress make of pages that were looked at.
fn try_ways(machine: &Machine, looked_at: &LookedAt, compression: Compression) -> anyhow::Result<Vec<wire::TriedWay>> {
    let runs: Vec<_> = looked_at.with_data().into_iter().map(to_engine).collect();
    let memory = SharedMemory::new(machine.memory().clone(), Vec::new());
    let ways = ferry_migration::try_out(&memory, &runs, compression)?;
    Ok(ways.iter().map(tried).collect())
}

fn tried(way: &SampledWay) -> wire::TriedWay {
    wire::TriedWay {
        method: way.method.to_string(),
        bytes: way.bytes,
        packed: way.packed,
        took_us: u64::try_from(way.took.as_micros()).unwrap_or(u64::MAX),
    }
}

fn count(runs: &[FrameRun]) -> u64 {
    runs.iter().map(|run| run.count).sum()
}

/// Short runs, spread evenly over these; all of them where they are few.
fn spread(runs: &[FrameRun]) -> Vec<FrameRun> {
    let pages: u64 = runs.iter().map(|run| run.count).sum();
    if pages <= LOOKED_AT {
        return runs.to_vec();
    }
    let mut spots =
        (0..LOOKED_AT / TOGETHER).map(|spot| u128::from(spot) * u128::from(pages) / u128::from(LOOKED_AT / TOGETHER));
    let mut next = spots.next();
    let mut before = 0u128;
    let mut spread = Vec::new();
    for run in runs {
        let end = before + u128::from(run.count);
        while let Some(spot) = next.filter(|&spot| spot < end) {
            // It lies in this run: the difference is less than its length.
            let offset = (spot - before) as u64;
            spread.push(FrameRun {
                first: run.first + offset,
                count: TOGETHER.min(run.count - offset),
            });
            next = spots.next();
        }
        before = end;
    }
    spread
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_not_zero_is_told_from_what_is() {
        let run = |first, count| FrameRun { first, count };
        let looked_at = LookedAt {
            all: vec![run(0, 64), run(100, 64), run(200, 64)],
            zero: vec![run(0, 64), run(100, 1), run(130, 4)],
        };
        assert_eq!(looked_at.with_data(), [run(101, 29), run(134, 30), run(200, 64)]);
    }

    proptest! {
        #[test]
        fn what_is_looked_at_is_populated_little_and_from_all_over(
            lengths in prop::collection::vec((1u64..5000, 1u64..100_000), 1..30),
        ) {
            let mut first = 0;
            let run = |(gap, count): (u64, u64)| {
                first += gap;
                let run = FrameRun { first, count };
                first += count;
                run
            };
            let runs: Vec<_> = lengths.into_iter().map(run).collect();
            let spread = spread(&runs);
            let count = |runs: &[FrameRun]| runs.iter().map(|run| run.count).sum::<u64>();
            prop_assert!(count(&spread) <= LOOKED_AT && count(&spread) > 0);
            prop_assert!(spread.windows(2).all(|pair| pair[0].first < pair[1].first));
            for spot in &spread {
                prop_assert!(runs.iter().any(|run| run.intersection(*spot) == Some(*spot)));
            }
            let longest = runs.iter().map(|run| run.count).max().unwrap();
            if longest * LOOKED_AT > count(&runs) * TOGETHER * 2 {
                let found = runs.iter().find(|run| run.count == longest).unwrap();
                prop_assert!(spread.iter().any(|spot| found.intersection(*spot).is_some()));
            }
        }
    }
}
