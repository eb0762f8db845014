//! Nothing is left on the file system that a host's journal is on: what cannot be noted is not done, guests run on, and once there is room again all is as
//! before, with the agent that was there.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use ferry_tests::{Guest, Host, Pair};
use libtest_mimic::Trial;

use crate::scenario::{command, has_nothing, on_kvm, with_mounts_of_its_own};

pub(crate) fn trials() -> Vec<Trial> {
    on_kvm![
        a_destination_whose_journal_has_no_room_takes_nothing,
        a_source_whose_journal_has_no_room_moves_nothing,
    ]
}

const WORK: &str = "fill=random fill_mib=16 work=uniform work_mib=4 rate=1000 heartbeat_ms=20";

fn a_destination_whose_journal_has_no_room_takes_nothing(pair: &mut Pair) -> Result<()> {
    pair.expect_complaint("no room is left");
    pair.expect_complaint("No space left");
    on_small_file_systems(pair, |pair| {
        let witness = pair.run(&Guest::new("g").work(WORK))?;
        let filler = fill(&pair.b)?;

        let foretold = pair.migrate("g", &["--dry-run", "--sample", "none"])?.exit(4)?;
        foretold.says("DATA_DIRECTORY_FULL")?;
        let told = pair.migrate("g", &[])?;

        ensure!(matches!(told.code, Some(1 | 4)), "{told}");
        names_the_lack(&told.to_string())?;
        pair.runs_only_at(&pair.a, "g", &witness)?;
        fs::remove_file(filler)?;
        has_nothing(&pair.b)?;
        pair.migrate("g", &["--digests"])?
            .exit(0)?
            .migration()?
            .is("completed", "b")?;
        pair.runs_only_at(&pair.b, "g", &witness)
    })
}

fn a_source_whose_journal_has_no_room_moves_nothing(pair: &mut Pair) -> Result<()> {
    pair.expect_complaint("no room is left");
    pair.expect_complaint("No space left");
    on_small_file_systems(pair, |pair| {
        // What it says is lost where its console has no room: nobody listens.
        pair.a
            .ferry(&Guest::new("g").work(WORK).arguments(&pair.kernel()))?
            .exit(0)?;
        let filler = fill(&pair.a)?;
        // What the journal has of its own it still takes.
        let refused = until_it_is_full(&pair.a)?;
        names_the_lack(&refused)?;

        let told = pair.migrate("g", &[])?;

        ensure!(told.code.is_some_and(|code| code != 0), "{told}");
        names_the_lack(&told.to_string())?;
        pair.a.wait_for_status("g", "running")?;
        fs::remove_file(filler)?;
        has_nothing(&pair.b)?;
        pair.migrate("g", &["--digests"])?
            .exit(0)?
            .migration()?
            .is("completed", "b")?;
        pair.b.wait_for_status("g", "running")?;
        has_nothing(&pair.a)
    })
}

/// Something that is noted each time, until that is refused; gives back with which words. The guest runs afterwards.
fn until_it_is_full(host: &Host) -> Result<String> {
    for _ in 0..MOST_TIMES {
        for verb in ["pause", "resume"] {
            let told = host.ferry(&[verb, "g"])?;
            if told.code == Some(0) {
                continue;
            }
            host.ferry(&["resume", "g"])?;
            return Ok(told.to_string());
        }
    }
    bail!("the journal took {MOST_TIMES} pauses on a full file system")
}

/// Ten times what a journal takes that was made a moment ago.
const MOST_TIMES: u32 = 3000;

fn names_the_lack(told: &str) -> Result<()> {
    ensure!(
        told.contains("no room is left for the journal") || told.contains("No space left"),
        "{told}"
    );
    Ok(())
}

/// Both hosts have data directories of 16 MiB.
fn on_small_file_systems(pair: &mut Pair, work: impl FnOnce(&mut Pair) -> Result<()> + Send) -> Result<()> {
    pair.a.terminate()?;
    pair.b.terminate()?;
    with_mounts_of_its_own(move || {
        for host in [&mut pair.a, &mut pair.b] {
            let at = host.data_dir.display().to_string();
            command("mount", &["-t", "tmpfs", "-o", "size=16m,mode=700", "none", &at])?;
            host.start()?;
        }
        work(pair)?;
        pair.a.terminate()?;
        pair.b.terminate()
    })
}

/// Takes all the room that is left to a host's data directory.
fn fill(host: &Host) -> Result<PathBuf> {
    let path = host.data_dir.join("filler");
    let mut file = File::create(&path)?;
    for piece in [1 << 20, 4096] {
        take(&mut file, &path, piece)?;
    }
    Ok(path)
}

/// Pieces of this size, until there is no room for one.
fn take(file: &mut File, path: &Path, piece: usize) -> Result<()> {
    loop {
        match file.write_all(&vec![1; piece]) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::StorageFull => return Ok(()),
            Err(error) => return Err(error).with_context(|| format!("failed to write {}", path.display())),
        }
    }
}
