//! Things break before GO: the guest runs on at the source, unless its own VMM was what died.

use anyhow::{Result, ensure};
use ferry_tests::memory_limit::MemoryLimit;
use ferry_tests::{
    Guest, Pair, Witness, process, until,
    waiting::{CALL, MOVE},
};
use libtest_mimic::Trial;
use rustix::process::Signal;

use crate::alphabet;
use crate::scenario::{expect_a_lost_peer_and, has_nothing, on_kvm};

pub(crate) fn trials() -> Vec<Trial> {
    on_kvm![
        a_destination_that_is_down_is_named,
        a_destination_that_has_the_name_already_refuses,
        a_destination_vmm_killed_in_mid_stream_leaves_the_guest_at_the_source,
        a_destination_that_runs_out_of_memory_leaves_the_guest_at_the_source,
        a_stalled_destination_vmm_leaves_the_guest_at_the_source,
        a_stalled_destination_agent_leaves_the_guest_at_the_source,
        a_stalled_source_agent_leaves_one_guest,
        a_source_vmm_killed_in_mid_stream_is_a_crash_at_the_source,
        a_source_vmm_that_stalls_and_wakes_leaves_one_guest,
    ]
}

const WORK: &str = "fill=random fill_mib=64 work=uniform work_mib=8 rate=1000 heartbeat_ms=20";

fn a_destination_that_is_down_is_named(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g"))?;
    pair.b.kill();

    let told = pair.migrate("g", &[])?.says("b")?;

    ensure!(matches!(told.code, Some(1 | 4)), "{told}");
    pair.runs_only_at(&pair.a, "g", &witness)?;
    pair.b.start()?;
    pair.migrate("g", &["--digests"])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn a_destination_that_has_the_name_already_refuses(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g"))?;
    let kernel = alphabet::file(pair.folder())?;
    pair.b
        .ferry(&["run", "g", "--kernel", &kernel, "--memory", "64M"])?
        .exit(0)?;

    let told = pair.migrate("g", &[])?.says("g")?;

    ensure!(matches!(told.code, Some(1 | 4)), "{told}");
    pair.b.wait_for_status("g", "running")?;
    pair.b.ferry(&["delete", "g", "--force"])?.exit(0)?;
    pair.runs_only_at(&pair.a, "g", &witness)
}

fn a_destination_vmm_killed_in_mid_stream_leaves_the_guest_at_the_source(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer(pair);
    let witness = pair.run(&Guest::new("g").work(WORK))?;
    let id = begin_slow(pair)?;

    process::signal(pair.b.vmm()?, Signal::KILL)?;

    fails_at_the_source(pair, &id, &witness)
}

/// The kernel ends who asks for more than there is, in the middle of populating.
fn a_destination_that_runs_out_of_memory_leaves_the_guest_at_the_source(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer(pair);
    let witness = pair.run(&Guest::new("g").work(WORK))?;
    let id = begin_slow(pair)?;

    let _limit = MemoryLimit::of(pair.b.vmm()?, 4 << 20)?;

    fails_at_the_source(pair, &id, &witness)?;
    // The source may hear of the lost connection first: then the destination alone knows why.
    until("somebody says that memory ran out", CALL, || {
        let told = pair.a.ferry(&["migration", "show", &id])?.exit(0)?.migration()?;
        let there = pair.b.ferry(&["migration", "list"])?.exit(0)?.json_lines()?;
        let of_b = there.iter().find(|one| one["id"] == id.as_str());
        let errors = [Some(&told.record), of_b].map(|record| record.and_then(|record| record["error"].as_str()));
        let says_so = |error: Option<&str>| error.is_some_and(|error| error.contains("memory"));
        Ok(errors.into_iter().any(says_so).then_some(()))
    })
}

fn a_stalled_destination_vmm_leaves_the_guest_at_the_source(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer(pair);
    let witness = pair.run(&Guest::new("g").work(WORK))?;
    let id = begin_slow(pair)?;

    process::signal(pair.b.vmm()?, Signal::STOP)?;

    fails_at_the_source(pair, &id, &witness)
}

fn a_stalled_destination_agent_leaves_the_guest_at_the_source(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer(pair);
    let witness = pair.run(&Guest::new("g").work(WORK))?;
    let id = begin_slow(pair)?;
    let agent = pair.b.pid().expect("agent b runs");

    process::signal(agent, Signal::STOP)?;
    let record = pair.wait_over(&id)?;
    ensure!(record.text("guest_location")? == "a", "{}", record.record);
    witness.wait_for_beats_at("a", 5)?;
    process::signal(agent, Signal::CONT)?;

    pair.runs_only_at(&pair.a, "g", &witness)?;
    has_nothing(&pair.b)?;
    pair.migrate("g", &["--digests"])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn a_stalled_source_agent_leaves_one_guest(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer(pair);
    let witness = pair.run(&Guest::new("g").work(WORK))?;
    let id = begin_slow(pair)?;
    let agent = pair.a.pid().expect("agent a runs");

    process::signal(agent, Signal::STOP)?;
    witness.wait_for_beats_at("a", 300)?;
    process::signal(agent, Signal::CONT)?;

    let record = pair.wait_over(&id)?;
    let host = if record.text("guest_location")? == "a" {
        &pair.a
    } else {
        &pair.b
    };
    pair.runs_only_at(host, "g", &witness)
}

fn a_source_vmm_killed_in_mid_stream_is_a_crash_at_the_source(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer(pair);
    pair.expect_complaint("crashed");
    pair.run(&Guest::new("g").work(WORK))?;
    let id = begin_slow(pair)?;

    process::signal(pair.a.vmm()?, Signal::KILL)?;

    let record = pair.wait_over(&id)?;
    ensure!(
        matches!(record.text("status")?, "failed" | "error"),
        "{}",
        record.record
    );
    pair.a.wait_for_status("g", "crashed")?;
    until("no VMM is left", MOVE, || {
        Ok((pair.a.vmms().is_empty() && pair.b.vmms().is_empty()).then_some(()))
    })?;
    pair.a.ferry(&["start", "g"])?.exit(0)?;
    pair.a.wait_for_status("g", "running")?;
    pair.exists_only_at(&pair.a, "g")
}

fn a_source_vmm_that_stalls_and_wakes_leaves_one_guest(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer(pair);
    let witness = pair.run(&Guest::new("g").work(WORK))?;
    let id = begin_slow(pair)?;
    let vmm = pair.a.vmm()?;

    process::signal(vmm, Signal::STOP)?;
    // Longer than a peer may be silent.
    let _ = witness.is_silent(std::time::Duration::from_secs(8));
    process::signal(vmm, Signal::CONT)?;

    let record = pair.wait_over(&id)?;
    let host = if record.text("guest_location")? == "a" {
        &pair.a
    } else {
        &pair.b
    };
    pair.runs_only_at(host, "g", &witness)
}

fn fails_at_the_source(pair: &Pair, id: &str, witness: &Witness) -> Result<()> {
    let record = pair.wait_over(id)?.is("failed", "a")?;
    ensure!(!record.text("error")?.is_empty());
    pair.runs_only_at(&pair.a, "g", witness)?;
    has_nothing(&pair.b)?;
    pair.migrate("g", &["--digests"])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;
    pair.runs_only_at(&pair.b, "g", witness)
}

fn begin_slow(pair: &Pair) -> Result<String> {
    let began = pair
        .migrate("g", &["--detach", "--bandwidth", "80Mbit", "--digests"])?
        .exit(0)?;
    let id = began.migration()?.text("id")?.to_owned();
    until("pages are being sent", MOVE, || {
        let record = pair.a.ferry(&["migration", "show", &id])?.exit(0)?.migration()?;
        Ok((record.number("bytes_sent")? > f64::from(2 << 20)).then_some(()))
    })?;
    pair.keep_logs();
    Ok(id)
}

fn expect_a_lost_peer(pair: &mut Pair) {
    expect_a_lost_peer_and(pair, &["transport", "VMM", "stream"]);
}
