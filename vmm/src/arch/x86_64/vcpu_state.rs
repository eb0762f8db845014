//! All that a vCPU is made of, read and written in the order that KVM needs.
//!
//! The dangerous orders: the MP state is read first, for reading it may carry out a pending INIT or SIPI and so change registers. The APIC
//! is read after the TSC deadline: a timer that fires in between is then at worst delivered twice, never lost. When writing, the
//! deadline comes after the counter that it is compared with and after the APIC whose mode it needs.

use kvm_bindings::{kvm_debugregs, kvm_lapic_state, kvm_regs, kvm_sregs2, kvm_vcpu_events, kvm_xcrs};

use super::cpuid::{CpuidEntry, give};
use super::msr::{IA32_MCG_CAP, IA32_TSC, IA32_TSC_DEADLINE, candidates};
use crate::kvm::{KvmError, Vcpu};

/// The state of one vCPU. Plain data; what KVM makes of it is KVM's to check.
#[derive(Debug, Clone)]
pub(crate) struct VcpuState {
    pub(crate) regs: kvm_regs,
    pub(crate) sregs: kvm_sregs2,
    pub(crate) debug_registers: kvm_debugregs,
    pub(crate) events: kvm_vcpu_events,
    pub(crate) xcrs: kvm_xcrs,
    pub(crate) lapic: kvm_lapic_state,
    pub(crate) xsave: Vec<u8>,
    pub(crate) mp_state: u32,
    /// Without the time stamp counter; the TSC deadline, if there, is last.
    pub(crate) msrs: Vec<(u32, u64)>,
    /// The guest's time stamp counter when this was read.
    pub(crate) tsc: u64,
    /// Its distance from the host's, where the host can set it.
    pub(crate) tsc_offset: Option<u64>,
    pub(crate) cpuid: Vec<CpuidEntry>,
}

/// What can be done about the guest's time stamp counter on this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TscControl {
    /// KVM_VCPU_TSC_OFFSET works: the one exact way.
    Offset,
    /// KVM does not know the attribute (before 5.16): writing the counter is all there is.
    Write,
    /// KVM takes the offset and does not apply it (kvm-pvm): the guest sees the host's counter.
    Fixed,
}

/// What the time stamp counter is to become when state is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TscTarget {
    /// It goes on as it is: a reset, or a host that cannot change it.
    Keep,
    /// It runs this far from the host's counter.
    Offset(u64),
    /// It is this now.
    Value(u64),
}

/// What is saved of every vCPU of a machine; found out once, so that saving is one ioctl per kind.
#[derive(Debug, Clone)]
pub(crate) struct SavePlan {
    /// MSRs that this host reads and sets, then the counter and the deadline.
    indices: Vec<u32>,
    pub(crate) tsc: TscControl,
}

impl SavePlan {
    /// Tries out on a fresh vCPU what can be read and set; also returns those MSRs that the host lists but cannot set.
    pub(crate) fn probe(vcpu: &Vcpu, listed: &[u32]) -> Result<(Self, Vec<u32>), KvmError> {
        let banks = vcpu
            .msrs(&[IA32_MCG_CAP])?
            .first()
            .map_or(0, |(_, value)| *value as u32 & 0xff);
        let readable = read_msrs(vcpu, &candidates(listed, banks))?;
        let refused: Vec<u32> = write_msrs(vcpu, &readable)?
            .into_iter()
            .map(|(index, _)| index)
            .collect();
        let mut indices: Vec<u32> = readable
            .iter()
            .map(|(index, _)| *index)
            .filter(|index| !refused.contains(index))
            .collect();
        indices.push(IA32_TSC);
        if !vcpu.msrs(&[IA32_TSC_DEADLINE])?.is_empty() {
            indices.push(IA32_TSC_DEADLINE);
        }
        let left_out = refused.into_iter().filter(|index| listed.contains(index)).collect();
        let tsc = probe_tsc(vcpu)?;
        Ok((Self { indices, tsc }, left_out))
    }
}

/// Sets another offset and looks whether it took effect; then sets the old one.
pub(crate) fn probe_tsc(vcpu: &Vcpu) -> Result<TscControl, KvmError> {
    let Some(offset) = vcpu.tsc_offset() else {
        return Ok(TscControl::Write);
    };
    let other = offset.wrapping_sub(1 << 30);
    if vcpu.set_tsc_offset(other).is_err() {
        return Ok(TscControl::Fixed);
    }
    let works = vcpu.tsc_offset() == Some(other);
    vcpu.set_tsc_offset(offset)?;
    Ok(if works { TscControl::Offset } else { TscControl::Fixed })
}

impl VcpuState {
    /// Reads the state of a vCPU that stands still with nothing pending.
    ///
    /// # Errors
    ///
    /// If KVM refuses any of it.
    pub(crate) fn save(vcpu: &Vcpu, plan: &SavePlan, cpuid: &[CpuidEntry]) -> Result<Self, KvmError> {
        let mp_state = vcpu.mp_state()?;
        let mut msrs = read_msrs(vcpu, &plan.indices)?;
        let tsc = msrs
            .iter()
            .position(|(index, _)| *index == IA32_TSC)
            .map_or(0, |position| msrs.remove(position).1);
        Ok(Self {
            regs: vcpu.regs()?,
            sregs: vcpu.sregs()?,
            debug_registers: vcpu.debug_registers()?,
            xcrs: vcpu.xcrs()?,
            xsave: vcpu.xsave()?,
            lapic: vcpu.lapic()?,
            events: vcpu.events()?,
            mp_state,
            msrs,
            tsc,
            tsc_offset: match plan.tsc {
                TscControl::Offset => vcpu.tsc_offset(),
                TscControl::Write | TscControl::Fixed => None,
            },
            cpuid: cpuid.to_vec(),
        })
    }

    /// Gives a vCPU this state. `cpuid` is what it was last given and is brought up to date.
    ///
    /// Returns the MSRs that this host did not take although its value differs; everything else was set.
    ///
    /// # Errors
    ///
    /// If KVM refuses anything but an MSR: the vCPU is then neither one thing nor the other.
    pub(crate) fn restore(
        &self,
        vcpu: &Vcpu,
        tsc_target: TscTarget,
        current_cpuid: &mut Vec<CpuidEntry>,
    ) -> Result<Vec<(u32, u64)>, KvmError> {
        let Self {
            regs,
            sregs,
            debug_registers,
            events,
            xcrs,
            lapic,
            xsave,
            mp_state,
            msrs,
            // Both went into `tsc_target`, together with the time that has passed.
            tsc: _,
            tsc_offset: _,
            cpuid,
        } = self;
        if cpuid != current_cpuid {
            give(vcpu, cpuid)?;
            current_cpuid.clone_from(cpuid);
        }
        vcpu.set_sregs(sregs)?;
        vcpu.set_regs(regs)?;
        vcpu.set_xcrs(xcrs)?;
        vcpu.set_xsave(xsave)?;
        vcpu.set_debug_registers(debug_registers)?;
        vcpu.set_lapic(lapic)?;
        let (deadline, others): (Vec<_>, Vec<_>) = msrs.iter().partition(|(index, _)| *index == IA32_TSC_DEADLINE);
        let mut refused = write_msrs(vcpu, &others)?;
        match tsc_target {
            TscTarget::Keep => {}
            TscTarget::Offset(offset) => vcpu.set_tsc_offset(offset)?,
            TscTarget::Value(value) => {
                vcpu.set_msrs(&[(IA32_TSC, value)])?;
            }
        }
        refused.extend(write_msrs(vcpu, &deadline)?);
        vcpu.set_events(events)?;
        vcpu.set_mp_state(*mp_state)?;
        differing(vcpu, refused)
    }
}

/// KVM takes no more registers in one call (`MAX_IO_MSRS`).
const MSRS_PER_CALL: usize = 256;

/// Reads what can be read of `indices`, in order.
fn read_msrs(vcpu: &Vcpu, indices: &[u32]) -> Result<Vec<(u32, u64)>, KvmError> {
    let mut values = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let part = &rest[..rest.len().min(MSRS_PER_CALL)];
        let read = vcpu.msrs(part)?;
        // KVM stopped before one that it cannot read: pass over it.
        let done = if read.len() < part.len() {
            read.len() + 1
        } else {
            part.len()
        };
        values.extend(read);
        rest = &rest[done..];
    }
    Ok(values)
}

/// Sets what can be set, in order, and returns the rest.
fn write_msrs(vcpu: &Vcpu, values: &[(u32, u64)]) -> Result<Vec<(u32, u64)>, KvmError> {
    let mut refused = Vec::new();
    let mut rest = values;
    while !rest.is_empty() {
        let part = &rest[..rest.len().min(MSRS_PER_CALL)];
        let count = vcpu.set_msrs(part)?;
        refused.extend(part.get(count).copied());
        rest = &rest[(count + 1).min(part.len())..];
    }
    Ok(refused)
}

/// Those of the refused registers that do not have the wanted value anyway.
fn differing(vcpu: &Vcpu, refused: Vec<(u32, u64)>) -> Result<Vec<(u32, u64)>, KvmError> {
    let mut differing = Vec::new();
    for (index, value) in refused {
        if vcpu.msrs(&[index])?.first() != Some(&(index, value)) {
            differing.push((index, value));
        }
    }
    Ok(differing)
}
