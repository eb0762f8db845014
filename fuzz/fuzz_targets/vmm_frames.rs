//! What a VMM and an agent may say to each other.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ferry_rpc::fuzz::vmm_frames(bytes));
