//! A guest that nobody here wrote: Linux boots, moves, reboots, switches off and panics.

use anyhow::{Context, Result, ensure};
use ferry_tests::linux::{BOOT, Console, Linux, ticks, wait_printed};
use ferry_tests::{Pair, waiting::CALL};
use libtest_mimic::Trial;

use crate::scenario::{is_long, on_kvm};

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = on_kvm![
        linux_moves_and_reboots_where_it_is,
        linux_that_powers_off_is_stopped,
        linux_that_panics_is_crashed,
    ];
    if is_long() {
        trials.extend(on_kvm![linux_boots_by_the_mp_table, linux_boots_with_eight_vcpus]);
    }
    trials
}

fn linux_moves_and_reboots_where_it_is(pair: &mut Pair) -> Result<()> {
    Linux::new("g")?.run(&pair.a)?;
    let text = wait_printed(&pair.a, "TICK 2 ", 1, BOOT)?;
    ensure!(text.contains("LINUX 6.1") && text.contains("CPUS 2"), "{text}");

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

fn linux_that_powers_off_is_stopped(pair: &mut Pair) -> Result<()> {
    Linux::new("g")?.vcpus(1).words("ferry.poweroff_at=1").run(&pair.a)?;
    wait_printed(&pair.a, "TICK 1 ", 1, BOOT)?;

    // By ACPI's \\_S5: nothing else told the kernel how.
    pair.a.wait_for_status("g", "stopped")?;
    Ok(())
}

fn linux_that_panics_is_crashed(pair: &mut Pair) -> Result<()> {
    pair.expect_complaint("panic");
    pair.expect_complaint("crashed");
    Linux::new("g")?.vcpus(1).words("ferry.panic_at=1").run(&pair.a)?;
    wait_printed(&pair.a, "Kernel panic", 1, BOOT)?;

    let shown = pair.a.wait_for_status("g", "crashed")?;

    ensure!(
        shown["reason"].as_str().is_some_and(|reason| reason.contains("panic")),
        "{shown}"
    );
    Ok(())
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
