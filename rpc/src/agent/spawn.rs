//! Starting a VMM process so that it outlives its agent, and reaching it again.
//!
//! The agent makes the listening socket and hands it over as standard input, so there is no moment in which the process
//! runs and cannot be reached. The process makes a session of its own first thing
//! and gets, where the host allows, a cgroup of its own
//! beside the agent's, so that stopping the agent's service does not stop guests.

use std::fs::{self, OpenOptions, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use rustix::time::Timespec;

use super::vmm_user::{self, UserRange};

/// The VMM's socket below an instance's folder.
pub(crate) const SOCKET: &str = "vmm.sock";
/// When a VMM gets its cgroup: by then its machine is built and its threads have begun.
const CGROUP_LATER: Duration = Duration::from_millis(150);
/// How long a process that is killed may take to be dead, and how much longer for each GiB that it has: the kernel frees that first.
const DEATH: Duration = Duration::from_secs(30);
const DEATH_PER_GIB: Duration = Duration::from_secs(1);
/// What a VMM's process calls itself.
const VMM_NAME: &str = "ferry-vmm";
/// What a VMM is told of its agent's environment: there may be secrets in it, and a VMM has no use for them.
const ENVIRONMENT: [&str; 4] = ["FERRY_LOG", "LD_LIBRARY_PATH", "RUST_BACKTRACE", "USER"];
/// The VMM's own log below an instance's folder.
pub(crate) const VMM_LOG: &str = "vmm.log";

/// A VMM's process: its id, and the descriptor that names it for ever.
pub(crate) struct Process {
    pub(crate) pid: i32,
    pub(crate) pidfd: OwnedFd,
    /// How it ended, once it has; none of a process that another agent started.
    ended: Option<Arc<OnceLock<ExitStatus>>>,
}

/// Starts `ferry vmm` for the instance in `folder`; it can be connected to when this returns. The process goes into a jail, where it
/// has this folder to read and the other, if there is one, to leave its started mark. `protocol_cap`: the newest version of the protocol with
/// its agent that it is to speak, for tests of an agent whose VMMs are of an earlier build.
///
/// # Errors
/// The socket cannot be made or the process cannot be started.
pub(crate) fn vmm(
    folder: &Path,
    mark_folder: Option<&Path>,
    users: UserRange,
    protocol_cap: Option<u32>,
    instance: &str,
) -> io::Result<Process> {
    let socket = folder.join(SOCKET);
    // One instance has one process: whatever an agent that was killed left here ends before its socket is taken away.
    kill_listening(&socket)?;
    match fs::remove_file(&socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = listen(&socket)?;
    fs::set_permissions(&socket, Permissions::from_mode(0o600))?;
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(folder.join(VMM_LOG))?;

    let mut command = Command::new("/proc/self/exe");
    command
        .arg0(VMM_NAME)
        .env_clear()
        .envs(
            ENVIRONMENT
                .iter()
                .filter_map(|name| Some((name, std::env::var_os(name)?))),
        )
        .arg("vmm")
        .arg("--instance-dir")
        .arg(folder)
        .stdin(Stdio::from(OwnedFd::from(listener)))
        .stdout(log.try_clone()?)
        .stderr(log);
    if let Some(mark_folder) = mark_folder {
        command.arg("--mark-dir").arg(mark_folder);
    }
    if let Some(cap) = protocol_cap {
        command.arg("--protocol-cap").arg(cap.to_string());
    }
    match vmm_user::give(folder, mark_folder, users) {
        Ok(user) => drop(command.arg("--user").arg(user.to_string())),
        Err(error) => tracing::info!(%error, instance, "the VMM has its agent's user"),
    }
    let child = command.spawn()?;
    // Before the child is waited for, its number is nobody else's.
    let pid = Pid::from_child(&child);
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    let ended = Arc::default();
    look_after(child, instance.to_owned(), Arc::clone(&ended));
    Ok(Process {
        pid: pid.as_raw_nonzero().get(),
        pidfd,
        ended: Some(ended),
    })
}

/// Connects to a VMM's socket. The path may be longer than a socket address can be.
///
/// # Errors
/// Nobody listens there.
pub(crate) fn connect(socket: &Path) -> io::Result<UnixStream> {
    let (_folder, short) = short_path(socket)?;
    UnixStream::connect(short)
}

/// The process behind a VMM's socket, alive although it may not answer; none if it is dead.
///
/// # Errors
/// It cannot be told.
pub(crate) fn listening(socket: &Path) -> io::Result<Option<Process>> {
    match connect(socket).and_then(|stream| listening_process(&stream)) {
        Ok(process) => Ok(Some(process)),
        Err(error) => match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Ok(None),
            // The process that listened is gone and its number with it.
            _ if error.raw_os_error() == Some(Errno::SRCH.raw_os_error()) => Ok(None),
            _ => Err(error),
        },
    }
}

/// The process that called `listen` last on the socket behind this connection: every VMM does when it starts.
pub(crate) fn listening_process(stream: &UnixStream) -> io::Result<Process> {
    let credentials = rustix::net::sockopt::socket_peercred(stream)?;
    let pidfd = pidfd_open(credentials.pid, PidfdFlags::empty())?;
    let pid = credentials.pid.as_raw_nonzero().get();
    // Until a VMM has called it, the number is that of the agent that made the socket, and may be anybody's by now.
    let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    if !command.starts_with(VMM_NAME.as_bytes()) {
        return Err(Errno::SRCH.into());
    }
    Ok(Process {
        pid,
        pidfd,
        ended: None,
    })
}

impl Process {
    /// A second handle on it.
    ///
    /// # Errors
    /// No descriptor is left.
    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            pid: self.pid,
            pidfd: self.pidfd.try_clone()?,
            ended: self.ended.clone(),
        })
    }

    /// How a process that has ended did, for people; waits for that a moment.
    pub(crate) fn obituary(&self) -> String {
        let unknown = || "the VMM died".to_owned();
        let Some(ended) = &self.ended else { return unknown() };
        // Its socket closes, and its pidfd tells, before the thread that waits for it does.
        for _ in 0..50 {
            if let Some(status) = ended.get() {
                return told(*status);
            }
            thread::sleep(Duration::from_millis(10));
        }
        unknown()
    }

    /// Whether it is dead, waiting for that `patience` at most.
    pub(crate) fn has_ended(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            };
            match poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], Some(&timeout)) {
                Ok(0) => return false,
                Ok(_) => return true,
                Err(Errno::INTR) => {}
                Err(_) => return false,
            }
        }
    }

    /// Kills it and waits until it is dead. Blocks.
    ///
    /// # Errors
    /// It does not die in time: the kernel holds it.
    pub(crate) fn kill(&self) -> io::Result<()> {
        let patience = patience_for(resident_pages(self.pid).unwrap_or_default());
        match pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => {}
            Err(error) => return Err(error.into()),
        }
        if self.has_ended(patience) {
            return Ok(());
        }
        let (pid, waited) = (self.pid, patience.as_secs());
        let error = format!("process {pid} was killed and is not dead {waited} s later: the kernel holds it");
        Err(io::Error::other(error))
    }
}

fn patience_for(pages: u64) -> Duration {
    let gib = pages.saturating_mul(rustix::param::page_size() as u64) >> 30;
    DEATH + DEATH_PER_GIB * u32::try_from(gib).unwrap_or(u32::MAX)
}

/// How many pages the process has in memory (proc(5), `/proc/pid/statm`); none if it is gone.
fn resident_pages(pid: i32) -> Option<u64> {
    let statm = fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
    statm.split_whitespace().nth(1)?.parse().ok()
}

/// Kills whatever VMM listens on this socket, and waits until it is dead. Blocks.
///
/// # Errors
/// It does not die, or it cannot be told who listens.
pub(crate) fn kill_listening(socket: &Path) -> io::Result<()> {
    listening(socket)?.map_or(Ok(()), |process| process.kill())
}

fn listen(socket: &Path) -> io::Result<UnixListener> {
    let (_folder, short) = short_path(socket)?;
    UnixListener::bind(short)
}

/// A path to `socket` through its open folder: a socket address holds 107 bytes, a data directory may be deeper.
fn short_path(socket: &Path) -> io::Result<(OwnedFd, PathBuf)> {
    use std::os::fd::AsRawFd;
    let (Some(folder), Some(name)) = (socket.parent(), socket.file_name()) else {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    };
    let folder = rustix::fs::open(
        folder,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let short = PathBuf::from(format!("/proc/self/fd/{}", folder.as_raw_fd())).join(name);
    Ok((folder, short))
}

/// How a VMM's process ended. It never ends by itself, so somebody, or something, did that.
fn told(status: ExitStatus) -> String {
    let how = format!("the VMM died ({status})");
    let of = |signal: Signal| status.signal() == Some(signal.as_raw());
    if of(Signal::SYS) {
        how + ": it made a system call that its jail forbids; the kernel's log names the call"
    } else if of(Signal::KILL) {
        how + ": somebody killed it, or the kernel did because memory ran out; then its log says so"
    } else {
        how
    }
}

/// Gives the process its cgroup, and waits for it so that it does not stay a zombie; how it ended is told by its socket
/// and its pidfd.
///
/// Not at once: moving a process waits for a grace period of the kernel, and nobody starts a thread meanwhile
/// (`cgroup_threadgroup_rwsem`), which is 10 to 20 ms that a migration into here would wait for its machine. In this order, because until the process is waited for its number is nobody
/// else's.
fn look_after(mut child: Child, instance: String, ended: Arc<OnceLock<ExitStatus>>) {
    let look = move || {
        thread::sleep(CGROUP_LATER);
        if let Err(error) = give_cgroup(child.id(), &instance) {
            tracing::info!(%error, instance, "the VMM stays in the agent's cgroup");
        }
        if let Ok(status) = child.wait() {
            tracing::debug!(pid = child.id(), %status, "a VMM process ended");
            // Nobody else sets it.
            let _ = ended.set(status);
        }
        // Whoever noticed the end first may have looked for the group before it was there.
        remove_cgroup(&instance);
    };
    if let Err(error) = thread::Builder::new().name("reap".to_owned()).spawn(look) {
        tracing::warn!(%error, "a VMM process stays in its agent's cgroup, and a zombie when it ends");
    }
}

/// Gives a VMM that was found again its cgroup, unless it has it.
pub(crate) fn see_to_cgroup(pid: i32, instance: &str) {
    let Ok(groups) = fs::read_to_string(format!("/proc/{pid}/cgroup")) else {
        return;
    };
    let own = format!("/ferry/{instance}");
    if groups
        .lines()
        .any(|line| line.starts_with("0::") && line.ends_with(&own))
    {
        return;
    }
    if let Err(error) = give_cgroup(pid.unsigned_abs(), instance) {
        tracing::info!(%error, instance, "the VMM stays in the agent's cgroup");
    }
}

/// Moves the process into a cgroup of its own at the root of the unified hierarchy, beside any service's.
fn give_cgroup(pid: u32, instance: &str) -> io::Result<()> {
    let group = cgroup_root()?.join("ferry").join(instance);
    fs::create_dir_all(&group)?;
    fs::write(group.join("cgroup.procs"), pid.to_string())
}

/// Removes the cgroup of an instance whose process is dead. It holds the process until somebody reaped it: then that is
/// waited for, elsewhere and not for ever. A start meanwhile uses the group again.
pub(crate) fn remove_cgroup(instance: &str) {
    let Ok(root) = cgroup_root() else { return };
    let group = root.join("ferry").join(instance);
    let is_busy = move || matches!(fs::remove_dir(&group), Err(error) if error.kind() == io::ErrorKind::ResourceBusy);
    if is_busy() {
        let wait = move || {
            for _ in 0..50 {
                thread::sleep(Duration::from_millis(20));
                if !is_busy() {
                    return;
                }
            }
        };
        // An empty group costs nothing: one that stays is no reason to fail.
        let _ = thread::Builder::new().name("cgroup".to_owned()).spawn(wait);
    }
}

/// Where the unified hierarchy is mounted: alone, or beside version 1.
///
/// # Errors
/// There is none.
pub fn cgroup_root() -> io::Result<PathBuf> {
    ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        .into_iter()
        .map(PathBuf::from)
        .find(|root| root.join("cgroup.procs").exists())
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no unified cgroup hierarchy is mounted"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forbidden_system_call_is_told_apart() {
        let words = told(ExitStatus::from_raw(Signal::SYS.as_raw()));
        assert!(words.contains("SIGSYS") && words.contains("jail"), "{words}");
        let words = told(ExitStatus::from_raw(Signal::TERM.as_raw()));
        assert_eq!(words, "the VMM died (signal: 15 (SIGTERM))");
    }

    #[test]
    fn a_process_with_more_memory_is_given_more_time_to_die() {
        let page = rustix::param::page_size() as u64;
        assert_eq!(patience_for(0), Duration::from_secs(30));
        assert_eq!(patience_for((512 << 30) / page), Duration::from_secs(542));
        let own = i32::try_from(std::process::id()).unwrap();
        assert!(resident_pages(own).is_some_and(|pages| pages > 0));
    }

    #[test]
    fn what_a_host_without_memory_does_is_hinted_at() {
        let words = told(ExitStatus::from_raw(Signal::KILL.as_raw()));
        assert!(words.contains("SIGKILL") && words.contains("memory ran out"), "{words}");
    }
}
