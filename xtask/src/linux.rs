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
    /// Print only what `ferry run` is told of it, for a shell to take: `eval "ferry run NAME $(cargo xtask linux --arguments)"`.
    #[arg(long)]
    arguments: bool,
    /// Further words for the guest's command line.
    #[arg(long, default_value = "")]
    words: String,
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
    let arguments = format!(
        "--memory 256M --kernel {} --initrd {} --cmdline '{}'",
        image.kernel.display(),
        image.initramfs.display(),
        format!("{CMDLINE} {}", options.words).trim_end()
    );
    if options.arguments {
        println!("{arguments}");
    } else {
        println!("ferry run linux {arguments}");
    }
    Ok(ExitCode::SUCCESS)
}
