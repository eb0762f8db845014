//! A disk's lock file, as somebody may have left it beside the image.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ferry_rpc::fuzz::lock_file(bytes));
