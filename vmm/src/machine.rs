//! A machine: memory, vCPUs and devices under one owner.
//!
//! ```text
//!                 boot(payload)
//!   BlankMachine ───────────────► Machine: paused ◄──── pause ──── running
//!                 restore(state)           │   └───────── run ───────▲
//!                                          └── export, reset
//! ```
//!
//! Stopping goes: vCPUs (with their pending exits finished), devices, then whoever asks exports, and only then fetches the last dirty pages.
//! Resuming is the mirror image. Others than the owner hold handles: guest memory, console input, the dirty clearer.

mod backends;
mod blank;
mod losses;
mod running;
mod throttling;
mod virtio;

use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use thiserror::Error;

pub use self::backends::{Backends, DiskAccess, DiskBackend, NicBackend};
pub use self::blank::BlankMachine;
pub use self::losses::Losses;
pub use self::running::{ConsoleInput, Machine};
pub use self::throttling::ThrottledVcpus;
use crate::arch::x86_64::board::Board;
use crate::arch::x86_64::boot::LoadError;
use crate::arch::x86_64::cpuid::CpuidEntry;
use crate::arch::x86_64::vcpu_state::{SavePlan, VcpuState};
use crate::devices::{BalloonLevel, CardTraffic, Devices, HintDesk, WrittenBlocks};
use crate::kvm::{HostError, KvmError, Vm};
use crate::memory::{GuestMemory, MemoryError};
use crate::state::IrqchipState;
use crate::vcpu::{VcpuError, VcpuHandle};

/// What a machine is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineConfig {
    /// Guest memory in bytes, a multiple of 4 KiB, with `hugepages` of 2 MiB.
    pub memory_bytes: u64,
    /// Number of vCPUs, at least 1.
    pub vcpus: u8,
    /// What the guest sees as its processor.
    pub cpu: CpuModel,
    /// How written pages are found.
    pub dirty: DirtyMode,
    /// Take memory from the host's pool of huge pages (hugetlbfs) instead of advising them.
    pub hugepages: bool,
    /// A migration will fill the memory: huge pages are then advised block by block ([`GuestMemory::advise_huge`]) and not for all of it.
    pub expect_incoming: bool,
}

/// A processor model.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum CpuModel {
    /// Everything that this host offers.
    #[default]
    Host,
    /// The level x86-64-v2 of the psABI: SSE4.2, POPCNT, CMPXCHG16B.
    X86_64V2,
    /// The level x86-64-v3 of the psABI: AVX2, FMA, BMI2.
    X86_64V3,
}

/// How KVM tells which pages were written. Fixed when the machine is made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum DirtyMode {
    /// A bitmap of all pages, cleared range by range.
    #[default]
    Log,
    /// A ring of page numbers per vCPU.
    Ring,
}

/// Something that happened in a running machine, without anyone asking.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MachineEvent {
    /// The guest asked for a reset; the vCPU that did stands still until [`Machine::reset`] or [`Machine::run`].
    ResetRequested,
    /// The guest switched itself off; the vCPU that did stands still.
    PoweredOff,
    /// The guest says that it panicked. It goes on running; told once between resets.
    Panicked,
    /// The guest can go on no more (triple fault); the vCPU stands still.
    TripleFault,
    /// KVM cannot run the guest any further; the vCPU stands still.
    Failed {
        /// Which vCPU.
        vcpu: u8,
        /// Why, with the bytes of an instruction that could not be emulated.
        reason: String,
    },
}

/// Where a machine's events go. It is called on a vCPU's thread before that vCPU stands still, so once
/// [`Machine::pause`] has returned, whatever ended the guest has been told; it must not block.
#[derive(Clone)]
pub struct EventSink(Arc<dyn Fn(MachineEvent) + Send + Sync>);

impl EventSink {
    /// Events are told to `listener`.
    pub fn new(listener: impl Fn(MachineEvent) + Send + Sync + 'static) -> Self {
        Self(Arc::new(listener))
    }

    /// Tells an event.
    pub(crate) fn tell(&self, event: MachineEvent) {
        (self.0)(event);
    }
}

impl From<Sender<MachineEvent>> for EventSink {
    /// Whoever does not listen does not want to know.
    fn from(sender: Sender<MachineEvent>) -> Self {
        Self::new(move |event| drop(sender.send(event)))
    }
}

impl std::fmt::Debug for EventSink {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("EventSink")
    }
}

/// Whether the vCPUs run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunState {
    /// All vCPUs stand still, nothing is pending, no device takes input.
    Paused,
    /// The vCPUs run, apart from one that stopped by an event.
    Running,
}

/// How long the parts of a pause took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PauseTimes {
    /// Until every vCPU stood still with its pending exit finished.
    pub vcpus: Duration,
    /// Until the devices were quiet.
    pub drain: Duration,
}

/// Something that was asked of a machine failed.
#[derive(Debug, Error)]
pub enum MachineError {
    /// This host cannot run machines.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The machine cannot have so many vCPUs.
    #[error("make a machine with {asked} vCPUs: 1 to {limit} are possible")]
    Vcpus {
        /// What was asked for.
        asked: u8,
        /// The host's limit.
        limit: usize,
    },
    /// The host's processor is below the model.
    #[error("make a machine with CPU model {model:?}: the host lacks {}", missing.join(", "))]
    CpuModel {
        /// The model.
        model: CpuModel,
        /// Names of the features that it lacks.
        missing: Vec<String>,
    },
    /// The host has no dirty ring.
    #[error("make a machine that tracks writes with the dirty ring: the host has none (Linux 5.11 or newer has it)")]
    NoDirtyRing,
    /// Guest memory could not be had.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// A thread could not be started.
    #[error("start a vCPU's thread")]
    Thread(#[source] std::io::Error),
    /// The kernel or initrd could not be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A vCPU did not answer within seconds: its thread hangs.
    #[error("command vCPU {0}: its thread does not answer")]
    VcpuSilent(u8),
    /// A device has something in flight that does not end: its disk hangs.
    #[error("bring device {0} to rest: what it has in flight does not end")]
    DeviceBusy(String),
    /// A device could not be made.
    #[error("make device {device}")]
    Device {
        /// Its name.
        device: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// There are not so many places for devices.
    #[error("make a machine with {asked} virtio devices: {limit} are possible")]
    TooManyDevices {
        /// What was asked for.
        asked: usize,
        /// How many there can be.
        limit: usize,
    },
    /// The state does not fit the machine.
    #[error("restore the state: {0}")]
    State(String),
    /// It is only possible while the machine is paused.
    #[error("{0}: the machine runs")]
    Running(&'static str),
    /// It is only possible while the machine runs.
    #[error("{0}: the machine is paused")]
    Paused(&'static str),
    /// A reset failed before; only another reset helps.
    #[error("run the machine: no kernel is loaded since its last reset failed")]
    NotLoaded,
}

impl From<VcpuError> for MachineError {
    fn from(error: VcpuError) -> Self {
        match error {
            VcpuError::Kvm(error) => Self::Kvm(error),
            VcpuError::Silent(index) => Self::VcpuSilent(index),
            VcpuError::Running => Self::Running("command a vCPU"),
        }
    }
}

/// What blank and living machines are made of.
#[derive(Debug)]
struct Parts {
    // First: its threads use everything else.
    vcpus: Vec<VcpuHandle>,
    vm: Arc<Vm>,
    memory: GuestMemory,
    devices: Arc<Devices>,
    /// Of each disk.
    written: Vec<WrittenBlocks>,
    /// Of each network card.
    traffic: Vec<CardTraffic>,
    balloon: BalloonLevel,
    hints: HintDesk,
    plan: Arc<SavePlan>,
    facts: Facts,
    /// What a reset goes back to: read before the first kernel was loaded.
    pristine: Pristine,
}

/// What does not change over a machine's life.
#[derive(Debug)]
struct Facts {
    boot_id: String,
    tsc_khz: u32,
    is_pvm: bool,
    /// MSRs that the host lists but cannot set.
    left_out: Vec<u32>,
}

#[derive(Debug)]
struct Pristine {
    vcpus: Vec<VcpuState>,
    irqchip: IrqchipState,
    pit: kvm_bindings::kvm_pit_state2,
}

impl Parts {
    /// What the guest is told that the machine consists of.
    fn board(&self) -> Board {
        Board {
            // As many as were asked for: a byte's worth.
            vcpus: self.vcpus.len() as u8,
            virtio_devices: self.devices.virtio_names().len(),
        }
    }

    /// What the first vCPU sees as its processor.
    fn cpuid(&self) -> &[CpuidEntry] {
        &self.pristine.vcpus[0].cpuid
    }
}
