//! What Linux is told at its 64-bit entry: the boot parameters ("zero page"), and the tables that the mode needs.
//!
//! ```text
//!   + 0x0000  struct boot_params, 4 KiB (`Documentation/arch/x86/zero-page.rst`)
//!   + 0x1000  global descriptor table
//!   + 0x2000  page tables: the first 4 GiB one to one, in pages of 2 MiB
//!   + 0x8000  command line
//! ```

use zerocopy::IntoBytes;

use super::bzimage::SETUP_HEADER;
use super::load::{Initrd, LoadError};
use super::place::write;
use super::start_info::MemoryMapEntry;
use crate::memory::{GuestMemory, PAGE_SIZE};

/// Bytes of everything but the command line.
pub(super) const TABLES_BYTES: u64 = 0x8000;

const GDT: u64 = 0x1000;
const PAGE_TABLES: u64 = 0x2000;

/// Selectors that the protocol prescribes: `__BOOT_CS`, `__BOOT_DS`.
pub(super) const CODE_SELECTOR: u16 = 0x10;
pub(super) const DATA_SELECTOR: u16 = 0x18;

/// Size of the global descriptor table.
pub(super) const GDT_BYTES: u16 = 4 * 8;

/// Where the tables of 64-bit mode lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LongMode {
    /// Physical address of the global descriptor table.
    pub(super) gdt: u64,
    /// Physical address of the topmost page table.
    pub(super) page_tables: u64,
}

/// What is told.
pub(super) struct BootParams<'a> {
    /// The kernel's own header; empty if the file has none.
    pub(super) setup_header: &'a [u8],
    pub(super) cmdline: &'a str,
    pub(super) initrd: Option<Initrd>,
    pub(super) memory_map: &'a [MemoryMapEntry],
    /// Address of ACPI's root.
    pub(super) rsdp: Option<u64>,
}

impl BootParams<'_> {
    /// Writes parameters, tables and command line from `start` on, a page where there is room.
    pub(super) fn write(&self, memory: &GuestMemory, start: u64) -> Result<LongMode, LoadError> {
        let tables = LongMode {
            gdt: start + GDT,
            page_tables: start + PAGE_TABLES,
        };
        let cmdline = start + TABLES_BYTES;
        write(memory, start, &self.zero_page(cmdline))?;
        write(memory, tables.gdt, DESCRIPTORS.as_bytes())?;
        write(memory, tables.page_tables, identity_map(tables.page_tables).as_bytes())?;
        write(memory, cmdline, self.cmdline.as_bytes())?;
        write(memory, cmdline + self.cmdline.len() as u64, &[0])?;
        Ok(tables)
    }

    fn zero_page(&self, cmdline: u64) -> [u8; PAGE_SIZE as usize] {
        let mut page = [0; PAGE_SIZE as usize];
        let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
        if self.setup_header.is_empty() {
            put(BOOT_FLAG, &[0x55, 0xaa]);
            put(MAGIC, b"HdrS");
            put(VERSION, &[0x0f, 0x02]);
            put(LOAD_FLAGS, &[LOADED_HIGH]);
        } else {
            put(SETUP_HEADER, self.setup_header);
        }
        put(LOADER_TYPE, &[UNKNOWN_LOADER]);
        put(CMDLINE, &(cmdline as u32).to_le_bytes());
        put(EXT_CMDLINE, &((cmdline >> 32) as u32).to_le_bytes());
        let initrd = self.initrd.unwrap_or(Initrd { address: 0, size: 0 });
        put(INITRD, &(initrd.address as u32).to_le_bytes());
        put(INITRD_SIZE, &(initrd.size as u32).to_le_bytes());
        put(RSDP, &self.rsdp.unwrap_or(0).to_le_bytes());
        // A machine has two regions, which make four entries at most; the table takes 128.
        put(E820_ENTRIES, &[self.memory_map.len() as u8]);
        for (index, entry) in self.memory_map.iter().enumerate() {
            let at = E820_TABLE + index * E820_ENTRY_BYTES;
            put(at, &entry.as_bytes()[..E820_ENTRY_BYTES]);
        }
        page
    }
}

/// Nothing twice, code of 64 bits, data.
const DESCRIPTORS: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

const _: () = assert!(size_of_val(&DESCRIPTORS) == GDT_BYTES as usize);

/// Tables for the first 4 GiB: one of each upper level, four of the lowest, which map pages of 2 MiB.
fn identity_map(address: u64) -> Vec<u64> {
    /// Present and writable.
    const TABLE: u64 = 0b11;
    /// The same, a page.
    const LARGE_PAGE: u64 = 1 << 7 | TABLE;
    const ENTRIES: usize = 512;
    const GIB: usize = 4;

    let mut tables = vec![0; 2 * ENTRIES];
    tables[0] = (address + PAGE_SIZE) | TABLE;
    for (index, entry) in tables[ENTRIES..ENTRIES + GIB].iter_mut().enumerate() {
        *entry = (address + (2 + index as u64) * PAGE_SIZE) | TABLE;
    }
    tables.extend((0..(GIB * ENTRIES) as u64).map(|page| page << 21 | LARGE_PAGE));
    tables
}

/// Offsets in `struct boot_params`, and values of its fields.
const RSDP: usize = 0x070;
const EXT_CMDLINE: usize = 0x0c8;
const E820_ENTRIES: usize = 0x1e8;
const BOOT_FLAG: usize = 0x1fe;
const MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const LOADER_TYPE: usize = 0x210;
const LOAD_FLAGS: usize = 0x211;
const INITRD: usize = 0x218;
const INITRD_SIZE: usize = 0x21c;
const CMDLINE: usize = 0x228;
const E820_TABLE: usize = 0x2d0;
/// Address, size and kind.
const E820_ENTRY_BYTES: usize = 20;
const UNKNOWN_LOADER: u8 = 0xff;
const LOADED_HIGH: u8 = 1;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_address_below_4_gib_is_mapped_to_itself() {
        let base = 0x8000;
        let tables = identity_map(base);
        assert_eq!(tables.len() * 8, (TABLES_BYTES - PAGE_TABLES) as usize);
        let entry = |table: u64, index: u64| tables[((table - base) / 8 + index) as usize];
        for address in [0u64, 0x20_0000, 0x4000_0000, 0xfee0_0000] {
            let top = entry(base, address >> 39);
            let middle = entry(top & !0xfff, address >> 30 & 0x1ff);
            let page = entry(middle & !0xfff, address >> 21 & 0x1ff);
            assert_eq!(page & !0xfff | address & 0x1f_ffff, address);
            assert_eq!(page & 0x83, 0x83);
        }
    }

    #[test]
    fn zero_page_holds_the_header_where_it_was() {
        let mut header = vec![0; 0x7b];
        header[0] = 7;
        let map = [MemoryMapEntry {
            address: 0x10_0000,
            size: 0x20_0000,
            kind: 1,
            reserved: 0,
        }];
        let page = BootParams {
            setup_header: &header,
            cmdline: "",
            initrd: Some(Initrd {
                address: 0x70_0000,
                size: 9,
            }),
            memory_map: &map,
            rsdp: Some(0xe_0000),
        }
        .zero_page(0x1_0000);
        let word = |at: usize| u32::from_le_bytes(page[at..at + 4].try_into().expect("four"));
        assert_eq!((page[SETUP_HEADER], page[LOADER_TYPE]), (7, 0xff));
        assert_eq!(
            (word(CMDLINE), word(INITRD), word(INITRD_SIZE)),
            (0x1_0000, 0x70_0000, 9)
        );
        assert_eq!((word(RSDP), page[E820_ENTRIES]), (0xe_0000, 1));
        assert_eq!(
            (word(E820_TABLE), word(E820_TABLE + 8), word(E820_TABLE + 16)),
            (0x10_0000, 0x20_0000, 1)
        );
    }
}
