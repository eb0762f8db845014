//! The lab itself: directory, agents, guest, readers of its console, and taking all of it down.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ferry_proto::agent::v1::{DeleteInstanceRequest, InstanceInfo, RunInstanceRequest};
use rustix::process::Pid;
use tempfile::TempDir;
use tokio::time::timeout;

use super::super::client::{Agent, LONG_PATIENCE, within};
use super::super::failure::{Exit, Failure};
use super::super::instances::instances_of;
use super::super::output::note;
use super::processes::{AgentPlan, AgentProcess, free_ports, kill_vmms_below, log_of, vmms_below};
use super::reader::{Reader, SharedRecord};
use super::record::Record;
use super::{GuestPlan, runners};
use crate::vmm_process::CONSOLE_LOG;

/// Two agents, `a` and `b`, on loopback in a temporary directory.
pub(in crate::cli) struct Lab {
    directory: TempDir,
    agents: Vec<AgentProcess>,
    readers: Vec<Reader>,
    /// What agents are told beside the usual.
    further: Vec<String>,
}

/// The guest in a lab, booted and ready.
pub(in crate::cli) struct ProbeGuest {
    pub(in crate::cli) id: String,
    pub(in crate::cli) name: String,
    /// From the order to run it until it had filled its memory.
    pub(in crate::cli) ready_after: Duration,
    pub(super) record: Arc<SharedRecord>,
}

impl Lab {
    pub(super) fn new() -> Result<Self, Failure> {
        let made = tempfile::Builder::new().prefix("ferry-").tempdir();
        let directory =
            made.map_err(|error| Failure::new(Exit::Failed, format!("make a temporary directory: {error}")))?;
        Ok(Self {
            directory,
            agents: Vec::new(),
            readers: Vec::new(),
            further: Vec::new(),
        })
    }

    /// Agents that are started from now on are told this, too.
    pub(in crate::cli) fn tell_agents(&mut self, words: impl IntoIterator<Item = String>) {
        self.further.extend(words);
    }

    /// Starts both agents and waits until they answer.
    ///
    /// A port that was free a moment ago may be someone else's now: then other ports are tried.
    pub(in crate::cli) async fn start_agents(&mut self) -> Result<(), Failure> {
        for _ in 1..START_TRIES {
            if self.try_agents().await.is_ok() {
                return Ok(());
            }
            self.agents.iter_mut().for_each(AgentProcess::kill);
            self.agents.clear();
        }
        self.try_agents().await
    }

    async fn try_agents(&mut self) -> Result<(), Failure> {
        let ports = free_ports().map_err(|error| Failure::new(Exit::Failed, format!("find free ports: {error}")))?;
        for (host, port, peer) in [("a", ports.0, ("b", ports.1)), ("b", ports.1, ("a", ports.0))] {
            let plan = AgentPlan {
                host,
                port,
                peer,
                directory: self.directory.path().to_owned(),
                further: self.further.clone(),
            };
            self.agents.push(AgentProcess::start(plan)?);
        }
        for agent in &mut self.agents {
            agent.answers().await?;
        }
        Ok(())
    }

    /// Boots the probe at host `a`, reads its consoles from then on, and waits until it has filled its memory.
    pub(in crate::cli) async fn boot(&mut self, plan: &GuestPlan) -> Result<ProbeGuest, Failure> {
        let began = Instant::now();
        let kernel = self.probe_file()?;
        let request = RunInstanceRequest {
            spec: Some(plan.spec(kernel)),
        };
        let answered = self
            .agent(0)
            .compute()
            .await?
            .run_instance(within(LONG_PATIENCE, request))
            .await;
        let info = answered
            .map_err(|status| Failure::of_status(&format!("run {}", plan.name), &status))?
            .into_inner();
        let record = Arc::new(SharedRecord::default());
        for (host, agent) in self.agents.iter().enumerate() {
            let log = agent.data_dir.join("instances").join(&info.id).join(CONSOLE_LOG);
            self.readers.push(Reader::start(host, log, Arc::clone(&record)));
        }
        let ready = |record: &Record| match (&record.error, record.tsc_khz, record.last()) {
            (Some(error), _, _) => Some(Err(Failure::new(Exit::Failed, format!("the guest says: {error}")))),
            (None, Some(_), Some(_)) => Some(Ok(())),
            _ => None,
        };
        let late = || {
            Failure::new(
                Exit::Failed,
                format!("the guest was not ready within {:?}", plan.patience),
            )
        };
        record.until(plan.patience, ready).await.ok_or_else(late)??;
        Ok(ProbeGuest {
            id: info.id,
            name: info.name,
            ready_after: began.elapsed(),
            record,
        })
    }

    pub(in crate::cli) fn agent(&self, host: usize) -> &Agent {
        &self.agents[host].agent
    }

    pub(in crate::cli) fn host(&self, host: usize) -> &str {
        &self.agents[host].host
    }

    pub(in crate::cli) fn agent_pid(&self, host: usize) -> u32 {
        self.agents[host].pid()
    }

    /// Kills the agent of a host, as `kill -9` does. Its VMMs go on.
    pub(in crate::cli) fn kill_agent(&mut self, host: usize) {
        self.agents[host].kill();
    }

    /// Starts the agent of a host again, and waits until it answers.
    pub(in crate::cli) async fn start_agent_again(&mut self, host: usize) -> Result<(), Failure> {
        self.agents[host].start_again().await
    }

    /// The VMM processes of a host.
    pub(in crate::cli) fn vmms(&self, host: usize) -> Vec<Pid> {
        vmms_below(&self.agents[host].data_dir)
    }

    pub(in crate::cli) fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// What both hosts have.
    pub(super) async fn instances(&self) -> Result<Vec<InstanceInfo>, Failure> {
        let mut instances = instances_of(self.agent(0)).await?;
        instances.extend(instances_of(self.agent(1)).await?);
        Ok(instances)
    }

    /// The hosts on which guests run, by what their agents say, and how many VMM processes there are.
    pub(super) async fn runners(&self) -> Result<(Vec<String>, usize), Failure> {
        let instances = self.instances().await?;
        let hosts = runners(&instances).into_iter().map(str::to_owned).collect();
        Ok((hosts, vmms_below(self.directory.path()).len()))
    }

    /// Prints the ends of all logs on stderr: they are about to be removed.
    pub(super) fn tell_logs(&self) {
        for agent in &self.agents {
            let instances = fs::read_dir(agent.data_dir.join("instances"))
                .into_iter()
                .flatten()
                .flatten();
            let mut logs = vec![log_of(&agent.data_dir)];
            logs.extend(instances.map(|instance| instance.path().join("vmm.log")));
            for log in logs {
                tell_log(&log);
            }
        }
    }

    /// Deletes the guests, ends the agents, and removes all files.
    ///
    /// # Errors
    /// Something is left.
    pub(super) async fn close(mut self) -> Result<(), Failure> {
        self.readers.clear();
        for agent in &self.agents {
            // What does not answer is killed below.
            let _ = timeout(DELETE_TIME, delete_all(&agent.agent)).await;
        }
        for agent in &mut self.agents {
            agent.stop().await;
        }
        let directory = self.directory.path().to_owned();
        // The rest is what is done in any case.
        drop(self);
        let vmms = vmms_below(&directory).len();
        if vmms > 0 || directory.exists() {
            let text = format!("{vmms} VMM processes are left, or files in {}", directory.display());
            return Err(Failure::new(Exit::Failed, text));
        }
        Ok(())
    }

    fn probe_file(&self) -> Result<String, Failure> {
        let path = self.directory.path().join("probe.elf");
        let failed = |problem: String| Failure::new(Exit::Failed, format!("write {}: {problem}", path.display()));
        fs::write(&path, ferry_probe::PROBE_ELF).map_err(|error| failed(error.to_string()))?;
        path.to_str()
            .map(str::to_owned)
            .ok_or_else(|| failed("the path is not UTF-8".to_owned()))
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.readers.clear();
        for agent in &mut self.agents {
            agent.kill();
        }
        kill_vmms_below(self.directory.path());
        for agent in &self.agents {
            crate::agent::remove_leftovers(&agent.data_dir);
        }
    }
}

async fn delete_all(agent: &Agent) -> Result<(), Failure> {
    for info in instances_of(agent).await? {
        let request = within(
            LONG_PATIENCE,
            DeleteInstanceRequest {
                instance: info.id.clone(),
                force: true,
            },
        );
        let deleted = agent.compute().await?.delete_instance(request).await;
        deleted.map_err(|status| Failure::of_status(&format!("delete {}", info.name), &status))?;
    }
    Ok(())
}

fn tell_log(path: &PathBuf) {
    let Ok(text) = fs::read_to_string(path) else { return };
    let lines: Vec<&str> = text.lines().collect();
    note(&format!("--- the end of {}", path.display()));
    for line in &lines[lines.len().saturating_sub(LOG_LINES)..] {
        note(line);
    }
}

const DELETE_TIME: Duration = Duration::from_secs(10);
const LOG_LINES: usize = 20;
const START_TRIES: usize = 3;
