//! Opening /dev/kvm, saying clearly why it cannot be opened, and asking what it offers.

use std::arch::x86_64;
use std::io;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::time::{SystemTime, UNIX_EPOCH};

use kvm_bindings::{
    KVM_API_VERSION, KVM_CAP_ADJUST_CLOCK, KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL,
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_CAP_SREGS2, KVM_CAP_XSAVE2, KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use rustix::io::Errno;
use thiserror::Error;

use super::vm::KvmError;
use crate::host_files::{self, KvmDenied};
use crate::memory::MemoryError;

/// Why this host cannot run a VM.
#[derive(Debug, Error)]
pub enum HostError {
    /// There is no /dev/kvm.
    #[error(
        "open /dev/kvm: there is none; load the module (kvm_intel, kvm_amd or kvm_pvm), or enable virtualisation in the firmware or outer host"
    )]
    Missing,
    /// This user may not open it.
    #[error(
        "open /dev/kvm: no right to it; it belongs to group {group}: `usermod -aG {group} {user}`, then log in again"
    )]
    NoRight {
        /// The group that the device belongs to.
        group: String,
        /// Who we are.
        user: String,
    },
    /// Opening it failed otherwise.
    #[error("open /dev/kvm")]
    Open(#[source] io::Error),
    /// It speaks another version of the interface.
    #[error("use /dev/kvm: it speaks API version {found}, needed is 12")]
    Version {
        /// What KVM_GET_API_VERSION said.
        found: i32,
    },
    /// Something that this program needs is not there.
    #[error("use /dev/kvm: it lacks {capability}; Linux 5.15 or newer has it")]
    Lacks {
        /// What is missing.
        capability: &'static str,
    },
    /// The host could not be asked.
    #[error("ask /dev/kvm what it offers")]
    Ask(#[source] KvmError),
    /// Not even a small machine's memory can be had.
    #[error("try a small machine")]
    Memory(#[source] MemoryError),
}

/// An open /dev/kvm and what it offers, as far as making VMs depends on it.
#[derive(Debug)]
pub(crate) struct Host {
    kvm: Kvm,
    /// Largest dirty ring of a vCPU in bytes; 0 where there is none.
    pub(crate) dirty_ring_bytes: usize,
    pub(super) dirty_ring_acquire_release: bool,
    /// Whether the dirty log can begin full.
    pub(super) dirty_log_begins_full: bool,
    /// Size of a vCPU's XSAVE area in bytes.
    pub(crate) xsave_bytes: usize,
    pub(super) sregs2: bool,
    /// KVM_CLOCK_* flags that the host knows.
    pub(crate) clock_flags: u32,
    pub(crate) max_vcpus: usize,
    /// Whether TSC-deadline timers work with the in-kernel local APIC.
    pub(crate) tsc_deadline: bool,
}

impl Host {
    /// Opens /dev/kvm and checks that what every VM needs is there.
    ///
    /// # Errors
    ///
    /// What is wrong, with a remedy.
    pub(crate) fn open() -> Result<Self, HostError> {
        let fd = host_files::kvm().map_err(open_error)?;
        // SAFETY: the descriptor is open, of /dev/kvm, and handed over here.
        let kvm = unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) };
        let found = kvm.get_api_version();
        if found != KVM_API_VERSION as i32 {
            return Err(HostError::Version { found });
        }
        for (cap, capability) in [
            (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
            (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
            (Cap::Pit2, "KVM_CAP_PIT2"),
            (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
            (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
            (Cap::Xsave, "KVM_CAP_XSAVE"),
            (Cap::Xcrs, "KVM_CAP_XCRS"),
            (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
            (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
            (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
        ] {
            if !kvm.check_extension(cap) {
                return Err(HostError::Lacks { capability });
            }
        }
        let number = |cap: u32| usize::try_from(kvm.check_extension_raw(cap.into())).unwrap_or(0);
        let (ring, acquire_release) = (number(KVM_CAP_DIRTY_LOG_RING), number(KVM_CAP_DIRTY_LOG_RING_ACQ_REL));
        let manual = number(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2);
        if manual == 0 {
            return Err(HostError::Lacks {
                capability: "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2",
            });
        }
        Ok(Self {
            dirty_ring_bytes: ring.max(acquire_release),
            dirty_ring_acquire_release: acquire_release > 0,
            dirty_log_begins_full: manual & KVM_DIRTY_LOG_INITIALLY_SET as usize != 0,
            xsave_bytes: number(KVM_CAP_XSAVE2).max(size_of::<kvm_bindings::kvm_xsave>()),
            sregs2: number(KVM_CAP_SREGS2) > 0,
            clock_flags: number(KVM_CAP_ADJUST_CLOCK) as u32,
            max_vcpus: kvm.get_max_vcpus(),
            tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
            kvm,
        })
    }

    pub(super) fn create_vm(&self) -> Result<VmFd, KvmError> {
        loop {
            match self.kvm.create_vm() {
                // A signal while the kernel registers its memory notifier.
                Err(error) if error.errno() == libc::EINTR => {}
                other => return other.map_err(|error| KvmError::new("make a VM", error)),
            }
        }
    }

    /// CPUID as the host supports it for guests (KVM_GET_SUPPORTED_CPUID).
    pub(crate) fn supported_cpuid(&self) -> Result<Vec<kvm_cpuid_entry2>, KvmError> {
        self.kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map(|cpuid| cpuid.as_slice().to_vec())
            .map_err(|error| KvmError::new("read the CPUID that the host supports", error))
    }

    /// MSRs that the host says belong into saved state (KVM_GET_MSR_INDEX_LIST).
    pub(crate) fn msr_indices(&self) -> Result<Vec<u32>, KvmError> {
        self.kvm
            .get_msr_index_list()
            .map(|list| list.as_slice().to_vec())
            .map_err(|error| KvmError::new("read the list of MSRs", error))
    }
}

/// What two host clocks said at about the same moment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HostClock {
    /// CLOCK_REALTIME in nanoseconds.
    pub(crate) realtime_ns: u64,
    /// The time stamp counter.
    pub(crate) tsc: u64,
}

impl HostClock {
    /// Reads both now.
    pub(crate) fn now() -> Self {
        let realtime = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            realtime_ns: realtime.as_nanos() as u64,
            tsc: host_tsc(),
        }
    }
}

/// The host's time stamp counter.
pub(crate) fn host_tsc() -> u64 {
    // SAFETY: every x86-64 processor has the instruction, and Linux does not forbid it to programs unless they ask for that.
    unsafe { x86_64::_rdtsc() }
}

/// CPUID as the processor itself answers, on whichever CPU this runs.
pub(crate) fn native_cpuid(function: u32, index: u32) -> [u32; 4] {
    let result = x86_64::__cpuid_count(function, index);
    [result.eax, result.ebx, result.ecx, result.edx]
}

fn open_error(denied: KvmDenied) -> HostError {
    let KvmDenied { error, group, user } = denied;
    match error {
        Errno::NOENT | Errno::NODEV | Errno::NXIO => HostError::Missing,
        Errno::ACCESS | Errno::PERM => HostError::NoRight { group, user },
        other => HostError::Open(other.into()),
    }
}
