//! What a guest calls free when its migration asks: not sent, unless the guest used it again.
//!
//! Where ring 0 is emulated a guest takes 10 ms to get a page and 2 ms to free one, and of what became free more than two seconds ago it tells its
//! host by itself: that is not there to be called free. So each time it is a block or two of 4 MiB at most, and should a move come too late, all is done
//! again. Hence these are long scenarios.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ferry_tests::linux::{BOOT, Linux, carry_out, wait_printed};
use ferry_tests::pair::Underway;
use ferry_tests::waiting::CALL;
use ferry_tests::{Host, Migration, Pair, until};
use libtest_mimic::Trial;

use crate::scenario::{is_long, on_kvm};

pub(crate) fn trials() -> Vec<Trial> {
    if !is_long() {
        return Vec::new();
    }
    on_kvm![
        what_became_free_right_before_a_move_is_not_sent,
        what_was_called_free_in_a_move_that_was_aborted_is_the_guests_again,
    ]
}

const MIB: u64 = 1 << 20;
/// How long a guest may take to use or free much of its memory where ring 0 is emulated.
const LONG: Duration = Duration::from_secs(900);
/// Slow enough that the guest has time to answer in the first pass.
const SLOWLY: [&str; 4] = ["--bandwidth", "8Mbit", "--timeout", "60m"];

/// A guest that holds memory until it is told to free it.
struct Holder {
    mib: u64,
    /// How often it was filled: each time with something else.
    times: u32,
}

impl Holder {
    /// Runs one with 256 MiB at A, and one vCPU: two wait for each other where ring 0 is emulated.
    fn run(pair: &Pair, mib: u64) -> Result<Self> {
        Linux::new("g")?.vcpus(1).run(&pair.a)?;
        wait_printed(&pair.a, "TICK 2 ", 1, BOOT)?;
        carry_out(&pair.a, "g", "$b mkfifo /tmp/f", BOOT)?;
        Ok(Self { mib, times: 0 })
    }

    fn fill(&mut self, host: &Host) -> Result<()> {
        self.times += 1;
        let line = format!("ferry-guest fill {} {} </tmp/f & exec 4>/tmp/f", self.mib, self.times);
        carry_out(host, "g", &line, LONG)?;
        wait_printed(host, &format!("FILLED {}", self.times), 1, LONG)?;
        Ok(())
    }

    /// Has it look whether all is what it was filled with, and free it.
    fn free(&self, host: &Host) -> Result<()> {
        for line in ["exec 4>&-", "wait $!"] {
            carry_out(host, "g", &format!("{line} #{}", self.times), LONG)?;
        }
        let text = wait_printed(host, "data=same", 1, BOOT)?;
        ensure!(!text.contains("DAMAGED"), "{text}");
        Ok(())
    }

    /// A migration in its first pass, from which so many bytes at least were left out because the guest freed them and called them free.
    fn moved_until_named(&mut self, pair: &Pair, enough: u64) -> Result<Underway> {
        let mut named = Vec::new();
        let found = until("what became free is named", LONG, || {
            self.fill(&pair.a)?;
            self.free(&pair.a)?;
            let underway = pair.migrate_until("g", &SLOWLY, |record| Ok(is_in_first_pass(record)))?;
            let began = Instant::now();
            let mut most = 0;
            until("enough is named, or not in time", CALL, || {
                let shown = pair.a.ferry(&["migration", "show", &underway.id])?.exit(0)?;
                most = number(&shown.migration()?, "memory_hinted")?;
                Ok((most >= enough || began.elapsed() > CALL / 2).then_some(()))
            })?;
            named.push(most);
            if most >= enough {
                return Ok(Some(underway));
            }
            abort(pair, underway)?;
            Ok(None)
        });
        eprintln!("bytes called free: {named:?}");
        found.with_context(|| format!("called free: {named:?}"))
    }
}

fn what_became_free_right_before_a_move_is_not_sent(pair: &mut Pair) -> Result<()> {
    let mut holder = Holder::run(pair, 32)?;
    holder.fill(&pair.a)?;
    let moved = pair.migrate("g", &[])?.exit(0)?.migration()?.is("completed", "b")?;
    let full = number(&moved, "bytes_sent")?;
    let back = pair
        .b
        .ferry(&["migrate", "g", "--to", "a", "--verify"])?
        .exit(0)?
        .migration()?;
    back.is("completed", "a")?;
    holder.free(&pair.a)?;

    let underway = holder.moved_until_named(pair, 4 * MIB)?;
    let moved = quickly(pair, underway)?;

    let (named, sent) = (number(&moved, "memory_hinted")?, number(&moved, "bytes_sent")?);
    eprintln!("bytes sent with all held {full}, without {sent}; called free {named}");
    // Nothing else became less: of the pass in which they were left out, for a slow move sends more pages again than a quick one.
    let first_pass = moved.record["rounds"][0]["bytes"].as_u64().context("no first pass")?;
    ensure!(first_pass + named < full, "{full} with all held; {}", moved.record);
    // What was called free is used again.
    holder.fill(&pair.b)?;
    holder.free(&pair.b)
}

/// It uses it again, and moves with that.
fn what_was_called_free_in_a_move_that_was_aborted_is_the_guests_again(pair: &mut Pair) -> Result<()> {
    const MOST_IS_FREE: &str = "most() { $b awk '/MemFree/{exit $2<150000}' /proc/meminfo; }";
    let mut holder = Holder::run(pair, 32)?;
    carry_out(&pair.a, "g", MOST_IS_FREE, BOOT)?;
    let underway = holder.moved_until_named(pair, 1)?;
    abort(pair, underway)?;
    carry_out(&pair.a, "g", "until most; do $b sleep 1; done", LONG)?;
    holder.fill(&pair.a)?;
    pair.migrate("g", &[])?.exit(0)?.migration()?.is("completed", "b")?;
    holder.free(&pair.b)
}

/// Lets the migration go as fast as it can, unless it is over, and waits for its end.
fn quickly(pair: &Pair, underway: Underway) -> Result<Migration> {
    pair.a
        .ferry(&["migration", "retune", &underway.id, "--bandwidth", "none"])?;
    let moved = underway.call.wait_for(LONG)?.exit(0)?;
    moved.migration()?.is("completed", "b")
}

fn abort(pair: &Pair, underway: Underway) -> Result<()> {
    pair.a.ferry(&["migration", "abort", &underway.id])?.exit(0)?;
    underway.call.wait_for(CALL)?.exit(1)?;
    Ok(())
}

fn is_in_first_pass(record: &Migration) -> bool {
    !record.is_over() && record.rounds() == 0
}

fn number(record: &Migration, name: &str) -> Result<u64> {
    Ok(record.number(name)? as u64)
}
