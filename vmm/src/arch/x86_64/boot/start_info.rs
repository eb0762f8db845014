//! What a PVH guest is told at its start (`xen/include/public/arch-x86/hvm/start_info.h`): one page, then the command line.

use zerocopy::{Immutable, IntoBytes};

use super::super::layout::{CONVENTIONAL_END, HIGH_MEMORY_START};
use super::load::{Initrd, LoadError};
use super::place::write;
use crate::memory::{GuestMemory, MemoryShape, PAGE_SIZE};

/// What is told.
pub(super) struct StartInformation<'a> {
    pub(super) cmdline: &'a str,
    pub(super) initrd: Option<Initrd>,
    pub(super) memory_map: &'a [MemoryMapEntry],
    /// Address of ACPI's root.
    pub(super) rsdp: Option<u64>,
}

impl StartInformation<'_> {
    /// Writes it from `start` on, a page where there is room.
    pub(super) fn write(&self, memory: &GuestMemory, start: u64) -> Result<(), LoadError> {
        let modules = start + size_of::<StartInfo>() as u64;
        let memory_map = modules + size_of::<Module>() as u64;
        let cmdline = start + PAGE_SIZE;
        let info = StartInfo {
            magic: START_MAGIC,
            version: 1,
            flags: 0,
            module_count: u32::from(self.initrd.is_some()),
            modules: if self.initrd.is_some() { modules } else { 0 },
            cmdline,
            rsdp: self.rsdp.unwrap_or(0),
            memory_map,
            memory_map_entries: self.memory_map.len() as u32,
            reserved: 0,
        };
        write(memory, start, info.as_bytes())?;
        if let Some(Initrd { address, size }) = self.initrd {
            let module = Module {
                address,
                size,
                cmdline: 0,
                reserved: 0,
            };
            write(memory, modules, module.as_bytes())?;
        }
        write(memory, memory_map, self.memory_map.as_bytes())?;
        write(memory, cmdline, self.cmdline.as_bytes())?;
        write(memory, cmdline + self.cmdline.len() as u64, &[0])
    }
}

/// `struct hvm_start_info`, version 1.
#[repr(C)]
#[derive(Debug, Clone, Copy, IntoBytes, Immutable)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    module_count: u32,
    modules: u64,
    cmdline: u64,
    /// Address of ACPI's root; 0: there is no ACPI.
    rsdp: u64,
    memory_map: u64,
    memory_map_entries: u32,
    reserved: u32,
}

const _: () = assert!(size_of::<StartInfo>() == 56);

/// `XEN_HVM_START_MAGIC_VALUE`.
pub(super) const START_MAGIC: u32 = 0x336e_c578;

/// `struct hvm_modlist_entry`: the initial RAM disk.
#[repr(C)]
#[derive(Debug, Clone, Copy, IntoBytes, Immutable)]
struct Module {
    address: u64,
    size: u64,
    cmdline: u64,
    reserved: u64,
}

const _: () = assert!(size_of::<Module>() == 32);

/// `struct hvm_memmap_table_entry`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, IntoBytes, Immutable)]
pub(super) struct MemoryMapEntry {
    pub(super) address: u64,
    pub(super) size: u64,
    /// As in E820: 1 is memory, 2 is reserved.
    pub(super) kind: u32,
    pub(super) reserved: u32,
}

const _: () = assert!(size_of::<MemoryMapEntry>() == 24);

const MEMORY: u32 = 1;
const RESERVED: u32 = 2;

/// The map of memory that the guest is given: all regions, without what a PC keeps below 1 MiB.
pub(super) fn memory_map(shape: &MemoryShape) -> Vec<MemoryMapEntry> {
    let entry = |start: u64, end: u64, kind| MemoryMapEntry {
        address: start,
        size: end - start,
        kind,
        reserved: 0,
    };
    let mut map = Vec::new();
    for region in &shape.regions {
        let (mut start, end) = (region.start, region.start + region.len);
        if start == 0 {
            map.push(entry(0, end.min(CONVENTIONAL_END), MEMORY));
            map.push(entry(CONVENTIONAL_END, HIGH_MEMORY_START, RESERVED));
            start = HIGH_MEMORY_START;
        }
        if end > start {
            map.push(entry(start, end, MEMORY));
        }
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn legacy_area_is_reserved() {
        let map = memory_map(&MemoryShape::from_size(64 << 20));
        let spans: Vec<_> = map
            .iter()
            .map(|entry| (entry.address, entry.size, entry.kind))
            .collect();
        assert_eq!(
            spans,
            [
                (0, 0x9_fc00, MEMORY),
                (0x9_fc00, 0x6_0400, RESERVED),
                (1 << 20, 63 << 20, MEMORY)
            ]
        );
    }

    #[test]
    fn memory_beyond_the_hole_is_told() {
        let map = memory_map(&MemoryShape::from_size(5 << 30));
        assert_eq!(
            map.last().map(|entry| (entry.address, entry.size)),
            Some((4 << 30, 2 << 30))
        );
    }
}
