//! How busy a vCPU's thread is, and where: looked at from outside, while it runs.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};
use rustix::thread::sched_getcpu;

/// Looks that are closer together than this say what the last one said: the kernel counts in steps.
const APART: Duration = Duration::from_millis(5);

/// Above this share of a processor a vCPU counts as busy: below it, somebody else can use more of the processor than is lost by keeping off.
const BUSY: f64 = 0.5;

/// Where a vCPU's thread notes its processor whenever it leaves the guest.
#[derive(Debug, Clone)]
pub(super) struct Whereabouts(Arc<AtomicUsize>);

/// No processor: the vCPU has not left the guest yet.
const UNKNOWN: usize = usize::MAX;

impl Default for Whereabouts {
    fn default() -> Self {
        Self(Arc::new(AtomicUsize::new(UNKNOWN)))
    }
}

impl Whereabouts {
    /// The calling thread, a vCPU's, is here.
    pub(super) fn note(&self) {
        self.0.store(sched_getcpu(), Ordering::Relaxed);
    }
}

/// What a vCPU's thread used of its processor.
#[derive(Debug)]
pub(super) struct Usage {
    clock: ClockId,
    whereabouts: Whereabouts,
    looked: Instant,
    used: Duration,
    busy: bool,
}

impl Usage {
    /// Of the thread with this id.
    pub(super) fn new(thread: i32, whereabouts: Whereabouts) -> Self {
        Self {
            clock: clock_of(thread),
            whereabouts,
            looked: Instant::now(),
            used: Duration::ZERO,
            busy: false,
        }
    }

    /// The processor that the vCPU keeps busy; `None` if it mostly waits, or was never seen. The processor is that of its last exit, and may be
    /// out of date: then the one that is kept free for it is idle, and the scheduler moves it there.
    pub(super) fn busy_processor(&mut self) -> Option<usize> {
        let now = Instant::now();
        let passed = now - self.looked;
        if passed >= APART {
            // A thread that has ended uses nothing.
            let used = clock_gettime(self.clock).map_or(self.used, Duration::from);
            self.busy = used.saturating_sub(self.used) > passed.mul_f64(BUSY);
            (self.looked, self.used) = (now, used);
        }
        let processor = self.whereabouts.0.load(Ordering::Relaxed);
        (self.busy && processor != UNKNOWN).then_some(processor)
    }
}

/// The clock of a thread's processor time, as `pthread_getcpuclockid(3)` makes it: `CPUCLOCK_PERTHREAD_MASK | CPUCLOCK_SCHED` of the kernel.
fn clock_of(thread: i32) -> ClockId {
    ClockId::from_raw((!thread << 3) | 4 | 2)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn a_thread_that_spins_is_busy_and_one_that_sleeps_is_not() {
        let stop = AtomicBool::new(false);
        let whereabouts = Whereabouts::default();
        let (sender, ids) = channel();
        let id = || rustix::thread::gettid().as_raw_nonzero().get();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _ = sender.send(id());
                while !stop.load(Ordering::Relaxed) {
                    whereabouts.note();
                }
            });
            let mut spins = Usage::new(ids.recv().unwrap(), whereabouts.clone());
            let mut sleeps = Usage::new(id(), Whereabouts::default());
            // However loaded the host is, the one gets most of a processor in some half second, and the other asks for none.
            let told_apart = (0..100).any(|_| {
                std::thread::sleep(Duration::from_millis(500));
                spins.busy_processor().is_some() && sleeps.busy_processor().is_none()
            });
            stop.store(true, Ordering::Relaxed);
            assert!(told_apart);
        });
    }
}
