//! Agents as child processes, and the VMMs that they leave behind.

use std::fs::{self, File};
use std::io;
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tokio::time::sleep;

use super::super::client::Agent;
use super::super::failure::{Exit, Failure};

/// One agent, running.
pub(super) struct AgentProcess {
    pub(super) host: String,
    pub(super) agent: Agent,
    pub(super) data_dir: PathBuf,
    plan: AgentPlan,
    child: Child,
}

/// What an agent is started with.
pub(super) struct AgentPlan {
    pub(super) host: &'static str,
    pub(super) port: u16,
    pub(super) peer: (&'static str, u16),
    /// Its files go below this.
    pub(super) directory: PathBuf,
    /// What it is told beside the usual.
    pub(super) further: Vec<String>,
}

impl AgentProcess {
    /// Starts an agent in a process group of its own, so that a Ctrl-C for us does not reach it.
    pub(super) fn start(plan: AgentPlan) -> Result<Self, Failure> {
        let child =
            spawn(&plan).map_err(|error| Failure::new(Exit::Failed, format!("start agent {}: {error}", plan.host)))?;
        Ok(Self {
            host: plan.host.to_owned(),
            agent: Agent::new(format!("http://127.0.0.1:{}", plan.port)),
            data_dir: plan.directory.join(plan.host),
            plan,
            child,
        })
    }

    /// Starts it again, on the same ports and data, after it was killed, and waits until it answers.
    pub(super) async fn start_again(&mut self) -> Result<(), Failure> {
        self.child = spawn(&self.plan)
            .map_err(|error| Failure::new(Exit::Failed, format!("start agent {} again: {error}", self.host)))?;
        self.answers().await
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until it answers.
    pub(super) async fn answers(&mut self) -> Result<(), Failure> {
        let began = Instant::now();
        loop {
            let failure = match self.agent.host().await {
                Ok(_) => return Ok(()),
                Err(failure) => failure,
            };
            if let Ok(Some(status)) = self.child.try_wait() {
                let text = format!("agent {} ended at once ({status}): {}", self.host, self.last_words());
                return Err(Failure::new(Exit::Failed, text));
            }
            if began.elapsed() > START_TIME {
                return Err(Failure {
                    message: format!("agent {} does not answer: {}", self.host, failure.message),
                    ..failure
                });
            }
            sleep(Duration::from_millis(10)).await;
        }
    }

    /// Asks it to end, and ends it if it does not.
    pub(super) async fn stop(&mut self) {
        self.terminate();
        let began = Instant::now();
        while began.elapsed() < STOP_TIME {
            match self.child.try_wait() {
                Ok(None) => sleep(Duration::from_millis(10)).await,
                _ => return,
            }
        }
        self.kill();
    }

    /// Ends it at once.
    pub(super) fn kill(&mut self) {
        // Both fail only where it is dead already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    fn terminate(&self) {
        // Not waited for yet, so the number is still this child's.
        let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
    }

    fn last_words(&self) -> String {
        let log = fs::read_to_string(log_of(&self.data_dir)).unwrap_or_default();
        log.lines().last().unwrap_or("it logged nothing").to_owned()
    }
}

fn spawn(plan: &AgentPlan) -> io::Result<Child> {
    let data_dir = plan.directory.join(plan.host);
    fs::create_dir_all(&data_dir)?;
    let log = File::options().create(true).append(true).open(log_of(&data_dir))?;
    let (peer, peer_port) = plan.peer;
    Command::new("/proc/self/exe")
        .arg0("ferry")
        .args(["agent", "--host-id", plan.host])
        .args([
            "--listen",
            &format!("127.0.0.1:{}", plan.port),
            "--data-listen",
            "127.0.0.1:0",
        ])
        .args(["--peer", &format!("{peer}=http://127.0.0.1:{peer_port}")])
        .arg("--data-dir")
        .arg(&data_dir)
        .args(&plan.further)
        .env_remove("FERRY_AGENT")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .process_group(0)
        .spawn()
}

/// An agent's log, in its data directory.
pub(super) fn log_of(data_dir: &Path) -> PathBuf {
    data_dir.join("agent.log")
}

/// Two ports of loopback that are free now.
pub(super) fn free_ports() -> io::Result<(u16, u16)> {
    let (one, other) = (TcpListener::bind("127.0.0.1:0")?, TcpListener::bind("127.0.0.1:0")?);
    Ok((one.local_addr()?.port(), other.local_addr()?.port()))
}

/// VMM processes whose instances lie below a directory.
pub(super) fn vmms_below(directory: &Path) -> Vec<Pid> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let found = entries.filter_map(|entry| {
        let pid = Pid::from_raw(entry.file_name().to_str()?.parse().ok()?)?;
        let line = fs::read(entry.path().join("cmdline")).ok()?;
        let words: Vec<&[u8]> = line.split(|&byte| byte == 0).collect();
        let is_vmm = words.get(1) == Some(&b"vmm".as_slice());
        let is_below = words
            .iter()
            .any(|word| word.starts_with(directory.as_os_str().as_encoded_bytes()));
        (is_vmm && is_below).then_some(pid)
    });
    found.collect()
}

/// Kills the VMMs whose instances lie below a directory, and waits until they are gone.
pub(super) fn kill_vmms_below(directory: &Path) {
    for pid in vmms_below(directory) {
        // It ended meanwhile.
        let _ = kill_process(pid, Signal::KILL);
    }
    let began = Instant::now();
    while !vmms_below(directory).is_empty() && began.elapsed() < STOP_TIME {
        std::thread::sleep(Duration::from_millis(5));
    }
}

const START_TIME: Duration = Duration::from_secs(15);
const STOP_TIME: Duration = Duration::from_secs(5);
