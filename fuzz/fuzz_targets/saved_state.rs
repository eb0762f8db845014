//! A saved machine, and the profile of one, as a peer or a disk may hand it over.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ferry_vmm::fuzz::saved_state(bytes));
