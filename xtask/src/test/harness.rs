//! Builds the test programs with cargo and runs each of them.

use std::env;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{ChildStdout, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::tally::{Output, Tally};
use crate::workspace;

/// What a test program tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A crate's own tests.
    Unit,
    /// Whole VMs and agents.
    Scenario,
}

/// A test program that cargo built.
pub(super) struct TestProgram {
    pub(super) name: String,
    pub(super) kind: Kind,
    /// The standard harness, not one of the program's own.
    standard: bool,
    file: PathBuf,
    package: PathBuf,
}

/// How long each fuzz target is fed (`fuzz/inputs`).
const FUZZ_SECONDS: &str = "FERRY_FUZZ_SECONDS";

/// Builds everything and tells what there is to run.
pub(super) fn build() -> Result<Vec<TestProgram>> {
    let mut child = workspace::cargo()
        .args([
            "build",
            "--workspace",
            "--all-targets",
            "--message-format=json-render-diagnostics",
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("failed to start cargo")?;
    let mut programs = Vec::new();
    for line in BufReader::new(child.stdout.take().expect("stdout was piped")).lines() {
        let line = line.context("failed to read what cargo says")?;
        programs.extend(serde_json::from_str(&line).ok().as_ref().and_then(test_program));
    }
    let status = child.wait().context("failed to wait for cargo")?;
    if !status.success() {
        bail!("cargo build: {status}");
    }
    programs.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(programs)
}

fn test_program(message: &Value) -> Option<TestProgram> {
    let target = message.get("target")?;
    let is = |kind: &str| {
        target["kind"]
            .as_array()
            .is_some_and(|kinds| kinds.iter().any(|k| k == kind))
    };
    if message["reason"] != "compiler-artifact" || message["profile"]["test"] != true || is("bench") {
        return None;
    }
    let package = Path::new(message["manifest_path"].as_str()?).parent()?;
    let folder = package.strip_prefix(workspace::root()).unwrap_or(package);
    let target_name = target["name"].as_str()?;
    let scenario = matches!(target_name, "scenarios" | "matrix") && is("test");
    Some(TestProgram {
        name: format!(
            "{} {}",
            folder.display(),
            if is("test") { target_name } else { "unit tests" }
        ),
        kind: if scenario { Kind::Scenario } else { Kind::Unit },
        standard: !is("test"),
        file: PathBuf::from(message["executable"].as_str()?),
        package: package.to_owned(),
    })
}

impl TestProgram {
    /// Runs it, shows what it says as it says it, and adds its results to the tally.
    ///
    /// # Errors
    /// If a test failed, or the program ended without a result.
    pub(super) fn run(&self, filter: Option<&str>, long: bool, tally: &mut Tally) -> Result<()> {
        eprintln!("   {}", self.name);
        let mut command = Command::new(&self.file);
        command
            .current_dir(&self.package)
            .env("CARGO_MANIFEST_DIR", &self.package);
        command.args(filter);
        if long {
            command.env("FERRY_LONG_TESTS", "1").arg("--include-ignored");
            if env::var_os(FUZZ_SECONDS).is_none() {
                command.env(FUZZ_SECONDS, "60");
            }
        }
        if self.standard {
            // A test that needs KVM and finds none says so and passes: what passing tests print is needed.
            command.arg("--show-output");
        }
        let deadline = if long {
            Duration::from_secs(7200)
        } else {
            // All scenarios take 35 minutes on two processors that have nothing else to do.
            Duration::from_secs(3600)
        };
        run_counted(command, &self.name, deadline, tally)
    }
}

/// Runs the examples in the documentation.
pub(super) fn run_doctests(tally: &mut Tally) -> Result<()> {
    let mut command = workspace::cargo();
    command.args(["test", "--workspace", "--doc", "--no-fail-fast"]);
    run_counted(command, "doctests", Duration::from_secs(900), tally)
}

fn run_counted(mut command: Command, name: &str, deadline: Duration, tally: &mut Tally) -> Result<()> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("failed to start {name}"))?;
    let stdout = child.stdout.take().expect("stdout was piped");
    let (done, watched) = mpsc::channel::<()>();
    let pid = Pid::from_child(&child);
    let watchdog = thread::spawn(move || {
        let late = watched.recv_timeout(deadline) == Err(mpsc::RecvTimeoutError::Timeout);
        if late {
            // The child is waited for only after this thread has ended, so the number is still its own.
            let _ = kill_process(pid, Signal::KILL);
        }
        late
    });
    let output = read_output(stdout, name);
    drop(done);
    let late = watchdog.join().expect("the watchdog does not panic");
    let status = child.wait().with_context(|| format!("failed to wait for {name}"))?;
    let had_result = output.results > 0;
    let failed = output.tally.failed > 0;
    tally.add(output.tally);
    if late {
        tally.fail(format!("{name}: not done after {} s, killed", deadline.as_secs()));
        bail!("{name} hung");
    }
    if !status.success() && !failed {
        tally.fail(format!("{name}: ended with {status} and no failed test"));
    } else if !had_result && name != "doctests" {
        tally.fail(format!("{name}: ended without a result"));
    }
    if status.success() {
        Ok(())
    } else {
        bail!("{name}: {status}")
    }
}

fn read_output(stdout: ChildStdout, name: &str) -> Output {
    let mut output = Output::new(name);
    let mut reader = BufReader::new(stdout);
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
        let text = String::from_utf8_lossy(&line);
        if output.take(text.trim_end()) {
            print!("{text}");
        }
        line.clear();
    }
    output
}
