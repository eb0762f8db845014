//! `snapshot.json`, as a snapshot's folder may hold it.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ferry_rpc::fuzz::snapshot_manifest(bytes));
