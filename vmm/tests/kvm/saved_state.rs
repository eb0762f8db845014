//! Exporting a machine and going on in another one.

use std::time::Duration;

use anyhow::{Result, ensure};
use ferry_vmm::{DirtyMode, MachineConfig, MachineError, MachineProfile, MachineState, PieceTable};

use super::Case;
use super::micro::{Code, Rig, blank, config, copy_memory, read, wait_for_count};

pub(crate) const CASES: &[Case] = &[
    ("restored_guest_goes_on_counting", restored_guest_goes_on_counting),
    (
        "restored_machine_exports_what_it_was_given",
        restored_machine_exports_what_it_was_given,
    ),
    ("unread_input_moves_along", unread_input_moves_along),
    (
        "access_in_flight_is_neither_lost_nor_doubled",
        access_in_flight_is_neither_lost_nor_doubled,
    ),
    (
        "export_of_a_running_machine_is_refused",
        export_of_a_running_machine_is_refused,
    ),
    (
        "state_of_another_number_of_vcpus_is_refused",
        state_of_another_number_of_vcpus_is_refused,
    ),
    (
        "damaged_state_is_refused_or_runs_but_never_panics",
        damaged_state_never_panics,
    ),
    ("own_profile_fits_this_host", own_profile_fits_this_host),
    (
        "guest_goes_on_from_an_image_of_its_memory",
        guest_goes_on_from_an_image_of_its_memory,
    ),
    ("clock_goes_on_while_nobody_runs", clock_goes_on_while_nobody_runs),
];

const COUNTER: u32 = 0x20_0000;

/// Moves the guest of a paused machine into a new one, also paused.
pub(crate) fn move_to_new(rig: &Rig, config: &MachineConfig) -> Result<Rig> {
    let bytes = rig.machine.export()?.to_bytes();
    let incoming = MachineConfig {
        expect_incoming: true,
        ..config.clone()
    };
    let (blank, console, events) = blank(&incoming)?;
    copy_memory(rig.machine.memory(), blank.memory())?;
    Ok(Rig {
        machine: blank.restore(&MachineState::from_bytes(&bytes)?)?,
        console,
        events,
    })
}

fn restored_guest_goes_on_counting() -> Result<()> {
    for dirty in [DirtyMode::Log, DirtyMode::Ring] {
        let config = MachineConfig { dirty, ..config() };
        let mut source = Rig::boot_with(&config, &Code::default().count(COUNTER))?;
        source.machine.run()?;
        wait_for_count(source.machine.memory(), COUNTER, 1000)?;
        source.machine.pause()?;
        let count = read(source.machine.memory(), COUNTER)?;
        let mut destination = move_to_new(&source, &config)?;
        ensure!(read(destination.machine.memory(), COUNTER)? == count);
        destination.machine.run()?;
        wait_for_count(destination.machine.memory(), COUNTER, count + 1000)?;
        ensure!(
            read(source.machine.memory(), COUNTER)? == count,
            "the source stands still"
        );
    }
    Ok(())
}

fn guest_goes_on_from_an_image_of_its_memory() -> Result<()> {
    let mut source = Rig::boot(&Code::default().count(COUNTER))?;
    source.machine.run()?;
    wait_for_count(source.machine.memory(), COUNTER, 1000)?;
    source.machine.pause()?;
    let (file, state) = (tempfile::tempfile()?, source.machine.export()?.to_bytes());
    let table = source.machine.memory().save_image(&file)?.to_bytes();
    let count = read(source.machine.memory(), COUNTER)?;

    let (blank, ..) = blank(&MachineConfig {
        expect_incoming: true,
        ..config()
    })?;
    let table = PieceTable::from_bytes(&table, blank.memory().shape())?;
    blank.memory().load_image(&file, &table)?;
    let mut restored = blank.restore(&MachineState::from_bytes(&state)?)?;

    ensure!(restored.export()?.digest() == source.machine.export()?.digest());
    ensure!(read(restored.memory(), COUNTER)? == count);
    restored.run()?;
    wait_for_count(restored.memory(), COUNTER, count + 1000)?;
    Ok(())
}

fn restored_machine_exports_what_it_was_given() -> Result<()> {
    let two = MachineConfig { vcpus: 2, ..config() };
    let mut source = Rig::boot_with(&two, &Code::default().print("x").count(COUNTER))?;
    source.machine.run()?;
    wait_for_count(source.machine.memory(), COUNTER, 100)?;
    source.machine.pause()?;
    let given = source.machine.export()?;
    let destination = move_to_new(&source, &two)?;
    let got = destination.machine.export()?;
    ensure!(got.digest() == given.digest(), "given {given:?}\n got {got:?}");
    ensure!(destination.machine.refused_msrs().is_empty());
    Ok(())
}

fn unread_input_moves_along() -> Result<()> {
    // Counts until it is moved: nobody reads the input before.
    let code = Code::default().print("ready").echo().echo().print("!").halt();
    let mut source = Rig::boot(&code)?;
    source.machine.run()?;
    source.console.wait_for("ready")?;
    ensure!(source.machine.console_input().push(b"ab") == 2);
    source.machine.pause()?;
    let seen = source.console.text();
    let mut destination = move_to_new(&source, &config())?;
    destination.machine.run()?;
    destination.console.wait_for("!")?;
    let all = seen + &destination.console.text();
    ensure!(all == "readyab!", "{all:?}");
    Ok(())
}

fn access_in_flight_is_neither_lost_nor_doubled() -> Result<()> {
    // A guest that does nothing but print: nearly every pause hits it in an access.
    let alphabet: String = ('a'..='z').collect();
    let code = Code::default().print(&alphabet.repeat(20)).print("\n").halt();
    let mut rig = Rig::boot(&code)?;
    let mut printed = String::new();
    while !printed.ends_with('\n') {
        rig.machine.run()?;
        std::thread::sleep(Duration::from_micros(200));
        rig.machine.pause()?;
        printed += &rig.console.text();
        rig = move_to_new(&rig, &config())?;
    }
    ensure!(printed == alphabet.repeat(20) + "\n", "{printed:?}");
    Ok(())
}

fn export_of_a_running_machine_is_refused() -> Result<()> {
    let mut rig = Rig::boot(&Code::default().count(COUNTER))?;
    rig.machine.run()?;
    ensure!(matches!(rig.machine.export(), Err(MachineError::Running(_))));
    Ok(())
}

fn state_of_another_number_of_vcpus_is_refused() -> Result<()> {
    let state = Rig::boot(&Code::default().halt())?.machine.export()?;
    let (blank, ..) = blank(&MachineConfig { vcpus: 2, ..config() })?;
    let error = blank.restore(&state).expect_err("one vCPU is missing");
    ensure!(matches!(error, MachineError::State(_)), "{error:?}");
    Ok(())
}

fn damaged_state_never_panics() -> Result<()> {
    let bytes = Rig::boot(&Code::default().halt())?.machine.export()?.to_bytes();
    for step in 0..60 {
        let mut damaged = bytes.clone();
        let at = damaged.len() * step / 60;
        damaged[at..].iter_mut().take(8).for_each(|byte| *byte ^= 0xff);
        let Ok(state) = MachineState::from_bytes(&damaged) else {
            continue;
        };
        let (blank, ..) = blank(&config())?;
        if let Ok(mut machine) = blank.restore(&state) {
            machine.run()?;
            machine.pause()?;
        }
    }
    Ok(())
}

fn own_profile_fits_this_host() -> Result<()> {
    let rig = Rig::boot(&Code::default().halt())?;
    let profile = MachineProfile::from_bytes(&rig.machine.profile().to_bytes())?;
    ensure!(
        profile
            == MachineProfile {
                tsc: profile.tsc,
                ..rig.machine.profile()
            }
    );
    let found = ferry_vmm::host()?.check(&profile);
    ensure!(found.is_empty(), "{found:?}");
    Ok(())
}

fn clock_goes_on_while_nobody_runs() -> Result<()> {
    let source = Rig::boot(&Code::default().halt())?;
    let before = clock(&source.machine.export()?)?;
    let bytes = source.machine.export()?.to_bytes();
    std::thread::sleep(Duration::from_millis(50));
    let (blank, ..) = blank(&config())?;
    let machine = blank.restore(&MachineState::from_bytes(&bytes)?)?;
    let passed = clock(&machine.export()?)? - before;
    ensure!(
        (50_000_000..5_000_000_000).contains(&passed),
        "{passed} ns passed in the guest"
    );
    Ok(())
}

/// The KVM clock in a state, in nanoseconds.
fn clock(state: &MachineState) -> Result<u64> {
    use ferry_proto::state::v1::{Clock, MachineState as Envelope};
    use prost::Message;

    let envelope = Envelope::decode(state.to_bytes().as_slice())?;
    let unit = envelope
        .units
        .iter()
        .find(|unit| unit.name == "clock")
        .expect("always there");
    Ok(Clock::decode(unit.body.as_slice())?.kvm_clock_ns)
}
