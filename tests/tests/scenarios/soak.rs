//! Guests that move to and fro for long, with changing workloads and in changing ways: what agents hold must not grow by it.
//!
//! A few moves in every run, 240 with `FERRY_LONG_TESTS=1`. A VMM lives from one move to the next, so what could grow is at the agents: descriptors,
//! threads, memory.

use std::fs;

use anyhow::{Context, Result, bail, ensure};
use ferry_tests::{
    Guest, Host, Pair, Witness, process, until,
    waiting::{CALL, MOVE},
};
use libtest_mimic::Trial;

use crate::scenario::{self, has_nothing, on_kvm};

pub(crate) fn trials() -> Vec<Trial> {
    on_kvm![guests_that_move_to_and_fro_leave_nothing_at_the_agents]
}

/// Workload, vCPUs and way of tracking of a lap's guest.
const WORK: [(&str, u32, &str); 5] = [
    ("fill=random fill_mib=96 work=uniform work_mib=32 rate=20000", 1, "log"),
    ("fill=text fill_mib=96 work=hotcold work_mib=32 rate=20000", 2, "ring"),
    ("fill=zero fill_mib=96 work=sweep work_mib=16 rate=5000", 1, "ring"),
    ("fill=random fill_mib=192 work=idle", 1, "log"),
    (
        "fill=random fill_mib=32 work=uniform work_mib=64 rate=100000",
        1,
        "ring",
    ),
];

/// What has pages go through the agents.
const THROUGH_AGENTS: [&[&str]; 2] = [&["--transport", "grpc"], &["--transport", "grpc", "--streams", "4"]];

/// What the moves of a lap are asked for, one after the other and again from the first.
const WAYS: [&[&str]; 8] = [
    &[],
    &["--compress", "lz4"],
    &["--streams", "1"],
    &["--mode", "hybrid"],
    &["--transport", "grpc"],
    &["--resume-window", "5s"],
    &["--mode", "postcopy"],
    &["--cold"],
];

fn guests_that_move_to_and_fro_leave_nothing_at_the_agents(pair: &mut Pair) -> Result<()> {
    let (laps, moves) = if scenario::is_long() { (20, 10) } else { (3, 4) };
    let mut told = Vec::new();
    // What is made once is made when each way was gone once: pools of threads, the journal's cache, connections, and memory that agents keep once pages
    // went through them. How much that is at most shows late, each of the allocator's arenas keeps what one move or another needed of it: in the first
    // 40 of 480 moves over gRPC 38 and 58 MiB, in all the others 11 more, and in the last 100 what the journal's cache takes.
    let warm = WAYS.len().div_ceil(moves).max(laps / 2);
    (0..warm).try_for_each(|number| lap(pair, number, moves, &WAYS))?;
    if scenario::is_long() {
        lap(pair, 0, 40, &THROUGH_AGENTS)?;
    }
    let first = held(pair)?;
    for number in warm..laps {
        lap(pair, number, moves, &WAYS)?;
        let now = held(pair)?;
        told.push(format!("after {:>3} moves: {now:?}", (number + 1) * moves));
        println!("{}", told[told.len() - 1]);
    }
    let last = held(pair)?;
    for (before, after) in first.iter().zip(&last) {
        before.has_not_become(after).with_context(|| told.join("\n"))?;
    }
    Ok(())
}

/// One guest is run, moved this often, and deleted; nothing of it is left.
fn lap(pair: &Pair, number: usize, moves: usize, ways: &[&[&str]]) -> Result<()> {
    let (work, vcpus, dirty) = WORK[number % WORK.len()];
    let work = format!("{work} heartbeat_ms=20");
    let witness = pair.run(&Guest::new("g").memory_mib(384).work(&work).vcpus(vcpus).dirty(dirty))?;
    for turn in 0..moves {
        let hosts = if turn.is_multiple_of(2) {
            [&pair.a, &pair.b]
        } else {
            [&pair.b, &pair.a]
        };
        let way = ways[(number * moves + turn) % ways.len()];
        moves_on(pair, hosts, way, &witness).with_context(|| format!("lap {number}, move {turn}, {way:?}"))?;
    }
    let at = if moves.is_multiple_of(2) { &pair.a } else { &pair.b };
    at.ferry(&["delete", "g", "--force"])?.exit(0)?;
    has_nothing(&pair.a)?;
    has_nothing(&pair.b)
}

fn moves_on(pair: &Pair, [from, to]: [&Host; 2], way: &[&str], witness: &Witness) -> Result<()> {
    let words = [&["migrate", "g", "--to", to.name, "--verify"], way].concat();
    let answer = from.begin(&words)?.wait_for(MOVE)?;
    answer.exit(0)?.migration()?.is("completed", to.name)?;
    pair.runs_only_at(to, "g", witness)
}

/// What one agent holds.
#[derive(Debug)]
#[expect(dead_code, reason = "the host's name is there to be printed")]
struct Held {
    host: &'static str,
    descriptors: usize,
    threads: usize,
    anonymous_kib: u64,
}

impl Held {
    fn of(host: &Host) -> Result<Self> {
        let id = host.pid().context("the agent is gone")?;
        let rollup = fs::read_to_string(format!("/proc/{id}/smaps_rollup"))?;
        let anonymous = rollup.lines().find_map(|line| line.strip_prefix("Pss_Anon:"));
        let kib = anonymous.and_then(|rest| rest.trim().strip_suffix(" kB"));
        Ok(Self {
            host: host.name,
            descriptors: fs::read_dir(format!("/proc/{id}/fd"))?.count(),
            threads: process::threads(id).len(),
            anonymous_kib: kib.context("the kernel tells no Pss_Anon")?.trim().parse()?,
        })
    }

    /// Fails if `after` holds more. Threads of a pool come as they are needed, up to its size; memory that was freed stays with the
    /// allocator, and the journal's cache has a bound that few moves do not reach.
    fn has_not_become(&self, after: &Self) -> Result<()> {
        ensure!(
            after.descriptors <= self.descriptors,
            "descriptors have become more: {self:?}, {after:?}"
        );
        ensure!(
            after.threads <= self.threads + POOL,
            "threads have become more: {self:?}, {after:?}"
        );
        ensure!(
            after.anonymous_kib <= self.anonymous_kib + SLACK_KIB,
            "memory has become more: {self:?}, {after:?}"
        );
        Ok(())
    }
}

/// Threads for what blocks, which tokio keeps for some seconds.
const POOL: usize = 8;

/// 16 MiB: the journal's cache may take 2 of it (SQLite's own default), an arena of the allocator that a move needs for the first time some MiB; a buffer of
/// 192 KiB that stays from each of 100 moves would be 18.
const SLACK_KIB: u64 = 16 << 10;

/// What both agents hold once they have settled: connections of a move that is over end by themselves.
fn held(pair: &Pair) -> Result<[Held; 2]> {
    let now = || -> Result<[Held; 2]> { Ok([Held::of(&pair.a)?, Held::of(&pair.b)?]) };
    let mut last = now()?;
    let mut calm = 0;
    let settled = until("what agents hold stays the same", CALL, || {
        let next = now()?;
        let same = next
            .iter()
            .zip(&last)
            .all(|(next, last)| next.descriptors == last.descriptors);
        calm = if same { calm + 1 } else { 0 };
        last = next;
        Ok((calm >= CALM).then_some(()))
    });
    if let Err(error) = settled {
        bail!("{error:#}: {last:?}");
    }
    Ok(last)
}

/// Looks, 10 ms apart, in which nothing changed.
const CALM: u32 = 50;
