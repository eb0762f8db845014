//! What every scenario shares: a pair of agents before it, a look at the logs after it.

use std::cmp::Reverse;
use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ferry_tests::{Guest, Host, Pair, Relay, ShapedLink, Tampering, Witness, until, waiting::CALL};
use libtest_mimic::{Failed, Trial};
use rustix::fs::{Access, access};
use rustix::io::Errno;
use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::thread::UnshareFlags;

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

/// Scenarios with two running agents in a network namespace of their own; they need KVM. Named after their functions.
macro_rules! in_a_network {
    ($($body:ident),+ $(,)?) => {
        vec![$($crate::scenario::trial_in_a_network(concat!(module_path!(), "::", stringify!($body)), $body)),+]
    };
}

pub(crate) use {in_a_network, on_kvm, without_kvm};

/// One scenario with two running agents; counted as skipped where there is no KVM.
pub(crate) fn trial_on_kvm(name: &str, body: impl FnOnce(&mut Pair) -> Result<()> + Send + 'static) -> Trial {
    let run = move || {
        let pair = Pair::start().map_err(|error| format!("{error:#}"))?;
        judge(pair, body)
    };
    timed(name, run).with_ignored_flag(!kvm_is_here())
}

/// One scenario with two running agents that share a network with nobody: it is gone with them, whatever was made in it.
pub(crate) fn trial_in_a_network(name: &str, body: impl FnOnce(&mut Pair) -> Result<()> + Send + 'static) -> Trial {
    let run = move || {
        let in_it = || -> Result<(), Failed> {
            match unshare(UnshareFlags::NEWNET) {
                Err(Errno::PERM) => {
                    eprintln!("skipped: this process may not make a network namespace");
                    return Ok(());
                }
                unshared => unshared.map_err(|error| format!("failed to make a network namespace: {error}"))?,
            }
            ip(&["link", "set", "lo", "up"]).map_err(|error| format!("{error:#}"))?;
            let pair = Pair::start().map_err(|error| format!("{error:#}"))?;
            judge(pair, body)
        };
        // What is started from a thread is in its network.
        let ended = std::thread::spawn(in_it).join();
        ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    };
    timed(name, run).with_ignored_flag(!kvm_is_here())
}

#[expect(
    deprecated,
    reason = "its successor is unsafe for the sake of other flags than this one"
)]
fn unshare(what: UnshareFlags) -> rustix::io::Result<()> {
    rustix::thread::unshare(what)
}

/// Does something in mounts of its own. What it starts stays in them; the host's are as they were.
pub(crate) fn with_mounts_of_its_own<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let in_them = || {
        unshare(UnshareFlags::NEWNS)?;
        mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)?;
        work()
    };
    let ended = std::thread::scope(|scope| scope.spawn(in_them).join());
    ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Calls `ip` (of iproute2) in the network of this scenario, and gives back what it prints.
pub(crate) fn ip(arguments: &[&str]) -> Result<String> {
    command("ip", arguments)
}

/// Calls a program that must succeed, and gives back what it prints.
pub(crate) fn command(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program).args(arguments).output();
    let output = output.with_context(|| format!("failed to call {program}, which these scenarios need"))?;
    ensure!(
        output.status.success(),
        "`{program} {}`: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A disk image of 64 MiB with an empty ext4.
pub(crate) fn make_file_system(path: &Path) -> Result<()> {
    File::create(path)?.set_len(64 << 20)?;
    command("mkfs.ext4", &["-q", "-F", &path.display().to_string()])?;
    Ok(())
}

/// One scenario whose agents do not run yet.
pub(crate) fn trial_without_kvm(name: &str, body: impl FnOnce(&mut Pair) -> Result<()> + Send + 'static) -> Trial {
    let run = move || {
        let pair = Pair::prepare().map_err(|error| format!("{error:#}"))?;
        judge(pair, body)
    };
    timed(name, run)
}

/// How long each scenario took that has run.
static TIMES: Mutex<Vec<(Duration, String)>> = Mutex::new(Vec::new());

/// A trial that notes how long it took.
fn timed(name: &str, run: impl FnOnce() -> Result<(), Failed> + Send + 'static) -> Trial {
    let name = short(name).to_owned();
    Trial::test(name.clone(), move || {
        let began = Instant::now();
        let outcome = run();
        let mut times = TIMES.lock().unwrap_or_else(PoisonError::into_inner);
        times.push((began.elapsed(), name));
        outcome
    })
}

/// Names the scenarios that took longest: where to begin when all of them together take too long.
pub(crate) fn tell_the_slowest() {
    const TOLD: usize = 30;
    let mut times = TIMES.lock().unwrap_or_else(PoisonError::into_inner);
    times.sort_by_key(|&(took, _)| Reverse(took));
    println!("the slowest of {} scenarios, in seconds:", times.len());
    for (took, name) in times.iter().take(TOLD) {
        println!("{:6.1} {name}", took.as_secs_f64());
    }
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

/// The two hosts with a link of this rate between them, and a guest on `a`.
pub(crate) fn across(pair: &mut Pair, rate: &str, guest: &Guest) -> Result<(ShapedLink, Witness)> {
    let link = ShapedLink::join(rate)?;
    for host in [&mut pair.a, &mut pair.b] {
        host.terminate()?;
    }
    link.part(pair);
    for host in [&mut pair.a, &mut pair.b] {
        host.start()?;
    }
    let witness = pair.run(guest)?;
    Ok((link, witness))
}

/// Waits until the host has no instance, no VMM and no folder of one.
pub(crate) fn has_nothing(host: &Host) -> Result<()> {
    until(&format!("nothing is left at {}", host.name), CALL, || {
        let folders = fs::read_dir(host.data_dir.join("instances")).map_or(0, Iterator::count);
        let listed = host.ferry(&["list"])?.exit(0)?.json_lines()?;
        Ok((folders == 0 && listed.is_empty() && host.vmms().is_empty()).then_some(()))
    })
}

/// A side that loses the other in mid-migration says so.
pub(crate) fn expect_a_lost_peer(pair: &mut Pair) {
    expect_a_lost_peer_and(pair, &["VMM", "source", "stream"]);
}

/// The same, in these words besides those that are always among them.
pub(crate) fn expect_a_lost_peer_and(pair: &mut Pair, further: &[&str]) {
    let always = ["peer", "migration", "heartbeat", "agent", "connection", "destination"];
    for words in always.iter().chain(further) {
        pair.expect_complaint(words);
    }
}

/// The guest runs at A with no migration in flight, B has nothing of it, and a new migration succeeds.
pub(crate) fn stays_and_moves_later(pair: &Pair, witness: &Witness) -> Result<()> {
    pair.runs_only_at(&pair.a, "g", witness)?;
    has_nothing(&pair.b)?;
    pair.migrate("g", &["--digests"])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;
    pair.runs_only_at(&pair.b, "g", witness)
}

/// A relay between A and B, of which A knows nothing.
pub(crate) fn between(pair: &mut Pair, tampering: Tampering) -> Result<Relay> {
    let relay = Relay::before(&pair.b, tampering)?;
    pair.a.set_peer("b", &relay.url());
    pair.a.terminate()?;
    pair.a.start()?;
    Ok(relay)
}
