//! What the guests' clock runs at.
//!
//! Every contender's guest is told, so that all of them count time alike. A guest that is not told reads CPUID, which not
//! every host lets through to it, or measures its clock against the PIT, which goes wrong where the host is busy.

use anyhow::{Context, Result, ensure};

/// The time stamp counter's frequency in kHz, as KVM on this host has it.
///
/// # Errors
/// KVM cannot be used, or the counter is not stable: then guests cannot measure here.
pub(super) fn tsc_khz() -> Result<u64> {
    let host = ferry_vmm::host().context("failed to ask KVM for the clock")?;
    ensure!(
        host.tsc_khz > 0,
        "the time stamp counter of this host is not stable, so no guest can measure time"
    );
    Ok(host.tsc_khz.into())
}
