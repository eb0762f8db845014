//! The tables around the devices' description.

use super::super::board::Board;
use super::super::layout::{ACPI_IRQ, IO_APIC, LOCAL_APIC, POWER_CONTROL_PORT, POWER_EVENT_PORT, RESET_CONTROL_PORT};
use super::super::mp_table::checksum;
use super::dsdt::definitions;

/// All tables, for one place in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in super::super) struct Tables {
    /// Their bytes, for the address that they were made for.
    pub(in super::super) bytes: Vec<u8>,
    /// Address of the root pointer.
    pub(in super::super) rsdp: u64,
}

/// Makes the tables for `address`, a multiple of 64 below 4 GiB.
pub(in super::super) fn tables(address: u64, board: Board) -> Tables {
    let mut shelf = Shelf {
        start: address,
        bytes: vec![0; ROOT_BYTES],
    };
    let facs = shelf.put(&firmware_control());
    let dsdt = shelf.put(&table(*b"DSDT", 2, &definitions(board)));
    let fadt = shelf.put(&fixed_description(facs, dsdt));
    let madt = shelf.put(&interrupt_controllers(board.vcpus));
    let xsdt = shelf.put(&table(*b"XSDT", 1, &[fadt.to_le_bytes(), madt.to_le_bytes()].concat()));
    let root = root_pointer(xsdt);
    shelf.bytes[..root.len()].copy_from_slice(&root);
    Tables {
        bytes: shelf.bytes,
        rsdp: address,
    }
}

/// Tables one after another, each at a multiple of 64: the FACS asks for that.
struct Shelf {
    start: u64,
    bytes: Vec<u8>,
}

impl Shelf {
    /// Adds a table and returns its address.
    fn put(&mut self, table: &[u8]) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(64), 0);
        let address = self.start + self.bytes.len() as u64;
        self.bytes.extend_from_slice(table);
        address
    }
}

/// Who made the tables: all have the same names.
const MAKER: [u8; 6] = *b"FERRY ";
const MACHINE: [u8; 8] = *b"FERRYVM ";
const CREATOR: [u8; 4] = *b"FRRY";

/// Room for the root pointer, which comes first and is made last.
const ROOT_BYTES: usize = 64;

const HEADER_BYTES: usize = 36;

/// A system description table: the header that all have, then its contents.
fn table(signature: [u8; 4], revision: u8, contents: &[u8]) -> Vec<u8> {
    let length = (HEADER_BYTES + contents.len()) as u32;
    let mut bytes = [
        &signature[..],
        &length.to_le_bytes(),
        // The checksum counts as 0 while it is being made.
        &[revision, 0],
        &MAKER,
        &MACHINE,
        &1u32.to_le_bytes(),
        &CREATOR,
        &1u32.to_le_bytes(),
        contents,
    ]
    .concat();
    bytes[9] = checksum(&bytes);
    bytes
}

/// The root system description pointer, revision 2.
fn root_pointer(xsdt: u64) -> Vec<u8> {
    const BYTES: u32 = 36;
    let mut bytes = [&b"RSD PTR "[..], &[0], &MAKER, &[2], &0u32.to_le_bytes()].concat();
    bytes[8] = checksum(&bytes);
    bytes.extend(BYTES.to_le_bytes());
    bytes.extend(xsdt.to_le_bytes());
    bytes.extend([0; 4]);
    bytes[32] = checksum(&bytes);
    bytes
}

/// The firmware ACPI control structure: a lock that nobody else takes.
fn firmware_control() -> Vec<u8> {
    let mut bytes = vec![0; 64];
    bytes[..4].copy_from_slice(b"FACS");
    bytes[4] = 64;
    bytes[32] = 2;
    bytes
}

/// The multiple APIC description table.
fn interrupt_controllers(vcpus: u8) -> Vec<u8> {
    /// There are the two older controllers too.
    const HAS_PICS: u32 = 1;
    let mut contents = [LOCAL_APIC as u32, HAS_PICS].map(u32::to_le_bytes).concat();
    for apic in 0..vcpus {
        // A processor: its number, its local APIC's, enabled.
        contents.extend([0, 8, apic, apic, 1, 0, 0, 0]);
    }
    // The I/O APIC with number 0, whose interrupts begin with 0.
    contents.extend([1, 12, 0, 0]);
    contents.extend((IO_APIC as u32).to_le_bytes());
    contents.extend([0; 4]);
    // ACPI's line, unlike the others of its bus, is active high and level-triggered.
    contents.extend([2, 10, 0, ACPI_IRQ as u8]);
    contents.extend(u32::from(ACPI_IRQ).to_le_bytes());
    contents.extend([0b1101, 0]);
    // Pin 1 of every local APIC is for what cannot be masked.
    contents.extend([4, 6, 0xff, 0, 0, 1]);
    table(*b"APIC", 3, &contents)
}

/// The fixed ACPI description table: power management, reset, and what a PC has that this machine has not.
fn fixed_description(facs: u64, dsdt: u64) -> Vec<u8> {
    /// The part of revision 6, without the header.
    const BYTES: usize = 276 - HEADER_BYTES;
    /// Not there: VGA, and a clock with battery. The bits for legacy devices and a keyboard controller stay zero.
    const ABSENT: u16 = 1 << 2 | 1 << 5;
    /// WBINVD works, all processors have C1, neither sleep button nor alarm is in fixed registers, there is a reset register. Bit 4 is
    /// not set: the power button is in fixed registers.
    const FLAGS: u32 = 1 << 0 | 1 << 2 | 1 << 5 | 1 << 6 | 1 << 10;
    /// Too slow to be used: the processor has neither C2 nor C3.
    const NO_C2: u16 = 0xfff;
    const NO_C3: u16 = 0xffff;
    /// The kinds "power on" of reset, and the bit that carries it out.
    const RESET: u8 = 0x0e;

    let mut contents = vec![0; BYTES];
    // Offsets are those of the whole table, as in the specification (ACPI 6.5, 5.2.9).
    let mut put = |at: usize, bytes: &[u8]| contents[at - HEADER_BYTES..][..bytes.len()].copy_from_slice(bytes);
    put(36, &(facs as u32).to_le_bytes());
    put(40, &(dsdt as u32).to_le_bytes());
    put(46, &ACPI_IRQ.to_le_bytes());
    put(56, &u32::from(POWER_EVENT_PORT).to_le_bytes());
    put(64, &u32::from(POWER_CONTROL_PORT).to_le_bytes());
    // Lengths of the two.
    put(88, &[4, 2]);
    put(96, &NO_C2.to_le_bytes());
    put(98, &NO_C3.to_le_bytes());
    put(109, &ABSENT.to_le_bytes());
    put(112, &FLAGS.to_le_bytes());
    put(116, &port(RESET_CONTROL_PORT, 1));
    put(128, &[RESET]);
    put(140, &dsdt.to_le_bytes());
    put(148, &port(POWER_EVENT_PORT, 4));
    put(172, &port(POWER_CONTROL_PORT, 2));
    table(*b"FACP", 6, &contents)
}

/// A generic address structure for ports, `width` bytes of them, accessed as the register's owner likes.
fn port(port: u16, width: u8) -> [u8; 12] {
    const PORTS: u8 = 1;
    let [low, high] = port.to_le_bytes();
    [PORTS, width * 8, 0, 0, low, high, 0, 0, 0, 0, 0, 0]
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: u64 = 0xe_0000;

    fn made() -> Tables {
        tables(
            START,
            Board {
                vcpus: 2,
                virtio_devices: 2,
            },
        )
    }

    fn long(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight"))
    }

    fn at(tables: &Tables, address: u64) -> &[u8] {
        let bytes = &tables.bytes[(address - START) as usize..];
        let len = u32::from_le_bytes(bytes[4..8].try_into().expect("four")) as usize;
        &bytes[..len]
    }

    #[test]
    fn root_leads_to_every_table_and_all_sums_are_zero() {
        let tables = made();
        let root = &tables.bytes[(tables.rsdp - START) as usize..][..36];
        assert_eq!((checksum(&root[..20]), checksum(root)), (0, 0));
        let xsdt = at(&tables, long(root, 24));
        let (fadt, madt) = (at(&tables, long(xsdt, 36)), at(&tables, long(xsdt, 44)));
        let dsdt = at(&tables, long(fadt, 140));
        for (table, signature) in [(xsdt, b"XSDT"), (fadt, b"FACP"), (madt, b"APIC"), (dsdt, b"DSDT")] {
            assert_eq!(&table[..4], signature);
            assert_eq!(checksum(table), 0, "{}", signature.escape_ascii());
        }
        assert_eq!(fadt.len(), 276);
        let facs = u32::from_le_bytes(fadt[36..40].try_into().expect("four")).into();
        assert_eq!(&at(&tables, facs)[..4], b"FACS");
        assert_eq!(facs % 64, 0);
    }

    #[test]
    fn power_button_is_in_the_fixed_registers_and_its_interrupt_is_level_triggered() {
        let fadt = fixed_description(0, 0);
        let flags = u32::from_le_bytes(fadt[112..116].try_into().expect("four"));
        assert_eq!(
            (flags & 1 << 4, flags & 1 << 5),
            (0, 1 << 5),
            "of buttons the power button only"
        );
        assert_eq!(fadt[46..48], ACPI_IRQ.to_le_bytes());
        assert_eq!(fadt[56..60], u32::from(POWER_EVENT_PORT).to_le_bytes());
        let line = ACPI_IRQ as u8;
        // An override: bus, line, the same line of the I/O APIC, active high and level-triggered.
        let madt = interrupt_controllers(1);
        let described = [2, 10, 0, line, line, 0, 0, 0, 0b1101, 0];
        assert!(madt.windows(10).any(|bytes| bytes == described), "{madt:?}");
    }

    #[test]
    fn processors_are_listed() {
        let madt = interrupt_controllers(2);
        assert_eq!(madt[44..60], [0, 8, 0, 0, 1, 0, 0, 0, 0, 8, 1, 1, 1, 0, 0, 0]);
    }

    #[test]
    fn largest_machine_stays_clear_of_the_generation_id() {
        let largest = Board {
            vcpus: 255,
            virtio_devices: 16,
        };
        let room = super::super::super::layout::GENERATION_ID - START;
        assert!((tables(START, largest).bytes.len() as u64) < room);
    }
}
