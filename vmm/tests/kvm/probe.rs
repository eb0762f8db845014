//! The probe: a guest that checks its own memory and clock.

use anyhow::{Context, Result, ensure};
use ferry_probe::PROBE_ELF;
use ferry_probe::console::parse;
use ferry_probe::report::{Heartbeat, Line};
use ferry_vmm::{Arming, DirtyMode, MachineConfig, MachineEvent, MachineState};

use super::Case;
use super::micro::{Console, Rig, blank, config, copy_memory, payload};

pub(crate) const CASES: &[Case] = &[
    ("probe_runs_with_one_vcpu", probe_runs_with_one_vcpu),
    ("probe_runs_with_two_vcpus", probe_runs_with_two_vcpus),
    (
        "probe_moves_with_one_vcpu_and_the_log",
        probe_moves_with_one_vcpu_and_the_log,
    ),
    (
        "probe_moves_with_two_vcpus_and_the_ring",
        probe_moves_with_two_vcpus_and_the_ring,
    ),
    (
        "pages_found_dirty_are_all_that_changed",
        pages_found_dirty_are_all_that_changed,
    ),
    ("probe_starts_again_after_its_reset", probe_starts_again_after_its_reset),
    (
        "a_probe_whose_beats_are_always_due_says_all_else_too",
        a_probe_whose_beats_are_always_due_says_all_else_too,
    ),
];

fn machine(vcpus: u8, dirty: DirtyMode) -> MachineConfig {
    MachineConfig {
        memory_bytes: 128 << 20,
        vcpus,
        dirty,
        ..config()
    }
}

fn boot(config: &MachineConfig, cmdline: &str) -> Result<Rig> {
    let (blank, console, events) = blank(config)?;
    let mut machine = blank.boot(payload(PROBE_ELF, cmdline)?)?;
    machine.run()?;
    let rig = Rig {
        machine,
        console,
        events,
    };
    rig.console
        .wait_for("READY")
        .with_context(|| format!("events: {:?}", rig.events.try_recv()))?;
    Ok(rig)
}

fn heartbeats(console: &Console, least: usize) -> Result<Vec<Heartbeat>> {
    console.wait(|text| {
        let all: Vec<Heartbeat> = text
            .lines()
            .filter_map(|line| match parse(line) {
                Some(Line::Heartbeat(heartbeat)) => Some(heartbeat),
                _ => None,
            })
            .collect();
        (all.len() >= least).then_some(all)
    })
}

fn without_faults(console: &Console) -> Result<()> {
    let text = console.text();
    ensure!(!text.contains("FAULT") && !text.contains("ERROR"), "{text}");
    Ok(())
}

fn runs(vcpus: u8) -> Result<()> {
    let rig = boot(
        &machine(vcpus, DirtyMode::Log),
        &format!("work=uniform work_mib=16 rate=5000 heartbeat_ms=50 cpus={vcpus}"),
    )?;
    let all = heartbeats(&rig.console, 8)?;
    let last = all.last().expect("eight");
    ensure!(last.writes > 0 && last.faults == 0, "{last:?}");
    ensure!(all.windows(2).all(|pair| pair[1].seq == pair[0].seq + 1));
    without_faults(&rig.console)
}

fn probe_runs_with_one_vcpu() -> Result<()> {
    runs(1)
}

fn probe_runs_with_two_vcpus() -> Result<()> {
    runs(2)
}

/// Pre-copies a running probe into a second machine in this process, round by round, and checks it there.
fn moves(vcpus: u8, dirty: DirtyMode) -> Result<()> {
    let config = machine(vcpus, dirty);
    let mut source = boot(
        &config,
        &format!("work=hotcold work_mib=32 fill_mib=16 rate=5000 heartbeat_ms=50 check_rate=5000 cpus={vcpus}"),
    )?;
    let before = heartbeats(&source.console, 3)?.len();
    let incoming = MachineConfig {
        expect_incoming: true,
        ..config
    };
    let (blank, console, events) = blank(&incoming)?;
    source.machine.start_dirty_tracking(Arming::All)?;
    copy_memory(source.machine.memory(), blank.memory())?;
    for _ in 0..3 {
        send_dirty(&mut source, &blank)?;
    }
    source.machine.pause()?;
    let state = source.machine.export()?;
    send_dirty(&mut source, &blank)?;
    same_memory(&source, &blank)?;

    let mut machine = blank.restore(&MachineState::from_bytes(&state.to_bytes())?)?;
    ensure!(machine.export()?.digest() == state.digest(), "state differs");
    machine.run()?;
    let destination = Rig {
        machine,
        console,
        events,
    };
    let after = heartbeats(&destination.console, 10)?;
    let last = after.last().expect("ten");
    ensure!(last.faults == 0 && last.tsc_back == 0, "{last:?}");
    let mut sequence: Vec<u64> = heartbeats(&source.console, before)?
        .iter()
        .map(|beat| beat.seq)
        .collect();
    // The first line at the destination may be the second half of one that began at the source.
    let next = sequence.last().expect("some") + 1;
    ensure!(
        after[0].seq == next || after[0].seq == next + 1,
        "{} after {next}",
        after[0].seq
    );
    sequence.dedup();
    without_faults(&destination.console)
}

fn send_dirty(source: &mut Rig, blank: &ferry_vmm::BlankMachine) -> Result<()> {
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    let dirty = source.machine.fetch_dirty()?;
    let clearer = source.machine.dirty_clearer();
    for run in source.machine.memory().shape().runs() {
        clearer.rearm(run, &dirty)?;
    }
    let (mine, theirs) = UnixStream::pair()?;
    let (memory, runs) = (source.machine.memory(), dirty.runs());
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| memory.send(mine.as_fd(), &[], &runs));
        blank.memory().receive(theirs.as_fd(), &runs)?;
        sender.join().expect("sender")
    })?;
    Ok(())
}

fn same_memory(source: &Rig, blank: &ferry_vmm::BlankMachine) -> Result<()> {
    let memory = source.machine.memory();
    for run in memory.populated()?.runs {
        ensure!(memory.digest(run)? == blank.memory().digest(run)?, "{run:?} differs");
    }
    Ok(())
}

fn probe_moves_with_one_vcpu_and_the_log() -> Result<()> {
    moves(1, DirtyMode::Log)
}

fn probe_moves_with_two_vcpus_and_the_ring() -> Result<()> {
    moves(2, DirtyMode::Ring)
}

fn pages_found_dirty_are_all_that_changed() -> Result<()> {
    let mut rig = boot(
        &machine(1, DirtyMode::Log),
        "work=uniform work_mib=16 rate=2000 heartbeat_ms=50",
    )?;
    rig.machine.pause()?;
    let memory = rig.machine.memory().clone();
    let pages = memory.shape().pages();
    let digests = |memory: &ferry_vmm::GuestMemory| -> Result<Vec<u128>> {
        (0..pages)
            .map(|first| Ok(memory.digest(ferry_vmm::FrameRun { first, count: 1 })?))
            .collect()
    };
    let before = digests(&memory)?;
    rig.machine.start_dirty_tracking(Arming::All)?;
    rig.machine.run()?;
    rig.console.clear();
    heartbeats(&rig.console, 3)?;
    rig.machine.pause()?;
    let dirty = rig.machine.fetch_dirty()?;
    let after = digests(&memory)?;
    let lost: Vec<u64> = (0..pages)
        .filter(|page| before[*page as usize] != after[*page as usize] && !dirty.contains(*page))
        .collect();
    ensure!(lost.is_empty(), "changed but not dirty: {lost:x?}");
    ensure!(dirty.count() > 0);
    Ok(())
}

fn probe_starts_again_after_its_reset() -> Result<()> {
    let cmdline = "work=idle heartbeat_ms=50 reset_after_ms=100 cpus=2";
    let mut rig = boot(&machine(2, DirtyMode::Log), cmdline)?;
    ensure!(rig.event()? == MachineEvent::ResetRequested);
    rig.console.clear();
    rig.machine.reset(payload(PROBE_ELF, cmdline)?)?;
    rig.machine.run()?;
    rig.console.wait_for("READY")
}

/// As on a host that gives it so little time that printing a beat takes longer than from beat to beat: by its clock, a millisecond is one
/// cycle here.
fn a_probe_whose_beats_are_always_due_says_all_else_too() -> Result<()> {
    let cmdline = "work=uniform work_mib=1 rate=1000 heartbeat_ms=1 tsc_khz=1";
    let rig = boot(&machine(1, DirtyMode::Log), cmdline)?;
    rig.console.clear();
    let all = heartbeats(&rig.console, 20)?;
    ensure!(
        all[19].writes > all[1].writes,
        "it does nothing but beat: {:?}, {:?}",
        all[1],
        all[19]
    );
    without_faults(&rig.console)
}
