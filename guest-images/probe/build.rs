//! Builds the guest from source: an ELF for the bare machine, made by the host's own target.
//!
//! Cargo knows no way to build one package for two environments without nightly features, so the
//! compiler is called directly. Fat LTO is not for speed: without it the linker keeps the parts of
//! `core` that ask for an unwinder.

use std::env;
use std::path::PathBuf;
use std::process::{Command, exit};

fn main() {
    let root = PathBuf::from(variable("CARGO_MANIFEST_DIR"));
    let out = PathBuf::from(variable("OUT_DIR"));
    let guest = root.join("src/guest");
    println!("cargo::rerun-if-changed={}", guest.display());
    for shared in [
        "cmdline.rs",
        "device_work.rs",
        "histogram.rs",
        "pattern.rs",
        "report.rs",
        "rng.rs",
    ] {
        println!("cargo::rerun-if-changed={}", root.join("src").join(shared).display());
    }
    println!("cargo::rerun-if-changed=build.rs");

    let host = variable("HOST");
    if !host.starts_with("x86_64-") {
        eprintln!("the probe guest is x86-64 code and is built by an x86-64 host; this is {host}");
        exit(1);
    }
    let script = format!("link-arg=-T{}", guest.join("link.ld").display());
    let built = Command::new(variable("RUSTC"))
        .args(["--edition=2024", "--crate-type=bin", "--crate-name=probe"])
        .arg(format!("--target={host}"))
        .args([
            "-Cpanic=abort",
            "-Crelocation-model=static",
            "-Clto=fat",
            "-Copt-level=3",
        ])
        .args(["-Cstrip=debuginfo", "-Clink-arg=-nostdlib", "-Clink-arg=-nostartfiles"])
        .args([
            "-Clink-arg=-static",
            "-Clink-arg=-no-pie",
            "-Clink-arg=-Wl,--build-id=none",
        ])
        .args(["-C", &script])
        .env("PROBE_VERSION", variable("CARGO_PKG_VERSION"))
        .arg("-o")
        .arg(out.join("probe.elf"))
        .arg(guest.join("main.rs"))
        .output();
    let output = built.unwrap_or_else(|error| {
        eprintln!("the compiler could not be started for the probe guest: {error}");
        exit(1);
    });
    let told = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        eprintln!("the probe guest did not build:\n{told}");
        exit(1);
    }
    for line in told.lines().filter(|line| !line.trim().is_empty()) {
        println!("cargo::warning={line}");
    }
}

fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|error| {
        eprintln!("cargo did not set {name}: {error}");
        exit(1);
    })
}
