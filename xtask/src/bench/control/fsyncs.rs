//! What is made durable between ARM and CONFIRM, as the kernel sees it: strace counts the agents' fsyncs, and the agents' own gate tells
//! when which step was taken.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use ferry_tests::{Guest, process, until};
use rustix::process::Signal;

use super::Figure;
use crate::bench::two_hosts;

const PATIENCE: Duration = Duration::from_secs(30);

/// When somebody came by a site: seconds since 1970, and `HOST MOMENT SITE`.
type Passages = Arc<Mutex<Vec<(f64, String)>>>;

pub(super) fn measure(ferry: &Path) -> Result<Vec<Figure>> {
    if Command::new("strace").arg("-V").stdout(Stdio::null()).status().is_err() {
        eprintln!("fsyncs: strace is not installed, they are not counted");
        return Ok(Vec::new());
    }
    let mut pair = two_hosts(ferry)?;
    let gate = pair.folder().join("gate.sock");
    let passages = listen(&gate)?;
    for host in [&mut pair.a, &mut pair.b] {
        host.arguments
            .extend(["--fault-gate".to_owned(), gate.display().to_string()]);
        host.start()?;
    }
    pair.run(&Guest::new("g"))?;
    let traces = [
        Trace::of(pair.a.pid(), pair.folder().join("a.strace"))?,
        Trace::of(pair.b.pid(), pair.folder().join("b.strace"))?,
    ];
    let moved = pair.migrate("g", &["--max-downtime", "2s"])?.exit(0)?;
    moved.migration()?.is("completed", "b")?;
    let [at_a, at_b] = traces.map(Trace::end);
    let (at_a, at_b) = (at_a?, at_b?);

    let passages = passages.lock().unwrap_or_else(PoisonError::into_inner);
    let when = |passage: &str| {
        let found = passages.iter().find(|(_, name)| name == passage).map(|(at, _)| *at);
        found.with_context(|| format!("nobody came by {passage}"))
    };
    let armed = when("a before a.journal-armed")?;
    let confirmed = when("a after a.journal-said-running")?.max(when("b after b.journal-running")?);
    let blackout = (when("a after order.grant")?, when("b before report.started")?);
    let between =
        |times: &[f64], (from, to): (f64, f64)| times.iter().filter(|at| (from..=to).contains(*at)).count() as f64;
    let switchover = (armed, confirmed);
    Ok(vec![
        Figure::new(
            "fsyncs of both agents while the guest stands still",
            between(&at_a, blackout) + between(&at_b, blackout),
            "",
        )
        .at_most(1.0),
        Figure::new("fsyncs of agent A from ARM to CONFIRM", between(&at_a, switchover), ""),
        Figure::new("fsyncs of agent B from ARM to CONFIRM", between(&at_b, switchover), ""),
    ])
}

/// Lets everybody pass and notes when.
fn listen(socket: &Path) -> Result<Passages> {
    let listener = UnixListener::bind(socket)?;
    let passages = Passages::default();
    let noted = Arc::clone(&passages);
    // Ends with this process: agents that ask are gone before.
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let noted = Arc::clone(&noted);
            thread::spawn(move || answer(&stream, &noted));
        }
    });
    Ok(passages)
}

fn answer(stream: &UnixStream, noted: &Passages) {
    let mut line = String::new();
    if BufReader::new(stream).read_line(&mut line).is_err() {
        return;
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut noted = noted.lock().unwrap_or_else(PoisonError::into_inner);
    noted.push((now.as_secs_f64(), line.trim_end().to_owned()));
    drop(noted);
    let mut stream = stream;
    // It may have been killed.
    let _ = stream.write_all(b"go\n");
}

/// An agent under strace.
struct Trace {
    strace: Child,
    file: PathBuf,
}

impl Trace {
    fn of(process: Option<u32>, file: PathBuf) -> Result<Self> {
        let process = process.context("the agent runs")?;
        let strace = Command::new("strace")
            .args(["-f", "-ttt", "-e", "trace=fsync,fdatasync", "-o"])
            .arg(&file)
            .args(["-p", &process.to_string()])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("failed to start strace")?;
        let mut trace = Self { strace, file };
        until("strace is attached", PATIENCE, || {
            if let Some(status) = trace.strace.try_wait()? {
                bail!("strace ended at once ({status}): it takes the right to trace");
            }
            let threads = fs::read_dir(format!("/proc/{process}/task"))?.flatten();
            let is_traced = |path: PathBuf| {
                let status = fs::read_to_string(path.join("status")).unwrap_or_default();
                !status
                    .lines()
                    .any(|line| line.starts_with("TracerPid:") && line.ends_with("\t0"))
            };
            Ok(threads.map(|thread| thread.path()).all(is_traced).then_some(()))
        })?;
        Ok(trace)
    }

    /// When the agent's fsyncs began, in seconds since 1970.
    fn end(mut self) -> Result<Vec<f64>> {
        process::signal(self.strace.id(), Signal::INT)?;
        until("strace ends", PATIENCE, || Ok(self.strace.try_wait()?))?;
        let text = fs::read_to_string(&self.file)?;
        let begun = text
            .lines()
            .filter(|line| line.contains("sync(") && !line.contains("resumed"));
        let times: Option<Vec<f64>> = begun.map(|line| line.split_whitespace().nth(1)?.parse().ok()).collect();
        let times = times.context("strace's output cannot be read")?;
        ensure!(!times.is_empty(), "no fsync was seen at all");
        Ok(times)
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        // Both fail only where it has ended.
        let _ = self.strace.kill();
        let _ = self.strace.wait();
    }
}
