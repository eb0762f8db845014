//! Whole machines on real KVM: micro guests of a few instructions, and the probe.
//!
//! Where this host cannot run machines the tests say why and count as ignored. `FERRY_LONG_TESTS=1` adds a whole Linux.

mod boot;
mod golden;
mod lifecycle;
mod linux;
mod micro;
mod power_button;
mod probe;
mod saved_state;
mod throttle;
mod tracking;

use libtest_mimic::{Arguments, Failed, Trial};

type Case = (&'static str, fn() -> anyhow::Result<()>);

fn main() {
    let mut arguments = Arguments::from_args();
    // Guests spin: side by side they would only measure each other.
    arguments.test_threads.get_or_insert(1);
    let obstacle = ferry_vmm::host().err();
    if let Some(obstacle) = &obstacle {
        println!("SKIPPED: no /dev/kvm that machines can run on: {obstacle}");
    }
    let cases = [
        boot::CASES,
        lifecycle::CASES,
        saved_state::CASES,
        golden::CASES,
        tracking::CASES,
        throttle::CASES,
        power_button::CASES,
        probe::CASES,
    ]
    .concat();
    let long_cases = if std::env::var_os("FERRY_LONG_TESTS").is_some() {
        linux::LONG_CASES
    } else {
        &[]
    };
    let trials = cases
        .into_iter()
        .chain(long_cases.iter().copied())
        .map(|(name, case)| {
            let run = move || case().map_err(|error| Failed::from(format!("{error:#}")));
            Trial::test(name, run).with_ignored_flag(obstacle.is_some())
        })
        .collect();
    libtest_mimic::run(&arguments, trials).exit();
}
