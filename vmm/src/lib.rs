//! One virtual machine straight on /dev/kvm: no async runtime, no RPC, nothing about how a machine moves.
//!
//! [`BlankMachine`] is made from a [`MachineConfig`] and becomes a [`Machine`] by booting a kernel or by restoring a [`MachineState`].
//! [`GuestMemory`] is a handle of its own, so that memory can be sent and filled while someone else owns the machine. [`host`] tells what
//! this host offers and whether a machine with a given [`MachineProfile`] could run here.
//!
//! Unsafe code is confined to `kvm`, `memory`, `tap`, `turns` and `vcpu::kick`.

mod arch;
mod devices;
#[cfg(any(fuzzing, test))]
pub mod fuzz;
mod host;
mod host_files;
mod kvm;
mod machine;
pub mod measuring;
mod memory;
mod state;
mod tap;
mod threads;
mod turns;
mod vcpu;

pub use arch::x86_64::boot::{BootPayload, KernelError, LoadError};
pub use arch::x86_64::cpuid::CpuidEntry;
pub use devices::{BalloonLevel, ButtonPress, CardTraffic, ConsoleOutput, FreePageHints, WriteWaits, WrittenBlocks};
pub use host::{HostCapabilities, Incompatibility, host};
pub use host_files::keep_host_files;
pub use kvm::{Arming, DirtyClearer, HostError, KvmError};
pub use machine::{
    Backends, BlankMachine, ConsoleInput, CpuModel, DirtyMode, DiskAccess, DiskBackend, EventSink, Losses, Machine,
    MachineConfig, MachineError, MachineEvent, NicBackend, PauseTimes, RunState, ThrottledVcpus,
};
pub use memory::{
    AbsentPages, DirtyBitmap, DiskBuffer, FrameRun, GuestMemory, HUGE_PAGE_SIZE, ImageError, MemoryError, MemoryRegion,
    MemoryShape, PAGE_SIZE, PieceTable, Population, TableError, probe_rings, probe_watching,
};
pub use state::{MachineProfile, MachineState, StateError, UnitKind};
pub use tap::{Tap, TapError, TapProblem, VNET_HEADER_SIZE};
pub use threads::{ThreadHook, ThreadKind};
pub use turns::set_turns;
pub use vcpu::{LONGEST_REST, MOST_PERCENT};
