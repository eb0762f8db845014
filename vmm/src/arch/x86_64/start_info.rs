//! What a PVH guest is told at its start (`xen/include/public/arch-x86/hvm/start_info.h`).

use zerocopy::{Immutable, IntoBytes};

use super::layout::{CONVENTIONAL_END, HIGH_MEMORY_START};
use crate::memory::MemoryShape;

/// `struct hvm_start_info`, version 1.
#[repr(C)]
#[derive(Debug, Clone, Copy, IntoBytes, Immutable)]
pub(crate) struct StartInfo {
    pub(crate) magic: u32,
    pub(crate) version: u32,
    pub(crate) flags: u32,
    pub(crate) module_count: u32,
    pub(crate) modules: u64,
    pub(crate) cmdline: u64,
    /// Address of ACPI's root; 0: there is no ACPI.
    pub(crate) rsdp: u64,
    pub(crate) memory_map: u64,
    pub(crate) memory_map_entries: u32,
    pub(crate) reserved: u32,
}

const _: () = assert!(size_of::<StartInfo>() == 56);

/// `XEN_HVM_START_MAGIC_VALUE`.
pub(crate) const START_MAGIC: u32 = 0x336e_c578;

/// `struct hvm_modlist_entry`: the initial RAM disk.
#[repr(C)]
#[derive(Debug, Clone, Copy, IntoBytes, Immutable)]
pub(crate) struct Module {
    pub(crate) address: u64,
    pub(crate) size: u64,
    pub(crate) cmdline: u64,
    pub(crate) reserved: u64,
}

const _: () = assert!(size_of::<Module>() == 32);

/// `struct hvm_memmap_table_entry`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, IntoBytes, Immutable)]
pub(crate) struct MemoryMapEntry {
    pub(crate) address: u64,
    pub(crate) size: u64,
    /// As in E820: 1 is memory, 2 is reserved.
    pub(crate) kind: u32,
    pub(crate) reserved: u32,
}

const _: () = assert!(size_of::<MemoryMapEntry>() == 24);

const MEMORY: u32 = 1;
const RESERVED: u32 = 2;

/// The map of memory that the guest is given: all regions, without what a PC keeps below 1 MiB.
pub(crate) fn memory_map(shape: &MemoryShape) -> Vec<MemoryMapEntry> {
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
