//! What a guest prints.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut tally = ferry_probe::console::Tally::default();
    tally.feed(bytes, std::time::Instant::now());
});
