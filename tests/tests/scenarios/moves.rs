//! A running guest moves: every workload, content, number of vCPUs and way of tracking; and what a move may cost.

use std::io::Read;

use anyhow::{Result, ensure};
use ferry_tests::{
    Guest, Pair, until,
    waiting::{CALL, MOVE},
};
use libtest_mimic::Trial;

use crate::alphabet;
use crate::scenario::{self, on_kvm};

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = matrix();
    trials.extend(on_kvm![
        ten_moves_there_and_back_keep_one_copy,
        a_guest_that_its_user_paused_arrives_paused,
        untouched_memory_is_not_sent,
        zero_pages_are_told_and_not_sent,
        one_stream_and_four_streams_move_the_same_guest,
        the_blackout_is_told_in_parts,
        a_guest_that_resets_itself_meanwhile_moves_all_the_same,
        a_moved_guest_reboots_at_the_destination,
        memory_above_the_hole_below_4_gib_moves,
        a_guest_that_is_not_ours_boots_and_moves,
    ]);
    trials
}

/// Every workload with every content; vCPUs and tracking take turns, and in long runs all are tried.
fn matrix() -> Vec<Trial> {
    let mut trials = Vec::new();
    for (row, work) in ["idle", "uniform", "hotcold", "sweep"].into_iter().enumerate() {
        for (column, fill) in ["random", "zero", "text"].into_iter().enumerate() {
            let all = [(1, "log"), (2, "ring"), (1, "ring"), (2, "log")];
            let turn = (row + column) % all.len();
            let chosen = if scenario::is_long() {
                &all[..]
            } else {
                &all[turn..=turn]
            };
            for &(vcpus, dirty) in chosen {
                let name = format!("scenarios::moves::{work}_on_{fill}_memory_arrives_whole_{vcpus}_vcpus_{dirty}");
                trials.push(scenario::trial_on_kvm(&name, move |pair| {
                    arrives_whole(pair, work, fill, vcpus, dirty)
                }));
            }
        }
    }
    trials
}

fn arrives_whole(pair: &Pair, work: &str, fill: &str, vcpus: u32, dirty: &'static str) -> Result<()> {
    let work = format!("fill={fill} fill_mib=48 work={work} work_mib=24 rate=20000 heartbeat_ms=20");
    let witness = pair.run(&Guest::new("g").work(&work).vcpus(vcpus).dirty(dirty))?;

    let moved = pair
        .migrate("g", &["--digests"])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;

    ensure!(
        !moved.text("memory_digest")?.is_empty() && !moved.text("state_digest")?.is_empty(),
        "{}",
        moved.record
    );
    pair.runs_only_at(&pair.b, "g", &witness)?;
    pair.a.wait_until_gone("g")?.says("moved_to")?;
    Ok(())
}

fn ten_moves_there_and_back_keep_one_copy(pair: &mut Pair) -> Result<()> {
    let work = "fill=random fill_mib=32 work=hotcold work_mib=16 rate=10000 heartbeat_ms=20";
    let witness = pair.run(&Guest::new("g").work(work).vcpus(2))?;

    for _ in 0..5 {
        pair.a
            .ferry(&["migrate", "g", "--to", "b", "--digests"])?
            .exit(0)?
            .migration()?
            .is("completed", "b")?;
        pair.runs_only_at(&pair.b, "g", &witness)?;
        pair.b
            .ferry(&["migrate", "g", "--to", "a", "--digests"])?
            .exit(0)?
            .migration()?
            .is("completed", "a")?;
        pair.runs_only_at(&pair.a, "g", &witness)?;
    }

    let epoch = pair.a.show("g")?["epoch"].as_u64();
    ensure!(
        epoch >= Some(11),
        "each right to run has an epoch of its own: {epoch:?}"
    );
    Ok(())
}

fn a_guest_that_its_user_paused_arrives_paused(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g"))?;
    pair.a.ferry(&["pause", "g"])?.exit(0)?;

    pair.migrate("g", &["--digests"])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;

    pair.b.wait_for_status("g", "paused")?;
    pair.exists_only_at(&pair.b, "g")?;
    ensure!(
        witness.is_silent(std::time::Duration::from_millis(300)),
        "a paused guest beats"
    );
    pair.b.ferry(&["resume", "g"])?.exit(0)?;
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn untouched_memory_is_not_sent(pair: &mut Pair) -> Result<()> {
    let work = "fill=random fill_mib=32 work=idle heartbeat_ms=20";
    let guest = Guest::new("g").memory_mib(large_guest_mib()?).work(work);
    let witness = pair.run(&guest)?;

    let moved = pair
        .migrate("g", &["--digests"])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;

    let mib = moved.number("bytes_sent")? / f64::from(1 << 20);
    ensure!((32.0..64.0).contains(&mib), "{mib} MiB were sent for 32 MiB touched");
    pair.runs_only_at(&pair.b, "g", &witness)
}

/// 12 GiB, or less on a host that has not twice as much.
fn large_guest_mib() -> Result<u64> {
    let told = std::fs::read_to_string("/proc/meminfo")?;
    let total = told
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.parse().ok());
    Ok((total.unwrap_or(0_u64) / 1024 / 2).min(12 << 10))
}

fn memory_above_the_hole_below_4_gib_moves(pair: &mut Pair) -> Result<()> {
    let work = "fill=text fill_mib=3150 work=idle check_rate=20000 heartbeat_ms=20";
    if large_guest_mib()? < 5 << 10 {
        return Ok(());
    }
    let witness = pair.run(&Guest::new("g").memory_mib(5 << 10).work(work))?;

    pair.migrate("g", &[])?.exit(0)?.migration()?.is("completed", "b")?;

    pair.runs_only_at(&pair.b, "g", &witness)
}

fn zero_pages_are_told_and_not_sent(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g").work("fill=zero fill_mib=64 work=idle heartbeat_ms=20"))?;

    let moved = pair
        .migrate("g", &["--digests"])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;

    ensure!(moved.number("zero_pages")? >= 64.0 * 256.0, "{}", moved.record);
    ensure!(moved.number("bytes_sent")? < f64::from(16 << 20), "{}", moved.record);
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn one_stream_and_four_streams_move_the_same_guest(pair: &mut Pair) -> Result<()> {
    let work = "fill=random fill_mib=64 work=uniform work_mib=16 rate=5000 heartbeat_ms=20";
    let witness = pair.run(&Guest::new("g").work(work))?;

    let there = pair
        .migrate("g", &["--digests", "--streams", "1"])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;
    let back = pair
        .b
        .ferry(&["migrate", "g", "--to", "a", "--digests", "--streams", "4"])?
        .exit(0)?
        .migration()?;

    ensure!(
        there.number("streams")? == 1.0 && back.number("streams")? == 4.0,
        "{} {}",
        there.record,
        back.record
    );
    pair.runs_only_at(&pair.a, "g", &witness)
}

fn the_blackout_is_told_in_parts(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g"))?;

    let moved = pair.migrate("g", &[])?.exit(0)?.migration()?.is("completed", "b")?;

    let parts = ["pause", "drain", "last_pages", "state", "claim", "start"];
    let sum = parts
        .iter()
        .map(|part| moved.number(&format!("downtime_ms.{part}")))
        .sum::<Result<f64>>()?;
    let total = moved.number("downtime_ms.total")?;
    let bound = moved.number("downtime_ms.upper_bound")?;
    ensure!(total > 0.0 && total <= bound, "{}", moved.record);
    ensure!(
        sum <= bound * 1.01 + 0.1,
        "the parts are more than the whole: {}",
        moved.record
    );
    ensure!(
        moved.rounds() >= 2 && bound < moved.number("total_ms")?,
        "{}",
        moved.record
    );
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn a_guest_that_resets_itself_meanwhile_moves_all_the_same(pair: &mut Pair) -> Result<()> {
    // It resets itself every three seconds and sends its memory in one: the reset falls into the first pass.
    let work = "fill=random fill_mib=20 work=idle heartbeat_ms=20 reset_after_ms=3000";
    let witness = pair.run(&Guest::new("g").work(work))?;
    witness.wait_for_beats_at("a", 110)?;

    let call = pair.begin_migrate("g", &["--digests", "--bandwidth", "160Mbit"])?;
    witness.wait_ready_times(2)?;

    call.wait_for(2 * MOVE)?.exit(0)?.migration()?.is("completed", "b")?;
    pair.b.wait_for_status("g", "running")?;
    pair.exists_only_at(&pair.b, "g")?;
    witness.wait_for_beats_at("b", 3)
}

fn a_moved_guest_reboots_at_the_destination(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g"))?;
    pair.migrate("g", &[])?.exit(0)?;
    pair.b.wait_for_status("g", "running")?;

    pair.b.ferry(&["reboot", "g"])?.exit(0)?;

    witness.wait_ready_times(2)?;
    pair.b.wait_for_status("g", "running")?;
    pair.exists_only_at(&pair.b, "g")
}

/// A guest of 29 bytes that prints the alphabet for ever: not a letter is lost or told twice.
fn a_guest_that_is_not_ours_boots_and_moves(pair: &mut Pair) -> Result<()> {
    let kernel = alphabet::file(pair.folder())?;
    let shown = pair
        .a
        .ferry(&["run", "g", "--kernel", &kernel, "--memory", "64M"])?
        .exit(0)?
        .json()?;
    let console = |host: &ferry_tests::Host| {
        host.data_dir
            .join("instances")
            .join(shown["id"].as_str().unwrap_or_default())
            .join("console.log")
    };
    let mut at_a = std::fs::File::open(console(&pair.a))?;
    until("the guest prints", CALL, || {
        Ok((at_a.metadata()?.len() > 100).then_some(()))
    })?;

    pair.migrate("g", &[])?.exit(0)?.migration()?.is("completed", "b")?;

    until("the guest prints on", CALL, || {
        Ok((std::fs::metadata(console(&pair.b))?.len() > 100).then_some(()))
    })?;
    let mut printed = String::new();
    at_a.read_to_string(&mut printed)?;
    printed += &std::fs::read_to_string(console(&pair.b))?;
    let whole = format!("{}\n", ('a'..='z').collect::<String>()).repeat(printed.len() / 27 + 1);
    ensure!(whole.starts_with(&printed), "{printed}");
    pair.exists_only_at(&pair.b, "g")
}
