//! Keeping the vCPUs from running for a share of the time, so that the guest writes less.

use crate::machine::{Machine, MachineError, RunState};
use crate::vcpu::{MOST_PERCENT, VcpuHandle};

/// A vCPU that wrote less than this share of what all wrote is let run: it has no part in it.
const WRITER: f64 = 0.05;

/// Which vCPUs are kept from running.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThrottledVcpus {
    /// None.
    None,
    /// All of them: the dirty log does not tell which of them write.
    All,
    /// So many, which write: the dirty ring tells.
    Writers(usize),
}

impl Machine {
    /// Keeps vCPUs from running for so much of the time, [`MOST_PERCENT`] at most, never for longer than
    /// [`LONGEST_REST`](crate::LONGEST_REST) at once: with the dirty ring those that wrote since this was called last, or since tracking
    /// began; with the log all of them. A pause ends it, too.
    ///
    /// # Errors
    ///
    /// If the machine is paused, or the thread cannot be started that does it.
    pub fn throttle(&mut self, percent: u32) -> Result<ThrottledVcpus, MachineError> {
        if percent == 0 {
            self.end_throttle();
            return Ok(ThrottledVcpus::None);
        }
        if self.run_state == RunState::Paused {
            return Err(MachineError::Paused("throttle the vCPUs"));
        }
        let writers = self.writers();
        let throttle = match self.throttle.take() {
            Some(throttle) => throttle,
            None => VcpuHandle::throttle(&self.parts.vcpus).map_err(MachineError::Thread)?,
        };
        let is_throttled = |index: usize| writers.as_ref().is_none_or(|writers| writers[index]);
        throttle.set(percent.min(MOST_PERCENT), is_throttled);
        self.throttle = Some(throttle);
        Ok(match &writers {
            None => ThrottledVcpus::All,
            Some(writers) => ThrottledVcpus::Writers(writers.iter().filter(|writes| **writes).count()),
        })
    }

    /// Leaves the vCPUs alone.
    pub fn end_throttle(&mut self) {
        self.throttle = None;
    }

    /// How many pages each vCPU has written so far while writes were tracked, as far as they were fetched: those written again after that each time. None with
    /// the log, which does not tell vCPUs apart.
    #[must_use]
    pub fn written_by_vcpu(&self) -> Option<Vec<u64>> {
        self.parts.vm.written_by_vcpu()
    }

    /// Of each vCPU whether it wrote since this was asked last; none if nothing tells them apart.
    fn writers(&mut self) -> Option<Vec<bool>> {
        let told = self.parts.vm.written_by_vcpu()?;
        let before = std::mem::replace(&mut self.written_before, told.clone());
        let since: Vec<u64> = told
            .iter()
            .enumerate()
            .map(|(index, told)| told - before.get(index).unwrap_or(&0))
            .collect();
        Some(who_writes(&since))
    }
}

/// Those that have a part in what was written; if nothing was, all of them.
fn who_writes(pages: &[u64]) -> Vec<bool> {
    let enough = pages.iter().sum::<u64>() as f64 * WRITER;
    pages.iter().map(|&pages| pages as f64 >= enough).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_that_write_are_told_from_those_that_do_not() {
        assert_eq!(who_writes(&[10_000, 3, 0, 9_000]), [true, false, false, true]);
        assert_eq!(who_writes(&[0, 0]), [true, true]);
        assert_eq!(who_writes(&[7]), [true]);
    }
}
