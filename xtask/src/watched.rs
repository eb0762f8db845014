//! A chore that leaves nothing running, also when somebody ends it early.
//!
//! Guests live in sessions of their own, and a peer's guests end with nobody but who started them: a bench that is interrupted would leave them all, each keeping a processor
//! busy. So the chore runs in a process of its own, below one that watches it. Whatever the chore leaves without a parent becomes a child of the one that watches
//! (`PR_SET_CHILD_SUBREAPER`), which asks it to end, ends it by its id if it does not, and removes the chore's folders.
//!
//! It reaps: what the chore leaves would stay in its cgroup otherwise, and the chore waits for that.

use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::io::Errno;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitOptions, WaitStatus, getpid, kill_process, pidfd_open, pidfd_send_signal,
    set_child_subreaper, wait,
};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use crate::workspace;

/// Set for the process that does the chore: where it may put what is large. That folder goes with it.
const ROOM: &str = "FERRY_CHORE_ROOM";

/// How long what is left may take to end by itself, once it was asked to: `ferry bench` takes its hosts down.
const PATIENCE: Duration = Duration::from_secs(20);

/// What shells call a process that a signal ended: this and the signal's number.
const BY_SIGNAL: i32 = 128;

/// Does the chore in a process that is watched: this program again, with the same arguments.
///
/// # Errors
/// The chore's own, or if there is no room for a process, a folder or a signal's handler.
pub(crate) fn run(chore: impl FnOnce() -> Result<ExitCode>) -> Result<ExitCode> {
    if env::var_os(ROOM).is_some() {
        return chore();
    }
    set_child_subreaper(Some(getpid())).context("failed to become the parent of what the chore leaves")?;
    // Sockets are made below the one, whose path has to be short, and disks in the other, which has to be on one.
    let short = tempfile::Builder::new().prefix("fx").tempdir();
    let short = short.context("failed to make a folder")?;
    let target = workspace::target();
    fs::create_dir_all(&target).with_context(|| format!("failed to make {}", target.display()))?;
    let large = tempfile::Builder::new().prefix("bench-").tempdir_in(&target);
    let large = large.with_context(|| format!("failed to make a folder in {}", target.display()))?;
    let mut again = Command::new(env::current_exe().context("failed to find this program")?);
    again.args(env::args_os().skip(1));
    again.env("TMPDIR", short.path()).env(ROOM, large.path());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let ended = runtime.block_on(until_ended(again));
    let left = end_children();
    ferry_tests::pair::remove_remains(short.path());
    ferry_tests::pair::remove_remains_of_the_dead();
    if left > 0 {
        // Whoever would read it may be gone.
        let _ = writeln!(io::stderr(), "{left} processes that were left have been ended");
    }
    ended
}

/// A folder for what is large, which goes with the chore however that ends.
pub(crate) fn room() -> PathBuf {
    env::var_os(ROOM).map_or_else(workspace::target, PathBuf::from)
}

/// Runs it until it ends or this process is asked to.
async fn until_ended(mut command: Command) -> Result<ExitCode> {
    let listen = |kind| signal(kind).context("failed to listen for signals");
    let mut interrupt = listen(SignalKind::interrupt())?;
    let mut terminate = listen(SignalKind::terminate())?;
    let child = command.spawn().context("failed to start this program again")?;
    let id = Pid::from_child(&child);
    // Before anybody reaps it: its number may be another's afterwards.
    let handle = pidfd_open(id, PidfdFlags::empty()).context("failed to open the chore's process")?;
    let (ended_in, mut ended) = oneshot::channel();
    let reaping = thread::Builder::new().name("reaper".into()).spawn(move || {
        // Nobody listens after a signal.
        let _ = ended_in.send(reap_until(id));
    });
    if let Err(error) = reaping {
        end(&handle);
        return Err(error).context("failed to start a thread");
    }
    let asked = tokio::select! {
        biased;
        _ = interrupt.recv() => Signal::INT,
        _ = terminate.recv() => Signal::TERM,
        ended = &mut ended => return Ok(code(ended??)),
    };
    end(&handle);
    let _ = ended.await;
    Ok(exit_code(BY_SIGNAL + asked.as_raw()))
}

/// Reaps every child until this one has ended.
fn reap_until(chore: Pid) -> io::Result<WaitStatus> {
    loop {
        match wait(WaitOptions::empty()) {
            Ok(Some((id, status))) if id == chore => return Ok(status),
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// It may have ended already.
fn end(process: &OwnedFd) {
    let _ = pidfd_send_signal(process, Signal::KILL);
}

fn code(ended: WaitStatus) -> ExitCode {
    let by_signal = || ended.terminating_signal().map(|signal| BY_SIGNAL + signal);
    exit_code(ended.exit_status().or_else(by_signal).unwrap_or(1))
}

fn exit_code(code: i32) -> ExitCode {
    u8::try_from(code).map_or(ExitCode::FAILURE, ExitCode::from)
}

/// Ends every child, and the children that they leave; how many there were. Nobody else reaps any more, so that a number is no other process's.
fn end_children() -> usize {
    let (mut asked, began) = (BTreeSet::new(), Instant::now());
    loop {
        while matches!(wait(WaitOptions::NOHANG), Ok(Some(_)) | Err(Errno::INTR)) {}
        let children = children_of(getpid());
        // What cannot be ended, as another user's, is not waited for.
        if children.is_empty() || began.elapsed() >= 2 * PATIENCE {
            return asked.len();
        }
        for child in children {
            if asked.insert(child.as_raw_nonzero()) {
                let _ = kill_process(child, Signal::TERM);
            } else if began.elapsed() >= PATIENCE {
                let _ = kill_process(child, Signal::KILL);
            }
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// The processes whose parent this is, those that have ended and were not waited for among them.
fn children_of(parent: Pid) -> Vec<Pid> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let ids = processes.filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?));
    let is_child = |id: &Pid| parent_of(*id) == Some(parent);
    ids.filter(is_child).collect()
}

/// The fourth field of proc_pid_stat(5); the second, the name, may have anything in it.
fn parent_of(id: Pid) -> Option<Pid> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", id.as_raw_nonzero())).ok()?;
    let (_, after_name) = stat.rsplit_once(") ")?;
    Pid::from_raw(after_name.split(' ').nth(1)?.parse().ok()?)
}

#[cfg(test)]
mod tests {
    use std::process::Stdio;

    use super::*;

    /// Set for the copy of the test's program that watches.
    const WATCHES: &str = "FERRY_TEST_WATCHES";
    const LEFT: &str = "left: ";

    /// This program runs this test alone below itself, which watches a third that leaves a process in a session of its own.
    #[test]
    fn what_a_chore_leaves_is_ended() {
        if env::var_os(WATCHES).is_some() {
            let ended = run(|| {
                let mut left = Command::new("setsid");
                left.args(["sleep", "1000"]);
                // It must not hold what the first one reads to its end.
                left.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
                let left = left.spawn()?;
                println!("{LEFT}{}", left.id());
                Ok(ExitCode::SUCCESS)
            });
            return assert_eq!(ended.unwrap(), ExitCode::SUCCESS);
        }
        let alone = ["--exact", "watched::tests::what_a_chore_leaves_is_ended", "--nocapture"];
        let mut watching = Command::new(env::current_exe().unwrap());
        watching.args(alone).env(WATCHES, "1").stderr(Stdio::inherit());
        let told = watching.output().unwrap();
        let words = String::from_utf8_lossy(&told.stdout).into_owned();
        assert!(told.status.success(), "{words}");
        let id = words
            .lines()
            .find_map(|line| Some(line.split_once(LEFT)?.1.parse().unwrap()));
        assert!(
            !ferry_tests::process::is_alive(id.expect("no process was left")),
            "{words}"
        );
    }
}
