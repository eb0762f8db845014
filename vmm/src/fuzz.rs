//! Ways in for the fuzz targets, which see only what is public. The tests feed them too.

use crate::memory::{MemoryShape, PAGE_SIZE, PieceTable};
use crate::state::{MachineProfile, MachineState};

/// A kernel's file, of whatever kind: parsed, and loaded if it can be.
pub fn kernel(bytes: &[u8]) {
    crate::arch::x86_64::boot::load_hostile_kernel(bytes);
}

/// A bzImage: its setup header, filled with these bytes, and what follows it.
pub fn bzimage(bytes: &[u8]) {
    let mut file = vec![0; 0x1f1];
    file.extend(bytes);
    kernel(&file);
}

/// The rings and buffers of a virtio device: the first byte says of which.
pub fn virtio(bytes: &[u8]) {
    crate::devices::work_on_hostile_memory(bytes);
}

/// What a driver writes to a device's registers and memory, while its machine moves: the first byte says of which.
pub fn virtio_registers(bytes: &[u8]) {
    crate::devices::program_hostile_registers(bytes);
}

/// A saved virtio device, and memory: the first byte says of which.
pub fn virtio_saved(bytes: &[u8]) {
    crate::devices::restore_hostile_state(bytes);
}

/// A saved machine, and the profile of one.
pub fn saved_state(bytes: &[u8]) {
    let _ = MachineProfile::from_bytes(bytes);
    if let Ok(state) = MachineState::from_bytes(bytes) {
        let again = MachineState::from_bytes(&state.to_bytes()).expect("what was written is read");
        assert_eq!(again.digest(), state.digest());
    }
}

/// The table of a memory image, as a snapshot's folder may hold it.
pub fn memory_pieces(bytes: &[u8]) {
    let shape = MemoryShape::from_size((1 << 20) + PAGE_SIZE);
    if let Ok(table) = PieceTable::from_bytes(bytes, &shape) {
        assert_eq!(table.to_bytes(), bytes);
    }
}

#[cfg(test)]
mod tests {
    use ferry_fuzz_inputs::feed;

    use super::*;

    #[test]
    fn tables_of_pieces_are_read_or_refused() {
        let shape = MemoryShape::from_size((1 << 20) + PAGE_SIZE);
        let mut table = vec![0; PieceTable::len_for(&shape)];
        table[..8].copy_from_slice(b"FERRYMEM");
        (table[8], table[14]) = (1, 0x10);
        table[16..].fill(0xff);
        let last_record = table.len() - 32;
        table[last_record..].fill(0);
        table[last_record] = 1;
        assert!(PieceTable::from_bytes(&table, &shape).is_ok());
        feed("memory_pieces", &[table], memory_pieces);
    }
}
