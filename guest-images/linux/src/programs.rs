//! The guest's own program: built by the host's compiler for the host's target, without a library to look for.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// Its source, by file name.
pub(crate) const SOURCES: [(&str, &str); 7] = [
    ("main.rs", include_str!("../programs/main.rs")),
    ("button.rs", include_str!("../programs/button.rs")),
    ("chain.rs", include_str!("../programs/chain.rs")),
    ("records.rs", include_str!("../programs/records.rs")),
    ("echo.rs", include_str!("../programs/echo.rs")),
    ("fill.rs", include_str!("../programs/fill.rs")),
    ("flood.rs", include_str!("../programs/flood.rs")),
];

/// Builds it in `folder` and tells where it is.
///
/// # Errors
/// What the compiler says.
pub(crate) fn build(folder: &Path) -> Result<PathBuf> {
    for (name, text) in SOURCES {
        let file = folder.join(name);
        fs::write(&file, text).with_context(|| format!("failed to write {}", file.display()))?;
    }
    let program = folder.join("ferry-guest");
    let output = Command::new(compiler())
        .args([
            "--edition=2024",
            "--crate-name=ferry_guest",
            "-Cpanic=abort",
            "-Copt-level=s",
        ])
        .args(["-Clto=fat", "-Cstrip=symbols"])
        // At a fixed place: one that moves itself would do so with the emulator's help, page by page.
        .args(["-Ctarget-feature=+crt-static", "-Crelocation-model=static"])
        .arg("-o")
        .arg(&program)
        .arg(folder.join("main.rs"))
        .output()
        .context("failed to start the compiler")?;
    if !output.status.success() {
        bail!(
            "failed to build the guest's program: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(program)
}

/// Which compiler it is, for the name of what it builds.
///
/// # Errors
/// If there is none.
pub(crate) fn compiler_version() -> Result<Vec<u8>> {
    let output = Command::new(compiler())
        .arg("-vV")
        .output()
        .context("failed to start the compiler (rustc)")?;
    Ok(output.stdout)
}

fn compiler() -> std::ffi::OsString {
    env::var_os("RUSTC").unwrap_or_else(|| "rustc".into())
}
