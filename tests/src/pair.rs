//! Two hosts that know each other, and what must hold of them after every scenario.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::process::Signal;
use tempfile::TempDir;

use crate::answer::{Answer, Migration};
use crate::guest::Guest;
use crate::host::{Call, Host};
use crate::waiting::{CALL, MOVE, until};
use crate::witness::Witness;
use crate::{binary, complaints, process};

/// Hosts `a` and `b` in one temporary directory. Dropping it ends every process that it started and removes every file.
pub struct Pair {
    /// Where guests are run.
    pub a: Host,
    /// Where they move to.
    pub b: Host,
    /// A third host, where a scenario asked for one.
    pub c: Option<Host>,
    /// What moves is compared, where that can be. Not for what speaks an older version: nothing that is new is asked of it.
    pub verifies: bool,
    expected_complaints: BTreeSet<String>,
    folder: TempDir,
}

impl Pair {
    /// Two hosts, their agents up.
    ///
    /// # Errors
    /// If an agent does not come up.
    pub fn start() -> Result<Self> {
        let mut pair = Self::prepare()?;
        pair.a.start()?;
        pair.b.start()?;
        Ok(pair)
    }

    /// Two hosts whose agents do not run yet.
    ///
    /// # Errors
    /// If the binary is missing or there is no room.
    pub fn prepare() -> Result<Self> {
        Self::prepare_with(&binary::ferry()?)
    }

    /// Two hosts of this binary, whose agents do not run yet.
    ///
    /// # Errors
    /// If there is no room.
    pub fn prepare_with(ferry: &Path) -> Result<Self> {
        remove_remains_of_the_dead();
        let folder = folder()?;
        let (mut a, mut b) = (
            Host::new("a", folder.path(), ferry)?,
            Host::new("b", folder.path(), ferry)?,
        );
        a.set_peer(b.name, &b.url());
        b.set_peer(a.name, &a.url());
        fs::write(folder.path().join(PROBE), ferry_probe::PROBE_ELF).context("failed to write the probe")?;
        fs::create_dir(folder.path().join(KEPT_LOGS))?;
        Ok(Self {
            a,
            b,
            c: None,
            verifies: true,
            expected_complaints: BTreeSet::new(),
            folder,
        })
    }

    /// Adds host `c`, known to `b` and knowing it, and starts its agent; that of `b` starts anew.
    ///
    /// # Errors
    /// If an agent does not come up.
    pub fn start_third(&mut self) -> Result<&Host> {
        let mut third = Host::new("c", self.folder.path(), &binary::ferry()?)?;
        third.set_peer(self.b.name, &self.b.url());
        self.b.set_peer(third.name, &third.url());
        self.b.terminate()?;
        self.b.start()?;
        let third = self.c.insert(third);
        third.start()?;
        Ok(third)
    }

    /// Adds host `c`; all three know each other. The agents of `a` and `b` start anew.
    ///
    /// # Errors
    /// If an agent does not come up.
    pub fn start_three(&mut self, third_arguments: &[&str]) -> Result<()> {
        let mut third = Host::new("c", self.folder.path(), &binary::ferry()?)?;
        third
            .arguments
            .extend(third_arguments.iter().map(|&word| word.to_owned()));
        for host in [&mut self.a, &mut self.b] {
            third.set_peer(host.name, &host.url());
            host.set_peer(third.name, &third.url());
            host.terminate()?;
            host.start()?;
        }
        self.c.insert(third).start()
    }

    fn hosts(&self) -> impl Iterator<Item = &Host> {
        [&self.a, &self.b].into_iter().chain(&self.c)
    }

    /// The temporary directory.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The probe as a file.
    #[must_use]
    pub fn kernel(&self) -> String {
        self.folder.path().join(PROBE).display().to_string()
    }

    /// Lines with these words in an agent's or a VMM's log do not fail the scenario.
    pub fn expect_complaint(&mut self, words: &str) {
        self.expected_complaints.insert(words.to_owned());
    }

    /// Runs a guest on `a` and waits until it is ready and beats.
    ///
    /// # Errors
    /// If it is refused, or does not come up.
    pub fn run(&self, guest: &Guest) -> Result<Witness> {
        self.a.ferry(&guest.arguments(&self.kernel()))?.exit(0)?;
        let witness = Witness::of(&[&self.a, &self.b]);
        witness.wait_ready()?;
        self.keep_logs();
        Ok(witness)
    }

    /// Moves the guest from `a` to `b` with these further arguments, verified, and waits for the end.
    ///
    /// # Errors
    /// If the call cannot be made.
    pub fn migrate(&self, name: &str, further: &[&str]) -> Result<Answer> {
        self.begin_migrate(name, further)?.wait()
    }

    /// The same, going on in the background.
    ///
    /// # Errors
    /// If the call cannot be made.
    pub fn begin_migrate(&self, name: &str, further: &[&str]) -> Result<Call> {
        let mut words = [&["migrate", name, "--to", "b"], further].concat();
        if self.verifies && !further.contains(&"--verify") {
            words.push("--verify");
        }
        self.a.begin(&words)
    }

    /// Begins to move the guest with these further arguments and waits until its record says so.
    ///
    /// # Errors
    /// If the migration ends before that, or the record never does.
    pub fn migrate_until(
        &self,
        name: &str,
        further: &[&str],
        says: impl Fn(&Migration) -> Result<bool>,
    ) -> Result<Underway> {
        let call = self.begin_migrate(name, further)?;
        let id = self.a.migration_of(name)?;
        until("the migration is where it should be", CALL, || {
            let migration = self.a.ferry(&["migration", "show", &id])?.exit(0)?.migration()?;
            if migration.is_over() {
                bail!("it ended: {}", migration.record);
            }
            Ok(says(&migration)?.then_some(()))
        })?;
        self.keep_logs();
        Ok(Underway { id, call })
    }

    /// Waits until the migration is over, asking `a`.
    ///
    /// # Errors
    /// If it does not end.
    pub fn wait_over(&self, id: &str) -> Result<Migration> {
        until("the migration is over", MOVE, || {
            let record = self.a.ferry(&["migration", "show", id])?.exit(0)?.migration()?;
            Ok(record.is_over().then_some(record))
        })
    }

    /// Checks that the guest runs at this host and nowhere else: status, processes, heartbeats, oracle.
    ///
    /// # Errors
    /// Which of these does not hold.
    pub fn runs_only_at(&self, host: &Host, name: &str, witness: &Witness) -> Result<()> {
        host.wait_for_status(name, "running")?;
        self.exists_only_at(host, name)?;
        witness.wait_for_beats_at(host.name, 5)?;
        self.keep_logs();
        witness.check()
    }

    /// Checks that the only VMM left is at this host.
    ///
    /// # Errors
    /// The processes found instead.
    pub fn exists_only_at(&self, host: &Host, name: &str) -> Result<()> {
        let other = if host.name == self.a.name { &self.b } else { &self.a };
        let one = until(&format!("the only VMM of {name} is at {}", host.name), CALL, || {
            Ok((host.vmms().len() == 1 && other.vmms().is_empty()).then_some(()))
        });
        one.with_context(|| format!("VMMs at a: {:?}, at b: {:?}", self.a.vmms(), self.b.vmms()))
    }

    /// Ends a scenario: no unexpected complaint in any log.
    ///
    /// # Errors
    /// The complaints.
    pub fn close(&self) -> Result<()> {
        self.keep_logs();
        let mut found = Vec::new();
        for file in self.logs() {
            let log = fs::read(&file).with_context(|| format!("failed to read {}", file.display()))?;
            let complaints = complaints::in_log(&String::from_utf8_lossy(&log), &self.expected_complaints);
            found.extend(complaints.into_iter().map(|line| format!("{}: {line}", file.display())));
        }
        if found.is_empty() {
            Ok(())
        } else {
            bail!("unexpected complaints:\n{}", found.join("\n"))
        }
    }

    /// Whether a line of any log has all of these words in it.
    ///
    /// # Errors
    /// If a log cannot be read.
    pub fn is_logged(&self, words: &[&str]) -> Result<bool> {
        self.keep_logs();
        for file in self.logs() {
            let log = fs::read(&file).with_context(|| format!("failed to read {}", file.display()))?;
            let log = String::from_utf8_lossy(&log);
            if log.lines().any(|line| words.iter().all(|word| line.contains(word))) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The ends of all logs, for the message of a failed scenario.
    #[must_use]
    pub fn story(&self) -> String {
        self.keep_logs();
        let logs = self.logs();
        logs.iter()
            .map(|file| format!("── {}\n{}\n", file.display(), complaints::tail(file, 40)))
            .collect()
    }

    /// Holds on to the logs of VMMs, which go when their instance does: a second link to each file.
    pub fn keep_logs(&self) {
        for host in self.hosts() {
            let instances = fs::read_dir(host.data_dir.join("instances"))
                .into_iter()
                .flatten()
                .flatten();
            for instance in instances {
                for entry in fs::read_dir(instance.path()).into_iter().flatten().flatten() {
                    let name = entry.file_name().to_string_lossy().into_owned();
                    let Ok(metadata) = entry.metadata() else { continue };
                    if name.ends_with(".log") && !name.contains("console") {
                        let kept = format!("{}-{}-{name}", host.name, metadata.ino());
                        let _ = fs::hard_link(entry.path(), self.folder.path().join(KEPT_LOGS).join(kept));
                    }
                }
            }
        }
    }

    fn logs(&self) -> Vec<PathBuf> {
        let kept = fs::read_dir(self.folder.path().join(KEPT_LOGS))
            .into_iter()
            .flatten()
            .flatten();
        self.hosts()
            .map(|host| host.log.clone())
            .filter(|file| file.exists())
            .chain(kept.map(|entry| entry.path()))
            .collect()
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        // The agents first: they would look after a VMM that dies.
        self.a.kill();
        self.b.kill();
        self.c = None;
        remove_remains(self.folder.path());
    }
}

/// Ends the processes that name the folder, and removes what they left outside it: cgroups and started marks.
pub fn remove_remains(folder: &Path) {
    for id in process::naming(folder) {
        let _ = process::signal(id, Signal::KILL);
    }
    let _ = until("all processes are gone", CALL, || {
        Ok(process::naming(folder).is_empty().then_some(()))
    });
    for data_dir in data_dirs(folder) {
        for instance in fs::read_dir(data_dir.join("instances")).into_iter().flatten().flatten() {
            remove_cgroup(&instance.file_name());
        }
        let name = mark_folder_name(&data_dir);
        for root in ["/run", "/dev/shm", "/tmp"] {
            let _ = fs::remove_dir_all(Path::new(root).join(&name));
        }
    }
}

/// The data directories of the agents: in the folder, and in a folder in it where they are another user's.
fn data_dirs(folder: &Path) -> Vec<PathBuf> {
    let folders = fs::read_dir(folder).into_iter().flatten().flatten();
    let homes = folders.map(|found| found.path()).chain([folder.to_owned()]);
    homes.flat_map(|home| HOSTS.map(|host| home.join(host))).collect()
}

/// What the folder is called in which a host with this data directory keeps the started marks of guests that move in.
#[must_use]
pub fn mark_folder_name(data_dir: &Path) -> String {
    let digest = blake3::hash(data_dir.as_os_str().as_encoded_bytes());
    format!("ferry-{}", &digest.to_hex()[..16])
}

/// A process that was killed is in its cgroup until the kernel is done with it.
fn remove_cgroup(instance: &OsStr) {
    for root in ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"] {
        let group = Path::new(root).join("ferry").join(instance);
        let _ = until("the cgroup is empty", CALL, || {
            let removed = fs::remove_dir(&group);
            Ok((removed.is_ok() || !group.exists()).then_some(()))
        });
    }
}

/// A folder that goes when it is dropped, or when the next [`Pair`] is made after this process was killed.
///
/// # Errors
/// If there is no room.
pub fn folder() -> Result<TempDir> {
    // Short: the path of a Unix socket has 107 characters.
    let prefix = format!("{PREFIX}{}-", std::process::id());
    let folder = tempfile::Builder::new().prefix(&prefix).tempdir_in(ROOT);
    folder.context("failed to make a folder")
}

/// Removes what runs of these tests, or of a bench, left that were killed themselves: their folders are named after their processes.
pub fn remove_remains_of_the_dead() {
    for entry in fs::read_dir(ROOT).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let owner = name
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.split_once('-')?.0.parse().ok());
        if owner.is_some_and(|owner| !process::is_alive(owner)) {
            remove_remains(&entry.path());
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// A migration that goes on.
pub struct Underway {
    /// The migration's id.
    pub id: String,
    /// The waiting `ferry migrate`.
    pub call: Call,
}

const ROOT: &str = "/tmp";
const PREFIX: &str = "ft";
const HOSTS: [&str; 3] = ["a", "b", "c"];
const PROBE: &str = "probe.elf";
const KEPT_LOGS: &str = "logs";
