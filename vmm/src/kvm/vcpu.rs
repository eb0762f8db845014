//! One vCPU: entering the guest, and reading and writing what it is made of.

use std::sync::atomic::AtomicU8;

use kvm_bindings::{
    CpuId, KVM_EXIT_DIRTY_RING_FULL, KVM_EXIT_IO_IN, KVM_EXIT_IO_OUT, Msrs, kvm_cpuid_entry2, kvm_debugregs,
    kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_run, kvm_sregs, kvm_sregs2, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::emulation::not_emulated;
use super::uapi;
use super::vm::KvmError;

/// A vCPU of a VM. All calls go through the thread that runs it: the kernel serialises them anyway.
#[derive(Debug)]
pub(crate) struct Vcpu {
    fd: VcpuFd,
    index: u8,
    traits: VcpuTraits,
}

/// What the host offers for its vCPUs.
#[derive(Debug, Clone, Copy)]
pub(super) struct VcpuTraits {
    /// Size of the XSAVE area in bytes, 4096 or more.
    pub(super) xsave_bytes: usize,
    /// Whether KVM_GET_SREGS2 exists.
    pub(super) sregs2: bool,
}

/// Why the guest was left.
#[derive(Debug)]
pub(crate) enum Exit<'a> {
    /// A signal or the immediate-exit mark; nothing is pending.
    Interrupted,
    /// The guest reads `data.len() / size` times from a port; fill in `data` before entering again.
    PortIn { port: u16, size: usize, data: &'a mut [u8] },
    /// The guest wrote to a port, `data.len() / size` times.
    PortOut { port: u16, size: usize, data: &'a [u8] },
    /// The guest reads where no memory is; fill in `data` before entering again.
    MmioRead { address: u64, data: &'a mut [u8] },
    /// The guest wrote where no memory is.
    MmioWrite { address: u64, data: &'a [u8] },
    /// The vCPU's dirty ring is full: harvest it, then enter again.
    DirtyRingFull,
    /// Triple fault.
    Shutdown,
    /// The guest cannot go on; in words.
    Failed(String),
}

/// What left the guest, without what borrows from the shared page.
enum Kind {
    Interrupted,
    Port,
    MmioRead,
    MmioWrite,
    RingFull,
    Shutdown,
    Internal,
    Failed(String),
}

impl Vcpu {
    pub(super) fn new(fd: VcpuFd, index: u8, traits: VcpuTraits) -> Self {
        Self { fd, index, traits }
    }

    /// The vCPU's number, 0 for the one that boots.
    pub(crate) fn index(&self) -> u8 {
        self.index
    }

    /// The byte in the shared page that makes KVM_RUN return at once while it is not 0; valid as long as this vCPU.
    pub(crate) fn immediate_exit_mark(&mut self) -> *const AtomicU8 {
        (&raw mut self.fd.get_kvm_run().immediate_exit).cast_const().cast()
    }

    /// Enters the guest until it leaves.
    ///
    /// # Errors
    ///
    /// If the kernel refuses to run it at all.
    pub(crate) fn run(&mut self) -> Result<Exit<'_>, KvmError> {
        let kind = match self.fd.run() {
            Ok(VcpuExit::IoIn(..) | VcpuExit::IoOut(..)) => Kind::Port,
            Ok(VcpuExit::MmioRead(..)) => Kind::MmioRead,
            Ok(VcpuExit::MmioWrite(..)) => Kind::MmioWrite,
            // Not one of ours to answer: both only say that something wants attention, and entering again is right.
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen) => Kind::Interrupted,
            Ok(VcpuExit::Shutdown) => Kind::Shutdown,
            Ok(VcpuExit::InternalError) => Kind::Internal,
            Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => Kind::RingFull,
            Ok(VcpuExit::FailEntry(reason, cpu)) => Kind::Failed(format!(
                "the processor refused to enter the guest: reason {reason:#x} on CPU {cpu}"
            )),
            Ok(other) => Kind::Failed(format!(
                "KVM_RUN returned an exit that nothing here asked for: {other:?}"
            )),
            // EAGAIN: a vCPU that waited for its start was woken; it enters on the next call.
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => Kind::Interrupted,
            Err(error) => return Err(KvmError::new("run the vCPU", error)),
        };
        Ok(match kind {
            Kind::Interrupted => Exit::Interrupted,
            Kind::Port => self.port_exit(),
            Kind::MmioRead => {
                let (address, data) = self.mmio_access();
                Exit::MmioRead { address, data }
            }
            Kind::MmioWrite => {
                let (address, data) = self.mmio_access();
                Exit::MmioWrite { address, data }
            }
            Kind::RingFull => Exit::DirtyRingFull,
            Kind::Shutdown => Exit::Shutdown,
            Kind::Internal => Exit::Failed(self.internal_error()),
            Kind::Failed(reason) => Exit::Failed(reason),
        })
    }

    /// kvm-ioctls drops the size of one access, without which `rep outsb` and `outw` look the same.
    fn port_exit(&mut self) -> Exit<'_> {
        let run = self.fd.get_kvm_run();
        // SAFETY: the exit reason, which led here, is KVM_EXIT_IO: this is the live member.
        let io = unsafe { run.__bindgen_anon_1.io };
        let (port, size) = (io.port, usize::from(io.size.max(1)));
        let len = size * io.count as usize;
        let start = (&raw mut *run).cast::<u8>().wrapping_add(io.data_offset as usize);
        // SAFETY: the kernel placed `len` bytes at `data_offset` of the shared mapping, of which `run` is the start; the borrow of
        // `self` keeps anyone from entering the guest, and so the kernel from changing them, while the slice lives.
        let data = unsafe { std::slice::from_raw_parts_mut(start, len) };
        match u32::from(io.direction) {
            KVM_EXIT_IO_IN => Exit::PortIn { port, size, data },
            KVM_EXIT_IO_OUT => Exit::PortOut { port, size, data },
            other => Exit::Failed(format!("KVM reported port access in direction {other}")),
        }
    }

    fn mmio_access(&mut self) -> (u64, &mut [u8]) {
        // SAFETY: the exit reason, which led here, is KVM_EXIT_MMIO: this is the live member.
        let mmio = unsafe { &mut self.fd.get_kvm_run().__bindgen_anon_1.mmio };
        let len = (mmio.len as usize).min(mmio.data.len());
        (mmio.phys_addr, &mut mmio.data[..len])
    }

    fn internal_error(&mut self) -> String {
        const EMULATION: u32 = kvm_bindings::KVM_INTERNAL_ERROR_EMULATION;
        let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
        let run: &kvm_run = self.fd.get_kvm_run();
        // SAFETY: the exit reason, which led here, is KVM_EXIT_INTERNAL_ERROR: this is the live member, all integers.
        let internal = unsafe { run.__bindgen_anon_1.internal };
        let words = &internal.data[..(internal.ndata as usize).min(internal.data.len())];
        if internal.suberror != EMULATION {
            return format!(
                "KVM reported internal error {} at rip {rip:#x}, data {words:x?}",
                internal.suberror
            );
        }
        // `struct emulation_failure` overlays the data: flags, then the length and up to 15 bytes of the instruction.
        let bytes: Vec<u8> = words.iter().skip(1).flat_map(|word| word.to_le_bytes()).collect();
        let has_bytes = words.first().is_some_and(|flags| flags & 1 == 1);
        match bytes.split_first() {
            Some((len, rest)) if has_bytes => not_emulated(rip, &rest[..usize::from(*len).min(rest.len())]),
            _ => not_emulated(rip, &[]),
        }
    }

    /// Tells the guest that its watchdogs must not count the time that it was stopped; no error if it has no KVM clock.
    pub(crate) fn announce_pause(&self) {
        let _ = self.fd.kvmclock_ctrl();
    }

    pub(crate) fn set_cpuid(&self, entries: &[kvm_cpuid_entry2]) -> Result<(), KvmError> {
        let cpuid = CpuId::from_entries(entries).map_err(|_| KvmError::limit("set CPUID", entries.len()))?;
        self.fd
            .set_cpuid2(&cpuid)
            .map_err(|error| KvmError::new("set CPUID", error))
    }

    pub(crate) fn regs(&self) -> Result<kvm_regs, KvmError> {
        self.fd
            .get_regs()
            .map_err(|error| KvmError::new("read registers", error))
    }

    pub(crate) fn set_regs(&self, regs: &kvm_regs) -> Result<(), KvmError> {
        self.fd
            .set_regs(regs)
            .map_err(|error| KvmError::new("set registers", error))
    }

    /// Special registers; on hosts without KVM_GET_SREGS2 without the PDPTRs.
    pub(crate) fn sregs(&self) -> Result<kvm_sregs2, KvmError> {
        if self.traits.sregs2 {
            uapi::sregs2(&self.fd)
        } else {
            self.fd.get_sregs().map(|sregs| widen(&sregs))
        }
        .map_err(|error| KvmError::new("read special registers", error))
    }

    pub(crate) fn set_sregs(&self, sregs: &kvm_sregs2) -> Result<(), KvmError> {
        if self.traits.sregs2 {
            uapi::set_sregs2(&self.fd, sregs)
        } else {
            self.fd.set_sregs(&narrow(sregs))
        }
        .map_err(|error| KvmError::new("set special registers", error))
    }

    pub(crate) fn xcrs(&self) -> Result<kvm_xcrs, KvmError> {
        self.fd.get_xcrs().map_err(|error| KvmError::new("read XCRs", error))
    }

    pub(crate) fn set_xcrs(&self, xcrs: &kvm_xcrs) -> Result<(), KvmError> {
        self.fd.set_xcrs(xcrs).map_err(|error| KvmError::new("set XCRs", error))
    }

    pub(crate) fn xsave(&self) -> Result<Vec<u8>, KvmError> {
        if self.traits.xsave_bytes > size_of::<kvm_bindings::kvm_xsave>() {
            return uapi::xsave(&self.fd, self.traits.xsave_bytes).map_err(|error| KvmError::new("read XSAVE", error));
        }
        let area = self
            .fd
            .get_xsave()
            .map_err(|error| KvmError::new("read XSAVE", error))?;
        Ok(area.region.iter().flat_map(|word| word.to_le_bytes()).collect())
    }

    /// Sets the XSAVE area. One from a host with a larger area fits if what is too much is zero.
    pub(crate) fn set_xsave(&self, area: &[u8]) -> Result<(), KvmError> {
        let size = self.traits.xsave_bytes;
        let too_much = area.get(size..).unwrap_or(&[]);
        if too_much.iter().any(|byte| *byte != 0) {
            return Err(KvmError::limit("set XSAVE", area.len()));
        }
        let mut padded;
        let area = if area.len() < size {
            padded = area.to_vec();
            padded.resize(size, 0);
            &padded
        } else {
            area
        };
        uapi::set_xsave(&self.fd, size, area).map_err(|error| KvmError::new("set XSAVE", error))
    }

    pub(crate) fn debug_registers(&self) -> Result<kvm_debugregs, KvmError> {
        self.fd
            .get_debug_regs()
            .map_err(|error| KvmError::new("read debug registers", error))
    }

    pub(crate) fn set_debug_registers(&self, registers: &kvm_debugregs) -> Result<(), KvmError> {
        self.fd
            .set_debug_regs(registers)
            .map_err(|error| KvmError::new("set debug registers", error))
    }

    pub(crate) fn lapic(&self) -> Result<kvm_lapic_state, KvmError> {
        self.fd
            .get_lapic()
            .map_err(|error| KvmError::new("read the local APIC", error))
    }

    pub(crate) fn set_lapic(&self, lapic: &kvm_lapic_state) -> Result<(), KvmError> {
        self.fd
            .set_lapic(lapic)
            .map_err(|error| KvmError::new("set the local APIC", error))
    }

    pub(crate) fn events(&self) -> Result<kvm_vcpu_events, KvmError> {
        self.fd
            .get_vcpu_events()
            .map_err(|error| KvmError::new("read pending events", error))
    }

    pub(crate) fn set_events(&self, events: &kvm_vcpu_events) -> Result<(), KvmError> {
        self.fd
            .set_vcpu_events(events)
            .map_err(|error| KvmError::new("set pending events", error))
    }

    pub(crate) fn mp_state(&self) -> Result<u32, KvmError> {
        self.fd
            .get_mp_state()
            .map(|state| state.mp_state)
            .map_err(|error| KvmError::new("read the MP state", error))
    }

    pub(crate) fn set_mp_state(&self, mp_state: u32) -> Result<(), KvmError> {
        self.fd
            .set_mp_state(kvm_mp_state { mp_state })
            .map_err(|error| KvmError::new("set the MP state", error))
    }

    /// Reads these registers, as many as there are before the first that KVM cannot read.
    pub(crate) fn msrs(&self, indices: &[u32]) -> Result<Vec<(u32, u64)>, KvmError> {
        let entries: Vec<_> = indices
            .iter()
            .map(|index| kvm_msr_entry {
                index: *index,
                ..Default::default()
            })
            .collect();
        let mut msrs = Msrs::from_entries(&entries).map_err(|_| KvmError::limit("read MSRs", entries.len()))?;
        let count = self
            .fd
            .get_msrs(&mut msrs)
            .map_err(|error| KvmError::new("read MSRs", error))?;
        Ok(msrs.as_slice()[..count.min(entries.len())]
            .iter()
            .map(|entry| (entry.index, entry.data))
            .collect())
    }

    /// Sets these registers in order and returns how many there are before the first that KVM refuses.
    pub(crate) fn set_msrs(&self, values: &[(u32, u64)]) -> Result<usize, KvmError> {
        let entries: Vec<_> = values
            .iter()
            .map(|(index, data)| kvm_msr_entry {
                index: *index,
                data: *data,
                ..Default::default()
            })
            .collect();
        let msrs = Msrs::from_entries(&entries).map_err(|_| KvmError::limit("set MSRs", entries.len()))?;
        self.fd
            .set_msrs(&msrs)
            .map_err(|error| KvmError::new("set MSRs", error))
    }

    /// KVM_VCPU_TSC_OFFSET; `None` where the host does not know it.
    pub(crate) fn tsc_offset(&self) -> Option<u64> {
        uapi::tsc_offset(&self.fd).ok()
    }

    pub(crate) fn set_tsc_offset(&self, offset: u64) -> Result<(), KvmError> {
        uapi::set_tsc_offset(&self.fd, offset).map_err(|error| KvmError::new("set the TSC offset", error))
    }

    /// Frequency of the guest's time stamp counter in kHz; 0 where the host's is unstable.
    pub(crate) fn tsc_khz(&self) -> u32 {
        self.fd.get_tsc_khz().unwrap_or(0)
    }
}

fn widen(sregs: &kvm_sregs) -> kvm_sregs2 {
    let kvm_sregs {
        cs,
        ds,
        es,
        fs,
        gs,
        ss,
        tr,
        ldt,
        gdt,
        idt,
        cr0,
        cr2,
        cr3,
        cr4,
        cr8,
        efer,
        apic_base,
        // Pending interrupts of an interrupt controller in user space; ours is in the kernel.
        interrupt_bitmap: _,
    } = *sregs;
    kvm_sregs2 {
        cs,
        ds,
        es,
        fs,
        gs,
        ss,
        tr,
        ldt,
        gdt,
        idt,
        cr0,
        cr2,
        cr3,
        cr4,
        cr8,
        efer,
        apic_base,
        flags: 0,
        pdptrs: [0; 4],
    }
}

fn narrow(sregs: &kvm_sregs2) -> kvm_sregs {
    let kvm_sregs2 {
        cs,
        ds,
        es,
        fs,
        gs,
        ss,
        tr,
        ldt,
        gdt,
        idt,
        cr0,
        cr2,
        cr3,
        cr4,
        cr8,
        efer,
        apic_base,
        // KVM loads them from guest memory when it sets the older structure.
        flags: _,
        pdptrs: _,
    } = *sregs;
    kvm_sregs {
        cs,
        ds,
        es,
        fs,
        gs,
        ss,
        tr,
        ldt,
        gdt,
        idt,
        cr0,
        cr2,
        cr3,
        cr4,
        cr8,
        efer,
        apic_base,
        interrupt_bitmap: [0; 4],
    }
}
