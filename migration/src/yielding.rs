//! The copy yields to the guests while it can afford to.
//!
//! A guest that writes its memory shares the host's processors with the threads that copy it. At equal rights the
//! scheduler takes the processor from a vCPU for whole ticks, again and again: on two processors the guest then feels
//! the copy more than it feels the switchover. So the bulk is copied at a lower weight. Whatever the guest waits for is
//! done at the usual one.

use rustix::process::setpriority_process;

/// A third of a vCPU's weight (`sched_prio_to_weight` in the kernel). Measured on two processors of which the guest keeps one busy, moves of
/// 1 GiB, medians of 12 and the guest's largest gap in each: at nice 5 312 ms and 2.2 ms, at 3 315 and 2.7, at 1 248 and 3.7, at 0 249 and 3.9; of a guest
/// that writes 20,000 pages/s, medians of 8: at 5 339 ms and 3.6 ms, at 2 322 and 3.9, at 0 325 and 3.0. Where the host itself was disturbed, gaps at 2 were
/// 7 to 47 ms.
///
/// Sending threads that were kept off the vCPUs' processors as well took 381 to 407 ms, at gaps of 2.3 to 3.3 ms, whatever their weight: the scheduler
/// places them better than we do.
const COPYING_NICE: i32 = 5;

/// The calling thread's weight. Belongs to the thread that made it.
#[derive(Debug, Default)]
pub(crate) struct Yielding {
    yields: bool,
}

impl Yielding {
    /// Makes the thread yield, or claim its full share again.
    ///
    /// Going back needs CAP_SYS_NICE or RLIMIT_NICE; without them the thread goes on yielding, which is slower and not
    /// wrong.
    pub(crate) fn set(&mut self, yields: bool) {
        if self.yields == yields {
            return;
        }
        self.yields = yields;
        // With no process given Linux means the calling thread, see NOTES in setpriority(2).
        if let Err(error) = setpriority_process(None, if yields { COPYING_NICE } else { 0 }) {
            tracing::debug!(%error, yields, "the thread's weight stays as it is");
        }
    }
}
