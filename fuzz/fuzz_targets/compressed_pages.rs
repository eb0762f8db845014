//! The compressed pages of a frame as a peer may send them.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ferry_migration::fuzz::compressed_pages(bytes));
