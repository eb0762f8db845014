//! One agent as a process of its own, and the command line that asks it.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::Signal;
use serde_json::Value;

use crate::answer::Answer;
use crate::process;
use crate::waiting::{CALL, until};

/// A host: an agent with a data directory and two ports. The agent can die and come back; the ports stay.
pub struct Host {
    /// Its id.
    pub name: &'static str,
    /// Its data directory.
    pub data_dir: PathBuf,
    /// Where the agents' log goes.
    pub log: PathBuf,
    /// Port of the API.
    pub port: u16,
    /// Port of the page streams.
    pub data_port: u16,
    /// What to tell the agent beside the usual: arguments.
    pub arguments: Vec<String>,
    /// What to tell the agent beside the usual: environment.
    pub environment: Vec<(String, String)>,
    /// Where it is reached.
    address: &'static str,
    /// Where its page streams come in, if that is elsewhere.
    data_address: Option<&'static str>,
    /// The network that its agent is in, if it is not the calling thread's.
    network: Option<PathBuf>,
    ferry: PathBuf,
    user: Option<u32>,
    /// Folders that this host alone sees elsewhere: what, and where.
    views: Vec<(PathBuf, PathBuf)>,
    agent: Option<Child>,
}

impl Host {
    /// A host below `folder` whose agent does not run yet.
    ///
    /// # Errors
    /// If no port is free.
    pub fn new(name: &'static str, folder: &Path, ferry: &Path) -> Result<Self> {
        Ok(Self {
            name,
            data_dir: folder.join(name),
            log: folder.join(format!("{name}.log")),
            port: free_port()?,
            data_port: free_port()?,
            arguments: Vec::new(),
            environment: Vec::new(),
            address: "127.0.0.1",
            data_address: None,
            network: None,
            ferry: ferry.to_owned(),
            user: None,
            views: Vec::new(),
            agent: None,
        })
    }

    /// The agent's address.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}:{}", self.address, self.port)
    }

    /// From its next start on the agent finds this peer at this address.
    pub fn set_peer(&mut self, name: &str, url: &str) {
        let known = format!("{name}=");
        let peer = format!("{known}{url}");
        match self.arguments.iter_mut().find(|word| word.starts_with(&known)) {
            Some(word) => *word = peer,
            None => self.arguments.extend(["--peer".to_owned(), peer]),
        }
    }

    /// Starts the agent and waits until it answers.
    ///
    /// # Errors
    /// What the agent logged, if it ends or does not answer.
    pub fn start(&mut self) -> Result<()> {
        self.spawn_agent()?;
        until(&format!("agent {} answers", self.name), CALL, || {
            if let Some(status) = self.agent.as_mut().and_then(|agent| agent.try_wait().ok().flatten()) {
                bail!(
                    "agent {} ended at once ({status}): {}",
                    self.name,
                    crate::complaints::tail(&self.log, 10)
                );
            }
            // Cheaper than a process that finds out that nobody listens yet.
            let listens = TcpStream::connect((self.address, self.port)).is_ok();
            Ok((listens && self.ferry(&["list"])?.code == Some(0)).then_some(()))
        })
    }

    /// Starts the agent without waiting for anything.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn spawn_agent(&mut self) -> Result<()> {
        let log = || -> Result<File> {
            let file = OpenOptions::new().create(true).append(true).open(&self.log);
            file.with_context(|| format!("failed to open {}", self.log.display()))
        };
        let data_address = self.data_address.unwrap_or(self.address);
        let mut command = self.agent_command();
        command
            .args(["agent", "--host-id", self.name])
            .args(["--listen", &format!("{}:{}", self.address, self.port)])
            .args(["--data-listen", &format!("{data_address}:{}", self.data_port)])
            .arg("--data-dir")
            .arg(&self.data_dir)
            .args(&self.arguments)
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .env("NO_COLOR", "1")
            .stdin(Stdio::null())
            .stdout(log()?)
            .stderr(log()?);
        if let Some(user) = self.user {
            command.uid(user).gid(user);
        }
        self.agent = Some(command.spawn().context("failed to start the agent")?);
        Ok(())
    }

    /// From its next start on the agent sees the folder `what` at `at`, and nobody else does: as if its host had a disk of its
    /// own there. The agent is in a mount namespace of its own then, which goes with it.
    pub fn see(&mut self, what: &Path, at: &Path) {
        self.views.push((what.to_owned(), at.to_owned()));
    }

    fn agent_command(&self) -> Command {
        const BIND: &str =
            r#"while [ "$1" != -- ]; do mount --bind "$1" "$2" || exit 1; shift 2; done; shift; exec "$@""#;
        if self.views.is_empty() {
            return self.in_its_network(self.ferry.as_os_str());
        }
        let mut command = self.in_its_network(OsStr::new("unshare"));
        command.args(["--mount", "--propagation", "private", "sh", "-c", BIND, "sh"]);
        for (what, at) in &self.views {
            command.arg(what).arg(at);
        }
        command.arg("--").arg(&self.ferry);
        command
    }

    fn in_its_network(&self, program: &OsStr) -> Command {
        let Some(network) = &self.network else {
            return Command::new(program);
        };
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", network.display())).arg(program);
        command
    }

    /// From its next start on the agent listens at this address, in this network.
    pub fn move_to(&mut self, address: &'static str, network: Option<PathBuf>) {
        (self.address, self.network) = (address, network);
    }

    /// From its next start on page streams come in at this address alone.
    pub fn take_pages_at(&mut self, address: &'static str) {
        self.data_address = Some(address);
    }

    /// From its next start on the agent is this binary, as after an upgrade. Its VMMs stay what they are.
    pub fn become_binary(&mut self, ferry: &Path) {
        ferry.clone_into(&mut self.ferry);
    }

    /// From its next start on the agent is this user's, from this copy of the binary, with its data in this folder.
    pub fn become_user(&mut self, user: u32, ferry: &Path, data_dir: &Path) {
        self.user = Some(user);
        ferry.clone_into(&mut self.ferry);
        data_dir.clone_into(&mut self.data_dir);
    }

    /// The agent's process id, if it was started and not ended by [`Host::kill`] or [`Host::terminate`].
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.agent.as_ref().map(Child::id)
    }

    /// Kills the agent, as `kill -9` does. Its VMMs go on.
    pub fn kill(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            let _ = agent.kill();
            let _ = agent.wait();
        }
    }

    /// Ends the agent as systemd does, and waits for it. Its VMMs go on.
    ///
    /// # Errors
    /// If it does not end.
    pub fn terminate(&mut self) -> Result<()> {
        let Some(agent) = self.agent.as_mut() else {
            return Ok(());
        };
        process::signal(agent.id(), Signal::TERM)?;
        until("the agent ends", CALL, || Ok(agent.try_wait()?))?;
        self.agent = None;
        Ok(())
    }

    /// Waits until the agent has ended by itself, and tells its exit code.
    ///
    /// # Errors
    /// If it does not end.
    pub fn wait_ended(&mut self) -> Result<Option<i32>> {
        let mut agent = self.agent.take().context("no agent was started")?;
        let status = until("the agent ends", CALL, || Ok(agent.try_wait()?));
        if status.is_err() {
            self.agent = Some(agent);
        }
        Ok(status?.code())
    }

    /// Calls the command line with `-o json`, asking this host, and waits for it.
    ///
    /// # Errors
    /// If it cannot be started or does not end within [`crate::waiting::MOVE`].
    pub fn ferry<S: AsRef<str>>(&self, arguments: &[S]) -> Result<Answer> {
        self.begin(arguments)?.wait()
    }

    /// Calls the command line without `-o json`, for verbs that have no result, and waits for it.
    ///
    /// # Errors
    /// If it cannot be started or does not end within [`crate::waiting::MOVE`].
    pub fn plain_ferry(&self, arguments: &[&str]) -> Result<Answer> {
        let mut command = Command::new(&self.ferry);
        command.args(arguments).env("NO_COLOR", "1");
        Call::start(command, format!("ferry {}", arguments.join(" ")))?.wait()
    }

    /// The same as [`Host::ferry`], going on in the background.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn begin<S: AsRef<str>>(&self, arguments: &[S]) -> Result<Call> {
        let words: Vec<&str> = arguments.iter().map(AsRef::as_ref).collect();
        let mut command = Command::new(&self.ferry);
        command
            .args(&words)
            .args(["-o", "json"])
            .env("FERRY_AGENT", self.url())
            .env("NO_COLOR", "1");
        Call::start(command, format!("ferry {} (at {})", words.join(" "), self.name))
    }

    /// Types into an instance's console, which is attached to until the call is dropped.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn type_into(&self, instance: &str, text: &str) -> Result<Call> {
        let mut command = Command::new(&self.ferry);
        command
            .args(["console", instance, "--attach"])
            .env("FERRY_AGENT", self.url())
            .env("NO_COLOR", "1");
        let mut typed = tempfile::tempfile().context("failed to make a file for what is typed")?;
        typed.write_all(text.as_bytes())?;
        typed.rewind()?;
        Call::start_reading(
            command,
            format!("ferry console {instance} --attach"),
            Stdio::from(typed),
        )
    }

    /// The instance as this host shows it.
    ///
    /// # Errors
    /// If it does not know the instance.
    pub fn show(&self, instance: &str) -> Result<Value> {
        self.ferry(&["show", instance])?.exit(0)?.json()
    }

    /// Waits until this host shows that the instance migrates, and tells the migration's id.
    ///
    /// # Errors
    /// If it never does.
    pub fn migration_of(&self, instance: &str) -> Result<String> {
        until("the migration is under way", CALL, || {
            let shown = self.show(instance)?;
            Ok(shown["migration"]
                .as_str()
                .filter(|_| shown["task"] == "migrating")
                .map(str::to_owned))
        })
    }

    /// Waits until this host shows the instance with this status and no task.
    ///
    /// # Errors
    /// The last answer, if that does not happen.
    pub fn wait_for_status(&self, instance: &str, status: &str) -> Result<Value> {
        let mut last = None;
        let found = until(&format!("{instance} is {status} at {}", self.name), CALL, || {
            let answer = self.ferry(&["show", instance])?;
            let shown = answer
                .json()
                .ok()
                .filter(|shown| shown["status"] == status && shown["task"].is_null());
            last = Some(answer);
            Ok(shown)
        });
        found.with_context(|| last.map(|answer| answer.to_string()).unwrap_or_default())
    }

    /// Waits until this host says that nobody knows where the instance is.
    ///
    /// # Errors
    /// If it does not say that.
    pub fn wait_for_indeterminate(&self, instance: &str) -> Result<()> {
        until(&format!("{instance} is indeterminate at {}", self.name), CALL, || {
            Ok((self.show(instance)?["status"] == "indeterminate").then_some(()))
        })
    }

    /// Waits until this host no longer has the instance.
    ///
    /// # Errors
    /// The last answer, if it still does.
    pub fn wait_until_gone(&self, instance: &str) -> Result<Answer> {
        until(&format!("{instance} is gone from {}", self.name), CALL, || {
            let answer = self.ferry(&["show", instance])?;
            Ok((answer.code == Some(3)).then_some(answer))
        })
    }

    /// The ids of the VMM processes of this host, found by their command lines.
    #[must_use]
    pub fn vmms(&self) -> Vec<u32> {
        let named = process::naming(&self.data_dir);
        named
            .into_iter()
            .filter(|&id| process::command_line(id).is_some_and(|line| line.contains(" vmm ")))
            .collect()
    }

    /// The one VMM process of this host.
    ///
    /// # Errors
    /// If there is none, or more.
    pub fn vmm(&self) -> Result<u32> {
        match self.vmms()[..] {
            [id] => Ok(id),
            ref other => bail!("one VMM expected at {}, found {other:?}", self.name),
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A call of the command line that goes on. Dropping it kills it.
pub struct Call {
    name: String,
    child: Child,
    readers: Option<(JoinHandle<String>, JoinHandle<String>)>,
}

impl Call {
    /// Starts a program whose whole command is the caller's; `name` is for messages.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(command: Command, name: String) -> Result<Self> {
        Self::start_reading(command, name, Stdio::null())
    }

    fn start_reading(mut command: Command, name: String, stdin: Stdio) -> Result<Self> {
        command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("failed to start {name}"))?;
        let stdout = read_all(child.stdout.take().expect("stdout was piped"));
        let stderr = read_all(child.stderr.take().expect("stderr was piped"));
        Ok(Self {
            name,
            child,
            readers: Some((stdout, stderr)),
        })
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// If it does not end within [`crate::waiting::MOVE`]; it is killed then.
    pub fn wait(self) -> Result<Answer> {
        self.wait_for(crate::waiting::MOVE)
    }

    /// Waits for its end, so long.
    ///
    /// # Errors
    /// If it does not end; it is killed then.
    pub fn wait_for(mut self, deadline: Duration) -> Result<Answer> {
        let status = until(&format!("`{}` ends", self.name), deadline, || {
            Ok(self.child.try_wait()?)
        })?;
        let (stdout, stderr) = self.readers.take().expect("a call is waited for once");
        let text = |reader: JoinHandle<String>| reader.join().expect("reading does not panic");
        Ok(Answer {
            call: self.name.clone(),
            code: status.code(),
            stdout: text(stdout),
            stderr: text(stderr),
        })
    }

    /// Kills it, as `kill -9` does, and tells whether that is what ended it.
    ///
    /// # Errors
    /// If it cannot be waited for.
    pub fn kill(mut self) -> Result<bool> {
        self.child.kill().context("failed to kill the command line")?;
        let status = self.child.wait().context("failed to wait for the command line")?;
        Ok(status.code().is_none())
    }

    /// Interrupts it, as Ctrl-C does.
    ///
    /// # Errors
    /// If it has ended.
    pub fn interrupt(&self) -> Result<()> {
        process::signal(self.child.id(), Signal::INT)
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read_all(mut stream: impl Read + Send + 'static) -> JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// A port of loopback that is free now.
///
/// Below the range from which the kernel takes ports of its own accord: one of those may be an outgoing connection's by
/// the time an agent listens on it. Each process begins elsewhere and gives none twice until it has come around.
///
/// # Errors
/// If there is none.
pub fn free_port() -> Result<u16> {
    const FIRST: u32 = 10_000;
    const COUNT: u32 = 20_000;
    static GIVEN: AtomicU32 = AtomicU32::new(0);
    let begin = std::process::id().wrapping_mul(101);
    (0..COUNT)
        .map(|_| begin.wrapping_add(GIVEN.fetch_add(1, Ordering::Relaxed)) % COUNT + FIRST)
        .filter_map(|port| u16::try_from(port).ok())
        .find(|&port| TcpListener::bind(("127.0.0.1", port)).is_ok())
        .context("no free port")
}
