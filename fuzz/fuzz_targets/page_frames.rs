//! A page stream as a peer may send it.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ferry_migration::fuzz::page_frames(bytes));
