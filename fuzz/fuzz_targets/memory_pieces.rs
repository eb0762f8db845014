//! The table of a memory image, as a snapshot's folder may hold it.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ferry_vmm::fuzz::memory_pieces(bytes));
