//! The VM: its memory slots, interrupt controllers and clock. Which pages it wrote is for `tracking` to find.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use kvm_bindings::{
    KVM_PIT_SPEAKER_DUMMY, kvm_clock_data, kvm_irqchip, kvm_pit_config, kvm_pit_state2, kvm_userspace_memory_region,
};
use kvm_ioctls::{IoEventAddress, VcpuFd, VmFd};
use thiserror::Error;
use vmm_sys_util::errno::Error as Errno;
use vmm_sys_util::eventfd::EventFd;

use super::host::Host;
use super::tracking::{Tracking, enable_tracking};
use super::vcpu::{Vcpu, VcpuTraits};
use crate::machine::DirtyMode;
use crate::memory::GuestMemory;

/// An ioctl of KVM failed.
#[derive(Debug, Error)]
#[error("{what}")]
pub struct KvmError {
    what: &'static str,
    #[source]
    source: io::Error,
}

impl KvmError {
    pub(super) fn new(what: &'static str, errno: Errno) -> Self {
        Self {
            what,
            source: io::Error::from_raw_os_error(errno.errno()),
        }
    }

    pub(super) fn io(what: &'static str, source: io::Error) -> Self {
        Self { what, source }
    }

    /// Something was given to KVM that it has no room for.
    pub(super) fn limit(what: &'static str, count: usize) -> Self {
        Self {
            what,
            source: io::Error::other(format!("{count} is more than this host takes")),
        }
    }

    /// The kernel's error number, where the kernel was asked.
    #[must_use]
    pub fn raw_os_error(&self) -> Option<i32> {
        self.source.raw_os_error()
    }
}

/// Three pages that Intel processors need for real mode, and one for its identity map; in the hole, below the firmware's place.
const TSS_ADDRESS: u64 = 0xfffb_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// A VM on KVM. Shared by everything that needs an ioctl on it; all methods may be called from any thread of this process.
#[derive(Debug)]
pub(crate) struct Vm {
    pub(super) fd: VmFd,
    pub(super) memory: GuestMemory,
    pub(super) tracking: Tracking,
    traits: VcpuTraits,
    clock_flags: u32,
}

impl Vm {
    /// Makes the VM with its interrupt controllers and timer, and gives it its memory.
    ///
    /// # Errors
    ///
    /// If the host refuses any of it, or has no dirty ring where one is asked for.
    pub(crate) fn new(host: &Host, memory: &GuestMemory, dirty: DirtyMode) -> Result<Self, KvmError> {
        let fd = host.create_vm()?;
        let failed = |what| move |error| KvmError::new(what, error);
        fd.set_identity_map_address(IDENTITY_MAP_ADDRESS)
            .map_err(failed("place the identity map"))?;
        fd.set_tss_address(TSS_ADDRESS as usize)
            .map_err(failed("place the TSS"))?;
        // Ring and log modes must be chosen before the first vCPU exists.
        let tracking = enable_tracking(&fd, host, memory, dirty)?;
        fd.create_irq_chip().map_err(failed("make the interrupt controllers"))?;
        fd.create_pit2(kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        })
        .map_err(failed("make the interval timer"))?;
        let vm = Self {
            fd,
            memory: memory.clone(),
            tracking,
            traits: VcpuTraits {
                xsave_bytes: host.xsave_bytes,
                sregs2: host.sregs2,
            },
            clock_flags: host.clock_flags,
        };
        vm.set_memory_flags(0)?;
        Ok(vm)
    }

    /// Adds a vCPU. Numbers start at 0 and have no gaps.
    pub(crate) fn create_vcpu(&self, index: u8) -> Result<Vcpu, KvmError> {
        let fd = self
            .fd
            .create_vcpu(u64::from(index))
            .map_err(|error| KvmError::new("make a vCPU", error))?;
        self.tracking.add_vcpu(borrowed(&fd))?;
        Ok(Vcpu::new(fd, index, self.traits))
    }

    /// Raises and lowers an interrupt line, in this call and not on some kernel thread: after it, the edge is in the saved state.
    pub(crate) fn pulse(&self, line: u32) -> Result<(), KvmError> {
        self.raise(line)?;
        self.lower(line)
    }

    /// Raises an interrupt line, which stays so. KVM's saved state does not hold the level: whoever restores a machine raises what
    /// was raised.
    pub(crate) fn raise(&self, line: u32) -> Result<(), KvmError> {
        self.fd
            .set_irq_line(line, true)
            .map_err(|error| KvmError::new("raise an interrupt", error))
    }

    /// Lowers an interrupt line.
    pub(crate) fn lower(&self, line: u32) -> Result<(), KvmError> {
        self.fd
            .set_irq_line(line, false)
            .map_err(|error| KvmError::new("lower an interrupt", error))
    }

    /// Has KVM raise an edge on an interrupt line whenever `event` is signalled; a thread of the kernel's may do it a little later.
    pub(crate) fn connect_interrupt(&self, event: &EventFd, line: u32) -> Result<(), KvmError> {
        self.fd
            .register_irqfd(event, line)
            .map_err(|error| KvmError::new("connect an interrupt", error))
    }

    /// Has KVM signal `event` whenever the guest writes the 32-bit number `value` to `address`, without leaving the guest for long.
    pub(crate) fn connect_doorbell(&self, event: &EventFd, address: u64, value: u32) -> Result<(), KvmError> {
        self.fd
            .register_ioevent(event, &IoEventAddress::Mmio(address), value)
            .map_err(|error| KvmError::new("connect a doorbell", error))
    }

    /// One of the interrupt controllers (KVM_IRQCHIP_*).
    pub(crate) fn irqchip(&self, chip_id: u32) -> Result<kvm_irqchip, KvmError> {
        let mut chip = kvm_irqchip {
            chip_id,
            ..Default::default()
        };
        self.fd
            .get_irqchip(&mut chip)
            .map_err(|error| KvmError::new("read an interrupt controller", error))?;
        Ok(chip)
    }

    /// Sets the interrupt controller that `chip` names.
    pub(crate) fn set_irqchip(&self, chip: &kvm_irqchip) -> Result<(), KvmError> {
        self.fd
            .set_irqchip(chip)
            .map_err(|error| KvmError::new("set an interrupt controller", error))
    }

    /// The interval timer.
    pub(crate) fn pit(&self) -> Result<kvm_pit_state2, KvmError> {
        self.fd
            .get_pit2()
            .map_err(|error| KvmError::new("read the interval timer", error))
    }

    /// Sets the interval timer; it counts from now on.
    pub(crate) fn set_pit(&self, pit: &kvm_pit_state2) -> Result<(), KvmError> {
        self.fd
            .set_pit2(pit)
            .map_err(|error| KvmError::new("set the interval timer", error))
    }

    /// The KVM clock; `realtime` and `host_tsc` are there if its flags say so.
    pub(crate) fn clock(&self) -> Result<kvm_clock_data, KvmError> {
        self.fd
            .get_clock()
            .map_err(|error| KvmError::new("read the KVM clock", error))
    }

    /// Sets the KVM clock.
    pub(crate) fn set_clock(&self, clock: &kvm_clock_data) -> Result<(), KvmError> {
        self.fd
            .set_clock(clock)
            .map_err(|error| KvmError::new("set the KVM clock", error))
    }

    /// Flags of KVM_SET_CLOCK and KVM_GET_CLOCK that this host knows.
    pub(crate) fn clock_flags(&self) -> u32 {
        self.clock_flags
    }

    pub(super) fn set_memory_flags(&self, flags: u32) -> Result<(), KvmError> {
        let slots = self.memory.shape().regions.iter().zip(self.memory.host_ranges());
        for (slot, (region, (address, len))) in slots.enumerate() {
            let region = kvm_userspace_memory_region {
                slot: slot as u32,
                flags,
                guest_phys_addr: region.start,
                memory_size: len as u64,
                userspace_addr: address.expose_provenance() as u64,
            };
            // SAFETY: the range is guest memory, mapped for as long as `self.memory`, and so this VM, lives.
            unsafe { self.fd.set_user_memory_region(region) }
                .map_err(|error| KvmError::new("give the VM its memory", error))?;
        }
        Ok(())
    }
}

fn borrowed(fd: &VcpuFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open for as long as `fd` is borrowed.
    unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }
}
