//! Processes, by their id only.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};

/// The ids of the processes whose command line names something below `folder`.
#[must_use]
pub fn naming(folder: &Path) -> Vec<u32> {
    let prefix = format!("{}/", folder.display());
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let ids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let own = std::process::id();
    ids.filter(|&id| id != own && is_alive(id) && command_line(id).is_some_and(|line| line.contains(&prefix)))
        .collect()
}

/// The words of a process's command line, joined by spaces.
#[must_use]
pub fn command_line(id: u32) -> Option<String> {
    let bytes = fs::read(format!("/proc/{id}/cmdline")).ok()?;
    Some(
        bytes
            .split(|&byte| byte == 0)
            .map(String::from_utf8_lossy)
            .collect::<Vec<_>>()
            .join(" "),
    )
}

/// Whether there is such a process, and not only its remains.
#[must_use]
pub fn is_alive(id: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
    let state = stat.rsplit(") ").next().and_then(|rest| rest.chars().next());
    state.is_some_and(|state| !matches!(state, 'Z' | 'X'))
}

/// The names of a process's threads, sorted.
#[must_use]
pub fn threads(id: u32) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{id}/task")).into_iter().flatten().flatten();
    let mut names: Vec<_> = tasks
        .filter_map(|task| fs::read_to_string(task.path().join("comm")).ok())
        .collect();
    names.sort();
    names
}

/// Sends one signal to one process.
///
/// # Errors
/// If there is no such process.
pub fn signal(id: u32, signal: Signal) -> Result<()> {
    let pid = i32::try_from(id)
        .ok()
        .and_then(Pid::from_raw)
        .with_context(|| format!("{id} is no process id"))?;
    kill_process(pid, signal).with_context(|| format!("failed to signal process {id}"))
}
