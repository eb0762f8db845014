//! Dirty pages: with log and ring, exactly what was written.

use anyhow::{Result, ensure};
use ferry_vmm::{Arming, DirtyBitmap, DirtyMode, FrameRun, MachineConfig, PAGE_SIZE};

use super::Case;
use super::micro::{Code, Rig, config, read, wait_for_count};

pub(crate) const CASES: &[Case] = &[
    (
        "log_finds_exactly_the_written_pages",
        log_finds_exactly_the_written_pages,
    ),
    (
        "ring_finds_exactly_the_written_pages",
        ring_finds_exactly_the_written_pages,
    ),
    (
        "what_is_populated_counts_as_written_until_it_is_rearmed",
        what_is_populated_counts_as_written_until_it_is_rearmed,
    ),
    (
        "what_was_not_populated_is_found_when_it_is_written",
        what_was_not_populated_is_found_when_it_is_written,
    ),
    (
        "log_keeps_a_page_until_it_is_rearmed",
        log_keeps_a_page_until_it_is_rearmed,
    ),
    ("rearming_leaves_neighbours_alone", rearming_leaves_neighbours_alone),
    ("rearming_odd_words_is_refused", rearming_odd_words_is_refused),
    (
        "page_written_again_after_rearming_is_found",
        page_written_again_after_rearming_is_found,
    ),
    ("ring_that_overflows_loses_nothing", ring_that_overflows_loses_nothing),
    ("ring_works_on_after_an_overrun", ring_works_on_after_an_overrun),
    ("tracking_twice_starts_empty", tracking_twice_starts_empty),
    (
        "tracking_begins_as_it_is_asked_to_each_time",
        tracking_begins_as_it_is_asked_to_each_time,
    ),
    (
        "fetching_without_tracking_is_an_error_with_the_log",
        fetching_without_tracking_is_an_error,
    ),
    ("memory_beyond_the_hole_is_tracked", memory_beyond_the_hole_is_tracked),
];

/// Three pages in different words and one twice, between the two waits of a guest.
const PAGES: [u32; 4] = [0x300, 0x33f, 0x340, 0x7ff];

fn writer() -> Code {
    PAGES
        .into_iter()
        .chain([0x300])
        .fold(Code::default().print("ready\n").echo(), |code, page| {
            code.store(page * 4096 + 8, page)
        })
        .print("written\n")
        .halt()
}

fn expected() -> Vec<u64> {
    PAGES.map(u64::from).to_vec()
}

fn pages(dirty: &DirtyBitmap) -> Vec<u64> {
    dirty.runs().iter().flat_map(|run| run.first..run.end()).collect()
}

fn with(dirty: DirtyMode) -> MachineConfig {
    MachineConfig { dirty, ..config() }
}

/// A guest of this code that has printed what comes before its wait; tracking has started since.
fn tracked(config: &MachineConfig, code: &Code) -> Result<Rig> {
    let mut rig = Rig::boot_with(config, code)?;
    rig.machine.run()?;
    rig.console.wait_for("ready\n")?;
    rig.machine.start_dirty_tracking(Arming::All)?;
    Ok(rig)
}

fn go_on(rig: &Rig) -> Result<()> {
    ensure!(rig.machine.console_input().push(b"g") == 1);
    Ok(())
}

fn log_finds_exactly_the_written_pages() -> Result<()> {
    let mut rig = tracked(&with(DirtyMode::Log), &writer())?;
    ensure!(
        rig.machine.fetch_dirty()?.is_empty(),
        "nothing is written before the guest goes on"
    );
    go_on(&rig)?;
    rig.console.wait_for("written\n")?;
    let found = pages(&rig.machine.fetch_dirty()?);
    ensure!(found == expected(), "{found:x?}");
    Ok(())
}

fn ring_finds_exactly_the_written_pages() -> Result<()> {
    let mut rig = tracked(&with(DirtyMode::Ring), &writer())?;
    ensure!(
        rig.machine.fetch_dirty()?.is_empty(),
        "nothing is written before the guest goes on"
    );
    go_on(&rig)?;
    rig.console.wait_for("written\n")?;
    rig.machine.pause()?;
    let found = pages(&rig.machine.fetch_dirty()?);
    ensure!(found == expected(), "{found:x?}");
    ensure!(rig.machine.fetch_dirty()?.is_empty(), "fetching re-arms");
    Ok(())
}

fn what_is_populated_counts_as_written_until_it_is_rearmed() -> Result<()> {
    let mut rig = Rig::boot_with(&with(DirtyMode::Log), &writer())?;
    rig.machine.run()?;
    rig.console.wait_for("ready\n")?;
    let whole = rig.machine.memory().shape().runs()[0];
    rig.machine.start_dirty_tracking(Arming::Unpopulated)?;
    let populated = rig.machine.memory().populated()?;
    let populated: Vec<u64> = populated.runs.iter().flat_map(|run| run.first..run.end()).collect();
    let dirty = rig.machine.fetch_dirty()?;
    ensure!(!populated.is_empty() && pages(&dirty) == populated, "{dirty:?}");

    // What is written before it is re-armed needs not be told apart; after that it does.
    rig.machine.dirty_clearer().rearm(whole, &dirty)?;
    ensure!(rig.machine.fetch_dirty()?.is_empty(), "all of it is armed");
    go_on(&rig)?;
    rig.console.wait_for("written\n")?;
    let found = pages(&rig.machine.fetch_dirty()?);
    ensure!(found == expected(), "{found:x?}");
    Ok(())
}

fn what_was_not_populated_is_found_when_it_is_written() -> Result<()> {
    let mut rig = Rig::boot_with(&with(DirtyMode::Log), &writer())?;
    rig.machine.run()?;
    rig.console.wait_for("ready\n")?;
    rig.machine.start_dirty_tracking(Arming::Unpopulated)?;
    let before = pages(&rig.machine.fetch_dirty()?);
    go_on(&rig)?;
    rig.console.wait_for("written\n")?;
    let mut all: Vec<u64> = [before.clone(), expected()].concat();
    all.sort_unstable();
    all.dedup();
    ensure!(all.len() > before.len(), "nothing else was written");
    let found = pages(&rig.machine.fetch_dirty()?);
    ensure!(found == all, "{found:x?}");
    Ok(())
}

fn log_keeps_a_page_until_it_is_rearmed() -> Result<()> {
    let mut rig = tracked(&with(DirtyMode::Log), &writer())?;
    go_on(&rig)?;
    rig.console.wait_for("written\n")?;
    rig.machine.pause()?;
    let dirty = rig.machine.fetch_dirty()?;
    ensure!(rig.machine.fetch_dirty()? == dirty, "fetching does not re-arm");
    let whole = rig.machine.memory().shape().runs()[0];
    rig.machine.dirty_clearer().rearm(whole, &dirty)?;
    ensure!(rig.machine.fetch_dirty()?.is_empty());
    Ok(())
}

fn rearming_leaves_neighbours_alone() -> Result<()> {
    let mut rig = tracked(&with(DirtyMode::Log), &writer())?;
    go_on(&rig)?;
    rig.console.wait_for("written\n")?;
    rig.machine.pause()?;
    let dirty = rig.machine.fetch_dirty()?;
    let one = FrameRun { first: 0x33f, count: 1 };
    rig.machine.dirty_clearer().rearm(one, &dirty)?;
    let found = pages(&rig.machine.fetch_dirty()?);
    ensure!(found == [0x300, 0x340, 0x7ff], "{found:x?}");
    let word = FrameRun {
        first: 0x340,
        count: 64,
    };
    rig.machine.dirty_clearer().rearm_words(word, &[1])?;
    let found = pages(&rig.machine.fetch_dirty()?);
    ensure!(found == [0x300, 0x7ff], "{found:x?}");
    Ok(())
}

fn rearming_odd_words_is_refused() -> Result<()> {
    let rig = tracked(&with(DirtyMode::Log), &writer())?;
    let clearer = rig.machine.dirty_clearer();
    for (first, count, words) in [(1, 64, 2), (0, 63, 1), (0, 128, 1), (0, 0, 0), (u64::MAX, 64, 1)] {
        let run = FrameRun { first, count };
        ensure!(clearer.rearm_words(run, &vec![0; words]).is_err(), "{run:?}");
    }
    Ok(())
}

fn page_written_again_after_rearming_is_found() -> Result<()> {
    const COUNTER: u32 = 0x20_0000;
    for dirty in [DirtyMode::Log, DirtyMode::Ring] {
        let code = Code::default().print("ready\n").count(COUNTER);
        let mut rig = tracked(&with(dirty), &code)?;
        let memory = rig.machine.memory().clone();
        let whole = memory.shape().runs()[0];
        for round in 0..50 {
            let count = read(&memory, COUNTER)?;
            wait_for_count(&memory, COUNTER, count + 10)?;
            let dirty = rig.machine.fetch_dirty()?;
            ensure!(dirty.contains(u64::from(COUNTER) / PAGE_SIZE), "lost in round {round}");
            rig.machine.dirty_clearer().rearm(whole, &dirty)?;
        }
    }
    Ok(())
}

fn ring_that_overflows_loses_nothing() -> Result<()> {
    // More pages than the largest ring has entries (65,536): mov edi, 16 MiB; mov ecx, 70000;
    // 1: mov [edi], ecx; add edi, 4096; dec ecx; jnz 1b
    const COUNT: u32 = 70_000;
    const START: u32 = 16 << 20;
    let mut sweep = vec![0xbf];
    sweep.extend(START.to_le_bytes());
    sweep.push(0xb9);
    sweep.extend(COUNT.to_le_bytes());
    sweep.extend([0x89, 0x0f, 0x81, 0xc7, 0, 0x10, 0, 0, 0x49, 0x75, 0xf5]);
    let code = Code::default()
        .print("ready\n")
        .echo()
        .raw(&sweep)
        .print("written\n")
        .halt();
    let config = MachineConfig {
        memory_bytes: 320 << 20,
        dirty: DirtyMode::Ring,
        ..config()
    };
    let mut rig = tracked(&config, &code)?;
    go_on(&rig)?;
    rig.console.wait_for("written\n")?;
    rig.machine.pause()?;
    let found = rig.machine.fetch_dirty()?;
    let all = FrameRun {
        first: u64::from(START) / PAGE_SIZE,
        count: COUNT.into(),
    };
    // A host that overruns its ring (kvm-pvm) makes it more than was written, never less.
    ensure!(found.runs_in(all) == [all], "{:x?}", found.runs());
    Ok(())
}

fn ring_works_on_after_an_overrun() -> Result<()> {
    const COUNTER: u32 = 0x20_0000;
    // An entry for each of 200,000 emulated writes on kvm-pvm, one per page elsewhere, and then writes without end.
    let code = Code::default()
        .print("ready\n")
        .echo()
        .raw(&[0xb9])
        .raw(&200_000u32.to_le_bytes())
        .raw(&[0x89, 0x0d])
        .raw(&(COUNTER + 0x1000).to_le_bytes())
        .raw(&[0x49, 0x75, 0xf7])
        .count(COUNTER);
    let mut rig = tracked(&with(DirtyMode::Ring), &code)?;
    go_on(&rig)?;
    let memory = rig.machine.memory().clone();
    wait_for_count(&memory, COUNTER, 1)?;
    ensure!(rig.machine.fetch_dirty()?.contains(u64::from(COUNTER) / PAGE_SIZE + 1));
    for round in 0..50 {
        let count = read(&memory, COUNTER)?;
        wait_for_count(&memory, COUNTER, count + 10)?;
        let dirty = rig.machine.fetch_dirty()?;
        ensure!(dirty.contains(u64::from(COUNTER) / PAGE_SIZE), "lost in round {round}");
    }
    Ok(())
}

fn tracking_twice_starts_empty() -> Result<()> {
    for dirty in [DirtyMode::Log, DirtyMode::Ring] {
        let mut rig = tracked(&with(dirty), &writer())?;
        go_on(&rig)?;
        rig.console.wait_for("written\n")?;
        rig.machine.stop_dirty_tracking()?;
        rig.machine.start_dirty_tracking(Arming::All)?;
        let found = rig.machine.fetch_dirty()?;
        ensure!(found.is_empty(), "{dirty:?}: {:x?}", found.runs());
    }
    Ok(())
}

fn tracking_begins_as_it_is_asked_to_each_time() -> Result<()> {
    let mut rig = tracked(&with(DirtyMode::Log), &writer())?;
    rig.machine.stop_dirty_tracking()?;
    rig.machine.start_dirty_tracking(Arming::Unpopulated)?;
    let populated = rig.machine.memory().populated()?.runs;
    ensure!(rig.machine.fetch_dirty()?.runs() == populated, "all that is populated");
    rig.machine.stop_dirty_tracking()?;
    rig.machine.start_dirty_tracking(Arming::All)?;
    ensure!(rig.machine.fetch_dirty()?.is_empty(), "nothing of before");
    // Also where it was not stopped.
    rig.machine.start_dirty_tracking(Arming::Unpopulated)?;
    rig.machine.start_dirty_tracking(Arming::All)?;
    go_on(&rig)?;
    rig.console.wait_for("written\n")?;
    let found = pages(&rig.machine.fetch_dirty()?);
    ensure!(found == expected(), "{found:x?}");
    Ok(())
}

fn fetching_without_tracking_is_an_error() -> Result<()> {
    let mut rig = Rig::boot_with(&with(DirtyMode::Log), &writer())?;
    ensure!(rig.machine.fetch_dirty().is_err());
    Ok(())
}

fn memory_beyond_the_hole_is_tracked() -> Result<()> {
    // The device bitmap and the slots of both regions: the loader is the one that can write beyond 4 GiB in 32-bit mode.
    let large = MachineConfig {
        memory_bytes: 4 << 30,
        ..config()
    };
    let mut rig = tracked(&large, &writer())?;
    let beyond = FrameRun {
        first: (4u64 << 30) / PAGE_SIZE + 100,
        count: 3,
    };
    rig.machine.memory().write_zeroes(beyond)?;
    let found = rig.machine.fetch_dirty()?.runs();
    ensure!(found == [beyond], "{found:x?}");
    Ok(())
}
