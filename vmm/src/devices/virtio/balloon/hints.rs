//! Free page hints, for whoever asks for them and does not hold the device.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::memory::FrameRun;

/// Where one asks for hints and the device leaves what it was told. Clones are of the same device, wherever its machine is.
#[derive(Debug, Clone, Default)]
pub(crate) struct HintDesk(Arc<Mutex<Desk>>);

#[derive(Debug, Default)]
struct Desk {
    /// How often was asked so far: which time it is tells hints for one who asked before from those for the next.
    times: u64,
    is_asked: bool,
    runs: Vec<FrameRun>,
    since: Option<Instant>,
    /// Pages that were named since, and when the last was.
    named: u64,
    took: Duration,
}

/// The most runs that wait to be taken, 1 MiB of them. Linux gives runs of 4 MiB, and the device joins neighbours; what a guest says beyond
/// that is left out, which costs the sending of those pages and nothing else.
const MOST_RUNS: usize = 1 << 16;

impl HintDesk {
    /// Asks from now on. What was left for who asked before is forgotten.
    pub(crate) fn ask(&self) -> FreePageHints {
        let mut desk = self.lock();
        desk.times += 1;
        desk.is_asked = true;
        desk.runs.clear();
        (desk.since, desk.named, desk.took) = (Some(Instant::now()), 0, Duration::ZERO);
        FreePageHints {
            desk: self.clone(),
            asked: desk.times,
        }
    }

    /// Nobody asks any more.
    pub(crate) fn end(&self) {
        let mut desk = self.lock();
        if desk.is_asked {
            let took_ms = desk.took.as_secs_f64() * 1e3;
            tracing::info!(pages = desk.named, took_ms, "the guest was asked which pages are free");
        }
        desk.is_asked = false;
        desk.runs = Vec::new();
    }

    /// Which time is asked now, if at all.
    pub(super) fn asked(&self) -> Option<u64> {
        let desk = self.lock();
        desk.is_asked.then_some(desk.times)
    }

    /// Leaves a run for who asked this time.
    pub(super) fn leave(&self, asked: u64, run: FrameRun) {
        let mut desk = self.lock();
        if !desk.is_asked || desk.times != asked {
            return;
        }
        desk.named = desk.named.saturating_add(run.count);
        desk.took = desk.since.map_or(Duration::ZERO, |since| since.elapsed());
        let has_room = desk.runs.len() < MOST_RUNS;
        match desk.runs.last_mut() {
            Some(last) if last.end() == run.first => last.count += run.count,
            Some(last) if run.end() == last.first => {
                *last = FrameRun {
                    first: run.first,
                    count: run.count + last.count,
                }
            }
            _ if has_room => desk.runs.push(run),
            _ => {}
        }
    }

    fn lock(&self) -> MutexGuard<'_, Desk> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a guest says of pages that are free, to one who asked it.
///
/// A page in here was free at some time after [`Machine::ask_for_free_pages`](crate::Machine::ask_for_free_pages) was called. It may be in use
/// again by now: the guest waits for nobody.
#[derive(Debug, Clone)]
pub struct FreePageHints {
    desk: HintDesk,
    asked: u64,
}

impl FreePageHints {
    /// Appends what was said since this was called last; nothing once somebody else asked, or nobody asks. Runs may lie over each other.
    pub fn take(&self, found: &mut Vec<FrameRun>) {
        let mut desk = self.desk.lock();
        if desk.is_asked && desk.times == self.asked {
            found.append(&mut desk.runs);
        }
    }
}
