//! Processor time of a migration, on both sides, without the threads that run the guest.
//!
//! A VMM that gave its guest away ends at once, and its figures with it; so they are read again and again while the
//! migration runs, and the last reading counts. What is lost is at most the time between two readings.

use std::collections::HashMap;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Reads processor times until it is asked for the sums.
pub struct CpuMeter {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<[f64; 2]>,
}

impl CpuMeter {
    /// Begins to measure these two processes and their children, those that are yet to come too. What was used before is not counted.
    #[must_use]
    pub fn start(processes: [u32; 2]) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let mut sides = processes.map(Side::new);
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                thread::sleep(INTERVAL);
                sides.iter_mut().for_each(Side::read);
            }
            sides.map(|side| side.seconds())
        });
        Self { stop, thread }
    }

    /// Seconds of processor time used on each side since the start. One more reading is made first.
    #[must_use]
    pub fn stop(self) -> [f64; 2] {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap_or([f64::NAN; 2])
    }
}

/// A process and its children: an agent and its VMMs, or a peer's VMM.
struct Side {
    process: u32,
    /// By process and thread: when counting began, and the last reading.
    threads: HashMap<(u32, u32), (u64, u64)>,
}

impl Side {
    fn new(process: u32) -> Self {
        let mut side = Self {
            process,
            threads: HashMap::new(),
        };
        side.read();
        for (began, last) in side.threads.values_mut() {
            *began = *last;
        }
        side
    }

    fn read(&mut self) {
        let mut processes = process_children(self.process);
        processes.push(self.process);
        for process in processes {
            for (thread, used_ns) in threads_of(process) {
                self.threads.entry((process, thread)).or_insert((0, 0)).1 = used_ns;
            }
        }
    }

    fn seconds(&self) -> f64 {
        self.threads
            .values()
            .map(|(began, last)| last.saturating_sub(*began))
            .sum::<u64>() as f64
            / 1e9
    }
}

/// The processes that a process started and that live.
#[must_use]
pub fn process_children(pid: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten();
    let lists = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    lists
        .flat_map(|list| {
            list.split_whitespace()
                .filter_map(|pid| pid.parse().ok())
                .collect::<Vec<_>>()
        })
        .collect()
}

/// The threads of a process that do not run a guest, each with the CPU time it used.
fn threads_of(process: u32) -> Vec<(u32, u64)> {
    let tasks = fs::read_dir(format!("/proc/{process}/task"))
        .into_iter()
        .flatten()
        .flatten();
    let used = tasks.filter_map(|task| {
        let name = fs::read_to_string(task.path().join("comm")).ok()?;
        if VCPU_THREADS.iter().any(|threads| name.starts_with(threads)) {
            return None;
        }
        let times = fs::read_to_string(task.path().join("schedstat")).ok()?;
        Some((
            task.file_name().to_str()?.parse().ok()?,
            times.split(' ').next()?.parse().ok()?,
        ))
    });
    used.collect()
}

/// What Ferry and QEMU (with `-name debug-threads=on`) call the threads that run the guest.
const VCPU_THREADS: [&str; 2] = ["vcpu", "CPU "];
const INTERVAL: Duration = Duration::from_millis(10);

#[cfg(test)]
mod tests {
    use super::*;
    use std::hint::black_box;
    use std::time::Instant;

    #[test]
    fn work_done_after_the_start_is_counted() {
        let meter = CpuMeter::start([std::process::id(), 1]);
        let began = Instant::now();
        while began.elapsed() < Duration::from_millis(60) {
            black_box(began);
        }
        thread::sleep(3 * INTERVAL);
        let [ours, _] = meter.stop();
        assert!(ours > 0.02, "{ours}");
    }
}
