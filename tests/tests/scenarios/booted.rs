//! A Linux that has booted, kept as a snapshot by the first scenario that needs one, so that the others wait for no boot.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use anyhow::{Result, ensure};
use ferry_tests::linux::{BOOT, Linux, wait_printed};
use ferry_tests::{Host, Pair, pair};
use tempfile::TempDir;

use crate::scenario::has_nothing;

/// Where it is kept until all scenarios are over.
static KEPT: Mutex<Option<TempDir>> = Mutex::new(None);

/// Keeps the only guest of A, a Linux that ticks and has devices of no host; what is kept already stays.
pub(crate) fn keep(pair: &Pair) -> Result<()> {
    let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    if kept.is_none() {
        let folder = pair::folder()?;
        pair.a
            .ferry(&["snapshot", "g", "--to", &snapshot(folder.path())])?
            .exit(0)?;
        *kept = Some(folder);
    }
    Ok(())
}

/// Has a Linux with two vCPUs run at A as `g`: restored under an identity of its own, and with its power button looked at.
pub(crate) fn run(pair: &Pair) -> Result<()> {
    if KEPT.lock().unwrap_or_else(PoisonError::into_inner).is_none() {
        Linux::new("g")?.run(&pair.a)?;
        has_booted(&pair.a)?;
        keep(pair)?;
        pair.a.ferry(&["delete", "g", "--force"])?.exit(0)?;
        has_nothing(&pair.a)?;
    }
    let kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    let from = kept.as_ref().map(|folder| snapshot(folder.path())).unwrap_or_default();
    pair.a.ferry(&["restore", &from, "--name", "g"])?.exit(0)?;
    wait_printed(&pair.a, "TICK ", 1, BOOT)?;
    Ok(())
}

/// Waits until the only guest of a host ticks and looks at its power button.
pub(crate) fn has_booted(host: &Host) -> Result<()> {
    wait_printed(host, "BUTTON ready", 1, BOOT)?;
    let text = wait_printed(host, "TICK 2 ", 1, BOOT)?;
    ensure!(text.contains("LINUX 6.1") && text.contains("CPUS 2"), "{text}");
    Ok(())
}

/// Removes what is kept.
pub(crate) fn forget() {
    KEPT.lock().unwrap_or_else(PoisonError::into_inner).take();
}

fn snapshot(folder: &Path) -> String {
    folder.join("linux").display().to_string()
}
