//! What a guest writes into a device's rings and buffers.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ferry_vmm::fuzz::virtio(bytes));
