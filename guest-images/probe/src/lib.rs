//! The probe: a bare-metal guest that writes memory without pause and measures what it lives through.
//!
//! [`PROBE_ELF`] is the guest itself, built from `src/guest` by the build script; it boots in any VMM that
//! starts PVH kernels. The modules are what guest and host must agree on, so both compile the same source:
//! the command line ([`cmdline`]), what pages hold ([`pattern`]) and the lines on the serial console
//! ([`report`]). [`console`] is the host's alone: it reads those lines back and keeps the tally that a demo,
//! a benchmark or a test asks for.

pub mod cmdline;
pub mod console;
pub mod pattern;
pub mod report;
pub mod rng;

/// The guest as an ELF file with a PVH note, to be handed to a VMM as its kernel.
pub const PROBE_ELF: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/probe.elf"));
