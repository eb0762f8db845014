//! The limit of the host: the workload's bytes over loopback TCP, and nothing else, while a thread keeps a processor busy in the guest's place.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use ferry_vmm::measuring::raw_copy;

use super::stolen::Stolen;
use super::workload::Workload;
use super::{Sample, warm};

/// As many streams as a migration has here when nothing else is asked for.
fn streams() -> u64 {
    thread::available_parallelism().map_or(1, |count| count.get().clamp(1, 4) as u64)
}

/// Copies as much as the workload's guest touches, once, and measures.
///
/// # Errors
/// If the host has not the memory.
pub(super) fn run(workload: &Workload) -> Result<Sample> {
    let over = AtomicBool::new(false);
    let stolen = Stolen::so_far();
    let (copy, gap) = thread::scope(|scope| {
        let busy = scope.spawn(|| largest_gap(&over));
        let copy = raw_copy(workload.touched_mib << 20, streams(), || {
            warm(workload).map_err(std::io::Error::other)
        });
        over.store(true, Ordering::Relaxed);
        (copy, busy.join().unwrap_or_default())
    });
    let stolen_ms = stolen.ms_since();
    let copy = copy.context("the raw copy failed")?;
    Ok(Sample {
        total_ms: copy.elapsed.as_secs_f64() * 1e3,
        gap_ms: gap.as_secs_f64() * 1e3,
        stolen_ms,
        bytes: Some(copy.bytes as f64),
        ..Sample::default()
    })
}

/// Looks at the clock without rest until it is over; the longest time between two looks.
fn largest_gap(over: &AtomicBool) -> Duration {
    let (mut largest, mut last) = (Duration::ZERO, Instant::now());
    while !over.load(Ordering::Relaxed) {
        let now = Instant::now();
        largest = largest.max(now - last);
        last = now;
    }
    largest
}
