//! A guest that writes its copied disk faster than the link carries: the disk is slower for it, and the copy ends.

use std::fs;
use std::path::Path;
use std::time::SystemTime;

use anyhow::{Result, ensure};
use ferry_tests::{Guest, Migration, Pair, Witness, until, waiting::MOVE};
use libtest_mimic::Trial;

use crate::device_work::{is_stamped, stamped_image, with_disk};
use crate::scenario::{has_nothing, on_kvm};
use crate::storage::{Folders, folders};

pub(crate) fn trials() -> Vec<Trial> {
    on_kvm![
        a_disk_that_is_written_faster_than_the_link_carries_moves_with_nothing_throttled,
        two_disks_that_are_written_and_one_that_is_not_move_together,
        an_aborted_copy_of_a_disk_lets_the_guest_write_on,
    ]
}

/// Writes all over its disk, for longer than any of this takes.
const ALL_THE_TIME: &str = "io=randwrite block_kib=8 depth=16 seconds=3600";

/// 5 MB/s, where the whole disk of 16 MiB would be dirty after each pass.
const SLOW: [&str; 3] = ["--bandwidth", "40Mbit", "--digests"];

/// Two hosts with a folder each, and the guest at work on its disk in that of A.
fn at_work(pair: &mut Pair) -> Result<(Folders, Witness)> {
    let folders = folders(pair)?;
    fs::rename(stamped_image(pair)?, folders.a.join("g.img"))?;
    let witness = pair.run(&with_disk(&folders.both.join("g.img"), ALL_THE_TIME))?;
    Ok((folders, witness))
}

fn held_back(migration: &Migration) -> f64 {
    migration.record["disk_writes_held_back"].as_f64().unwrap_or(0.0)
}

fn written(image: &Path) -> Result<SystemTime> {
    Ok(fs::metadata(image)?.modified()?)
}

fn writes_on(image: &Path) -> Result<()> {
    let before = written(image)?;
    until("the guest writes on", MOVE, || {
        Ok((written(image)? > before).then_some(()))
    })
}

fn a_disk_that_is_written_faster_than_the_link_carries_moves_with_nothing_throttled(pair: &mut Pair) -> Result<()> {
    let (folders, witness) = at_work(pair)?;

    let moved = pair.migrate("g", &SLOW)?.exit(0)?.migration()?.is("completed", "b")?;

    ensure!(
        held_back(&moved) > 0.0 && moved.number("throttle_percent")? == 0.0,
        "{}",
        moved.record
    );
    let (longest, total) = (moved.number("disk_longest_wait_ms")?, moved.number("disk_waited_ms")?);
    ensure!(0.0 < longest && longest <= total, "{}", moved.record);
    let shown = pair.a.ferry(&["migration", "show", moved.text("id")?])?.exit(0)?;
    ensure!(shown.stdout.contains("disk_waited_ms"), "{shown}");
    pair.runs_only_at(&pair.b, "g", &witness)?;
    let image = folders.b.join("g.img");
    writes_on(&image)?;
    pair.b.ferry(&["stop", "g", "--force"])?.exit(0)?;
    is_stamped(&image)?;
    ensure!(!folders.a.join("g.img").exists(), "the source's image is still there");
    Ok(())
}

fn two_disks_that_are_written_and_one_that_is_not_move_together(pair: &mut Pair) -> Result<()> {
    let folders = folders(pair)?;
    fs::rename(stamped_image(pair)?, folders.a.join("g.img"))?;
    fs::write(folders.a.join("other.img"), vec![7; 1 << 20])?;
    let disk = |name: &str| format!("path={}", folders.both.join(name).display());
    let work = format!("heartbeat_ms=20 fill=random fill_mib=16 work=blk {ALL_THE_TIME}");
    let guest = Guest::new("g")
        .disk(&disk("g.img"))
        .disk(&disk("other.img"))
        .work(&work);
    let witness = pair.run(&guest)?;

    let moved = pair.migrate("g", &SLOW)?.exit(0)?.migration()?.is("completed", "b")?;

    ensure!(held_back(&moved) > 0.0, "{}", moved.record);
    pair.runs_only_at(&pair.b, "g", &witness)?;
    pair.b.ferry(&["stop", "g", "--force"])?.exit(0)?;
    is_stamped(&folders.b.join("g.img"))?;
    ensure!(fs::read(folders.b.join("other.img"))? == vec![7; 1 << 20]);
    Ok(())
}

fn an_aborted_copy_of_a_disk_lets_the_guest_write_on(pair: &mut Pair) -> Result<()> {
    let (folders, witness) = at_work(pair)?;
    // From the first pass to the end there are as many seconds again.
    let slower = ["--bandwidth", "16Mbit"];
    let underway = pair.migrate_until("g", &slower, |migration| Ok(held_back(migration) > 0.0))?;
    pair.a.ferry(&["migration", "abort", &underway.id])?.exit(0)?;

    let over = underway.call.wait()?.exit(1)?.migration()?.is("cancelled", "a")?;

    ensure!(over.number("disk_waited_ms")? > 0.0, "{}", over.record);
    pair.runs_only_at(&pair.a, "g", &witness)?;
    let image = folders.a.join("g.img");
    writes_on(&image)?;
    has_nothing(&pair.b)?;
    ensure!(fs::read_dir(&folders.b)?.count() == 0, "something is left at b");
    pair.a.ferry(&["stop", "g", "--force"])?.exit(0)?;
    is_stamped(&image)
}
