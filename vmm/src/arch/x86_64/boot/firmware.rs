//! What a PC's firmware leaves in memory: the tables by which a guest finds processors and devices, and the generation id.

use super::super::acpi;
use super::super::board::Board;
use super::super::layout::{ACPI_START, GENERATION_ID, HIGH_MEMORY_START, MP_TABLE};
use super::super::mp_table::mp_table;
use super::load::{LoadError, MemoryBefore};
use super::place::{place, write};
use crate::memory::GuestMemory;

/// Writes all tables, again at each reset: the guest may have written over them. Returns the address of ACPI's root.
///
/// The generation id is made once in the life of an instance. It lives in guest memory, and so moves with it and
/// survives a reset; [`renew_generation_id`] makes another.
pub(super) fn write_firmware(memory: &GuestMemory, board: Board, before: MemoryBefore) -> Result<u64, LoadError> {
    place("firmware's tables", memory, ACPI_START, HIGH_MEMORY_START - ACPI_START)?;
    write(memory, MP_TABLE, &mp_table(MP_TABLE, board.vcpus))?;
    let tables = acpi::tables(ACPI_START, board);
    write(memory, ACPI_START, &tables.bytes)?;
    if before == MemoryBefore::Fresh {
        renew_generation_id(memory)?;
    }
    Ok(tables.rsdp)
}

/// Gives the guest another generation id: it is then no longer the one that an earlier state of it was.
///
/// # Errors
///
/// If the host has no random numbers, or the guest no memory there.
pub(crate) fn renew_generation_id(memory: &GuestMemory) -> Result<(), LoadError> {
    let mut id = [0; 16];
    rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())
        .map_err(|errno| LoadError::Random(errno.into()))?;
    write(memory, GENERATION_ID, &id)
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::MemoryOptions;

    const BOARD: Board = Board {
        vcpus: 1,
        virtio_devices: 0,
    };

    fn memory() -> GuestMemory {
        GuestMemory::new(MemoryOptions {
            bytes: 1 << 20,
            hugetlb: false,
            expect_incoming: false,
        })
        .expect("memory")
    }

    fn generation_id(memory: &GuestMemory) -> u128 {
        memory
            .tracked()
            .read_obj(GuestAddress(GENERATION_ID))
            .expect("guest memory")
    }

    #[test]
    fn generation_id_survives_a_reset_and_changes_only_on_demand() {
        let memory = memory();
        write_firmware(&memory, BOARD, MemoryBefore::Fresh).expect("written");
        let first = generation_id(&memory);
        assert_ne!(first, 0);
        write_firmware(&memory, BOARD, MemoryBefore::Used).expect("written");
        assert_eq!(generation_id(&memory), first);
        renew_generation_id(&memory).expect("written");
        assert_ne!(generation_id(&memory), first);
    }

    #[test]
    fn memory_without_the_area_of_the_bios_is_refused() {
        let small = GuestMemory::new(MemoryOptions {
            bytes: 512 << 10,
            hugetlb: false,
            expect_incoming: false,
        })
        .expect("memory");
        let error = write_firmware(&small, BOARD, MemoryBefore::Fresh);
        assert!(matches!(error, Err(LoadError::DoesNotFit { .. })));
    }
}
