//! Sending threads keep off the processors that the guest's vCPUs keep busy, as long as half of them are left.
//!
//! Less weight alone does not spare a vCPU: the scheduler looks at who is owed what once a tick (4 ms at 250 Hz), so a vCPU that shares its
//! processor with a sending and a receiving thread runs for a tick and then waits until they have caught up, again and again. What the
//! guest feels of a move is this wait, not the switchover.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Which processors the vCPUs keep busy, as somebody last saw them.
#[derive(Debug, Default)]
pub(crate) struct Placement {
    taken: Mutex<Vec<usize>>,
    changes: AtomicU64,
}

impl Placement {
    /// These processors are busy now.
    pub(crate) fn taken(&self, processors: Vec<usize>) {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if *taken != processors {
            *taken = processors;
            self.changes.fetch_add(1, Ordering::Release);
        }
    }
}

/// The calling thread's place. Belongs to the thread that made it.
pub(crate) struct Place<'a> {
    placement: &'a Placement,
    /// Where the thread might run when it began; `None` where that cannot be told.
    allowed: Option<CpuSet>,
    /// What was last followed; `None` while the thread may run wherever it might at first.
    followed: Option<u64>,
}

impl<'a> Place<'a> {
    pub(crate) fn new(placement: &'a Placement) -> Self {
        Self {
            placement,
            allowed: sched_getaffinity(None).ok(),
            followed: None,
        }
    }

    /// Keeps the thread off the taken processors from now on, or lets it run anywhere again.
    pub(crate) fn set(&mut self, keeps_off: bool) {
        let Some(allowed) = self.allowed else { return };
        let wanted = keeps_off.then(|| self.placement.changes.load(Ordering::Acquire));
        if self.followed == wanted {
            return;
        }
        self.followed = wanted;
        let taken = self.placement.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let place = match keeps_off {
            true => without(allowed, &taken),
            false => allowed,
        };
        drop(taken);
        // A processor may have been taken from the process meanwhile. Then it stays where it is, and only its weight yields.
        if let Err(error) = sched_setaffinity(None, &place) {
            tracing::debug!(%error, "a copying thread stays where it is");
        }
    }
}

/// The rest of `allowed`, or all of it if less than half is left: a copy that is much slower costs the guest more than it is spared.
fn without(allowed: CpuSet, taken: &[usize]) -> CpuSet {
    let mut rest = allowed;
    taken
        .iter()
        .filter(|&&processor| processor < CpuSet::MAX_CPU)
        .for_each(|&processor| rest.unset(processor));
    if rest.count() * 2 < allowed.count() {
        allowed
    } else {
        rest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(processors: &[usize]) -> CpuSet {
        let mut set = CpuSet::new();
        processors.iter().for_each(|&processor| set.set(processor));
        set
    }

    #[test]
    fn a_copy_keeps_off_the_vcpus_only_where_half_is_left() {
        assert_eq!(without(set(&[0, 1, 5]), &[1]), set(&[0, 5]));
        assert_eq!(without(set(&[0, 1]), &[1]), set(&[0]));
        assert_eq!(without(set(&[0, 1]), &[1, 0]), set(&[0, 1]));
        assert_eq!(without(set(&[0, 1, 2]), &[1, 0]), set(&[0, 1, 2]));
        assert_eq!(without(set(&[0, 1]), &[7, 100_000]), set(&[0, 1]));
    }

    #[test]
    fn a_thread_follows_the_vcpus_and_comes_back() {
        std::thread::scope(|scope| {
            // A thread of its own: its affinity is nobody else's.
            scope.spawn(|| {
                let before = sched_getaffinity(None).unwrap();
                let first = (0..CpuSet::MAX_CPU)
                    .find(|&processor| before.is_set(processor))
                    .unwrap();
                let placement = Placement::default();
                let mut place = Place::new(&placement);
                placement.taken(vec![first]);
                place.set(true);
                assert_eq!(sched_getaffinity(None).unwrap(), without(before, &[first]));
                placement.taken(Vec::new());
                place.set(true);
                assert_eq!(sched_getaffinity(None).unwrap(), before);
                placement.taken(vec![first]);
                place.set(true);
                place.set(false);
                assert_eq!(sched_getaffinity(None).unwrap(), before);
            });
        });
    }
}
