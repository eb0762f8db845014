//! The one place that talks to the kernel's KVM: descriptors, ioctls, and memory that the kernel shares with us.
//!
//! kvm-ioctls does most of it; what it lacks (clearing the dirty log, the dirty ring, sregs2, XSAVE by bytes, TSC offsets) is in `uapi`
//! and `ring`. Everything above this module is safe code.

#![expect(
    unsafe_code,
    reason = "ioctls that kvm-ioctls lacks, and memory that is shared with the kernel"
)]

mod emulation;
mod host;
mod ring;
mod tracking;
mod uapi;
mod vcpu;
mod vm;

pub use host::HostError;
pub(crate) use host::{Host, HostClock, host_tsc, native_cpuid};
pub use tracking::{Arming, DirtyClearer};
pub(crate) use uapi::{Uapi, from_bytes, to_bytes};
pub(crate) use vcpu::{Exit, Vcpu};
pub use vm::KvmError;
pub(crate) use vm::Vm;
