//! The kernel: unpacked, patched, configured, built, stripped.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context, Result, bail};

/// Where Debian's package puts the source.
pub(crate) const SOURCE: &str = "/usr/src/linux-source-6.1.tar.xz";

/// What is switched on, and off.
pub(crate) const CONFIG: &str = include_str!("../kernel.defconfig");

/// Ours, in order; each says why.
pub(crate) const PATCHES: [(&str, &str); 3] = [
    (
        "0001-no-int3-self-test.patch",
        include_str!("../patches/0001-no-int3-self-test.patch"),
    ),
    ("0002-no-fwait.patch", include_str!("../patches/0002-no-fwait.patch")),
    (
        "0003-syscall-by-page-fault.patch",
        include_str!("../patches/0003-syscall-by-page-fault.patch"),
    ),
];

/// Builds `vmlinux` into `folder`; what was only needed for that is gone afterwards.
///
/// # Errors
/// The first step that failed.
pub(crate) fn build(folder: &Path, log: &Path) -> Result<()> {
    let tree = folder.join("source");
    fs::create_dir(&tree).with_context(|| format!("failed to make {}", tree.display()))?;
    File::create(log).with_context(|| format!("failed to write {}", log.display()))?;
    let step = |what: &str, command: &mut Command| run(what, command, log);
    step(
        "unpack the kernel's source",
        Command::new("tar")
            .args(["--extract", "--strip-components=1", "--file", SOURCE, "--directory"])
            .arg(&tree),
    )?;
    for (name, text) in PATCHES {
        let file = folder.join(name);
        fs::write(&file, text).with_context(|| format!("failed to write {}", file.display()))?;
        step(
            &format!("apply {name}"),
            Command::new("patch")
                .args(["--strip=1", "--input"])
                .arg(&file)
                .current_dir(&tree),
        )?;
        fs::remove_file(&file).with_context(|| format!("failed to remove {}", file.display()))?;
    }
    let config = tree.join("arch/x86/configs/ferry_guest_defconfig");
    fs::write(&config, CONFIG).with_context(|| format!("failed to write {}", config.display()))?;
    let jobs = thread::available_parallelism().map_or(1, usize::from);
    step(
        "configure the kernel",
        Command::new("make").arg("ferry_guest_defconfig").current_dir(&tree),
    )?;
    step(
        "build the kernel",
        Command::new("make")
            .arg(format!("-j{jobs}"))
            .arg("vmlinux")
            .current_dir(&tree),
    )?;
    step(
        "strip the kernel",
        Command::new("strip")
            .arg("-o")
            .arg(folder.join("vmlinux"))
            .arg(tree.join("vmlinux")),
    )?;
    fs::remove_dir_all(&tree).with_context(|| format!("failed to remove {}", tree.display()))
}

fn run(what: &str, command: &mut Command, log: &Path) -> Result<()> {
    let out = File::options()
        .append(true)
        .open(log)
        .with_context(|| format!("failed to write {}", log.display()))?;
    let status = command
        .stdin(Stdio::null())
        .stdout(out.try_clone().context("failed to share the log")?)
        .stderr(out)
        .status()
        .with_context(|| format!("failed to {what}: {:?} does not start", command.get_program()))?;
    if !status.success() {
        bail!("failed to {what}: {status}, see {}", log.display());
    }
    Ok(())
}
