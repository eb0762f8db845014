//! Scenarios: whole VMs on real KVM under two agents, as a user drives them.
//!
//! Two side by side, and by themselves those that could not bear that. Each starts its own pair of agents and leaves nothing behind; after
//! each exactly one copy of the guest exists, its oracle is clean, and no log holds a complaint that was not expected.
//! `FERRY_LONG_TESTS=1` adds the long matrices.

mod aborts;
mod across;
mod admission;
mod agents;
mod alphabet;
mod block_devices;
mod booted;
mod callers;
mod carried;
mod casts;
mod clients;
mod cold;
mod compress;
mod convergence;
mod data_port;
mod device_work;
mod disks;
mod events;
mod fast_disks;
mod faults;
mod fields;
mod foreign;
mod full_disks;
mod full_journals;
#[expect(dead_code, reason = "the matrix asks more of it")]
#[path = "../matrix/gate.rs"]
mod gate;
mod hanging;
mod hints;
mod hostile;
mod hugepages;
mod jail;
mod journal;
mod late_cuts;
mod late_questions;
mod lifecycle;
mod limits;
mod linux;
mod linux_devices;
mod linux_stop;
mod memory;
mod moves;
mod networks;
mod onward;
mod placement;
mod postcopy;
mod prediction;
mod progress;
mod queue;
mod readme;
mod readonly;
mod refusals;
mod requests;
mod resolves;
mod restarts;
mod resume;
mod scenario;
mod selftest;
mod silence;
mod snapshots;
mod soak;
mod storage;
mod unprivileged;
mod upgrades;
mod verify;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};

/// Scenarios that run side by side: they mostly wait, for deadlines, heartbeats and disks.
const SIDE_BY_SIDE: usize = 2;

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    let given = arguments.test_threads;
    let mut all_passed = true;
    for (trials, most) in [(waiting(), SIDE_BY_SIDE), (alone(), 1)] {
        arguments.test_threads = Some(given.map_or(most, |given| given.clamp(1, most)));
        all_passed &= !libtest_mimic::run(&arguments, trials).has_failed();
    }
    booted::forget();
    scenario::tell_the_slowest();
    if all_passed {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Those that bear company.
fn waiting() -> Vec<Trial> {
    let trials = [
        lifecycle::trials(),
        restarts::trials(),
        placement::trials(),
        moves::trials(),
        disks::trials(),
        storage::trials(),
        readonly::trials(),
        block_devices::trials(),
        device_work::trials(),
        networks::trials(),
        requests::trials(),
        events::trials(),
        aborts::trials(),
        queue::trials(),
        admission::trials(),
        onward::trials(),
        cold::trials(),
        postcopy::trials(),
        late_questions::trials(),
        resume::trials(),
        carried::trials(),
        casts::trials(),
        agents::trials(),
        progress::trials(),
        verify::trials(),
        resolves::trials(),
        data_port::trials(),
        faults::trials(),
        hostile::trials(),
        jail::trials(),
        callers::trials(),
        fields::trials(),
        foreign::trials(),
        full_disks::trials(),
        full_journals::trials(),
        clients::trials(),
        selftest::trials(),
        silence::trials(),
        snapshots::trials(),
    ];
    trials.into_iter().flatten().collect()
}

/// Those that measure rates, or whose guests need a processor of their own, or something of which the host has one, or that run a program which they
/// just wrote: no other thread may begin a process meanwhile, which would have it open for writing for a moment.
fn alone() -> Vec<Trial> {
    let trials = [
        linux::trials(),
        prediction::trials(),
        fast_disks::trials(),
        linux_devices::trials(),
        linux_stop::trials(),
        readme::trials(),
        hanging::trials(),
        limits::trials(),
        memory::trials(),
        hints::trials(),
        convergence::trials(),
        late_cuts::trials(),
        hugepages::trials(),
        soak::trials(),
        across::trials(),
        compress::trials(),
        refusals::trials(),
        upgrades::trials(),
        unprivileged::trials(),
    ];
    trials.into_iter().flatten().collect()
}
