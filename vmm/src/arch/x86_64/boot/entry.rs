//! The registers with which the first vCPU starts.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs2};

use super::super::msr::{IA32_MISC_ENABLE, MTRR_DEFAULT_TYPE};
use super::boot_params::{CODE_SELECTOR, DATA_SELECTOR, GDT_BYTES, LongMode};
use crate::kvm::{KvmError, Vcpu};

/// Where and how the first vCPU starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EntryPoint {
    /// 32-bit protected mode, no paging.
    Pvh {
        /// Physical address of its first instruction.
        rip: u64,
        /// Physical address of the start information, for EBX.
        start_info: u64,
    },
    /// 64-bit mode.
    Linux64 {
        /// Physical address of its first instruction.
        rip: u64,
        /// Physical address of the boot parameters, for RSI.
        boot_params: u64,
        /// Where its tables lie.
        tables: LongMode,
    },
}

/// Sets the registers of the first vCPU, fresh from its creation or set back to that, to the start of a kernel.
///
/// # Errors
///
/// If KVM refuses.
pub(crate) fn enter(vcpu: &Vcpu, entry: EntryPoint) -> Result<(), KvmError> {
    let sregs = vcpu.sregs()?;
    let regs = kvm_regs {
        // Bit 1 is always one.
        rflags: 2,
        ..Default::default()
    };
    let (sregs, regs) = match entry {
        EntryPoint::Pvh { rip, start_info } => (
            protected_mode(&sregs),
            kvm_regs {
                rip,
                rbx: start_info,
                ..regs
            },
        ),
        EntryPoint::Linux64 {
            rip,
            boot_params,
            tables,
        } => (
            long_mode(&sregs, tables),
            kvm_regs {
                rip,
                rsi: boot_params,
                ..regs
            },
        ),
    };
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&regs)?;
    // What firmware would have done; a host that does not know one of them leaves the guest a little slower.
    for register in [(IA32_MISC_ENABLE, 1), (MTRR_DEFAULT_TYPE, 0x806)] {
        vcpu.set_msrs(&[register])?;
    }
    Ok(())
}

/// CR0: protection, and the bit that is always one.
const PROTECTED: u64 = 0x11;
/// CR0: paging.
const PAGING: u64 = 1 << 31;
/// CR4: page tables with entries of 8 bytes.
const PHYSICAL_ADDRESS_EXTENSION: u64 = 1 << 5;
/// EFER: long mode enabled, and active.
const LONG_MODE: u64 = 1 << 8 | 1 << 10;

fn protected_mode(sregs: &kvm_sregs2) -> kvm_sregs2 {
    let data = flat(DATA_SELECTOR, 3);
    kvm_sregs2 {
        cs: flat(CODE_SELECTOR, 11),
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: kvm_segment {
            base: 0,
            limit: 0x67,
            selector: 0x20,
            type_: 11,
            present: 1,
            ..Default::default()
        },
        // The guest brings its own before it loads a segment or takes an interrupt.
        gdt: kvm_dtable::default(),
        idt: kvm_dtable::default(),
        cr0: PROTECTED,
        cr3: 0,
        cr4: 0,
        efer: 0,
        ..*sregs
    }
}

fn long_mode(sregs: &kvm_sregs2, tables: LongMode) -> kvm_sregs2 {
    let protected = protected_mode(sregs);
    kvm_sregs2 {
        cs: kvm_segment {
            db: 0,
            l: 1,
            ..protected.cs
        },
        // The protocol asks for descriptors that the guest can load again.
        gdt: kvm_dtable {
            base: tables.gdt,
            limit: GDT_BYTES - 1,
            ..Default::default()
        },
        cr0: PROTECTED | PAGING,
        cr3: tables.page_tables,
        cr4: PHYSICAL_ADDRESS_EXTENSION,
        efer: LONG_MODE,
        ..protected
    }
}

/// A segment that covers the first 4 GiB.
fn flat(selector: u16, type_: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}
