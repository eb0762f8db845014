//! The control stream as a peer may send it, in both directions.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ferry_migration::fuzz::control_messages(bytes));
