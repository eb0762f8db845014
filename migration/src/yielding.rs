//! The copy yields to the guests while it can afford to.
//!
//! A guest that writes its memory shares the host's processors with the threads that copy it. At equal rights the
//! scheduler takes the processor from a vCPU for whole ticks, again and again: on two processors the guest then feels
//! the copy more than it feels the switchover. So the bulk is copied at a lower weight. Whatever the guest waits for is
//! done at the usual one.

use rustix::process::setpriority_process;

/// A third of a vCPU's weight (`sched_prio_to_weight` in the kernel). Measured on two processors of which the guest keeps one busy, eight
/// moves each: at nice 2 the guest's largest gap is 9 to 12 ms, at 5 to 7 it is 4 to 6, at 10 it is 4; the move takes 450 ms at 2, 510 to 520 from
/// 5 on. A tenth of the weight made moves four times slower where guests keep all processors busy, which is not what somebody wants who
/// empties an overloaded host.
///
/// Sending threads are kept off the vCPUs' processors as well. Left to the scheduler a move is shorter by a fifth (medians of 7 and 10 beside QEMU: 343 and
/// 349 ms) and the guest's largest gap is 6 to 9 ms.
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
