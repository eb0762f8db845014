//! One virtual machine straight on /dev/kvm: no async runtime, no RPC, nothing about how a machine moves.
//!
//! [`BlankMachine`] is made from a [`MachineConfig`] and becomes a [`Machine`] by booting a kernel or by restoring a [`MachineState`].
//! [`GuestMemory`] is a handle of its own, so that memory can be sent and filled while someone else owns the machine. [`host`] tells what
//! this host offers and whether a machine with a given [`MachineProfile`] could run here.
//!
//! Unsafe code is confined to `kvm`, `memory`, `tap` and `vcpu::kick`.

mod arch;
mod devices;
mod host;
mod host_files;
mod kvm;
mod machine;
mod memory;
mod state;
mod tap;
mod threads;
mod vcpu;

/// A way in for the fuzz targets, which see only what is public.
#[cfg(fuzzing)]
pub mod fuzz {
    /// A kernel's file, of whatever kind.
    pub fn kernel(bytes: &[u8]) {
        let _ = crate::arch::x86_64::boot::Kernel::parse(&bytes.to_vec());
    }

    /// The rings and buffers of a virtio device: the first byte says of which.
    pub fn virtio(bytes: &[u8]) {
        crate::devices::work_on_hostile_memory(bytes);
    }

    /// A bzImage: its setup header, filled with these bytes, and what follows it.
    pub fn bzimage(bytes: &[u8]) {
        let mut file = vec![0; 0x1f1];
        file.extend(bytes);
        kernel(&file);
    }
}

pub use arch::x86_64::boot::{BootPayload, KernelError, LoadError};
pub use arch::x86_64::cpuid::CpuidEntry;
pub use devices::{BalloonLevel, ButtonPress, ConsoleOutput, WrittenBlocks};
pub use host::{HostCapabilities, Incompatibility, host};
pub use host_files::keep_host_files;
pub use kvm::{DirtyClearer, HostError, KvmError};
pub use machine::{
    Backends, BlankMachine, ConsoleInput, CpuModel, DirtyMode, DiskAccess, DiskBackend, EventSink, Machine,
    MachineConfig, MachineError, MachineEvent, NicBackend, PauseTimes, RunState,
};
pub use memory::{
    AbsentPages, DirtyBitmap, FrameRun, GuestMemory, HUGE_PAGE_SIZE, ImageError, MemoryError, MemoryRegion,
    MemoryShape, PAGE_SIZE, PieceTable, Population, TableError, probe_rings, probe_watching, warm_host_memory,
};
pub use state::{MachineProfile, MachineState, StateError, UnitKind};
pub use tap::{Tap, TapError, TapProblem, VNET_HEADER_SIZE};
pub use threads::{ThreadHook, ThreadKind};
