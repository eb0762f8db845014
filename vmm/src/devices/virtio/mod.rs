//! Virtio devices over MMIO (virtio 1.2, 4.2), without legacy.
//!
//! ```text
//!   vCPU thread ──registers──► MmioDevice ──activate, reset──►┐
//!        └──QueueNotify (ioeventfd)──────────────────────────►│ worker thread ──► Device ──► file, tap, …
//!   guest  ◄──────────── irqfd ◄── Interrupt ◄────────────────┘
//! ```
//!
//! A [`Device`] is one kind of device: what it offers, and what it does with the chains that the guest gives it. It knows neither registers
//! nor threads. [`MmioDevice`] is the transport around it: the registers, which vCPU threads read and write, and a worker thread, which
//! alone touches queues and backend. What the guest writes into queues is hostile: a chain that breaks the rules breaks the device (it says
//! DEVICE_NEEDS_RESET and does nothing until the guest resets it), and nothing else.
//!
//! Standing still: the worker is told to rest and finishes what is in flight; from then on nothing changes until it may go on. What the
//! guest was not yet told (the interrupt status) is saved, and told again when it runs.

mod balloon;
mod block;
mod device;
mod entropy;
mod failures;
#[cfg(test)]
mod golden;
#[cfg(any(fuzzing, test))]
mod hostile;
mod interrupt;
mod mmio;
mod net;
mod queue;
mod registers;
mod state;
#[cfg(test)]
mod testing;
mod worker;

pub(crate) use self::balloon::{Balloon, HintDesk};
pub use self::balloon::{BalloonLevel, FreePageHints};
pub(crate) use self::block::Block;
pub use self::block::{WriteWaits, WrittenBlocks};
pub(crate) use self::device::Device;
pub(crate) use self::entropy::Entropy;
#[cfg(any(fuzzing, test))]
pub(crate) use self::hostile::{program_hostile_registers, restore_hostile_state, work_on_hostile_memory};
pub(crate) use self::interrupt::InterruptFd;
pub(crate) use self::mmio::MmioDevice;
pub use self::net::CardTraffic;
pub(crate) use self::net::Net;
pub(crate) use self::state::{newest_version, schema_of, set_macs, version_of_saved};
