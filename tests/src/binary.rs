//! Finds the binaries `ferry` and `xtask`.

use std::env;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

/// The binary under test: `FERRY_BINARY` if it is set, else the one that cargo built into the same target directory as
/// the program that asks.
///
/// # Errors
/// If there is none; the message says how to build it.
pub fn ferry() -> Result<PathBuf> {
    if let Some(file) = env::var_os("FERRY_BINARY") {
        return Ok(file.into());
    }
    built("ferry")
}

/// The binary `xtask` that cargo built into the same target directory as the program that asks.
///
/// # Errors
/// If there is none; the message says how to build it.
pub fn xtask() -> Result<PathBuf> {
    built("xtask")
}

fn built(name: &str) -> Result<PathBuf> {
    let own = env::current_exe().context("failed to find the running program")?;
    let found = own
        .ancestors()
        .skip(1)
        .take(2)
        .map(|folder| folder.join(name))
        .find(|file| file.is_file());
    match found {
        Some(file) => Ok(file),
        None => bail!(
            "no binary `{name}` beside {}: run `cargo build --workspace` first",
            own.display()
        ),
    }
}
