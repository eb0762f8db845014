//! A bzImage as a user may name it, from its setup header on.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ferry_vmm::fuzz::bzimage(bytes));
