//! Keeping vCPUs from running: how much, whom, and how promptly they obey all the same.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, ensure};
use ferry_vmm::{Arming, DirtyMode, LONGEST_REST, MachineConfig, MachineError, ThrottledVcpus};

use super::Case;
use super::micro::{Code, Rig, config, read, wait_for_count};

pub(crate) const CASES: &[Case] = &[
    ("throttled_guest_runs_less", throttled_guest_runs_less),
    ("throttled_guest_pauses_at_once", throttled_guest_pauses_at_once),
    ("pause_ends_the_throttle", pause_ends_the_throttle),
    (
        "ring_throttles_only_those_that_write",
        ring_throttles_only_those_that_write,
    ),
    (
        "throttled_machine_is_dropped_in_time",
        throttled_machine_is_dropped_in_time,
    ),
];

/// Where the guest counts.
const COUNTER: u32 = 0x20_0000;

/// How long it is looked at, in turn with and without a throttle: what else the host does meanwhile hits both.
const LOOK: Duration = Duration::from_millis(250);

fn counting() -> Result<Rig> {
    let mut rig = Rig::boot(&Code::default().count(COUNTER))?;
    rig.machine.run()?;
    wait_for_count(rig.machine.memory(), COUNTER, 1000)?;
    Ok(rig)
}

/// How far it counts in a look.
fn counted(rig: &Rig) -> Result<f64> {
    let before = read(rig.machine.memory(), COUNTER)?;
    sleep(LOOK);
    Ok(f64::from(read(rig.machine.memory(), COUNTER)?.wrapping_sub(before)))
}

/// What it does of what it could, with this throttle.
fn share(rig: &mut Rig, percent: u32) -> Result<f64> {
    let (mut throttled, mut free) = (0.0, 0.0);
    for _ in 0..4 {
        ensure!(rig.machine.throttle(percent)? == ThrottledVcpus::All);
        throttled += counted(rig)?;
        ensure!(rig.machine.throttle(0)? == ThrottledVcpus::None);
        free += counted(rig)?;
    }
    Ok(throttled / free)
}

fn throttled_guest_runs_less() -> Result<()> {
    let mut rig = counting()?;
    let half = share(&mut rig, 50)?;
    let little = share(&mut rig, 90)?;
    ensure!((0.25..0.8).contains(&half), "{half} of what it could, at 50 %");
    ensure!((0.01..0.35).contains(&little), "{little} of what it could, at 90 %");
    ensure!(little < half, "{little} at 90 %, {half} at 50 %");
    Ok(())
}

fn throttled_guest_pauses_at_once() -> Result<()> {
    let mut rig = counting()?;
    let mut prompt = 0;
    for _ in 0..40 {
        rig.machine.throttle(99)?;
        sleep(LONGEST_REST);
        // Nearly all of the time it rests. Had the rest to be waited for, one pause of twenty would be so short.
        prompt += u32::from(rig.machine.pause()?.vcpus < LONGEST_REST / 20);
        rig.machine.run()?;
    }
    ensure!(prompt >= 10, "{prompt} of 40 pauses came at once");
    Ok(())
}

fn pause_ends_the_throttle() -> Result<()> {
    let mut rig = counting()?;
    let (mut after, mut free) = (0.0, 0.0);
    for _ in 0..4 {
        rig.machine.throttle(99)?;
        rig.machine.pause()?;
        ensure!(matches!(rig.machine.throttle(99), Err(MachineError::Paused(_))));
        rig.machine.run()?;
        after += counted(&rig)?;
        rig.machine.end_throttle();
        free += counted(&rig)?;
    }
    ensure!(after / free > 0.4, "{} of what it could", after / free);
    Ok(())
}

fn ring_throttles_only_those_that_write() -> Result<()> {
    // The second one waits for its start, for ever.
    let two = MachineConfig {
        vcpus: 2,
        dirty: DirtyMode::Ring,
        ..config()
    };
    let mut rig = Rig::boot_with(&two, &Code::default().count(COUNTER))?;
    rig.machine.run()?;
    rig.machine.start_dirty_tracking(Arming::All)?;
    let before = read(rig.machine.memory(), COUNTER)?;
    wait_for_count(rig.machine.memory(), COUNTER, before + 1000)?;
    ensure!(!rig.machine.fetch_dirty()?.is_empty());
    let throttled = rig.machine.throttle(50)?;
    ensure!(throttled == ThrottledVcpus::Writers(1), "{throttled:?}");
    Ok(())
}

fn throttled_machine_is_dropped_in_time() -> Result<()> {
    let mut rig = counting()?;
    rig.machine.throttle(99)?;
    sleep(LONGEST_REST);
    drop(rig);
    Ok(())
}
