//! What a guest writes into a device's registers, while it moves.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ferry_vmm::fuzz::virtio_registers(bytes));
