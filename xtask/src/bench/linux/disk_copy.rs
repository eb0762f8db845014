//! A disk that moves with its guest, against a raw copy of the same file in the same file system.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use ferry_probe::rng::Rng;
use ferry_tests::{Guest, Pair};
use rustix::fs::{Advice, fadvise};

use super::Samples;
use crate::bench::{Options, ferry, two_hosts};
use crate::watched;

/// Much more than what a disk takes in without writing it.
const BYTES: u64 = 1 << 30;
const PIECE: usize = 4 << 20;
const DISK: &str = "disk.img";

pub(super) fn measure(options: &Options, ferry: &ferry::Binary) -> Result<Vec<Samples>> {
    let folder = tempfile::Builder::new()
        .prefix("bench-copy-")
        .tempdir_in(watched::room());
    let folder = folder.context("failed to make a folder for the disks")?;
    let places = Places::make(folder.path())?;
    write_noise(&places.a.join(DISK)).context("failed to write the disk")?;
    let pair = places.hosts(ferry)?;
    pair.run(&Guest::new("g").disk(&format!("path={}", places.both.join(DISK).display())))?;
    let mut all = ["ferry", "raw, direct", "raw, cached"].map(|name| Samples::of(name, "MiB/s"));
    for run in 1..=options.runs {
        eprintln!("disk-copy: run {run} of {}", options.runs);
        all[0].add(places.moves(&pair)?);
        for (samples, direct) in all[1..].iter_mut().zip([true, false]) {
            samples.add(raw_copy(&places.a.join(DISK), &places.b.join("raw.img"), direct)?);
        }
    }
    pair.close()?;
    all.iter().for_each(Samples::print);
    let raw = all[1..].iter().map(Samples::median).fold(f64::NAN, f64::max);
    println!("disk copy: {:.2} of the best raw copy", all[0].median() / raw);
    Ok(all.into())
}

/// The folders of the two hosts, and where both see them.
struct Places {
    a: PathBuf,
    b: PathBuf,
    both: PathBuf,
}

impl Places {
    fn make(folder: &Path) -> Result<Self> {
        let [a, b, both] = ["a", "b", "both"].map(|name| folder.join(name));
        for path in [&a, &b, &both] {
            fs::create_dir(path).with_context(|| format!("failed to make {}", path.display()))?;
        }
        Ok(Self { a, b, both })
    }

    fn hosts(&self, ferry: &ferry::Binary) -> Result<Pair> {
        let mut pair = two_hosts(ferry.file())?;
        pair.a.see(&self.a, &self.both);
        pair.b.see(&self.b, &self.both);
        pair.a.start()?;
        pair.b.start()?;
        Ok(pair)
    }

    /// Moves the guest with its disk to B, at this rate by the whole time of the move, and back.
    fn moves(&self, pair: &Pair) -> Result<f64> {
        let mut rate = 0.0;
        for (to, from) in [("b", &self.a), ("a", &self.b)] {
            uncached(&from.join(DISK))?;
            let moved = pair.a.ferry(&["migrate", "g", "--to", to, "--storage", "copy"])?;
            let moved = moved.exit(0)?.migration()?.is("completed", to)?;
            if to == "b" {
                rate = mib_per_s(moved.number("total_ms")? / 1e3);
            }
        }
        Ok(rate)
    }
}

/// Copies with `dd` and waits until it is on the disk: MiB/s.
fn raw_copy(from: &Path, to: &Path, direct: bool) -> Result<f64> {
    uncached(from)?;
    let mut dd = Command::new("dd");
    dd.arg(format!("if={}", from.display()))
        .arg(format!("of={}", to.display()))
        .args(["bs=1M", "conv=fdatasync"]);
    if direct {
        dd.args(["iflag=direct", "oflag=direct"]);
    }
    let began = Instant::now();
    let output = dd.stdin(Stdio::null()).output().context("failed to start dd")?;
    let seconds = began.elapsed().as_secs_f64();
    ensure!(
        output.status.success(),
        "dd: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    fs::remove_file(to).context("failed to remove the raw copy")?;
    Ok(mib_per_s(seconds))
}

fn mib_per_s(seconds: f64) -> f64 {
    (BYTES >> 20) as f64 / seconds
}

/// Nobody is to find the file in the page cache.
fn uncached(path: &Path) -> Result<()> {
    let file = File::open(path).with_context(|| format!("failed to open {}", path.display()))?;
    file.sync_all()?;
    fadvise(&file, 0, None, Advice::DontNeed)?;
    Ok(())
}

fn write_noise(path: &Path) -> Result<()> {
    let mut file = File::create(path)?;
    let mut rng = Rng::new(1, 0);
    for _ in 0..BYTES / PIECE as u64 {
        let piece: Vec<u8> = (0..PIECE / 8).flat_map(|_| rng.word().to_le_bytes()).collect();
        file.write_all(&piece)?;
    }
    file.sync_all()?;
    Ok(())
}
