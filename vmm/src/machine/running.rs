//! A machine with a guest in it.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use super::blank::{restore_irqchip, restore_vcpus, save_irqchip};
use super::virtio::BALLOON;
use super::{MachineError, Parts, PauseTimes, RunState};
use crate::arch::x86_64::boot::{BootPayload, MemoryBefore, load, renew_generation_id};
use crate::arch::x86_64::layout::GENERATION_IRQ;
use crate::arch::x86_64::time::ClockState;
use crate::arch::x86_64::vcpu_state::TscTarget;
use crate::devices::{BalloonLevel, ButtonPress, CardTraffic, Devices, FreePageHints, Restless, WrittenBlocks};
use crate::host::as_guests_see;
use crate::kvm::{Arming, DirtyClearer, host_tsc};
use crate::memory::{DirtyBitmap, GuestMemory, PAGE_SIZE};
use crate::state::{MachineProfile, MachineState, unit_kinds};
use crate::vcpu::{ANSWER_DEADLINE, Pending, Throttle, VcpuHandle};

/// A machine with a guest, paused or running. It has one owner; dropping it ends the vCPU threads and gives memory back.
#[derive(Debug)]
pub struct Machine {
    // Before the vCPUs that it kicks.
    pub(super) throttle: Option<Throttle>,
    pub(super) parts: Parts,
    pub(super) run_state: RunState,
    kernel: Kernel,
    /// The guest's counter minus the host's, as far as this machine knows; a guest that writes its counter makes it old.
    tsc_offset: u64,
    /// MSRs of the saved state that this host did not take.
    refused_msrs: Vec<(u32, u64)>,
    /// What each vCPU had written when it was last looked at.
    pub(super) written_before: Vec<u64>,
}

/// Whether there is something to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kernel {
    Loaded,
    /// A reset failed half way.
    Missing,
}

/// How long the balloon may take to rest: one request of its queue, each of which gives some thousand pages back at most.
const BALLOON_PATIENCE: Duration = Duration::from_secs(1);

impl Machine {
    pub(super) fn new(parts: Parts, tsc_offset: u64, refused_msrs: Vec<(u32, u64)>) -> Self {
        Self {
            parts,
            run_state: RunState::Paused,
            kernel: Kernel::Loaded,
            tsc_offset,
            refused_msrs,
            throttle: None,
            written_before: Vec::new(),
        }
    }

    /// Lets the vCPUs run. Returns once each of their threads is about to enter the guest; nothing happens if they run already.
    ///
    /// # Errors
    ///
    /// If a vCPU's thread does not answer, or the last reset failed. The machine may then be partly running: pause it.
    pub fn run(&mut self) -> Result<(), MachineError> {
        if self.kernel == Kernel::Missing {
            return Err(MachineError::NotLoaded);
        }
        if self.run_state == RunState::Running {
            return Ok(());
        }
        self.parts.devices.make_live();
        self.run_state = RunState::Running;
        let pending: Vec<_> = self.parts.vcpus.iter().map(VcpuHandle::run).collect();
        wait_for_all(pending)
    }

    /// Stops the vCPUs, finishes what is pending, and makes the devices quiet. Nothing happens if the machine is paused.
    ///
    /// # Errors
    ///
    /// If a vCPU's thread does not answer; the others run on then, and the machine counts as running.
    pub fn pause(&mut self) -> Result<PauseTimes, MachineError> {
        self.pause_until(Instant::now() + ANSWER_DEADLINE)
    }

    /// [`pause`](Self::pause) that is given up at the deadline.
    ///
    /// # Errors
    ///
    /// If a vCPU's thread does not answer or a device does not finish what it has in flight: the machine runs on then.
    pub fn pause_until(&mut self, deadline: Instant) -> Result<PauseTimes, MachineError> {
        if self.run_state == RunState::Paused {
            return Ok(PauseTimes::default());
        }
        let start = Instant::now();
        let pending: Vec<_> = self.parts.vcpus.iter().map(VcpuHandle::pause).collect();
        if let Err(error) = wait_for_all_until(pending, deadline) {
            self.run_on();
            return Err(error);
        }
        let stopped = Instant::now();
        if let Err(Restless(device)) = self.parts.devices.make_quiet(deadline) {
            self.parts.devices.make_live();
            self.run_on();
            return Err(MachineError::DeviceBusy(device));
        }
        self.run_state = RunState::Paused;
        if let Some(throttle) = &self.throttle {
            throttle.release();
        }
        Ok(PauseTimes {
            vcpus: stopped - start,
            drain: stopped.elapsed(),
        })
    }

    /// Those vCPUs that stopped run on, and one that answers late does what is queued behind its pause: as a whole the machine runs as it
    /// did.
    fn run_on(&self) {
        self.parts.vcpus.iter().for_each(|vcpu| drop(vcpu.run()));
    }

    /// Whether the vCPUs run.
    #[must_use]
    pub fn run_state(&self) -> RunState {
        self.run_state
    }

    /// Sets vCPUs and devices back to power-on and loads a kernel. The machine is paused afterwards, whatever it was before.
    ///
    /// Memory is as the guest left it, but for what the kernel covers; tracking of dirty pages goes on, and what is loaded is dirty.
    ///
    /// # Errors
    ///
    /// If it cannot be paused, or what is wrong with the payload: [`run`](Self::run) is then refused until a reset succeeds.
    pub fn reset(&mut self, payload: BootPayload) -> Result<(), MachineError> {
        self.pause()?;
        self.kernel = Kernel::Missing;
        let Parts {
            vcpus,
            vm,
            memory,
            devices,
            pristine,
            ..
        } = &self.parts;
        // Time goes on over a reset.
        restore_vcpus(&self.parts, &pristine.vcpus, |_, _| TscTarget::Keep)?;
        devices.reset();
        restore_irqchip(vm, &pristine.irqchip)?;
        vm.set_pit(&pristine.pit)?;
        let entry = load(memory, self.parts.board(), &payload, MemoryBefore::Used)?;
        vcpus[0].enter(entry).wait()?;
        self.kernel = Kernel::Loaded;
        Ok(())
    }

    /// Reads everything that the machine is besides its memory. Fetch the last dirty pages after this, not before.
    ///
    /// # Errors
    ///
    /// If the machine runs, or KVM refuses.
    pub fn export(&self) -> Result<MachineState, MachineError> {
        if self.run_state == RunState::Running {
            return Err(MachineError::Running("export the state"));
        }
        let Parts {
            vcpus,
            vm,
            devices,
            facts,
            ..
        } = &self.parts;
        let pending: Vec<_> = vcpus.iter().map(VcpuHandle::save).collect();
        // While the vCPUs' threads read theirs.
        let clock = ClockState::save(vm, &facts.boot_id, facts.tsc_khz)?;
        let irqchip = save_irqchip(vm)?;
        let pit = vm.pit()?;
        let devices = devices.save();
        let vcpus = pending.into_iter().map(Pending::wait).collect::<Result<_, _>>()?;
        Ok(MachineState {
            vcpus,
            clock,
            irqchip,
            pit,
            devices,
        })
    }

    /// Gives the guest another generation id and tells it, for a guest that begins again from an earlier state: it then makes its
    /// random numbers and identifiers anew. A guest that moves, or is reset, keeps the one that it has. It also makes itself known to no
    /// network when it runs: under the addresses that it goes on using, that could take frames away from the guest that it was.
    ///
    /// # Errors
    ///
    /// If the machine runs: the guest could still use what it holds unique. Or if the host has no random numbers.
    pub fn renew_generation_id(&mut self) -> Result<(), MachineError> {
        if self.run_state == RunState::Running {
            return Err(MachineError::Running("change the generation id"));
        }
        renew_generation_id(&self.parts.memory)?;
        self.parts.devices.stay_silent();
        Ok(self.parts.vm.pulse(GENERATION_IRQ)?)
    }

    /// Presses the power button, which asks the guest to switch itself off; what it makes of that, and when, is its own. Pressed again
    /// before the guest has seen to it, it is pressed once.
    ///
    /// # Errors
    ///
    /// If the machine is paused.
    pub fn press_power_button(&self) -> Result<ButtonPress, MachineError> {
        if self.run_state == RunState::Paused {
            return Err(MachineError::Paused("press the power button"));
        }
        Ok(self.parts.devices.press_power_button())
    }

    /// Guest memory. Clone it to use it where the machine is not.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.parts.memory
    }

    /// A handle that feeds the guest's console; works wherever the machine is.
    #[must_use]
    pub fn console_input(&self) -> ConsoleInput {
        ConsoleInput {
            devices: Arc::downgrade(&self.parts.devices),
        }
    }

    /// How much memory the guest has given up, to be looked at wherever the machine is.
    #[must_use]
    pub fn balloon(&self) -> BalloonLevel {
        self.parts.balloon.clone()
    }

    /// Asks the guest to give up so many pages of 4 KiB, or to take back what it has given up beyond them. It does so in its own time, or
    /// not at all: [`BalloonLevel`] tells. The wish is part of the state, and survives a reset.
    ///
    /// # Errors
    ///
    /// If the guest keeps the device busy: nothing has changed then.
    pub fn want_balloon(&mut self, pages: u32) -> Result<(), MachineError> {
        let busy = || MachineError::DeviceBusy(BALLOON.to_owned());
        let device = self.parts.devices.virtio(BALLOON).ok_or_else(busy)?;
        let wish = || self.parts.balloon.set_wanted(pages);
        match self.run_state {
            RunState::Running if !device.change_by(Instant::now() + BALLOON_PATIENCE, wish) => Err(busy()),
            RunState::Running => Ok(()),
            RunState::Paused => {
                device.change(wish);
                Ok(())
            }
        }
    }

    /// How many sectors each disk has, as the guest reads it.
    #[must_use]
    pub fn disk_sectors(&self) -> Vec<u64> {
        self.parts.devices.disk_sectors()
    }

    /// Asks the guest which of its pages are free, if it has a driver that tells, in its own time: nobody waits for it. It is asked until
    /// [`end_free_page_hints`](Self::end_free_page_hints) or until somebody else asks, and may keep the pages that it named from being used until then.
    ///
    /// What it names was free after this was called. Who wants to do without these pages must track writes since before.
    pub fn ask_for_free_pages(&self) -> FreePageHints {
        let hints = self.parts.hints.ask();
        self.look_at_hints();
        hints
    }

    /// The guest is asked no more, and what it kept is its own again: it is told when it next runs.
    pub fn end_free_page_hints(&self) {
        self.parts.hints.end();
        self.look_at_hints();
    }

    fn look_at_hints(&self) {
        if let Some(device) = self.parts.devices.virtio(BALLOON) {
            device.look();
        }
    }

    /// Which blocks of the disk with this number the guest writes; `None` if there is no such disk.
    #[must_use]
    pub fn written_blocks(&self, disk: usize) -> Option<WrittenBlocks> {
        self.parts.written.get(disk).cloned()
    }

    /// When frames passed each network card, in the cards' order, to be looked at wherever the machine is.
    #[must_use]
    pub fn traffic(&self) -> &[CardTraffic] {
        &self.parts.traffic
    }

    /// What a host must offer to take this machine over.
    #[must_use]
    pub fn profile(&self) -> MachineProfile {
        let Parts {
            vcpus, memory, facts, ..
        } = &self.parts;
        MachineProfile {
            page_size: PAGE_SIZE,
            shape: memory.shape().clone(),
            vcpus: vcpus.len() as u32,
            cpuid: as_guests_see(self.parts.cpuid(), facts.is_pvm),
            tsc_khz: facts.tsc_khz,
            tsc: host_tsc().wrapping_add(self.tsc_offset),
            boot_id: facts.boot_id.clone(),
            units: unit_kinds(vcpus.len(), &self.parts.devices.virtio_versions()),
            disk_sectors: self.parts.devices.disk_sectors(),
        }
    }

    /// MSRs that this host lists as state but cannot set: they are not saved.
    #[must_use]
    pub fn left_out_msrs(&self) -> &[u32] {
        &self.parts.facts.left_out
    }

    /// MSRs, with their values, of the state that this machine was restored from which this host did not take.
    #[must_use]
    pub fn refused_msrs(&self) -> &[(u32, u64)] {
        &self.refused_msrs
    }

    /// Starts to track writes: every page written after this returned is found by [`fetch_dirty`](Self::fetch_dirty). May be called while
    /// the machine runs; costs the guest a fault at the first write to each page that is armed.
    ///
    /// # Errors
    ///
    /// If KVM refuses.
    pub fn start_dirty_tracking(&mut self, arming: Arming) -> Result<(), MachineError> {
        Ok(self.parts.vm.start_tracking(arming)?)
    }

    /// Gives every page that a vCPU, a device or the loader has written since tracking started, or since it was last re-armed.
    ///
    /// The contract: a written page is never missing; a page may be given although it was not written. With the log, fetching does not
    /// re-arm: a page is in every answer until [`DirtyClearer::rearm`] names it, which must happen *before* the page is read to be sent.
    /// With the ring, and for what devices wrote, fetching re-arms by itself: a page is in one answer, and whoever drops
    /// an answer has lost its pages. With the vCPUs running, a write that happens during the call is in this answer or in the next.
    ///
    /// # Errors
    ///
    /// If tracking is off, or KVM refuses.
    pub fn fetch_dirty(&mut self) -> Result<DirtyBitmap, MachineError> {
        Ok(self.parts.vm.fetch_dirty()?)
    }

    /// The handle with which the threads that send re-arm tracking.
    #[must_use]
    pub fn dirty_clearer(&self) -> DirtyClearer {
        DirtyClearer::new(self.parts.vm.clone())
    }

    /// Stops to track writes. Nothing that was not fetched is kept.
    ///
    /// # Errors
    ///
    /// If KVM refuses.
    pub fn stop_dirty_tracking(&mut self) -> Result<(), MachineError> {
        Ok(self.parts.vm.stop_tracking()?)
    }
}

/// Feeds the guest's console from any thread.
#[derive(Debug, Clone)]
pub struct ConsoleInput {
    /// Not the machine's life: a console that someone still looks at must not keep guest memory mapped.
    devices: Weak<Devices>,
}

impl ConsoleInput {
    /// Gives the port as many of the bytes as it has room for (64 at most) and returns how many. None while the machine is paused:
    /// keep the rest and offer it again. None for ever once the machine is gone.
    #[must_use = "what was not taken must be offered again"]
    pub fn push(&self, bytes: &[u8]) -> usize {
        self.devices.upgrade().map_or(0, |devices| devices.push_input(bytes))
    }
}

/// Waits for all, also when one fails: none may still be on its way when the caller goes on.
fn wait_for_all(pending: Vec<Pending<()>>) -> Result<(), MachineError> {
    wait_for_all_until(pending, Instant::now() + ANSWER_DEADLINE)
}

fn wait_for_all_until(pending: Vec<Pending<()>>, deadline: Instant) -> Result<(), MachineError> {
    let answers: Vec<_> = pending
        .into_iter()
        .map(|pending| pending.wait_until(deadline))
        .collect();
    Ok(answers.into_iter().collect::<Result<(), _>>()?)
}
