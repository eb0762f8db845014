//! The PC: CPUID, where things lie in its physical addresses, how a kernel is started, and what a vCPU's state consists of.

pub(crate) mod boot;
pub(crate) mod cpuid;
pub(crate) mod elf;
pub(crate) mod features;
pub(crate) mod layout;
pub(crate) mod msr;
pub(crate) mod start_info;
pub(crate) mod time;
pub(crate) mod vcpu_state;
