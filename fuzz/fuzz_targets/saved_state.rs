//! A saved machine, and the profile of one, as a peer or a disk may hand it over.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = ferry_vmm::MachineProfile::from_bytes(bytes);
    if let Ok(state) = ferry_vmm::MachineState::from_bytes(bytes) {
        let again = ferry_vmm::MachineState::from_bytes(&state.to_bytes()).expect("what was written is read");
        assert_eq!(again.digest(), state.digest());
    }
});
