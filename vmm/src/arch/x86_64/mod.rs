//! The PC: CPUID, where things lie in its physical addresses, how a kernel is started, and what a vCPU's state consists of.

mod acpi;
pub(crate) mod board;
pub(crate) mod boot;
pub(crate) mod cpuid;
pub(crate) mod features;
pub(crate) mod layout;
mod mp_table;
pub(crate) mod msr;
pub(crate) mod time;
pub(crate) mod vcpu_state;
