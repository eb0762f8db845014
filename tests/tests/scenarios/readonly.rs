//! Disks that a guest only reads, and its next host does not have.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use ferry_tests::{Guest, Pair, Witness};
use libtest_mimic::Trial;
use rustix::fs::OFlags;

use crate::scenario::{has_nothing, on_kvm};
use crate::storage::{Folders, folders};

pub(crate) fn trials() -> Vec<Trial> {
    on_kvm![
        a_disk_that_is_only_read_comes_along_and_stays_for_others,
        an_aborted_move_leaves_nothing_of_a_disk_that_is_only_read,
        a_disk_that_is_only_read_and_is_there_is_taken_as_it_is,
    ]
}

/// A sparse image whose middle holds something.
const SIZE: u64 = 24 << 20;
const MIDDLE: u64 = 8 << 20;

fn make(image: &Path) -> Result<()> {
    let file = File::create(image)?;
    file.set_len(SIZE)?;
    Ok(file.write_all_at(&vec![0x77; 4 << 20], MIDDLE)?)
}

fn is_whole(image: &Path) -> Result<()> {
    let metadata = fs::metadata(image)?;
    ensure!(
        metadata.len() == SIZE && metadata.blocks() * 512 < SIZE / 2,
        "{metadata:?}"
    );
    let mut expected = vec![0; SIZE as usize];
    expected[MIDDLE as usize..][..4 << 20].fill(0x77);
    ensure!(fs::read(image)? == expected, "{} is not what it was", image.display());
    Ok(())
}

fn reader(folders: &Folders, name: &str) -> Guest {
    let image = folders.both.join("base.img");
    Guest {
        name: name.to_owned(),
        ..Guest::new(name).disk(&format!("path={},readonly=on", image.display()))
    }
}

fn run(pair: &mut Pair) -> Result<(Folders, Witness)> {
    let folders = folders(pair)?;
    make(&folders.a.join("base.img"))?;
    pair.run(&reader(&folders, "g"))?;
    Ok((folders, of_g(pair)?))
}

/// Follows the guest alone where there are others.
pub(crate) fn of_g(pair: &Pair) -> Result<Witness> {
    let shown = pair.a.show("g")?;
    let id = shown["id"].as_str().context("no id")?;
    Ok(Witness::of_instance(&[&pair.a, &pair.b], id))
}

fn a_disk_that_is_only_read_comes_along_and_stays_for_others(pair: &mut Pair) -> Result<()> {
    let (folders, witness) = run(pair)?;

    let moved = pair
        .migrate("g", &["--digests"])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;

    let path = folders.both.join("base.img").display().to_string();
    ensure!(
        moved.record["copied_disks"] == serde_json::json!([path]),
        "{}",
        moved.record
    );
    pair.runs_only_at(&pair.b, "g", &witness)?;
    is_whole(&folders.b.join("base.img"))?;
    for (descriptor, flags) in open(pair.b.vmm()?, &path)? {
        ensure!(
            !flags.intersects(OFlags::WRONLY | OFlags::RDWR),
            "{} could be written",
            descriptor.display()
        );
    }
    // What it was made of is not the guest's alone, and it finds it again; at b somebody else has come to read it.
    is_whole(&folders.a.join("base.img"))?;
    pair.b
        .ferry(&reader(&folders, "other").arguments(&pair.kernel()))?
        .exit(0)?;
    let back = ["migrate", "g", "--to", "a", "--storage", "copy", "--digests"];
    let back = pair.b.ferry(&back)?.exit(0)?.migration()?.is("completed", "a")?;
    ensure!(back.record["copied_disks"] == serde_json::json!([]), "{}", back.record);
    is_whole(&folders.b.join("base.img"))?;
    pair.b.ferry(&["delete", "other", "--force"])?.exit(0)?;
    pair.runs_only_at(&pair.a, "g", &witness)
}

fn an_aborted_move_leaves_nothing_of_a_disk_that_is_only_read(pair: &mut Pair) -> Result<()> {
    let (folders, witness) = run(pair)?;
    let slow = ["--bandwidth", "16Mbit"];
    let underway = pair.migrate_until("g", &slow, |record| Ok(record.record["status"] == "running"))?;
    ensure!(folders.b.join("base.img").exists());
    pair.a.ferry(&["migration", "abort", &underway.id])?.exit(0)?;

    ensure!(underway.call.wait()?.code == Some(1));
    pair.runs_only_at(&pair.a, "g", &witness)?;
    has_nothing(&pair.b)?;
    ensure!(fs::read_dir(&folders.b)?.count() == 0, "something is left at b");
    is_whole(&folders.a.join("base.img"))
}

fn a_disk_that_is_only_read_and_is_there_is_taken_as_it_is(pair: &mut Pair) -> Result<()> {
    let (folders, witness) = run(pair)?;
    pair.migrate("g", &["--storage", "shared"])?.exit(4)?.says("base.img")?;
    File::create(folders.b.join("base.img"))?.set_len(SIZE - 512)?;
    pair.migrate("g", &["--storage", "copy"])?
        .exit(4)?
        .says("and the guest's disk")?;
    make(&folders.b.join("base.img"))?;

    let moved = pair
        .migrate("g", &["--storage", "copy"])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;

    ensure!(
        moved.record["copied_disks"] == serde_json::json!([]),
        "{}",
        moved.record
    );
    pair.runs_only_at(&pair.b, "g", &witness)
}

/// How a process has this file open, each time.
fn open(process: u32, path: &str) -> Result<Vec<(PathBuf, OFlags)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(format!("/proc/{process}/fd"))?.flatten() {
        let Ok(target) = fs::read_link(entry.path()) else {
            continue;
        };
        if target.file_name() != Path::new(path).file_name() {
            continue;
        }
        let info = entry.path().display().to_string().replace("/fd/", "/fdinfo/");
        let told = fs::read_to_string(&info)?;
        let flags = told.lines().find_map(|line| line.strip_prefix("flags:"));
        let flags = u32::from_str_radix(flags.context("no flags")?.trim(), 8)?;
        found.push((entry.path(), OFlags::from_bits_retain(flags)));
    }
    ensure!(!found.is_empty(), "process {process} has {path} not open");
    Ok(found)
}
