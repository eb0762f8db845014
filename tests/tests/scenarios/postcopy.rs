//! Guests that run at the destination before all of their memory is there: both modes, and what fails meanwhile.

use std::fs;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use ferry_tests::memory_limit::MemoryLimit;
use ferry_tests::{
    Guest, Migration, Pair, Relay, Tampering, Witness, pair::Underway, process, until, waiting::CALL, waiting::MOVE,
};
use libtest_mimic::Trial;
use rustix::process::Signal;

use crate::device_work::{stamped_image, with_disk};
use crate::scenario::{self, expect_a_lost_peer_and, has_nothing, on_kvm};

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = matrix();
    trials.extend(on_kvm![
        a_guest_that_moved_by_post_copy_moves_back_and_forth,
        completing_a_hybrid_one_by_force_has_the_rest_come_late,
        pre_copy_whose_time_is_up_goes_over_to_post_copy,
        a_guest_that_its_user_paused_arrives_paused_and_whole,
        what_needs_all_of_its_memory_waits_for_the_last_page,
        a_cap_is_lifted_while_pages_come_late,
        a_source_agent_killed_while_pages_are_missing_changes_nothing,
        a_destination_agent_killed_while_pages_are_missing_changes_nothing,
        a_cut_link_pauses_what_needs_a_page_and_is_made_again,
        a_guest_whose_page_source_dies_is_lost_and_started_anew,
        a_guest_that_its_user_stops_needs_no_more_pages,
        a_guest_that_dies_with_its_vmm_needs_no_more_pages,
        a_guest_whose_host_runs_out_of_memory_for_late_pages_crashed_and_says_why,
        a_guest_that_resets_itself_boots_once_it_is_whole,
        a_disk_on_the_way_does_its_work_before_its_memory_is_there,
        memory_that_came_late_is_in_huge_pages_again,
    ]);
    trials
}

/// Both modes, with one vCPU and two, and both ways of tracking.
fn matrix() -> Vec<Trial> {
    let cells = [
        ("postcopy", 1, "log"),
        ("postcopy", 2, "ring"),
        ("hybrid", 1, "ring"),
        ("hybrid", 2, "log"),
    ];
    let trial = |(mode, vcpus, dirty): (&'static str, u32, &'static str)| {
        let name = format!("scenarios::postcopy::a_busy_guest_moves_{mode}_with_{vcpus}_vcpus_{dirty}");
        scenario::trial_on_kvm(&name, move |pair| moves(pair, mode, vcpus, dirty))
    };
    cells.into_iter().map(trial).collect()
}

pub(crate) const BUSY: &str = "fill=random fill_mib=48 work=uniform work_mib=24 rate=20000 heartbeat_ms=20";

/// Pages that nobody waits for come within several seconds.
const SLOW: [&str; 4] = ["--mode", "postcopy", "--bandwidth", "80Mbit"];

fn moves(pair: &mut Pair, mode: &str, vcpus: u32, dirty: &'static str) -> Result<()> {
    let witness = pair.run(&Guest::new("g").work(BUSY).vcpus(vcpus).dirty(dirty))?;
    let open_before = open_files(pair.a.vmm()?)?;

    // No round brings a guest that writes so much within this.
    let moved = pair
        .migrate("g", &["--mode", mode, "--max-downtime", "1ms"])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;

    let waited = came_late(&moved)?;
    ensure!(waited > 0 || mode == "hybrid", "nobody waited: {}", moved.record);
    pair.runs_only_at(&pair.b, "g", &witness)?;
    pair.a.wait_until_gone("g")?.says("moved_to")?;
    nobody_waits_for_pages(pair)?;
    let open = open_files(pair.b.vmm()?)?;
    ensure!(open == open_before, "open at b: {open:?}, at a before: {open_before:?}");
    Ok(())
}

/// How many sockets and watchers of memory a VMM has open.
fn open_files(vmm: u32) -> Result<(usize, usize)> {
    let links = fs::read_dir(format!("/proc/{vmm}/fd"))?.flatten();
    let names: Vec<String> = links
        .filter_map(|link| Some(fs::read_link(link.path()).ok()?.to_string_lossy().into_owned()))
        .collect();
    let count = |word: &str| names.iter().filter(|name| name.contains(word)).count();
    Ok((count("socket:"), count("userfaultfd")))
}

/// Pages came late, and their record says how long they were waited for. How often.
fn came_late(moved: &Migration) -> Result<u64> {
    let pages = moved.number("late_pages")?;
    let waits: Option<Vec<u64>> = moved.record["late_waits_log2_us"]
        .as_array()
        .map(|buckets| buckets.iter().filter_map(serde_json::Value::as_u64).collect());
    ensure!(
        pages > 0.0 && moved.number("late_missing")? == 0.0 && moved.number("late_ms")? > 0.0,
        "{}",
        moved.record
    );
    let waits = waits.unwrap_or_default();
    eprintln!(
        "{pages} pages came late in {} ms; waits by the logarithm of their microseconds: {waits:?}",
        moved.number("late_ms")?
    );
    Ok(waits.iter().sum())
}

/// The threads that took pages in are gone.
fn nobody_waits_for_pages(pair: &Pair) -> Result<()> {
    // One makes huge pages of small ones first, for each of which the kernel waits for all processors.
    until("the threads for late pages are gone", 2 * MOVE, || {
        let late = |name: &String| name.starts_with("ferry-late") || name.starts_with("ferry-faults");
        let threads = process::threads(pair.b.vmm()?);
        Ok((!threads.iter().any(late)).then_some(()))
    })
}

fn a_guest_that_moved_by_post_copy_moves_back_and_forth(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g").work(BUSY))?;
    for mode in ["postcopy", "precopy"] {
        pair.a
            .ferry(&["migrate", "g", "--to", "b", "--mode", mode, "--verify"])?
            .exit(0)?
            .migration()?
            .is("completed", "b")?;
        pair.runs_only_at(&pair.b, "g", &witness)?;
        pair.b
            .ferry(&["migrate", "g", "--to", "a", "--mode", "postcopy", "--verify"])?
            .exit(0)?
            .migration()?
            .is("completed", "a")?;
        pair.runs_only_at(&pair.a, "g", &witness)?;
    }
    has_nothing(&pair.b)
}

fn completing_a_hybrid_one_by_force_has_the_rest_come_late(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g").work(BUSY))?;
    // Rounds alone would not tell after the first one.
    let hybrid = ["--mode", "hybrid", "--bandwidth", "240Mbit", "--max-downtime", "100ms"];
    let underway = pair.migrate_until("g", &hybrid, |told| Ok(told.record["bytes_sent"].as_u64() > Some(0)))?;

    pair.a.ferry(&["migration", "force-complete", &underway.id])?.exit(0)?;

    let moved = underway.call.wait()?.exit(0)?.migration()?.is("completed", "b")?;
    ensure!(moved.number("late_pages")? > 0.0, "{}", moved.record);
    ensure!(
        moved.text("decision")?.contains("its user wants it"),
        "{}",
        moved.record
    );
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn pre_copy_whose_time_is_up_goes_over_to_post_copy(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g").work(BUSY))?;

    // Within this nothing is handed over, whatever the guest writes.
    let terms = ["--max-downtime", "1ms", "--bandwidth", "240Mbit", "--timeout", "5s"];
    let moved = pair
        .migrate("g", &[&terms[..], &["--on-timeout", "postcopy"]].concat())?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;

    came_late(&moved)?;
    ensure!(
        moved.number("total_ms")? >= 5000.0 && moved.text("mode")? == "precopy-then-postcopy",
        "{}",
        moved.record
    );
    let decisions = moved.record["decisions"].as_array().context("no decisions")?;
    let deeds: Vec<_> = decisions
        .iter()
        .filter_map(|decision| decision["deed"].as_str())
        .collect();
    ensure!(
        deeds.contains(&"infeasible") && deeds.contains(&"time-up") && deeds.last() == Some(&"postcopy"),
        "{deeds:?}"
    );
    ensure!(moved.text("decision")?.contains("its time is up"), "{}", moved.record);
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn a_guest_that_its_user_paused_arrives_paused_and_whole(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g").work(BUSY))?;
    pair.a.ferry(&["pause", "g"])?.exit(0)?;

    pair.migrate("g", &["--mode", "postcopy"])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;

    pair.b.wait_for_status("g", "paused")?;
    pair.exists_only_at(&pair.b, "g")?;
    pair.b.ferry(&["resume", "g"])?.exit(0)?;
    pair.runs_only_at(&pair.b, "g", &witness)
}

/// Begins to move the guest and waits until it runs at B without all of its memory.
fn begin(pair: &Pair) -> Result<Underway> {
    begin_with(pair, &[])
}

/// The same with further arguments.
pub(crate) fn begin_with(pair: &Pair, further: &[&str]) -> Result<Underway> {
    let call = pair.begin_migrate("g", &[&SLOW, further].concat())?;
    let id = until("the guest runs without all of its memory", CALL, || {
        let listed = pair.a.ferry(&["migration", "list"])?.exit(0)?.json_lines()?;
        let Some(last) = listed.last() else { return Ok(None) };
        ensure!(last["status"] != "completed", "it was too fast: {last}");
        let is_late = last["status"] == "running (post-copy)" && last["guest_location"] == "b";
        Ok(last["id"].as_str().filter(|_| is_late).map(str::to_owned))
    })?;
    pair.keep_logs();
    Ok(Underway { id, call })
}

/// The migration completes, whoever watched it, and the guest is whole.
pub(crate) fn completes(pair: &Pair, id: &str, witness: &Witness) -> Result<()> {
    pair.wait_over(id)?.is("completed", "b")?;
    pair.runs_only_at(&pair.b, "g", witness)?;
    has_nothing(&pair.a)?;
    nobody_waits_for_pages(pair)
}

fn what_needs_all_of_its_memory_waits_for_the_last_page(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g").work(BUSY))?;
    let underway = begin(pair)?;

    let refused = |words: &[&str]| pair.b.ferry(words)?.exit(4)?.says("last page").map(drop);
    refused(&["migrate", "g", "--to", "a"])?;
    refused(&["balloon", "g", "--size", "64M"])?;
    let directory = pair.folder().join("snapshot").display().to_string();
    refused(&["snapshot", "g", "--to", &directory])?;
    refused(&["reboot", "g"])?;
    pair.a
        .ferry(&["migration", "abort", &underway.id])?
        .exit(4)?
        .says("runs on host b")?;
    pair.b.ferry(&["pause", "g"])?.exit(0)?;
    pair.b.ferry(&["resume", "g"])?.exit(0)?;

    underway.call.wait()?.exit(0)?.migration()?.is("completed", "b")?;
    completes(pair, &underway.id, &witness)
}

fn a_cap_is_lifted_while_pages_come_late(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer_and(pair, &["VMM", "source", "stream"]);
    let witness = pair.run(&Guest::new("g").work(BUSY))?;
    let slow = ["--mode", "postcopy", "--bandwidth", "1Mbit"];
    let late = |record: &Migration| Ok(record.record["status"] == "running (post-copy)");
    let underway = pair.migrate_until("g", &slow, late)?;

    let retune = ["migration", "retune", &underway.id];
    let too_late = pair.a.ferry(&[&retune[..], &["--max-downtime", "1s"]].concat())?;
    too_late.exit(4)?.says("handed over")?;
    // An agent that was started anew knows the way to who serves.
    pair.a.kill();
    pair.a.start()?;
    let lift = [&retune[..], &["--bandwidth", "none"]].concat();
    let retuned = until("the agent knows the migration again", CALL, || {
        let answer = pair.b.ferry(&lift)?;
        Ok((answer.code == Some(0)).then_some(answer))
    })?;

    let record = retuned.migration()?;
    ensure!(record.record["bandwidth_bytes_per_s"].is_null(), "{}", record.record);
    // With the cap it would take ten minutes.
    pair.wait_over(&underway.id)?.is("completed", "b")?;
    completes(pair, &underway.id, &witness)
}

fn a_source_agent_killed_while_pages_are_missing_changes_nothing(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer_and(pair, &["VMM", "source", "stream"]);
    let witness = pair.run(&Guest::new("g").work(BUSY))?;
    let underway = begin(pair)?;

    pair.a.kill();
    witness.wait_for_beats_at("b", 10)?;
    pair.a.start()?;

    let record = pair.wait_over(&underway.id)?.is("completed", "b")?;
    ensure!(record.record["restarted_in"] == "serve", "{}", record.record);
    completes(pair, &underway.id, &witness)
}

fn a_destination_agent_killed_while_pages_are_missing_changes_nothing(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer_and(pair, &["VMM", "source", "stream"]);
    let witness = pair.run(&Guest::new("g").work(BUSY))?;
    let underway = begin(pair)?;

    pair.b.kill();
    witness.wait_for_beats_at("b", 10)?;
    pair.b.start()?;

    underway.call.wait()?.exit(0)?.migration()?.is("completed", "b")?;
    completes(pair, &underway.id, &witness)
}

fn a_cut_link_pauses_what_needs_a_page_and_is_made_again(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer_and(pair, &["VMM", "source", "stream"]);
    let relay = Relay::before(&pair.b, Tampering::Cuts)?;
    pair.a.set_peer("b", &relay.url());
    pair.a.terminate()?;
    pair.a.start()?;
    let witness = pair.run(&Guest::new("g").work(BUSY))?;
    let underway = begin(pair)?;

    for _ in 0..2 {
        relay.cut();
        until("the source says that the guest waits", CALL, || {
            let record = pair
                .a
                .ferry(&["migration", "show", &underway.id])?
                .exit(0)?
                .migration()?;
            ensure!(!record.is_over(), "it ended: {}", record.record);
            let waits = record.record["decision"]
                .as_str()
                .is_some_and(|words| words.contains("waits for pages"));
            Ok(waits.then_some(()))
        })?;
        ensure!(pair.b.show("g")?["status"] == "running");
        relay.heal();
        witness.wait_for_beats_at("b", 10)?;
    }

    underway.call.wait()?.exit(0)?.migration()?.is("completed", "b")?;
    completes(pair, &underway.id, &witness)
}

fn a_guest_whose_page_source_dies_is_lost_and_started_anew(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer_and(pair, &["VMM", "source", "stream", "lost"]);
    let witness = pair.run(&Guest::new("g").work(BUSY).restart("on-crash"))?;
    let underway = begin(pair)?;

    process::signal(pair.a.vmm()?, Signal::KILL)?;

    let lost = underway.call.wait()?.exit(7)?.migration()?;
    ensure!(
        lost.record["status"] == "error" && lost.record["guest_ended"] == "lost",
        "{}",
        lost.record
    );
    witness.wait_ready_times(2)?;
    let shown = pair.b.wait_for_status("g", "running")?;
    ensure!(shown["epoch"] == 3, "{shown}");
    pair.exists_only_at(&pair.b, "g")?;
    has_nothing(&pair.a)
}

fn a_guest_that_its_user_stops_needs_no_more_pages(pair: &mut Pair) -> Result<()> {
    pair.run(&Guest::new("g").work(BUSY))?;
    let underway = begin(pair)?;

    pair.b.ferry(&["stop", "g", "--force"])?.exit(0)?;

    let record = until("the migration is over", MOVE, || {
        let record = pair
            .a
            .ferry(&["migration", "show", &underway.id])?
            .exit(0)?
            .migration()?;
        Ok(record.is_over().then_some(record))
    })?;
    ensure!(record.record["status"] == "completed", "{}", record.record);
    pair.b.wait_for_status("g", "stopped")?;
    has_nothing(&pair.a)
}

fn a_guest_that_dies_with_its_vmm_needs_no_more_pages(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer_and(pair, &["VMM", "source", "stream"]);
    pair.run(&Guest::new("g").work(BUSY))?;
    let underway = begin(pair)?;

    process::signal(pair.b.vmm()?, Signal::KILL)?;

    pair.wait_over(&underway.id)?.is("completed", "b")?;
    pair.b.wait_for_status("g", "crashed")?;
    has_nothing(&pair.a)?;
    pair.b.ferry(&["start", "g"])?.exit(0)?;
    let shown = pair.b.wait_for_status("g", "running")?;
    ensure!(shown["epoch"] == 3, "{shown}");
    Ok(())
}

/// The kernel ends who asks for more than there is. What the guest did at B is nowhere else: it is a crash, and its cause is told.
fn a_guest_whose_host_runs_out_of_memory_for_late_pages_crashed_and_says_why(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer_and(pair, &["VMM", "source", "stream"]);
    pair.run(&Guest::new("g").work(BUSY))?;
    let underway = begin(pair)?;

    let _limit = MemoryLimit::of(pair.b.vmm()?, 4 << 20)?;

    let told = pair.wait_over(&underway.id)?.is("completed", "b")?;
    let not_needed = told.text("decision")?.contains("the guest is crashed");
    ensure!(not_needed && told.number("late_missing")? > 0.0, "{}", told.record);
    let shown = pair.b.wait_for_status("g", "crashed")?;
    let reason = shown["reason"].as_str().unwrap_or_default();
    ensure!(reason.contains("memory ran out"), "{shown}");
    has_nothing(&pair.a)?;
    pair.b.ferry(&["start", "g"])?.exit(0)?;
    let shown = pair.b.wait_for_status("g", "running")?;
    ensure!(shown["epoch"] == 3, "{shown}");
    Ok(())
}

fn a_guest_that_resets_itself_boots_once_it_is_whole(pair: &mut Pair) -> Result<()> {
    // It resets itself after three seconds; its pages take four.
    let work = "fill=random fill_mib=40 work=idle heartbeat_ms=20 reset_after_ms=3000";
    let witness = pair.run(&Guest::new("g").work(work))?;
    witness.wait_for_beats_at("a", 50)?;
    let underway = begin(pair)?;

    pair.wait_over(&underway.id)?.is("completed", "b")?;

    witness.wait_ready_times(2)?;
    pair.b.wait_for_status("g", "running")?;
    pair.exists_only_at(&pair.b, "g")
}

fn a_disk_on_the_way_does_its_work_before_its_memory_is_there(pair: &mut Pair) -> Result<()> {
    let image = stamped_image(pair)?;
    let guest = with_disk(&image, "fill=random fill_mib=32 io=randread depth=16 seconds=12");
    let witness = pair.run(&guest)?;

    let began = Instant::now();
    pair.migrate("g", &SLOW)?.exit(0)?.migration()?.is("completed", "b")?;

    pair.runs_only_at(&pair.b, "g", &witness)?;
    let told = witness.transfers_after(began)?;
    ensure!(told.operations > 0 && told.failed == 0 && told.wrong == 0, "{told}");
    Ok(())
}

fn memory_that_came_late_is_in_huge_pages_again(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g").work(BUSY))?;
    let before = huge_bytes(pair.a.vmm()?)?;
    ensure!(before >= 32 << 20, "{before} bytes in huge pages at a");

    pair.migrate("g", &["--mode", "postcopy"])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;

    let first = huge_bytes(pair.b.vmm()?)?;
    nobody_waits_for_pages(pair)?;
    let after = huge_bytes(pair.b.vmm()?)?;
    eprintln!("in huge pages: {before} bytes at a; at b {first} when the last page had come, {after} a moment later");
    // The host may have none left for some.
    ensure!(after >= before / 2, "{after} bytes in huge pages at b, {before} at a");
    pair.runs_only_at(&pair.b, "g", &witness)
}

/// How much of a process's memory is in huge pages.
fn huge_bytes(process: u32) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{process}/smaps_rollup"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("AnonHugePages:"));
    let kib = line
        .and_then(|line| line.trim().strip_suffix(" kB"))
        .context("no AnonHugePages")?;
    Ok(kib.trim().parse::<u64>()? << 10)
}
