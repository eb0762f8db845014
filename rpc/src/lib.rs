//! Ferry's control plane: agents, the conductor, VMM processes and the command line, in the one binary `ferry`.
#![forbid(unsafe_code)]

pub mod agent;
pub mod cli;
pub mod faults;
#[cfg(any(fuzzing, test))]
pub mod fuzz;
mod lock_file;
mod mac;
mod request;
mod vmm_channel;
pub mod vmm_process;

use ferry_migration::error_chain;
