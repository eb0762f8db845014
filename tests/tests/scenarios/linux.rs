//! A guest that nobody here wrote: Linux boots, moves, reboots, switches off and panics, also while it is copied.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use ferry_tests::linux::{BOOT, Console, Linux, carry_out, ticks, wait_printed};
use ferry_tests::waiting::{CALL, MOVE};
use ferry_tests::{Pair, until};
use libtest_mimic::Trial;

use crate::booted;
use crate::scenario::{command, is_long, on_kvm};

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = on_kvm![
        linux_moves_and_reboots_where_it_is,
        linux_that_reboots_while_it_is_copied_comes_up_where_it_went,
        linux_that_powers_off_while_it_is_copied_ends_the_migration,
        linux_hears_that_it_is_a_copy_and_of_no_move,
        linux_that_powers_off_is_stopped,
        linux_that_panics_is_crashed,
    ];
    if is_long() {
        trials.extend(on_kvm![
            linux_boots_by_the_mp_table,
            linux_boots_with_eight_vcpus,
            linux_boots_as_a_bzimage,
            linux_of_the_64_bit_protocol_trims_its_disk_and_draws_random_numbers,
        ]);
    }
    trials
}

fn linux_moves_and_reboots_where_it_is(pair: &mut Pair) -> Result<()> {
    Linux::new("g")?.run(&pair.a)?;
    booted::has_booted(&pair.a)?;
    booted::keep(pair)?;

    let at_a = Console::of(&pair.a)?;
    pair.migrate("g", &[])?.exit(0)?.migration()?.is("completed", "b")?;
    let at_b = wait_printed(&pair.b, "TICK", 3, CALL)?;
    pair.exists_only_at(&pair.b, "g")?;
    goes_on(&ticks(&at_a.text()?)?, &ticks(&at_b)?)?;

    pair.b.ferry(&["reboot", "g"])?.exit(0)?;
    let text = wait_printed(&pair.b, "TICK 1 ", 1, BOOT)?;
    ensure!(text.contains("CPUS 2"), "{text}");
    pair.exists_only_at(&pair.b, "g")
}

/// Has the guest do something in two seconds of its own, when it has said that it will.
fn soon(pair: &Pair, what: &str) -> Result<()> {
    carry_out(&pair.a, "g", &format!("{{ $b sleep 2; {what}; }} &"), BOOT)
}

fn linux_that_reboots_while_it_is_copied_comes_up_where_it_went(pair: &mut Pair) -> Result<()> {
    booted::run(pair)?;
    // So slow that the first pass is not over before the guest boots.
    let slow = ["--bandwidth", "2Mbit", "--digests"];
    let underway = pair.migrate_until("g", &slow, |record| Ok(record.number("bytes_sent")? > 0.0))?;

    soon(pair, "$b reboot -f")?;
    wait_printed(&pair.a, "Linux version", 1, BOOT)?;
    let record = pair
        .a
        .ferry(&["migration", "show", &underway.id])?
        .exit(0)?
        .migration()?;
    ensure!(record.record["status"] == "running", "{}", record.record);
    let retune = ["migration", "retune", &underway.id, "--bandwidth", "none"];
    pair.a.ferry(&retune)?.exit(0)?;

    let moved = underway.call.wait_for(2 * MOVE)?.exit(0)?;
    moved.migration()?.is("completed", "b")?;
    let text = wait_printed(&pair.b, "TICK 1 ", 1, BOOT)?;
    ensure!(
        text.contains("CPUS 2") && !text.contains("Linux version"),
        "it did not go on with its boot: {text}"
    );
    ticks(&text)?;
    pair.exists_only_at(&pair.b, "g")
}

fn linux_that_powers_off_while_it_is_copied_ends_the_migration(pair: &mut Pair) -> Result<()> {
    booted::run(pair)?;
    let underway = pair.migrate_until("g", &["--hold-at", "running"], |record| Ok(record.rounds() >= 1))?;

    soon(pair, "$b poweroff -f")?;

    let told = underway.call.wait_for(2 * MOVE)?.exit(7)?;
    let record = told.migration()?;
    ensure!(
        record.text("status")? == "failed" && record.text("error")?.contains("guest stopped"),
        "{told}"
    );
    pair.a.wait_for_status("g", "stopped")?;
    pair.b.wait_until_gone("g")?;
    until("no VMM is left", CALL, || {
        Ok((pair.a.vmms().is_empty() && pair.b.vmms().is_empty()).then_some(()))
    })
}

/// What Linux says when its generation id has become another.
const RESEEDED: &str = "crng reseeded due to virtual machine fork";

fn linux_hears_that_it_is_a_copy_and_of_no_move(pair: &mut Pair) -> Result<()> {
    booted::run(pair)?;
    wait_printed(&pair.a, RESEEDED, 1, BOOT)?;

    let at_a = Console::of(&pair.a)?;
    pair.migrate("g", &["--digests"])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;
    let at_b = wait_printed(&pair.b, "TICK", 3, CALL)?;

    let at_a = at_a.text()?;
    goes_on(&ticks(&at_a)?, &ticks(&at_b)?)?;
    ensure!(
        at_a.matches(RESEEDED).count() == 1 && !at_b.contains(RESEEDED),
        "at A: {at_a}\nat B: {at_b}"
    );
    pair.exists_only_at(&pair.b, "g")
}

fn linux_that_powers_off_is_stopped(pair: &mut Pair) -> Result<()> {
    booted::run(pair)?;

    soon(pair, "$b poweroff -f")?;

    // By ACPI's \\_S5: nothing else told the kernel how.
    pair.a.wait_for_status("g", "stopped")?;
    Ok(())
}

fn linux_that_panics_is_crashed(pair: &mut Pair) -> Result<()> {
    pair.expect_complaint("panic");
    pair.expect_complaint("crashed");
    booted::run(pair)?;

    soon(pair, "echo c >/proc/sysrq-trigger")?;

    let shown = pair.a.wait_for_status("g", "crashed")?;
    ensure!(
        shown["reason"].as_str().is_some_and(|reason| reason.contains("panic")),
        "{shown}"
    );
    ensure!(Console::of(&pair.a)?.text()?.contains("Kernel panic"));
    Ok(())
}

fn linux_of_the_64_bit_protocol_trims_its_disk_and_draws_random_numbers(pair: &mut Pair) -> Result<()> {
    let disk = pair.folder().join("g.img");
    fs::write(&disk, vec![0xa5; 64 << 20])?;
    let name = disk.display().to_string();
    command("mkfs.ext4", &["-q", "-F", "-E", "nodiscard", &name])?;
    let full = allocated(&disk)?;
    Linux::new("g")?
        .without_pvh(pair.folder())?
        .disk(&format!("path={name}"))
        .words("ferry.disk")
        .run(&pair.a)?;
    wait_printed(&pair.a, "RECORDS", 1, BOOT)?;

    carry_out(&pair.a, "g", "$b fstrim /data", BOOT)?;
    let trimmed = allocated(&disk)?;
    ensure!(
        trimmed < full / 2,
        "{full} bytes before it was trimmed, {trimmed} after"
    );

    carry_out(&pair.a, "g", "$b dd if=/dev/hwrng of=/tmp/1 bs=16 count=1", BOOT)?;
    pair.migrate("g", &["--digests"])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;
    carry_out(&pair.b, "g", "$b dd if=/dev/hwrng of=/tmp/2 bs=16 count=1", BOOT)?;
    carry_out(&pair.b, "g", "[ -s /tmp/2 ] && ! $b cmp -s /tmp/1 /tmp/2", BOOT)?;
    pair.exists_only_at(&pair.b, "g")
}

/// How many bytes of a file are on its disk.
fn allocated(file: &Path) -> Result<u64> {
    Ok(fs::metadata(file)?.blocks() * 512)
}

fn linux_boots_by_the_mp_table(pair: &mut Pair) -> Result<()> {
    Linux::new("g")?.words("acpi=off").run(&pair.a)?;
    let text = wait_printed(&pair.a, "TICK 1 ", 1, BOOT)?;
    ensure!(
        text.contains("MPTABLE: OEM ID: FERRY") && text.contains("CPUS 2"),
        "{text}"
    );
    Ok(())
}

fn linux_boots_as_a_bzimage(pair: &mut Pair) -> Result<()> {
    Linux::new("g")?.as_bzimage(pair.folder())?.run(&pair.a)?;
    booted::has_booted(&pair.a)
}

fn linux_boots_with_eight_vcpus(pair: &mut Pair) -> Result<()> {
    Linux::new("g")?.vcpus(8).run(&pair.a)?;
    let text = wait_printed(&pair.a, "TICK 1 ", 1, BOOT)?;
    ensure!(text.contains("CPUS 8"), "{text}");
    Ok(())
}

/// The ticks at B continue those at A: none twice, and at most the one missing that the move cut in two.
fn goes_on(at_a: &[u64], at_b: &[u64]) -> Result<()> {
    let last = at_a.last().context("no tick at A")?;
    let first = at_b.first().context("no tick at B")?;
    ensure!(
        first == &(last + 1) || first == &(last + 2),
        "tick {last} at A is followed by {first} at B"
    );
    for ticks in [at_a, at_b] {
        ensure!(ticks.windows(2).all(|pair| pair[1] == pair[0] + 1), "{ticks:?}");
    }
    Ok(())
}
