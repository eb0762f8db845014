//! `cargo xtask linux`: a small Linux guest as two files.

use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail};
use ferry_linux_guest::{CMDLINE, PACKAGES, image};

/// What `cargo xtask linux` takes.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Install what the build needs first (root, apt).
    #[arg(long)]
    install: bool,
}

/// Builds the guest, unless it is in the cache, and prints how to run it.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    if options.install {
        let mut apt = Command::new("apt-get");
        let status = apt
            .args(["install", "--yes", "--quiet", "--no-install-recommends"])
            .args(PACKAGES)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(Stdio::null())
            .status();
        if !status.context("failed to start apt-get")?.success() {
            bail!("apt-get could not install {}", PACKAGES.join(" "));
        }
    }
    eprintln!("the kernel is built unless it is in the cache: some minutes");
    let image = image()?;
    println!(
        "ferry run linux --memory 256M --kernel {} --initrd {} --cmdline '{CMDLINE}'",
        image.kernel.display(),
        image.initramfs.display()
    );
    Ok(ExitCode::SUCCESS)
}
