//! The copy yields to the guests while it can afford to.
//!
//! A guest that writes its memory shares the host's processors with the threads that copy it. A thread that got a processor keeps it to the next tick of the
//! scheduler's clock if nothing takes it away (4 ms where there are 250 a second), two such threads keep it for two: on two processors the guest then feels the
//! copy more than it feels the switchover. So the threads that copy in bulk take short turns, and give way themselves after each frame: a vCPU that waits gets the
//! processor then, not at the tick. Whatever the guest waits for is done as every other thread would.

use std::time::Duration;

use rustix::process::setpriority_process;

use crate::guest::GuestMemory;

/// How long a copying thread's turn is. A thread that gives way forfeits what is left of its turn (Linux since 6.18), so that turns which are much longer than a frame
/// takes (0.3 to 0.6 ms for 2 MiB) give the processor to the guest for good, and turns which are much shorter give nothing away.
///
/// Measured on two processors of which the guest keeps one busy, moves of 1 GiB, medians of 7, the guest's largest gap beside the total: turns of 1 ms 284 ms and 2.7 ms;
/// 0.2 ms 297 and 9.9; the usual ones (1.4 ms there) 321 and 3.6. Without giving way 259 and 11.4.
const TURN: Duration = Duration::from_millis(1);

/// Where turns are as long as the kernel wants them, a third of a vCPU's weight (`sched_prio_to_weight` in the kernel) makes up for it: 339 ms and 3.0 ms. A tenth of the weight
/// made moves four times slower where guests keep all processors busy, which is not what somebody wants who empties an overloaded host.
const COPYING_NICE: i32 = 5;

/// Whether the calling thread yields. Belongs to the thread that made it.
#[derive(Debug, Default)]
pub(crate) struct Yielding {
    how: Option<How>,
}

#[derive(Clone, Copy, Debug)]
enum How {
    /// By turns of [`TURN`].
    Turns,
    /// By weight.
    Weight,
}

impl Yielding {
    /// Makes the thread yield to the guest that this is the memory of, or claim its full share again.
    ///
    /// Going back to the usual weight needs CAP_SYS_NICE or RLIMIT_NICE; without them the thread goes on yielding, which is slower and not
    /// wrong.
    pub(crate) fn set(&mut self, yields: bool, memory: &impl GuestMemory) {
        match (yields, self.how) {
            (true, None) => {
                let has_turns = memory.set_turns(Some(TURN)).unwrap_or_else(|error| {
                    tracing::debug!(%error, "the thread's turns stay as they are");
                    false
                });
                if !has_turns {
                    set_weight(COPYING_NICE);
                }
                self.how = Some(if has_turns { How::Turns } else { How::Weight });
            }
            (false, Some(how)) => {
                match how {
                    How::Turns => {
                        // A turn that stays short costs nobody anything.
                        let _ = memory.set_turns(None);
                    }
                    How::Weight => set_weight(0),
                }
                self.how = None;
            }
            _ => {}
        }
    }

    /// Lets somebody else have the processor who waits for it, if this thread yields. After each frame.
    pub(crate) fn give_way(&self, memory: &impl GuestMemory) {
        if self.how.is_some() {
            memory.give_way();
        }
    }
}

/// Makes the calling thread one that others go before, for good: it does what nobody waits for.
pub(crate) fn stand_back() {
    set_weight(COPYING_NICE);
}

fn set_weight(nice: i32) {
    // With no process given Linux means the calling thread, see NOTES in setpriority(2).
    if let Err(error) = setpriority_process(None, nice) {
        tracing::debug!(%error, nice, "the thread's weight stays as it is");
    }
}
