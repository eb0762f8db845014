//! Scenarios: whole VMs on real KVM under two agents, as a user drives them.
//!
//! One at a time, because each has guests that spin. Each starts its own pair of agents and leaves nothing behind; after
//! each exactly one copy of the guest exists, its oracle is clean, and no log holds a complaint that was not expected.
//! `FERRY_LONG_TESTS=1` adds the long matrices.

mod aborts;
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

use libtest_mimic::Arguments;

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let trials = [
        lifecycle::trials(),
        restarts::trials(),
        linux::trials(),
        refusals::trials(),
        placement::trials(),
        prediction::trials(),
        moves::trials(),
        disks::trials(),
        storage::trials(),
        fast_disks::trials(),
        readonly::trials(),
        block_devices::trials(),
        linux_devices::trials(),
        linux_stop::trials(),
        readme::trials(),
        device_work::trials(),
        hanging::trials(),
        networks::trials(),
        limits::trials(),
        memory::trials(),
        hints::trials(),
        requests::trials(),
        events::trials(),
        aborts::trials(),
        queue::trials(),
        admission::trials(),
        onward::trials(),
        cold::trials(),
        compress::trials(),
        convergence::trials(),
        postcopy::trials(),
        late_cuts::trials(),
        late_questions::trials(),
        hugepages::trials(),
        resume::trials(),
        carried::trials(),
        casts::trials(),
        agents::trials(),
        progress::trials(),
        upgrades::trials(),
        verify::trials(),
        resolves::trials(),
        data_port::trials(),
        faults::trials(),
        hostile::trials(),
        jail::trials(),
        unprivileged::trials(),
        callers::trials(),
        fields::trials(),
        foreign::trials(),
        full_journals::trials(),
        clients::trials(),
        selftest::trials(),
        silence::trials(),
        snapshots::trials(),
        soak::trials(),
    ];
    let conclusion = libtest_mimic::run(&arguments, trials.into_iter().flatten().collect());
    booted::forget();
    scenario::tell_the_slowest();
    conclusion.exit_code()
}
