//! The probe: a bare-metal guest that writes memory without pause and measures what it lives through.
//!
//! [`PROBE_ELF`] is the guest itself, built from `src/guest` by the build script; it boots in any VMM that
//! starts PVH kernels. The modules are what guest and host must agree on, so both compile the same source:
//! the command line ([`cmdline`]), work on devices ([`device_work`], [`histogram`]), what pages hold ([`pattern`]) and
//! the lines on the serial console ([`report`]). [`console`] is the host's alone: it reads those lines back and keeps the tally that a demo,
//! a benchmark or a test asks for.

pub mod cmdline;
pub mod console;
pub mod device_work;
pub mod histogram;
pub mod pattern;
pub mod report;
pub mod rng;

/// The guest as an ELF file with a PVH note, to be handed to a VMM as its kernel.
pub const PROBE_ELF: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/probe.elf"));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_is_an_elf_with_a_pvh_entry() {
        assert!(PROBE_ELF.starts_with(b"\x7fELF\x02\x01"));
        // Sizes of name and entry, XEN_ELFNOTE_PHYS32_ENTRY, the name.
        let note = b"\x04\0\0\0\x08\0\0\0\x12\0\0\0Xen\0";
        assert!(PROBE_ELF.windows(note.len()).any(|bytes| bytes == note));
    }
}
