//! A saved device as a peer or a disk may hand it over.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ferry_vmm::fuzz::virtio_saved(bytes));
