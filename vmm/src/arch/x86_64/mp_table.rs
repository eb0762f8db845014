//! The processors and interrupt lines as Intel's MultiProcessor Specification 1.4 tells them: what a guest goes by that has
//! no ACPI, or is not to use it.

use zerocopy::{Immutable, IntoBytes};

use super::layout::{IO_APIC, IO_APIC_LINES, LOCAL_APIC};

/// The floating pointer structure, by which a guest finds the table in low memory, and the table right behind it; to be
/// placed at `address`, a multiple of 16 below 4 GiB.
pub(crate) fn mp_table(address: u64, vcpus: u8) -> Vec<u8> {
    let entries = entries(vcpus);
    let mut header = Header {
        signature: *b"PCMP",
        length: (size_of::<Header>() + entries.bytes.len()) as u16,
        revision: REVISION,
        checksum: 0,
        oem: *b"FERRY   ",
        product: *b"VM          ",
        oem_table: 0,
        oem_table_length: 0,
        entry_count: entries.count,
        local_apic: LOCAL_APIC as u32,
        extended_length: 0,
        extended_checksum: 0,
        reserved: 0,
    };
    header.checksum = checksum(&[header.as_bytes(), &entries.bytes].concat());
    let mut pointer = FloatingPointer {
        signature: *b"_MP_",
        table: address as u32 + size_of::<FloatingPointer>() as u32,
        length: 1,
        revision: REVISION,
        checksum: 0,
        // The first 0: there is a table. The second: the lines go through the I/O APIC from the start.
        features: [0; 5],
    };
    pointer.checksum = checksum(pointer.as_bytes());
    [pointer.as_bytes(), header.as_bytes(), &entries.bytes].concat()
}

/// What makes the sum of all bytes zero.
pub(super) fn checksum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0u8, |sum, byte| sum.wrapping_add(*byte))
        .wrapping_neg()
}

/// Version 1.4.
const REVISION: u8 = 4;

/// Versions of KVM's interrupt controllers.
const LOCAL_APIC_VERSION: u8 = 0x14;
const IO_APIC_VERSION: u8 = 0x11;

/// What the I/O APIC's own register says.
const IO_APIC_ID: u8 = 0;

/// The only bus: its lines are edge-triggered and active when high.
const ISA_BUS: u8 = 0;

/// The processor's family, and that it has an FPU and an APIC; a guest asks CPUID.
const PROCESSOR_SIGNATURE: u32 = 0x600;
const PROCESSOR_FEATURES: u32 = 0x201;

/// Flags of a processor.
const ENABLED: u8 = 1 << 0;
const BOOTS: u8 = 1 << 1;

/// Kinds of interrupts.
const VECTORED: u8 = 0;
const NON_MASKABLE: u8 = 1;
const EXTERNAL: u8 = 3;

/// Kinds of interrupt entries.
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;

const ALL_APICS: u8 = 0xff;

#[derive(Default)]
struct Entries {
    bytes: Vec<u8>,
    count: u16,
}

impl Entries {
    fn add(&mut self, entry: &(impl IntoBytes + Immutable)) {
        self.bytes.extend_from_slice(entry.as_bytes());
        self.count += 1;
    }
}

fn entries(vcpus: u8) -> Entries {
    let mut entries = Entries::default();
    for apic in 0..vcpus {
        entries.add(&Processor {
            kind: 0,
            apic,
            apic_version: LOCAL_APIC_VERSION,
            flags: if apic == 0 { ENABLED | BOOTS } else { ENABLED },
            signature: PROCESSOR_SIGNATURE,
            features: PROCESSOR_FEATURES,
            reserved: [0; 2],
        });
    }
    entries.add(&Bus {
        kind: 1,
        id: ISA_BUS,
        name: *b"ISA   ",
    });
    entries.add(&IoApic {
        kind: 2,
        id: IO_APIC_ID,
        version: IO_APIC_VERSION,
        flags: ENABLED,
        address: IO_APIC as u32,
    });
    let interrupt = |kind, interrupt, line, apic, pin| Interrupt {
        kind,
        interrupt,
        // Polarity and trigger mode conform to the bus.
        flags: 0,
        bus: ISA_BUS,
        line,
        apic,
        pin,
    };
    // KVM routes the interval timer's line to pin 0 too, so there is no exception to the rule.
    for line in 0..IO_APIC_LINES {
        entries.add(&interrupt(IO_INTERRUPT, VECTORED, line, IO_APIC_ID, line));
    }
    entries.add(&interrupt(LOCAL_INTERRUPT, EXTERNAL, 0, 0, 0));
    entries.add(&interrupt(LOCAL_INTERRUPT, NON_MASKABLE, 0, ALL_APICS, 1));
    entries
}

#[repr(C)]
#[derive(IntoBytes, Immutable)]
struct FloatingPointer {
    signature: [u8; 4],
    table: u32,
    /// In units of 16 bytes.
    length: u8,
    revision: u8,
    checksum: u8,
    features: [u8; 5],
}

#[repr(C)]
#[derive(IntoBytes, Immutable)]
struct Header {
    signature: [u8; 4],
    length: u16,
    revision: u8,
    checksum: u8,
    oem: [u8; 8],
    product: [u8; 12],
    oem_table: u32,
    oem_table_length: u16,
    entry_count: u16,
    local_apic: u32,
    extended_length: u16,
    extended_checksum: u8,
    reserved: u8,
}

#[repr(C)]
#[derive(IntoBytes, Immutable)]
struct Processor {
    kind: u8,
    apic: u8,
    apic_version: u8,
    flags: u8,
    signature: u32,
    features: u32,
    reserved: [u32; 2],
}

#[repr(C)]
#[derive(IntoBytes, Immutable)]
struct Bus {
    kind: u8,
    id: u8,
    name: [u8; 6],
}

#[repr(C)]
#[derive(IntoBytes, Immutable)]
struct IoApic {
    kind: u8,
    id: u8,
    version: u8,
    flags: u8,
    address: u32,
}

/// Of a line of a bus into an I/O APIC, or into local APICs.
#[repr(C)]
#[derive(IntoBytes, Immutable)]
struct Interrupt {
    kind: u8,
    interrupt: u8,
    flags: u16,
    bus: u8,
    line: u8,
    apic: u8,
    pin: u8,
}

const _: () = assert!(size_of::<FloatingPointer>() == 16);
const _: () = assert!(size_of::<Header>() == 44);
const _: () = assert!(size_of::<Processor>() == 20);
const _: () = assert!(size_of::<Bus>() == 8);
const _: () = assert!(size_of::<IoApic>() == 8);
const _: () = assert!(size_of::<Interrupt>() == 8);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_zero_and_lengths_agree() {
        let bytes = mp_table(0xf_0000, 8);
        let (pointer, table) = bytes.split_at(16);
        assert_eq!(checksum(pointer), 0);
        assert_eq!(checksum(table), 0);
        assert_eq!(&pointer[..8], b"_MP_\x10\x00\x0f\x00");
        assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
    }

    #[test]
    fn every_processor_is_there_and_one_boots() {
        let bytes = mp_table(0xf_0000, 3);
        let processors: Vec<_> = bytes[60..120]
            .chunks_exact(20)
            .map(|entry| (entry[0], entry[1], entry[3]))
            .collect();
        assert_eq!(processors, [(0, 0, 3), (0, 1, 1), (0, 2, 1)]);
        assert_eq!(bytes[120], 1, "then the bus");
    }

    #[test]
    fn largest_machine_has_a_table() {
        assert!(mp_table(0xf_0000, 255).len() < 0x1_0000);
    }
}
