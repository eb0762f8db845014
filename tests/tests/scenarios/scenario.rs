//! What every scenario shares: a pair of agents before it, a look at the logs after it.

use std::path::Path;

use anyhow::Result;
use ferry_tests::Pair;
use libtest_mimic::{Failed, Trial};
use rustix::fs::{Access, access};

/// Scenarios with two running agents; they need KVM. Named after their functions.
macro_rules! on_kvm {
    ($($body:ident),+ $(,)?) => {
        vec![$($crate::scenario::trial_on_kvm(concat!(module_path!(), "::", stringify!($body)), $body)),+]
    };
}

/// Scenarios that start agents themselves and need no KVM. Named after their functions.
macro_rules! without_kvm {
    ($($body:ident),+ $(,)?) => {
        vec![$($crate::scenario::trial_without_kvm(concat!(module_path!(), "::", stringify!($body)), $body)),+]
    };
}

pub(crate) use {on_kvm, without_kvm};

/// One scenario with two running agents; counted as skipped where there is no KVM.
pub(crate) fn trial_on_kvm(name: &str, body: impl FnOnce(&mut Pair) -> Result<()> + Send + 'static) -> Trial {
    let run = move || {
        let pair = Pair::start().map_err(|error| format!("{error:#}"))?;
        judge(pair, body)
    };
    Trial::test(short(name), run).with_ignored_flag(!kvm_is_here())
}

/// One scenario whose agents do not run yet.
pub(crate) fn trial_without_kvm(name: &str, body: impl FnOnce(&mut Pair) -> Result<()> + Send + 'static) -> Trial {
    let run = move || {
        let pair = Pair::prepare().map_err(|error| format!("{error:#}"))?;
        judge(pair, body)
    };
    Trial::test(short(name), run)
}

/// Whether the long matrices are asked for.
pub(crate) fn is_long() -> bool {
    std::env::var_os("FERRY_LONG_TESTS").is_some()
}

fn judge(mut pair: Pair, body: impl FnOnce(&mut Pair) -> Result<()>) -> Result<(), Failed> {
    let outcome = body(&mut pair).and_then(|()| pair.close());
    outcome.map_err(|error| format!("{error:#}\n{}", pair.story()).into())
}

fn kvm_is_here() -> bool {
    access(Path::new("/dev/kvm"), Access::READ_OK | Access::WRITE_OK).is_ok()
}

fn short(name: &str) -> &str {
    name.split_once("::").map_or(name, |(_, rest)| rest)
}
