//! The table of a memory image, as a snapshot's folder may hold it.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let shape = ferry_vmm::MemoryShape::from_size((1 << 20) + ferry_vmm::PAGE_SIZE);
    if let Ok(table) = ferry_vmm::PieceTable::from_bytes(bytes, &shape) {
        assert_eq!(table.to_bytes(), bytes);
    }
});
