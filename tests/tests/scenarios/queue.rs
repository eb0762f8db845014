//! The queue of migrations out of a host: first come first served, whatever becomes of the others and of the agent.

use anyhow::{Result, ensure};
use ferry_tests::pair::Underway;
use ferry_tests::{Guest, Migration, Pair};
use libtest_mimic::Trial;

use crate::scenario::{expect_a_lost_peer, on_kvm};

pub(crate) fn trials() -> Vec<Trial> {
    on_kvm![
        those_that_wait_are_carried_out_in_the_order_of_their_receipts,
        one_that_is_aborted_while_it_waits_gives_its_place_up_at_once,
        those_that_wait_go_on_waiting_when_the_agent_is_killed,
        one_under_way_when_the_agent_is_killed_still_counts,
    ]
}

/// The instances that wait, in the order in which they are to be moved. It is neither that of their names nor that of their making.
const LINE: [&str; 3] = ["m", "z", "a"];

/// Small, and quiet.
fn boot(pair: &Pair, names: &[&str]) -> Result<()> {
    for name in names {
        let guest = Guest::new(name).memory_mib(16).work("work=idle heartbeat_ms=100");
        pair.a.ferry(&guest.arguments(&pair.kernel()))?.exit(0)?;
        pair.a.ferry(&["pause", name])?.exit(0)?;
    }
    Ok(())
}

/// Has `first` take the only turn and keep it, and those of [`LINE`] wait behind it. Gives back the migrations' ids.
fn queue_up(pair: &Pair) -> Result<(Underway, [String; 3])> {
    boot(pair, &["first", "a", "m", "z"])?;
    let first = pair.migrate_until("first", &["--cold", "--hold-at", "queued"], |record| {
        Ok(record.text("step")? == "queue")
    })?;
    let mut ids = LINE.map(str::to_owned);
    for id in &mut ids {
        let accepted = pair.migrate(id, &["--cold", "--detach"])?.exit(0)?.migration()?;
        accepted.text("id")?.clone_into(id);
    }
    Ok((first, ids))
}

fn record(pair: &Pair, id: &str) -> Result<Migration> {
    pair.a.ferry(&["migration", "show", id])?.exit(0)?.migration()
}

/// Waits until all of these are completed, and checks that they ended in this order.
fn are_done_in_order(pair: &Pair, ids: &[String]) -> Result<()> {
    let mut ended = Vec::new();
    for id in ids {
        let over = pair.wait_over(id)?.is("completed", "b")?;
        ended.push(over.text("ended")?.to_owned());
    }
    ensure!(ended.is_sorted(), "they ended at {ended:?}");
    Ok(())
}

fn those_that_wait_are_carried_out_in_the_order_of_their_receipts(pair: &mut Pair) -> Result<()> {
    let (first, ids) = queue_up(pair)?;
    for id in &ids {
        let waits = record(pair, id)?;
        ensure!(waits.text("status")? == "queued", "{}", waits.record);
    }

    pair.a.ferry(&["migration", "abort", &first.id])?.exit(0)?;

    first.call.wait()?.exit(1)?.migration()?.is("cancelled", "a")?;
    are_done_in_order(pair, &ids)
}

fn one_that_is_aborted_while_it_waits_gives_its_place_up_at_once(pair: &mut Pair) -> Result<()> {
    let (first, [m, z, a]) = queue_up(pair)?;

    let told = pair.a.ferry(&["migration", "abort", &m])?.exit(0)?.migration()?;

    let told = told.is("cancelled", "a")?;
    ensure!(
        told.record["undone"].as_array().is_none_or(Vec::is_empty),
        "{}",
        told.record
    );
    ensure!(
        record(pair, &first.id)?.record["ended"].is_null(),
        "the first lost its turn"
    );
    pair.a.ferry(&["migration", "abort", &first.id])?.exit(0)?;
    first.call.wait()?.exit(1)?;
    are_done_in_order(pair, &[z, a])?;
    pair.a.wait_for_status("m", "paused").map(drop)
}

fn those_that_wait_go_on_waiting_when_the_agent_is_killed(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer(pair);
    let (first, ids) = queue_up(pair)?;

    pair.a.kill();
    pair.a.start()?;

    for id in &ids {
        let waits = record(pair, id)?;
        let (status, restarted) = (waits.text("status")?, waits.text("restarted_in")?);
        ensure!((status, restarted) == ("queued", "queue"), "{}", waits.record);
    }
    let busy = pair.migrate("z", &["--cold"])?.exit(4)?;
    busy.says("INSTANCE_BUSY")?.says(&ids[1])?;
    pair.a.ferry(&["migration", "abort", &first.id])?.exit(0)?;
    first.call.wait()?.exit(1)?;
    are_done_in_order(pair, &ids)
}

fn one_under_way_when_the_agent_is_killed_still_counts(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer(pair);
    let witness = pair.run(&Guest::new("g"))?;
    let first = pair.migrate_until("g", &["--hold-at", "running"], |record| {
        Ok(record.text("step")? == "copy" && record.rounds() > 0)
    })?;
    boot(pair, &["next"])?;

    pair.a.kill();
    pair.a.start()?;

    let next = pair.migrate("next", &["--cold", "--detach"])?.exit(0)?.migration()?;
    let next = next.text("id")?.to_owned();
    // Long enough for one that has its turn to be over.
    witness.wait_for_beats_at("a", 50)?;
    let waits = record(pair, &next)?;
    ensure!(waits.text("status")? == "queued", "{}", waits.record);
    pair.a.ferry(&["migration", "abort", &first.id])?.exit(0)?;
    first.call.wait()?.exit(1)?.migration()?.is("cancelled", "a")?;
    are_done_in_order(pair, &[next])
}
