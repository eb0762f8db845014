//! Where a guest goes when nobody says, what a host says no for, and agents of different versions.

use anyhow::{Context, Result, ensure};
use ferry_tests::{Guest, Host, Pair, Witness, process, until, waiting::CALL};
use libtest_mimic::Trial;
use rustix::process::Signal;
use serde_json::Value;

use crate::scenario::{expect_a_lost_peer, on_kvm};

pub(crate) fn trials() -> Vec<Trial> {
    on_kvm![
        a_guest_without_a_destination_goes_to_the_best_host,
        where_the_best_host_refuses_the_next_one_is_asked,
        a_host_whose_claims_are_full_is_left_and_says_so,
        a_dry_run_tells_of_every_host_and_changes_nothing,
        a_host_that_is_down_is_left,
        a_guest_whose_copy_broke_at_one_host_arrives_whole_at_another,
        a_second_migration_of_a_guest_names_the_first,
        a_migration_waits_for_a_destination_that_has_its_hands_full,
        an_agent_kept_at_an_older_version_gives_and_takes,
        hosts_are_told_with_what_is_claimed_of_them,
    ]
}

fn third(pair: &Pair) -> Result<&Host> {
    pair.c.as_ref().context("there is no third host")
}

/// Runs a guest on `a` and follows it on all three hosts.
fn run(pair: &Pair) -> Result<Witness> {
    pair.a.ferry(&Guest::new("g").arguments(&pair.kernel()))?.exit(0)?;
    let witness = Witness::of_instance(&[&pair.a, &pair.b, third(pair)?], &id(&pair.a, "g")?);
    witness.wait_ready()?;
    Ok(witness)
}

fn id(host: &Host, name: &str) -> Result<String> {
    Ok(host.show(name)?["id"].as_str().context("no id")?.to_owned())
}

/// What a dry run says of a host.
fn verdict(told: &Value, host: &str) -> Result<Value> {
    let hosts = told["hosts"].as_array().context("no hosts")?;
    let found = hosts.iter().find(|verdict| verdict["host"] == host);
    found
        .cloned()
        .with_context(|| format!("nothing of host {host}: {told}"))
}

fn a_guest_without_a_destination_goes_to_the_best_host(pair: &mut Pair) -> Result<()> {
    pair.start_three(&[])?;
    let witness = run(pair)?;
    pair.b.ferry(&Guest::new("other").arguments(&pair.kernel()))?.exit(0)?;

    let told = pair.a.ferry(&["migrate", "g", "--verify"])?.exit(0)?;

    told.clone().says("host c chosen")?.migration()?.is("completed", "c")?;
    witness.wait_for_beats_at("c", 3)?;
    witness.check()?;
    pair.b.ferry(&["delete", "other", "--force"])?.exit(0)?;
    third(pair)?.ferry(&["delete", "g", "--force"])?.exit(0)?;
    Ok(())
}

/// The best by its claims, which passes every filter, has an instance of that name.
fn where_the_best_host_refuses_the_next_one_is_asked(pair: &mut Pair) -> Result<()> {
    pair.start_three(&[])?;
    let witness = run(pair)?;
    pair.b.ferry(&Guest::new("g").arguments(&pair.kernel()))?.exit(0)?;
    pair.b.ferry(&["stop", "g", "--force"])?.exit(0)?;
    for name in ["other", "another"] {
        let arguments = Guest::new(name).memory_mib(128).arguments(&pair.kernel());
        third(pair)?.ferry(&arguments)?.exit(0)?;
    }

    let told = pair.a.ferry(&["migrate", "g", "--verify"])?.exit(0)?;

    let told = told.says("host c chosen")?.says("not host b")?.says("g")?;
    told.migration()?.is("completed", "c")?;
    witness.wait_for_beats_at("c", 3)?;
    witness.check()?;
    pair.b.ferry(&["delete", "g", "--force"])?.exit(0)?;
    for name in ["g", "other", "another"] {
        third(pair)?.ferry(&["delete", name, "--force"])?.exit(0)?;
    }
    Ok(())
}

fn a_host_whose_claims_are_full_is_left_and_says_so(pair: &mut Pair) -> Result<()> {
    pair.start_three(&["--ram-allocation-ratio", "0.01", "--cpu-allocation-ratio", "0.01"])?;
    let witness = run(pair)?;

    pair.a
        .ferry(&["migrate", "g", "--to", "c"])?
        .exit(4)?
        .says("INSUFFICIENT_VCPUS")?
        .says("--cpu-allocation-ratio")?;
    let told = pair.a.ferry(&["migrate", "g", "--verify"])?.exit(0)?;

    told.says("not host c")?.migration()?.is("completed", "b")?;
    pair.runs_only_at(&pair.b, "g", &witness)
}

/// What was written before the first copy broke, while it went on and since: the second one has all of it.
fn a_guest_whose_copy_broke_at_one_host_arrives_whole_at_another(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer(pair);
    pair.start_three(&[])?;
    for dirty in ["log", "ring"] {
        let work = "fill=random fill_mib=32 work=uniform work_mib=16 rate=20000 heartbeat_ms=20";
        let guest = Guest::new("g").work(work).dirty(dirty);
        pair.a.ferry(&guest.arguments(&pair.kernel()))?.exit(0)?;
        let witness = Witness::of_instance(&[&pair.a, &pair.b, third(pair)?], &id(&pair.a, "g")?);
        witness.wait_ready()?;
        let slow = ["--bandwidth", "160Mbit", "--max-downtime", "1ms", "--compress", "off"];
        let underway = pair.migrate_until("g", &slow, |record| Ok(record.rounds() >= 2))?;

        process::signal(pair.b.vmm()?, Signal::KILL)?;

        underway.call.wait()?.exit(1)?.migration()?.is("failed", "a")?;
        let moved = pair.a.ferry(&["migrate", "g", "--to", "c", "--verify"])?.exit(0)?;
        moved.migration()?.is("completed", "c")?;
        witness.wait_for_beats_at("c", 3)?;
        witness.check()?;
        third(pair)?.ferry(&["delete", "g", "--force"])?.exit(0)?;
    }
    Ok(())
}

fn a_dry_run_tells_of_every_host_and_changes_nothing(pair: &mut Pair) -> Result<()> {
    pair.start_three(&[])?;
    let witness = run(pair)?;
    pair.b.ferry(&Guest::new("g").arguments(&pair.kernel()))?.exit(0)?;

    let told = pair
        .a
        .ferry(&["migrate", "g", "--dry-run", "--sample", "none"])?
        .exit(0)?
        .json()?;

    ensure!(told["destination"] == "c" && told["migration"] == "", "{told}");
    ensure!(verdict(&told, "b")?["reason"] == "ALREADY_THERE", "{told}");
    let checks = verdict(&told, "c")?["checks"].as_array().map_or(0, Vec::len);
    ensure!(checks == 8, "{told}");
    ensure!(pair.a.ferry(&["migration", "list"])?.exit(0)?.json_lines()?.is_empty());
    pair.b.ferry(&["delete", "g", "--force"])?.exit(0)?;
    pair.runs_only_at(&pair.a, "g", &witness)
}

fn a_host_that_is_down_is_left(pair: &mut Pair) -> Result<()> {
    pair.start_three(&[])?;
    let witness = run(pair)?;
    pair.c.as_mut().context("there is no third host")?.kill();

    pair.a
        .ferry(&["migrate", "g", "--to", "c"])?
        .exit(4)?
        .says("DESTINATION_DOWN")?;
    let told = pair.a.ferry(&["migrate", "g", "--verify"])?.exit(0)?;

    told.migration()?.is("completed", "b")?;
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn a_second_migration_of_a_guest_names_the_first(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g"))?;
    let underway = pair.migrate_until("g", &["--hold-at", "running"], |record| {
        Ok(record.record["status"] == "running")
    })?;

    pair.migrate("g", &[])?
        .exit(4)?
        .says("INSTANCE_BUSY")?
        .says(&underway.id)?;

    pair.a.ferry(&["migration", "abort", &underway.id])?.exit(0)?;
    underway.call.wait()?.exit(1)?;
    pair.runs_only_at(&pair.a, "g", &witness)
}

fn a_migration_waits_for_a_destination_that_has_its_hands_full(pair: &mut Pair) -> Result<()> {
    let words = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect::<Vec<_>>();
    pair.a
        .arguments
        .extend(words(&["--max-concurrent-live-migrations", "2"]));
    pair.b.arguments.extend(words(&["--max-concurrent-incoming", "1"]));
    for host in [&mut pair.a, &mut pair.b] {
        host.terminate()?;
        host.start()?;
    }
    pair.run(&Guest::new("g"))?;
    let witness = Witness::of_instance(&[&pair.a, &pair.b], &id(&pair.a, "g")?);
    let first = pair.migrate_until("g", &["--hold-at", "running"], |record| {
        Ok(record.record["status"] == "running")
    })?;
    pair.a.ferry(&Guest::new("second").arguments(&pair.kernel()))?.exit(0)?;
    let second = pair.migrate_until("second", &[], |record| {
        Ok(record.record["status"] == "queued" && record.record["decision"].is_string())
    })?;

    pair.a.terminate()?;
    pair.a.start()?;
    // It asks once, and waits on.
    let still = until("the migration is queued again", CALL, || {
        let shown = pair.a.ferry(&["migration", "show", &second.id])?.exit(0)?.migration()?;
        Ok((shown.text("status")? == "queued").then_some(shown))
    })?;
    ensure!(still.text("restarted_in")? == "prepare", "{}", still.record);
    pair.a.ferry(&["migration", "abort", &first.id])?.exit(0)?;

    first.call.wait()?.exit(1)?;
    second.call.wait()?.exit(0)?.migration()?.is("completed", "b")?;
    pair.b.ferry(&["delete", "second", "--force"])?.exit(0)?;
    pair.a.wait_for_status("g", "running")?;
    witness.check()
}

fn an_agent_kept_at_an_older_version_gives_and_takes(pair: &mut Pair) -> Result<()> {
    pair.b.arguments.extend(["--rpc-cap".to_owned(), "4.0".to_owned()]);
    pair.b.terminate()?;
    pair.b.start()?;
    let witness = pair.run(&Guest::new("g"))?;

    // The old one casts to the new one, and then the new one to the old one.
    let there = pair.b.ferry(&["migrate", "g", "--to", "b"])?.exit(0)?;
    there.migration()?.is("completed", "b")?;
    let back = pair.a.ferry(&["migrate", "g", "--to", "a"])?.exit(0)?;
    back.migration()?.is("completed", "a")?;

    ensure!(pair.b.ferry(&["host", "show", "b"])?.exit(0)?.json()?["rpc_version"] == "4.0");
    pair.runs_only_at(&pair.a, "g", &witness)
}

fn hosts_are_told_with_what_is_claimed_of_them(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g").memory_mib(96))?;

    let hosts = pair.b.ferry(&["host", "list"])?.exit(0)?.json_lines()?;

    let a = hosts.iter().find(|host| host["host"] == "a").context("no host a")?;
    ensure!(a["reachable"] == true && a["last_heard"].is_string(), "{a}");
    ensure!(a["memory_claimed_bytes"] == 96 << 20 && a["vcpus_claimed"] == 1, "{a}");
    pair.runs_only_at(&pair.a, "g", &witness)
}
