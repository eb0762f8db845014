//! The copy yields to the guests while it can afford to.
//!
//! A guest that writes its memory shares the host's processors with the threads that copy it. At equal rights the
//! scheduler takes the processor from a vCPU for whole ticks, again and again: on two processors the guest then feels
//! the copy more than it feels the switchover. So the bulk is copied at a lower weight. Whatever the guest waits for is
//! done at the usual one.

use rustix::process::setpriority_process;

/// A third of a vCPU's weight (`sched_prio_to_weight` in the kernel). Measured on two processors of which the guest keeps one busy: moves of 1 GiB take
/// 312 ms at nice 5, 315 at 3, 248 at 1, 249 at 0 (medians of 12). Beside QEMU, medians of 10, the guest's largest gap was 6.1 ms at 5 and 16.8 at 2, the
/// second while the host itself was disturbed. A tenth of the weight made moves four times slower where guests keep all processors busy, which is not what
/// somebody wants who empties an overloaded host.
///
/// Sending threads that were kept off the vCPUs' processors as well took 381 to 407 ms, whatever their weight, and 600 to 2800 ms on a disturbed host, where the
/// guest's gaps were 28 to 112 ms: the scheduler places them better than we do.
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
