//! Agents that are killed and come back: before, during and after a migration.

use anyhow::{Result, ensure};
use ferry_tests::{Guest, Pair, until, waiting::MOVE};
use libtest_mimic::Trial;

use crate::journal;
use crate::scenario::{expect_a_lost_peer_and, has_nothing, on_kvm};

pub(crate) fn trials() -> Vec<Trial> {
    on_kvm![
        a_guest_outlives_its_agent,
        a_source_agent_killed_before_a_migration_finds_its_guest_again,
        a_source_agent_killed_while_copying_comes_back_to_one_guest,
        a_source_agent_killed_and_gone_for_good_loses_no_guest,
        a_source_agent_killed_afterwards_remembers_where_the_guest_went,
        a_destination_agent_killed_before_a_migration_takes_the_guest,
        a_destination_agent_killed_while_copying_leaves_the_guest_at_the_source,
        a_destination_agent_killed_afterwards_keeps_its_guest,
        a_source_agent_killed_when_armed_comes_back_to_its_guest,
        a_destination_agent_killed_when_armed_leaves_the_guest_at_the_source,
        both_agents_killed_while_copying_come_back_to_one_guest,
        agents_killed_at_random_moments_never_make_two_guests,
        the_journal_is_readable_while_the_agent_runs,
    ]
}

const WORK: &str = "fill=random fill_mib=64 work=uniform work_mib=8 rate=1000 heartbeat_ms=20";

fn a_guest_outlives_its_agent(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g"))?;
    let vmm = pair.a.vmm()?;

    pair.a.kill();
    witness.wait_for_beats_at("a", 5)?;
    pair.a.start()?;
    pair.a.terminate()?;
    witness.wait_for_beats_at("a", 5)?;
    pair.a.start()?;

    ensure!(pair.a.vmm()? == vmm);
    pair.a.ferry(&["pause", "g"])?.exit(0)?;
    pair.a.ferry(&["resume", "g"])?.exit(0)?;
    pair.runs_only_at(&pair.a, "g", &witness)
}

fn a_source_agent_killed_before_a_migration_finds_its_guest_again(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g"))?;
    pair.a.kill();
    pair.a.start()?;

    pair.migrate("g", &["--digests"])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;

    pair.runs_only_at(&pair.b, "g", &witness)
}

fn a_source_agent_killed_while_copying_comes_back_to_one_guest(pair: &mut Pair) -> Result<()> {
    tolerate_lost_agents(pair);
    let witness = pair.run(&Guest::new("g").work(WORK))?;
    let id = begin_slow(pair)?;

    pair.a.kill();
    witness.wait_for_beats_at("a", 2)?;
    pair.a.start()?;

    ends_with_one_guest(pair, &id, &witness)
}

fn a_source_agent_killed_and_gone_for_good_loses_no_guest(pair: &mut Pair) -> Result<()> {
    tolerate_lost_agents(pair);
    let witness = pair.run(&Guest::new("g").work(WORK))?;
    begin_slow(pair)?;

    pair.a.kill();

    // No agent gives a grant: the guest stays where it is, for as long as its own VMM lives.
    witness.wait_for_beats_at("a", 100)?;
    witness.check()
}

fn a_source_agent_killed_afterwards_remembers_where_the_guest_went(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g"))?;
    let id = pair.migrate("g", &[])?.exit(0)?.migration()?.text("id")?.to_owned();

    pair.a.kill();
    pair.a.start()?;

    pair.a.ferry(&["show", "g"])?.exit(3)?.says("moved_to")?.says("b")?;
    pair.a
        .ferry(&["migration", "show", &id])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn a_destination_agent_killed_before_a_migration_takes_the_guest(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g"))?;
    pair.b.kill();
    pair.b.start()?;

    pair.migrate("g", &["--digests"])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;

    pair.runs_only_at(&pair.b, "g", &witness)
}

fn a_destination_agent_killed_while_copying_leaves_the_guest_at_the_source(pair: &mut Pair) -> Result<()> {
    tolerate_lost_agents(pair);
    let witness = pair.run(&Guest::new("g").work(WORK))?;
    let id = begin_slow(pair)?;

    pair.b.kill();
    let record = pair.wait_over(&id)?;
    ensure!(record.text("guest_location")? == "a", "{}", record.record);
    pair.b.start()?;

    pair.runs_only_at(&pair.a, "g", &witness)?;
    has_nothing(&pair.b)?;
    pair.migrate("g", &["--digests"])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn a_destination_agent_killed_afterwards_keeps_its_guest(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g"))?;
    pair.migrate("g", &[])?.exit(0)?.migration()?.is("completed", "b")?;

    pair.b.kill();
    witness.wait_for_beats_at("b", 5)?;
    pair.b.start()?;

    pair.runs_only_at(&pair.b, "g", &witness)?;
    pair.b
        .ferry(&["migrate", "g", "--to", "a", "--digests"])?
        .exit(0)?
        .migration()?
        .is("completed", "a")?;
    pair.runs_only_at(&pair.a, "g", &witness)
}

fn a_source_agent_killed_when_armed_comes_back_to_its_guest(pair: &mut Pair) -> Result<()> {
    tolerate_lost_agents(pair);
    let witness = pair.run(&Guest::new("g"))?;
    let id = begin_armed(pair)?;

    pair.a.kill();
    witness.wait_for_beats_at("a", 2)?;
    pair.a.start()?;
    // Held again, or ended by then.
    pair.a.ferry(&["migration", "abort", &id])?;

    ensure!(pair.wait_over(&id)?.text("guest_location")? == "a");
    pair.runs_only_at(&pair.a, "g", &witness)
}

fn a_destination_agent_killed_when_armed_leaves_the_guest_at_the_source(pair: &mut Pair) -> Result<()> {
    tolerate_lost_agents(pair);
    let witness = pair.run(&Guest::new("g"))?;
    let id = begin_armed(pair)?;

    pair.b.kill();
    ensure!(pair.wait_over(&id)?.text("guest_location")? == "a");
    pair.b.start()?;

    pair.runs_only_at(&pair.a, "g", &witness)?;
    has_nothing(&pair.b)?;
    pair.migrate("g", &["--digests"])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn both_agents_killed_while_copying_come_back_to_one_guest(pair: &mut Pair) -> Result<()> {
    tolerate_lost_agents(pair);
    let witness = pair.run(&Guest::new("g").work(WORK))?;
    let id = begin_slow(pair)?;

    pair.a.kill();
    pair.b.kill();
    pair.b.start()?;
    pair.a.start()?;

    ends_with_one_guest(pair, &id, &witness)
}

fn agents_killed_at_random_moments_never_make_two_guests(pair: &mut Pair) -> Result<()> {
    die_at_random_moments(pair, &[])
}

/// Agents are killed in one move after the other, each asked for with these further arguments.
pub(crate) fn die_at_random_moments(pair: &mut Pair, further: &[&str]) -> Result<()> {
    tolerate_lost_agents(pair);
    let witness = pair.run(&Guest::new("g").work("fill=random fill_mib=16 work=uniform work_mib=8 heartbeat_ms=20"))?;

    // The moments are spread over a fast move, the switchover among them.
    for (round, delay_ms) in [30, 60, 90, 120, 160, 200].into_iter().enumerate() {
        let (source, target) = if pair.a.ferry(&["show", "g"])?.code == Some(0) {
            ("a", "b")
        } else {
            ("b", "a")
        };
        let host = if source == "a" { &pair.a } else { &pair.b };
        let words = [&["migrate", "g", "--to", target, "--detach", "--verify"], further].concat();
        let began = host.ferry(&words)?.exit(0)?;
        let id = began.migration()?.text("id")?.to_owned();
        std::thread::sleep(std::time::Duration::from_millis(delay_ms));
        let kills_source = round % 2 == 0;
        let victim = if (source == "a") == kills_source {
            &mut pair.a
        } else {
            &mut pair.b
        };
        victim.kill();
        victim.start()?;
        ends_with_one_guest(pair, &id, &witness)?;
    }
    Ok(())
}

fn the_journal_is_readable_while_the_agent_runs(pair: &mut Pair) -> Result<()> {
    pair.run(&Guest::new("g"))?;
    let id = pair.migrate("g", &[])?.exit(0)?.migration()?.text("id")?.to_owned();

    for host in [&pair.a, &pair.b] {
        let journal = journal::of(host)?;
        ensure!(journal.has_migration(&id)?, "no row at {}", host.name);
        ensure!(journal.pragma("journal_mode")? == "wal" && journal.pragma("quick_check")? == "ok");
    }
    ensure!(journal::of(&pair.b)?.decision_of(&id, "RUNNING")?);
    pair.b.wait_for_status("g", "running")?;
    Ok(())
}

fn begin_slow(pair: &Pair) -> Result<String> {
    let began = pair
        .migrate("g", &["--detach", "--bandwidth", "64Mbit", "--digests"])?
        .exit(0)?;
    let id = began.migration()?.text("id")?.to_owned();
    until("pages are being sent", MOVE, || {
        let record = pair.a.ferry(&["migration", "show", &id])?.exit(0)?.migration()?;
        Ok((record.number("bytes_sent")? > f64::from(4 << 20)).then_some(()))
    })?;
    pair.keep_logs();
    Ok(id)
}

/// Agent B expects the guest and VMM A has no grant.
fn begin_armed(pair: &Pair) -> Result<String> {
    let began = pair.migrate("g", &["--detach", "--hold-at", "armed"])?.exit(0)?;
    let id = began.migration()?.text("id")?.to_owned();
    let journal = journal::of(&pair.b)?;
    until("agent B expects the guest", MOVE, || {
        Ok(journal.decision_of(&id, "OPEN")?.then_some(()))
    })?;
    pair.keep_logs();
    Ok(id)
}

fn ends_with_one_guest(pair: &Pair, id: &str, witness: &ferry_tests::Witness) -> Result<()> {
    let record = pair.wait_over(id)?;
    let (host, other) = match record.text("guest_location")? {
        "a" => (&pair.a, &pair.b),
        _ => (&pair.b, &pair.a),
    };
    pair.runs_only_at(host, "g", witness)?;
    has_nothing(other)
}

fn tolerate_lost_agents(pair: &mut Pair) {
    expect_a_lost_peer_and(pair, &["transport", "source"]);
}
