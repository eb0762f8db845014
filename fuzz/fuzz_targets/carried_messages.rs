//! What comes in a call of `Streams.Carry`, in whatever parts.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ferry_rpc::fuzz::carried_messages(bytes));
