//! Guest time across a stop: it goes on while nobody runs the guest.
//!
//! The way of `devices/vcpu.rst`: save the KVM clock together with the host's real time and counter, let KVM advance the clock by the real
//! time that has passed, then move every vCPU's TSC offset by what the counters differ and what has passed. Within one boot
//! of one host the offset is copied as it is, which is exact.

use kvm_bindings::{KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, kvm_clock_data};

use super::vcpu_state::{TscControl, TscTarget};
use crate::kvm::{HostClock, KvmError, Vm};

/// What time it was in the guest, and on which host clock that was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ClockState {
    /// The guest's KVM clock in nanoseconds.
    pub(crate) kvm_clock_ns: u64,
    /// The host's CLOCK_REALTIME then.
    pub(crate) host_realtime_ns: u64,
    /// The host's time stamp counter then.
    pub(crate) host_tsc: u64,
    /// Boot of the host that it was read on.
    pub(crate) boot_id: String,
    /// Frequency of the guest's counter.
    pub(crate) tsc_khz: u32,
}

/// How far a guest's time stamp counter must move on this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TscShift {
    /// To be added to each offset, modulo 2^64.
    offset_change: u64,
    /// Ticks that passed since the state was saved.
    elapsed: u64,
}

impl ClockState {
    /// Reads the clock of a machine whose vCPUs stand still.
    pub(crate) fn save(vm: &Vm, boot_id: &str, tsc_khz: u32) -> Result<Self, KvmError> {
        let clock = vm.clock()?;
        let host = host_side(&clock);
        Ok(Self {
            kvm_clock_ns: clock.clock,
            host_realtime_ns: host.realtime_ns,
            host_tsc: host.tsc,
            boot_id: boot_id.to_owned(),
            tsc_khz,
        })
    }

    /// Sets the clock of a new machine, advanced by the time that has passed.
    pub(crate) fn restore(&self, vm: &Vm, boot_id: &str) -> Result<TscShift, KvmError> {
        let mut clock = kvm_clock_data {
            clock: self.kvm_clock_ns,
            ..Default::default()
        };
        if vm.clock_flags() & KVM_CLOCK_REALTIME != 0 {
            clock.flags = KVM_CLOCK_REALTIME;
            clock.realtime = self.host_realtime_ns;
        } else {
            let passed = HostClock::now().realtime_ns.saturating_sub(self.host_realtime_ns);
            clock.clock = clock.clock.saturating_add(passed);
        }
        vm.set_clock(&clock)?;
        let now = vm.clock()?;
        let elapsed_ns = now.clock.saturating_sub(self.kvm_clock_ns);
        let shift = if boot_id == self.boot_id {
            TscShift {
                offset_change: 0,
                elapsed: host_side(&now).tsc.saturating_sub(self.host_tsc),
            }
        } else {
            self.shift(elapsed_ns, host_side(&now).tsc)
        };
        Ok(shift)
    }

    /// The formula: what the counter was, plus what has passed, must be this host's counter plus the new offset.
    fn shift(&self, elapsed_ns: u64, host_tsc: u64) -> TscShift {
        let elapsed = (u128::from(elapsed_ns) * u128::from(self.tsc_khz) / 1_000_000) as u64;
        TscShift {
            offset_change: self.host_tsc.wrapping_sub(host_tsc).wrapping_add(elapsed),
            elapsed,
        }
    }
}

impl TscShift {
    /// What to do with a vCPU that was saved with this offset and counter.
    pub(crate) fn target(&self, control: TscControl, offset: Option<u64>, tsc: u64) -> TscTarget {
        match (control, offset) {
            (TscControl::Fixed, _) => TscTarget::Keep,
            (TscControl::Offset, Some(offset)) => TscTarget::Offset(offset.wrapping_add(self.offset_change)),
            // One of the two hosts does not know offsets.
            (TscControl::Offset | TscControl::Write, _) => TscTarget::Value(tsc.wrapping_add(self.elapsed)),
        }
    }
}

/// The host's clocks at the moment of `clock`, by KVM if it tells (it does while its master clock is on), else by ours right after.
fn host_side(clock: &kvm_clock_data) -> HostClock {
    let ours = HostClock::now();
    HostClock {
        realtime_ns: if clock.flags & KVM_CLOCK_REALTIME != 0 {
            clock.realtime
        } else {
            ours.realtime_ns
        },
        tsc: if clock.flags & KVM_CLOCK_HOST_TSC != 0 {
            clock.host_tsc
        } else {
            ours.tsc
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn saved() -> ClockState {
        ClockState {
            kvm_clock_ns: 5_000_000_000,
            host_realtime_ns: 0,
            host_tsc: 1_000_000,
            boot_id: "there".to_owned(),
            tsc_khz: 2_000_000,
        }
    }

    #[test]
    fn counter_goes_on_by_what_has_passed() {
        let offset = 7u64.wrapping_sub(1_000_000);
        let shift = saved().shift(300_000_000, 9_000_000_000);
        let TscTarget::Offset(moved) = shift.target(TscControl::Offset, Some(offset), 7) else {
            panic!("offsets can be set");
        };
        // 300 ms at 2 GHz.
        assert_eq!(9_000_000_000u64.wrapping_add(moved), 7 + 600_000_000);
    }

    #[test]
    fn host_that_cannot_set_the_counter_keeps_it() {
        let shift = saved().shift(1, 2);
        assert_eq!(shift.target(TscControl::Fixed, Some(3), 4), TscTarget::Keep);
    }

    #[test]
    fn counter_is_written_where_offsets_are_unknown() {
        let shift = saved().shift(1_000_000, 5);
        assert_eq!(shift.target(TscControl::Write, None, 100), TscTarget::Value(2_000_100));
    }
}
