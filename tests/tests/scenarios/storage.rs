//! Disks that move with their guest: each host of these scenarios has a folder of its own under the same path.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Result, ensure};
use ferry_tests::pair::Underway;
use ferry_tests::{Guest, Migration, Pair, Tampering, Witness, until, waiting::CALL};
use libtest_mimic::Trial;

use crate::device_work::{is_stamped, stamped_image, with_disk};
use crate::scenario::{between, command, expect_a_lost_peer, has_nothing, on_kvm};

pub(crate) fn trials() -> Vec<Trial> {
    on_kvm![
        a_local_disk_moves_with_its_guest_and_stays_sparse,
        a_disk_that_is_there_already_is_not_written_over,
        an_aborted_copy_leaves_the_source_as_it_was_and_nothing_at_the_destination,
        a_disk_without_room_at_the_destination_is_refused_before_anything_moves,
        a_disk_finds_room_for_what_it_holds_or_for_all_that_it_may_hold,
        a_destination_that_fills_while_a_disk_is_copied_says_so_and_keeps_nothing,
        an_image_that_shrinks_while_it_is_copied_ends_the_migration_by_its_name,
        an_image_that_shrinks_before_it_is_copied_ends_the_migration_by_its_name,
        a_local_disk_moves_over_grpc,
        a_local_disk_comes_before_the_guest_and_its_memory_late,
        a_local_disk_that_the_guest_writes_is_of_the_instant_of_the_switch,
        a_shared_disk_is_not_copied,
        a_stopped_instance_moves_cold_with_its_disk,
        a_shared_disk_goes_with_a_stopped_instance,
        a_disk_that_is_damaged_on_its_way_stays_where_it_is,
    ]
}

/// 64 MiB, of which two pieces hold something.
const SIZE: u64 = 64 << 20;
const PIECES: [(u64, u8); 2] = [(1 << 20, 0x5a), (40 << 20, 0xa5)];
const PIECE: usize = 3 << 20;

/// The folders that the hosts see as one.
pub(crate) struct Folders {
    pub(crate) a: PathBuf,
    pub(crate) b: PathBuf,
    pub(crate) both: PathBuf,
}

/// Two hosts with a folder each, and the guest's disk in that of A.
fn apart(pair: &mut Pair) -> Result<Folders> {
    let folders = folders(pair)?;
    let disk = File::create(folders.a.join("g.img"))?;
    disk.set_len(SIZE)?;
    for (at, byte) in PIECES {
        disk.write_all_at(&vec![byte; PIECE], at)?;
    }
    Ok(folders)
}

/// Two hosts with a folder each.
pub(crate) fn folders(pair: &mut Pair) -> Result<Folders> {
    let folder = |name: &str| pair.folder().join(name);
    let folders = Folders {
        a: folder("disks-a"),
        b: folder("disks-b"),
        both: folder("disks"),
    };
    for path in [&folders.a, &folders.b, &folders.both] {
        fs::create_dir(path)?;
    }
    pair.a.see(&folders.a, &folders.both);
    pair.b.see(&folders.b, &folders.both);
    for host in [&mut pair.a, &mut pair.b] {
        host.terminate()?;
        host.start()?;
    }
    Ok(folders)
}

fn run(pair: &Pair, folders: &Folders) -> Result<Witness> {
    pair.run(&Guest::new("g").disk(&format!("path={}", folders.both.join("g.img").display())))
}

/// The disk is here as it was made, and sparse.
fn is_whole(path: PathBuf) -> Result<()> {
    let disk = File::open(&path)?;
    let metadata = disk.metadata()?;
    ensure!(metadata.len() == SIZE, "{metadata:?}");
    ensure!(metadata.blocks() * 512 < SIZE / 2, "it is not sparse: {metadata:?}");
    let mut expected = vec![0; SIZE as usize];
    for (at, byte) in PIECES {
        expected[at as usize..at as usize + PIECE].fill(byte);
    }
    ensure!(fs::read(&path)? == expected, "{} is not what it was", path.display());
    Ok(())
}

fn is_empty(folder: &PathBuf) -> Result<()> {
    until(&format!("{} is empty", folder.display()), CALL, || {
        Ok((fs::read_dir(folder)?.count() == 0).then_some(()))
    })
}

fn a_local_disk_moves_with_its_guest_and_stays_sparse(pair: &mut Pair) -> Result<()> {
    let folders = apart(pair)?;
    let witness = run(pair, &folders)?;

    let moved = pair
        .migrate("g", &["--digests"])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;

    let path = folders.both.join("g.img").display().to_string();
    ensure!(
        moved.record["copied_disks"] == serde_json::json!([path]),
        "{}",
        moved.record
    );
    ensure!(moved.number("disk_total")? == SIZE as f64, "{}", moved.record);
    let processed = moved.number("disk_processed")? as usize;
    ensure!((2 * PIECE..SIZE as usize / 2).contains(&processed), "{}", moved.record);
    ensure!(moved.number("disk_remaining")? == 0.0, "{}", moved.record);
    pair.runs_only_at(&pair.b, "g", &witness)?;
    is_whole(folders.b.join("g.img"))?;
    is_empty(&folders.a)?;

    let back = ["migrate", "g", "--to", "a", "--storage", "copy", "--digests"];
    pair.b.ferry(&back)?.exit(0)?.migration()?.is("completed", "a")?;
    pair.runs_only_at(&pair.a, "g", &witness)?;
    is_whole(folders.a.join("g.img"))?;
    is_empty(&folders.b)
}

fn a_local_disk_moves_over_grpc(pair: &mut Pair) -> Result<()> {
    let folders = apart(pair)?;
    let witness = run(pair, &folders)?;

    let grpc = ["--transport", "grpc", "--streams", "4", "--digests"];
    let moved = pair.migrate("g", &grpc)?.exit(0)?.migration()?.is("completed", "b")?;

    ensure!(moved.record["transport"] == "grpc", "{}", moved.record);
    pair.runs_only_at(&pair.b, "g", &witness)?;
    is_whole(folders.b.join("g.img"))?;
    is_empty(&folders.a)
}

fn a_local_disk_comes_before_the_guest_and_its_memory_late(pair: &mut Pair) -> Result<()> {
    let folders = apart(pair)?;
    let busy = "fill=random fill_mib=32 work=uniform work_mib=16 rate=20000 heartbeat_ms=20";
    let disk = format!("path={}", folders.both.join("g.img").display());
    let witness = pair.run(&Guest::new("g").work(busy).disk(&disk))?;

    let dry = pair
        .migrate("g", &["--mode", "postcopy", "--dry-run"])?
        .exit(0)?
        .json()?;
    let moved = pair
        .migrate("g", &["--mode", "postcopy"])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;

    // All of its memory and nothing of its disk, as was foretold.
    ensure!(moved.number("late_pages")? >= 32.0 * 256.0, "{}", moved.record);
    let processed = moved.number("disk_processed")? as usize;
    let foretold = &dry["prediction"];
    let (late, before) = (foretold["late_bytes"].as_u64(), foretold["bytes"].as_u64());
    ensure!(
        late <= foretold["populated_bytes"].as_u64() && late >= Some(32 << 20),
        "{dry}"
    );
    ensure!(before >= Some(2 * PIECE as u64) && foretold["rounds"] == 1, "{dry}");
    ensure!((2 * PIECE..SIZE as usize / 2).contains(&processed), "{}", moved.record);
    pair.runs_only_at(&pair.b, "g", &witness)?;
    is_whole(folders.b.join("g.img"))?;
    is_empty(&folders.a)?;

    let back = ["migrate", "g", "--to", "a", "--storage", "copy", "--verify"];
    let hybrid = ["--mode", "hybrid", "--max-downtime", "1ms"];
    let moved = pair.b.ferry(&[&back[..], &hybrid].concat())?.exit(0)?;
    let moved = moved.migration()?.is("completed", "a")?;
    ensure!(moved.number("late_pages")? > 0.0, "{}", moved.record);
    pair.runs_only_at(&pair.a, "g", &witness)?;
    is_whole(folders.a.join("g.img"))?;
    is_empty(&folders.b)
}

fn a_local_disk_that_the_guest_writes_is_of_the_instant_of_the_switch(pair: &mut Pair) -> Result<()> {
    let folders = apart(pair)?;
    fs::rename(stamped_image(pair)?, folders.a.join("g.img"))?;
    let writes = "fill=random fill_mib=32 io=randwrite block_kib=8 depth=4 seconds=20";
    let witness = pair.run(&with_disk(&folders.both.join("g.img"), writes))?;

    let began = Instant::now();
    let moved = pair
        .migrate("g", &["--mode", "postcopy", "--max-downtime", "2s"])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;

    ensure!(moved.number("late_pages")? > 0.0, "{}", moved.record);
    pair.runs_only_at(&pair.b, "g", &witness)?;
    let told = witness.transfers_after(began)?;
    ensure!(told.operations > 0 && told.failed == 0, "{told}");
    pair.b.ferry(&["stop", "g", "--force"])?.exit(0)?;
    is_stamped(&folders.b.join("g.img"))?;
    is_empty(&folders.a)
}

fn a_disk_that_is_there_already_is_not_written_over(pair: &mut Pair) -> Result<()> {
    let folders = apart(pair)?;
    let witness = run(pair, &folders)?;
    fs::write(folders.b.join("g.img"), b"somebody else's")?;

    for storage in ["auto", "copy"] {
        let told = pair.migrate("g", &["--storage", storage])?.exit(4)?;
        told.says("host b")?.says("g.img")?.says("it is there")?;
    }

    ensure!(fs::read(folders.b.join("g.img"))? == b"somebody else's");
    is_whole(folders.a.join("g.img"))?;
    pair.runs_only_at(&pair.a, "g", &witness)
}

fn an_aborted_copy_leaves_the_source_as_it_was_and_nothing_at_the_destination(pair: &mut Pair) -> Result<()> {
    let folders = apart(pair)?;
    let witness = run(pair, &folders)?;

    let slow = ["--bandwidth", "40Mbit"];
    let underway = pair.migrate_until("g", &slow, |record| Ok(record.record["status"] == "running"))?;
    ensure!(folders.b.join("g.img").exists());
    pair.a.ferry(&["migration", "abort", &underway.id])?.exit(0)?;

    ensure!(underway.call.wait()?.code == Some(1));
    pair.runs_only_at(&pair.a, "g", &witness)?;
    has_nothing(&pair.b)?;
    is_empty(&folders.b)?;
    is_whole(folders.a.join("g.img"))?;
    pair.migrate("g", &[])?.exit(0)?.migration()?.is("completed", "b")?;
    is_whole(folders.b.join("g.img"))
}

fn a_disk_without_room_at_the_destination_is_refused_before_anything_moves(pair: &mut Pair) -> Result<()> {
    let folders = apart(pair)?;
    let witness = run(pair, &folders)?;
    // Seen by B alone, and gone with its agent.
    let small = format!("mount -t tmpfs -o size=1M none {}", folders.both.display());
    let pid = pair.b.pid().unwrap_or_default().to_string();
    command("nsenter", &["--mount", "--target", &pid, "sh", "-c", &small])?;

    pair.migrate("g", &[])?.exit(4)?.says("host b")?.says("are free")?;

    is_whole(folders.a.join("g.img"))?;
    pair.runs_only_at(&pair.a, "g", &witness)
}

fn a_disk_finds_room_for_what_it_holds_or_for_all_that_it_may_hold(pair: &mut Pair) -> Result<()> {
    pair.expect_complaint("there is room for what a disk holds now");
    let folders = apart(pair)?;
    let witness = run(pair, &folders)?;
    let small = format!("mount -t tmpfs -o size=24M none {}", folders.both.display());
    let pid = pair.b.pid().unwrap_or_default().to_string();
    command("nsenter", &["--mount", "--target", &pid, "sh", "-c", &small])?;
    let whole = ["--disk-over-commit", "no"];

    pair.migrate("g", &whole)?.exit(4)?.says("may come to 64 MiB")?;
    pair.migrate("g", &[&whole[..], &["--dry-run", "--sample", "none"]].concat())?
        .exit(4)?
        .says("may come to 64 MiB")?;
    pair.migrate("g", &[])?.exit(0)?.migration()?.is("completed", "b")?;
    let back = [&["migrate", "g", "--to", "a", "--verify"], &whole[..]].concat();
    pair.b.ferry(&back)?.exit(0)?.migration()?.is("completed", "a")?;

    let here = fs::metadata(folders.a.join("g.img"))?;
    ensure!(here.len() == SIZE && here.blocks() * 512 >= SIZE, "{here:?}");
    pair.runs_only_at(&pair.a, "g", &witness)
}

fn a_destination_that_fills_while_a_disk_is_copied_says_so_and_keeps_nothing(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer(pair);
    pair.expect_complaint("No space left");
    pair.expect_complaint("there is room for what a disk holds now");
    let folders = apart(pair)?;
    let witness = run(pair, &folders)?;
    // What is looked for is there, and then somebody else takes it.
    let pid = pair.b.pid().unwrap_or_default().to_string();
    let at_b = |what: &str| command("nsenter", &["--mount", "--target", &pid, "sh", "-c", what]);
    at_b(&format!("mount -t tmpfs -o size=16M none {}", folders.both.display()))?;
    let slow = ["--bandwidth", "40Mbit", "--resume-window", "20s"];
    let underway = pair.migrate_until("g", &slow, |record| Ok(record.record["status"] == "running"))?;
    at_b(&format!(
        "head -c 16M /dev/zero > {}/other || true",
        folders.both.display()
    ))?;

    let told = underway.call.wait()?.exit(1)?;

    let error = told.migration()?.is("failed", "a")?.text("error")?.to_owned();
    let image = folders.both.join("g.img").display().to_string();
    ensure!(error.contains("No space left") && error.contains(&image), "{error}");
    pair.runs_only_at(&pair.a, "g", &witness)?;
    is_whole(folders.a.join("g.img"))?;
    has_nothing(&pair.b)?;
    until("nothing but the other's file is left", CALL, || {
        let left = at_b(&format!("ls {}", folders.both.display()))?;
        Ok((left.trim() == "other").then_some(()))
    })
}

fn an_image_that_shrinks_while_it_is_copied_ends_the_migration_by_its_name(pair: &mut Pair) -> Result<()> {
    let (folders, witness) = reads_its_disk(pair)?;
    let is_copied = |told: &Migration| Ok(told.record["memory_processed"].as_u64() > Some(0));
    let underway = pair.migrate_until("g", &["--bandwidth", "16Mbit"], is_copied)?;

    halve(&folders.a.join("g.img"))?;

    stays_with_half_a_disk(pair, underway, &folders, &witness)
}

/// The destination made room for what it was when it was asked.
fn an_image_that_shrinks_before_it_is_copied_ends_the_migration_by_its_name(pair: &mut Pair) -> Result<()> {
    let (folders, witness) = reads_its_disk(pair)?;
    let relay = between(pair, Tampering::HoldPrepared)?;
    let underway = pair.migrate_until("g", &[], |_| Ok(relay.has_tampered()))?;

    halve(&folders.a.join("g.img"))?;
    relay.release();

    stays_with_half_a_disk(pair, underway, &folders, &witness)
}

/// A guest that reads a disk all over, which only A has, for some seconds.
fn reads_its_disk(pair: &mut Pair) -> Result<(Folders, Witness)> {
    pair.expect_complaint("a disk request failed");
    expect_a_lost_peer(pair);
    let folders = apart(pair)?;
    fs::rename(stamped_image(pair)?, folders.a.join("g.img"))?;
    let reads = "io=randread depth=4 seconds=20";
    let witness = pair.run(&with_disk(&folders.both.join("g.img"), reads))?;
    Ok((folders, witness))
}

fn halve(path: &Path) -> Result<()> {
    let image = File::options().write(true).open(path)?;
    Ok(image.set_len(image.metadata()?.len() / 2)?)
}

fn stays_with_half_a_disk(pair: &Pair, underway: Underway, folders: &Folders, witness: &Witness) -> Result<()> {
    let told = underway.call.wait()?.exit(1)?;
    let error = told.migration()?.is("failed", "a")?.text("error")?.to_owned();
    let path = folders.both.join("g.img").display().to_string();
    ensure!(error.contains(&path), "{error}");
    ensure!(
        error.contains("it has become smaller") || error.contains("and the guest's"),
        "{error}"
    );
    pair.runs_only_at(&pair.a, "g", witness)?;
    has_nothing(&pair.b)?;
    is_empty(&folders.b)?;
    // And to the guest a part of its disk cannot be read, and nothing else has happened.
    let told = witness.transfers()?;
    ensure!(
        told.failed > 0 && told.operations > told.failed && told.wrong == 0,
        "{told}"
    );
    Ok(())
}

fn a_shared_disk_is_not_copied(pair: &mut Pair) -> Result<()> {
    let path = pair.folder().join("g.img");
    File::create(&path)?.set_len(SIZE)?;
    let witness = pair.run(&Guest::new("g").disk(&format!("path={}", path.display())))?;

    let told = pair.migrate("g", &["--storage", "copy"])?.exit(4)?;
    told.says("nothing is written over")?;
    let moved = pair.migrate("g", &[])?.exit(0)?.migration()?.is("completed", "b")?;

    ensure!(
        moved.record["copied_disks"] == serde_json::json!([]),
        "{}",
        moved.record
    );
    ensure!(path.exists());
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn a_stopped_instance_moves_cold_with_its_disk(pair: &mut Pair) -> Result<()> {
    let folders = apart(pair)?;
    run(pair, &folders)?;
    pair.a.ferry(&["stop", "g", "--force"])?.exit(0)?;

    let cold = ["--cold", "--storage", "copy", "--digests"];
    pair.migrate("g", &cold)?.exit(0)?.migration()?.is("completed", "b")?;

    pair.b.wait_for_status("g", "stopped")?;
    is_whole(folders.b.join("g.img"))?;
    is_empty(&folders.a)?;
    pair.b.ferry(&["start", "g"])?.exit(0)?;
    Witness::of(&[&pair.b]).wait_ready()?;
    pair.exists_only_at(&pair.b, "g")
}

fn a_shared_disk_goes_with_a_stopped_instance(pair: &mut Pair) -> Result<()> {
    let path = pair.folder().join("g.img");
    File::create(&path)?.set_len(SIZE)?;
    pair.run(&Guest::new("g").disk(&format!("path={}", path.display())))?;
    pair.a.ferry(&["stop", "g", "--force"])?.exit(0)?;

    let moved = pair
        .migrate("g", &["--cold"])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;

    ensure!(
        moved.record["copied_disks"] == serde_json::json!([]),
        "{}",
        moved.record
    );
    pair.b.wait_for_status("g", "stopped")?;
    let other = Guest::new("other").disk(&format!("path={}", path.display()));
    // It is the instance's still, and nobody's while that is off.
    pair.b.ferry(&["start", "g"])?.exit(0)?;
    pair.a.ferry(&other.arguments(&pair.kernel()))?.exit(4)?.says("g.img")?;
    Witness::of(&[&pair.b]).wait_ready()?;
    pair.exists_only_at(&pair.b, "g")
}

/// Blocks of disks are compared as pages are.
fn a_disk_that_is_damaged_on_its_way_stays_where_it_is(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer(pair);
    pair.expect_complaint("is not what was sent");
    let folders = apart(pair)?;
    let damage = |page: &mut [u8]| {
        if page.iter().all(|&byte| byte == PIECES[1].1) {
            page[7] ^= 1;
        }
    };
    let relay = between(
        pair,
        Tampering::Pages {
            streams: 0..=0,
            number: 0,
            frames: None,
            change: damage,
        },
    )?;
    let witness = run(pair, &folders)?;

    let told = pair
        .migrate("g", &["--storage", "copy", "--verify", "--streams", "1"])?
        .exit(1)?;

    ensure!(relay.has_tampered(), "nothing was tampered with: {told}");
    let error = told.migration()?.is("failed", "a")?.text("error")?.to_owned();
    ensure!(error.contains("is not what was sent"), "{error}");
    pair.runs_only_at(&pair.a, "g", &witness)?;
    is_whole(folders.a.join("g.img"))?;
    has_nothing(&pair.b)?;
    is_empty(&folders.b)
}
