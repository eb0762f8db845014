//! A chore that leaves nothing behind, also when somebody ends it early.
//!
//! Guests live in sessions of their own, and a peer's guests end with nobody but who started them: a bench that is interrupted would leave them all, each keeping a processor
//! busy. So the chore runs in a process of its own, below one that watches it. Whatever the chore leaves without a parent becomes a child of the one that watches
//! (`PR_SET_CHILD_SUBREAPER`), which ends it, by its id, and removes the chore's folders.

use std::env;
use std::fs;
use std::process::{Command, ExitCode, ExitStatus};
use std::thread;

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, WaitOptions, getpid, kill_process, set_child_subreaper, waitpid};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

/// Set for the process that does the chore.
const IS_WATCHED: &str = "FERRY_CHORE_IS_WATCHED";

/// What shells call a process that a signal ended: this and the signal's number.
const BY_SIGNAL: u8 = 128;

/// Does the chore in a process that is watched: this program again, with the same arguments.
///
/// # Errors
/// The chore's own, or if there is no room for a process, a folder or a signal's handler.
pub(crate) fn run(chore: impl FnOnce() -> Result<ExitCode>) -> Result<ExitCode> {
    if env::var_os(IS_WATCHED).is_some() {
        return chore();
    }
    set_child_subreaper(Some(getpid())).context("failed to become the parent of what the chore leaves")?;
    let folder = tempfile::Builder::new().prefix("fx").tempdir();
    let folder = folder.context("failed to make a folder")?;
    let mut again = Command::new(env::current_exe().context("failed to find this program")?);
    again.args(env::args_os().skip(1)).env(IS_WATCHED, "1");
    again.env("TMPDIR", folder.path());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let ended = runtime.block_on(until_ended(again));
    let left = end_children();
    ferry_tests::pair::remove_remains_of_the_dead();
    if left > 0 {
        eprintln!("{left} processes that were left have been ended, and the folders are removed");
    }
    ended
}

/// Runs it until it ends or this process is asked to.
async fn until_ended(mut command: Command) -> Result<ExitCode> {
    let listen = |kind| signal(kind).context("failed to listen for signals");
    let mut interrupt = listen(SignalKind::interrupt())?;
    let mut terminate = listen(SignalKind::terminate())?;
    let mut hangup = listen(SignalKind::hangup())?;
    let mut child = command.spawn().context("failed to start this program again")?;
    let id = child.id();
    let (ended_in, mut ended) = oneshot::channel();
    thread::spawn(move || {
        // Nobody listens after a signal.
        let _ = ended_in.send(child.wait());
    });
    let asked = tokio::select! {
        ended = &mut ended => return Ok(code(ended??)),
        _ = interrupt.recv() => Signal::INT,
        _ = terminate.recv() => Signal::TERM,
        _ = hangup.recv() => Signal::HUP,
    };
    if let Some(child) = i32::try_from(id).ok().and_then(Pid::from_raw) {
        // It may have ended by the same signal.
        let _ = kill_process(child, Signal::KILL);
    }
    let _ = ended.await;
    Ok(ExitCode::from(BY_SIGNAL + asked.as_raw() as u8))
}

fn code(ended: ExitStatus) -> ExitCode {
    let code = ended.code().and_then(|code| u8::try_from(code).ok());
    code.map_or(ExitCode::FAILURE, ExitCode::from)
}

/// Ends every child, and the children that they leave, until there is none; how many had not ended by themselves.
fn end_children() -> usize {
    let mut ended = 0;
    loop {
        let children = children_of(getpid());
        if children.is_empty() {
            return ended;
        }
        for child in children {
            ended += usize::from(ferry_tests::process::is_alive(
                child.as_raw_nonzero().get().unsigned_abs(),
            ));
            // One that has ended already waits for this process alone.
            let _ = kill_process(child, Signal::KILL);
            if waitpid(Some(child), WaitOptions::empty()).is_err() {
                return ended;
            }
        }
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

    #[test]
    fn a_process_is_its_parents_child_until_it_was_waited_for() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let id = Pid::from_child(&child);
        assert_eq!(parent_of(id), Some(getpid()));
        assert!(children_of(getpid()).contains(&id));
        drop(child.stdin.take());
        child.wait().unwrap();
        assert!(!children_of(getpid()).contains(&id));
    }
}
