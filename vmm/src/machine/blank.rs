//! A machine that holds no guest yet.

use std::sync::Arc;

use kvm_bindings::{KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE};

use super::virtio::{Connected, connect};
use super::{Backends, DirtyMode, EventSink, Facts, Machine, MachineConfig, MachineError, Parts, Pristine};
use crate::arch::x86_64::boot::{BootPayload, MemoryBefore, load};
use crate::arch::x86_64::cpuid::{CpuidEntry, give, of_model, of_vcpu, tell_frequencies};
use crate::arch::x86_64::layout::{ACPI_IRQ, SERIAL_IRQ};
use crate::arch::x86_64::vcpu_state::{SavePlan, TscControl, TscTarget, VcpuState};
use crate::devices::{ConsoleOutput, Devices, DevicesState, InterruptLine, Lines};
use crate::host::{HostCapabilities, as_guests_see, offered_cpuid};
use crate::host_files;
use crate::kvm::{Host, KvmError, Vcpu, Vm, host_tsc};
use crate::memory::{GuestMemory, MemoryOptions};
use crate::state::{IrqchipState, MachineState};
use crate::threads::ThreadHook;
use crate::vcpu::{Pending, VcpuHandle, VcpuSetup};

/// A machine with memory, devices and vCPUs but without a guest: it is booted or restored into, once.
#[derive(Debug)]
pub struct BlankMachine {
    parts: Parts,
    host: HostCapabilities,
}

impl BlankMachine {
    /// Makes the VM, maps memory (without touching it), builds the devices and starts the threads of devices and vCPUs, at rest.
    ///
    /// # Errors
    ///
    /// What this host cannot do of it, by name.
    pub fn new(
        config: &MachineConfig,
        backends: Backends,
        console: Box<dyn ConsoleOutput>,
        events: impl Into<EventSink>,
        threads: &ThreadHook,
    ) -> Result<Self, MachineError> {
        let events = events.into();
        let host = Host::open()?;
        if config.vcpus == 0 || usize::from(config.vcpus) > host.max_vcpus {
            return Err(MachineError::Vcpus {
                asked: config.vcpus,
                limit: host.max_vcpus.min(u8::MAX.into()),
            });
        }
        if config.dirty == DirtyMode::Ring && host.dirty_ring_bytes == 0 {
            return Err(MachineError::NoDirtyRing);
        }
        let mut cpuid = model_cpuid(&host, config)?;
        let memory = GuestMemory::new(MemoryOptions {
            bytes: config.memory_bytes,
            hugetlb: config.hugepages,
            expect_incoming: config.expect_incoming,
        })?;
        let vm = Arc::new(Vm::new(&host, &memory, config.dirty)?);
        let line = |number| Arc::new(KvmLine { vm: vm.clone(), number });
        let lines = Lines {
            serial: line(SERIAL_IRQ),
            power: line(ACPI_IRQ.into()),
        };
        let Connected {
            devices: virtio,
            written,
            traffic,
            balloon,
            hints,
        } = connect(&vm, &memory, backends, threads)?;
        let devices = Arc::new(Devices::new(console, lines, virtio));

        let cpus = (0..config.vcpus)
            .map(|index| vm.create_vcpu(index))
            .collect::<Result<Vec<Vcpu>, _>>()?;
        let tsc_khz = cpus[0].tsc_khz();
        tell_frequencies(&mut cpuid, tsc_khz);
        let cpus = cpus
            .into_iter()
            .map(|vcpu| {
                let cpuid = of_vcpu(&cpuid, vcpu.index(), config.vcpus);
                give(&vcpu, &cpuid).map(|()| (vcpu, cpuid))
            })
            .collect::<Result<Vec<_>, _>>()?;
        for (vcpu, _) in &cpus {
            // KVM looks up who gets an interrupt in a map that it made when each vCPU was made, before that one was in it. Any change of a
            // local APIC makes it anew; without one, the guest's first INIT to the last vCPU would go nowhere.
            vcpu.set_lapic(&vcpu.lapic()?)?;
        }
        // After CPUID: it decides which MSRs there are.
        let (plan, left_out) = SavePlan::probe(&cpus[0].0, &host.msr_indices()?)?;
        let facts = Facts {
            boot_id: host_files::boot_id(),
            tsc_khz,
            is_pvm: host_files::is_pvm(),
            left_out,
        };
        let host = HostCapabilities::of(&host, tsc_khz, plan.tsc)?;
        let plan = Arc::new(plan);
        let vcpus = cpus
            .into_iter()
            .map(|(vcpu, cpuid)| {
                VcpuHandle::start(VcpuSetup {
                    vcpu,
                    cpuid,
                    plan: plan.clone(),
                    vm: vm.clone(),
                    devices: devices.clone(),
                    events: events.clone(),
                    threads: threads.clone(),
                })
            })
            .collect::<Result<Vec<_>, _>>()
            .map_err(MachineError::Thread)?;
        let pristine = Pristine {
            vcpus: save_vcpus(&vcpus)?,
            irqchip: save_irqchip(&vm)?,
            pit: vm.pit()?,
        };
        Ok(Self {
            parts: Parts {
                vcpus,
                vm,
                memory,
                devices,
                written,
                traffic,
                balloon,
                hints,
                plan,
                facts,
                pristine,
            },
            host,
        })
    }

    /// Guest memory: all zero until someone fills it.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.parts.memory
    }

    /// What this host offers, found out with this machine: what [`host`](crate::host()) tells, without a VM made for it.
    #[must_use]
    pub fn host(&self) -> &HostCapabilities {
        &self.host
    }

    /// MSRs that this host lists as state but cannot set: they are neither saved nor restored.
    #[must_use]
    pub fn left_out_msrs(&self) -> &[u32] {
        &self.parts.facts.left_out
    }

    /// Loads a kernel and puts the first vCPU in front of it. The machine is paused.
    ///
    /// # Errors
    ///
    /// What is wrong with the payload.
    pub fn boot(self, payload: BootPayload) -> Result<Machine, MachineError> {
        let entry = load(&self.parts.memory, self.parts.board(), &payload, MemoryBefore::Fresh)?;
        self.parts.vcpus[0].enter(entry).wait()?;
        let first = &self.parts.pristine.vcpus[0];
        let tsc_offset = match self.parts.plan.tsc {
            TscControl::Fixed => 0,
            TscControl::Offset | TscControl::Write => first.tsc_offset.unwrap_or(0),
        };
        Ok(Machine::new(self.parts, tsc_offset, Vec::new()))
    }

    /// Becomes the machine whose state this is, its guest's time advanced by what has passed. The machine is paused; its memory is the
    /// caller's to fill, before or after.
    ///
    /// # Errors
    ///
    /// If the state is of a machine with other vCPUs, or the host refuses part of it. Nothing of the machine is left then.
    pub fn restore(self, state: &MachineState) -> Result<Machine, MachineError> {
        let parts = self.parts;
        if state.vcpus.len() != parts.vcpus.len() {
            return Err(MachineError::State(format!(
                "it has {} vCPUs, the machine {}",
                state.vcpus.len(),
                parts.vcpus.len()
            )));
        }
        // Clock first: the vCPUs' counters move by what it says has passed.
        let shift = state.clock.restore(&parts.vm, &parts.facts.boot_id)?;
        let refused = restore_vcpus(&parts, &state.vcpus, |state, plan| {
            shift.target(plan.tsc, state.tsc_offset, state.tsc)
        })?;
        // A device that is built anew may raise its interrupt; whether that is pending is for the controllers, set last, to say. A line
        // that a device keeps raised must be so before: their saved state does not hold it.
        restore_devices(&parts, &state.devices)?;
        restore_irqchip(&parts.vm, &state.irqchip)?;
        parts.vm.set_pit(&state.pit)?;
        let first = &state.vcpus[0];
        let tsc_offset = match shift.target(parts.plan.tsc, first.tsc_offset, first.tsc) {
            TscTarget::Keep => 0,
            TscTarget::Offset(offset) => offset,
            TscTarget::Value(value) => value.wrapping_sub(host_tsc()),
        };
        Ok(Machine::new(parts, tsc_offset, refused))
    }
}

fn model_cpuid(host: &Host, config: &MachineConfig) -> Result<Vec<CpuidEntry>, MachineError> {
    let supported = offered_cpuid(host)?;
    let seen = as_guests_see(&supported, host_files::is_pvm());
    of_model(&supported, &seen, config.cpu, host.tsc_deadline).map_err(|missing| MachineError::CpuModel {
        model: config.cpu,
        missing,
    })
}

/// Reads all vCPUs, each on its own thread, at the same time.
pub(super) fn save_vcpus(vcpus: &[VcpuHandle]) -> Result<Vec<VcpuState>, MachineError> {
    let pending: Vec<_> = vcpus.iter().map(VcpuHandle::save).collect();
    Ok(pending.into_iter().map(Pending::wait).collect::<Result<_, _>>()?)
}

/// Writes all vCPUs, each on its own thread, at the same time; returns the MSRs that the host did not take.
pub(super) fn restore_vcpus(
    parts: &Parts,
    states: &[VcpuState],
    target: impl Fn(&VcpuState, &SavePlan) -> TscTarget,
) -> Result<Vec<(u32, u64)>, MachineError> {
    let pending: Vec<_> = parts
        .vcpus
        .iter()
        .zip(states)
        .map(|(vcpu, state)| vcpu.restore(state.clone(), target(state, &parts.plan)))
        .collect();
    let mut refused = Vec::new();
    for pending in pending {
        refused.extend(pending.wait()?);
    }
    Ok(refused)
}

fn restore_devices(parts: &Parts, state: &DevicesState) -> Result<(), MachineError> {
    parts
        .devices
        .restore(state)
        .map_err(|error| MachineError::State(error.to_string()))
}

pub(super) fn save_irqchip(vm: &Vm) -> Result<IrqchipState, KvmError> {
    Ok(IrqchipState {
        pic_primary: vm.irqchip(KVM_IRQCHIP_PIC_MASTER)?,
        pic_secondary: vm.irqchip(KVM_IRQCHIP_PIC_SLAVE)?,
        ioapic: vm.irqchip(KVM_IRQCHIP_IOAPIC)?,
    })
}

pub(super) fn restore_irqchip(vm: &Vm, state: &IrqchipState) -> Result<(), KvmError> {
    let IrqchipState {
        pic_primary,
        pic_secondary,
        ioapic,
    } = state;
    let chips = [
        (KVM_IRQCHIP_PIC_MASTER, pic_primary),
        (KVM_IRQCHIP_PIC_SLAVE, pic_secondary),
        (KVM_IRQCHIP_IOAPIC, ioapic),
    ];
    for (chip_id, chip) in chips {
        // The number in the saved bytes is not trusted.
        vm.set_irqchip(&kvm_bindings::kvm_irqchip { chip_id, ..*chip })?;
    }
    Ok(())
}

/// A device's interrupt line into KVM's controllers.
#[derive(Debug)]
struct KvmLine {
    vm: Arc<Vm>,
    number: u32,
}

impl InterruptLine for KvmLine {
    fn raise(&self) {
        if let Err(error) = self.vm.raise(self.number) {
            tracing::error!(line = self.number, %error, "interrupt lost");
        }
    }

    fn lower(&self) {
        if let Err(error) = self.vm.lower(self.number) {
            tracing::error!(line = self.number, %error, "interrupt stuck");
        }
    }
}
