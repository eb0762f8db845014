//! Puts a kernel into guest memory and the first vCPU in front of it.
//!
//! | kernel file | protocol | the first vCPU starts in |
//! | --- | --- | --- |
//! | ELF with a PVH note | PVH (`docs/misc/pvh.pandoc` of Xen) | 32-bit protected mode, flat segments, no paging, EBX: start information |
//! | 64-bit ELF without one | Linux (`Documentation/arch/x86/boot.rst`), 64-bit | long mode, the first 4 GiB mapped one to one, RSI: boot parameters |
//! | bzImage | the same | the same, 0x200 after the start of what was loaded |
//!
//! Everything is written through the tracked memory: a reset in the middle of a migration is then as dirty as it must be.

mod boot_params;
mod bzimage;
mod cmdline;
mod elf;
mod entry;
mod firmware;
#[cfg(any(fuzzing, test))]
mod hostile;
mod kernel;
mod load;
mod place;
mod start_info;

pub(crate) use self::entry::{EntryPoint, enter};
pub(crate) use self::firmware::renew_generation_id;
#[cfg(any(fuzzing, test))]
pub(crate) use self::hostile::load_hostile_kernel;
pub use self::kernel::KernelError;
pub use self::load::{BootPayload, LoadError};
pub(crate) use self::load::{MemoryBefore, load};
