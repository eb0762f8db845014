//! A vCPU's state as a message: schema "ferry.vcpu", version 1.

use ferry_proto::state::v1 as saved;

use super::envelope::{StateError, structure};
use crate::arch::x86_64::cpuid::CpuidEntry;
use crate::arch::x86_64::vcpu_state::VcpuState;
use crate::kvm::to_bytes;

pub(super) const SCHEMA: &str = "ferry.vcpu";

/// Hosts list 40 to 200 registers, and MTRRs and machine check banks come on top.
const MSR_LIMIT: usize = 1024;

/// KVM takes no more lines (`KVM_MAX_CPUID_ENTRIES`).
const CPUID_LIMIT: usize = 256;

/// Larger than the area of any processor so far (11 KiB with AMX).
const XSAVE_LIMIT: usize = 64 << 10;

/// Size of `struct kvm_xsave`, the least that KVM reads.
const XSAVE_LEAST: usize = 4096;

pub(super) fn to_saved(state: &VcpuState) -> saved::Vcpu {
    let VcpuState {
        regs,
        sregs,
        debug_registers,
        events,
        xcrs,
        lapic,
        xsave,
        mp_state,
        msrs,
        tsc,
        tsc_offset,
        cpuid,
    } = state;
    saved::Vcpu {
        regs: to_bytes(regs),
        sregs: to_bytes(sregs),
        debug_registers: to_bytes(debug_registers),
        events: to_bytes(events),
        xcrs: to_bytes(xcrs),
        lapic: to_bytes(lapic),
        xsave: xsave.clone(),
        mp_state: *mp_state,
        msr_indices: msrs.iter().map(|(index, _)| *index).collect(),
        msr_values: msrs.iter().map(|(_, value)| *value).collect(),
        tsc: *tsc,
        tsc_offset: *tsc_offset,
        cpuid: cpuid.iter().copied().map(Into::into).collect(),
    }
}

pub(super) fn from_saved(what: &str, message: saved::Vcpu) -> Result<VcpuState, StateError> {
    let saved::Vcpu {
        regs,
        sregs,
        debug_registers,
        events,
        xcrs,
        lapic,
        xsave,
        mp_state,
        msr_indices,
        msr_values,
        tsc,
        tsc_offset,
        cpuid,
    } = message;
    let size = |field, found| StateError::Size {
        what: what.to_owned(),
        field,
        found,
    };
    if msr_indices.len() != msr_values.len() || msr_indices.len() > MSR_LIMIT {
        return Err(size("msr_indices", msr_indices.len()));
    }
    if cpuid.len() > CPUID_LIMIT {
        return Err(size("cpuid", cpuid.len()));
    }
    if !(XSAVE_LEAST..=XSAVE_LIMIT).contains(&xsave.len()) {
        return Err(size("xsave", xsave.len()));
    }
    Ok(VcpuState {
        regs: structure(what, "regs", &regs)?,
        sregs: structure(what, "sregs", &sregs)?,
        debug_registers: structure(what, "debug_registers", &debug_registers)?,
        events: structure(what, "events", &events)?,
        xcrs: structure(what, "xcrs", &xcrs)?,
        lapic: structure(what, "lapic", &lapic)?,
        xsave,
        mp_state,
        msrs: msr_indices.into_iter().zip(msr_values).collect(),
        tsc,
        tsc_offset,
        cpuid: cpuid.into_iter().map(Into::into).collect(),
    })
}

impl From<CpuidEntry> for saved::CpuidEntry {
    fn from(entry: CpuidEntry) -> Self {
        let CpuidEntry {
            function,
            index,
            flags,
            eax,
            ebx,
            ecx,
            edx,
        } = entry;
        Self {
            function,
            index,
            flags,
            eax,
            ebx,
            ecx,
            edx,
        }
    }
}

impl From<saved::CpuidEntry> for CpuidEntry {
    fn from(entry: saved::CpuidEntry) -> Self {
        let saved::CpuidEntry {
            function,
            index,
            flags,
            eax,
            ebx,
            ecx,
            edx,
        } = entry;
        Self {
            function,
            index,
            flags,
            eax,
            ebx,
            ecx,
            edx,
        }
    }
}
