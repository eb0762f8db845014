//! A kernel file as a user may name it.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ferry_vmm::fuzz::kernel(bytes));
