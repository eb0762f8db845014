//! Links that are lost while a guest is copied, and made again, or not.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use anyhow::{Result, ensure};
use ferry_tests::{
    Guest, Migration, Pair, Relay, Tampering, Witness, pair::Underway, process, until, waiting::CALL, waiting::MOVE,
};
use libtest_mimic::Trial;
use rustix::process::Signal;

use crate::scenario::{expect_a_lost_peer, has_nothing, on_kvm, stays_and_moves_later};

pub(crate) fn trials() -> Vec<Trial> {
    on_kvm![
        a_link_cut_at_ten_points_of_the_copy_is_made_again_each_time,
        a_link_over_grpc_cut_at_ten_points_of_the_copy_is_made_again_each_time,
        a_link_cut_in_later_rounds_is_made_again_each_time,
        a_link_over_grpc_cut_in_later_rounds_is_made_again_each_time,
        what_came_before_a_late_cut_is_not_sent_again,
        what_came_over_grpc_before_a_late_cut_is_not_sent_again,
        one_stream_of_four_is_made_again_with_the_others,
        a_disk_that_is_copied_is_not_sent_again,
        rounds_before_post_copy_go_on_over_another_link,
        rounds_over_grpc_before_post_copy_go_on_over_another_link,
        a_cold_move_goes_on_over_another_link,
        a_link_that_stays_lost_ends_the_migration_with_the_guest_where_it_was,
        a_link_over_grpc_that_stays_lost_ends_the_migration_with_the_guest_where_it_was,
        an_abort_is_obeyed_while_a_link_is_waited_for,
        hosts_that_are_cut_off_from_each_other_go_on_once_they_are_not,
        hosts_that_are_cut_off_from_each_other_over_grpc_go_on_once_they_are_not,
        hosts_that_stay_cut_off_from_each_other_leave_the_guest_where_it_was,
        hosts_that_stay_cut_off_from_each_other_over_grpc_leave_the_guest_where_it_was,
        without_a_window_a_cut_link_ends_the_migration_at_once,
        a_source_agent_killed_while_a_link_is_waited_for_makes_it_when_it_is_back,
        a_destination_agent_killed_while_a_link_is_waited_for_takes_it_when_it_is_back,
        a_destination_that_dies_while_a_link_is_waited_for_ends_the_migration,
        a_source_that_dies_while_a_link_is_waited_for_leaves_nothing_at_the_destination,
    ]
}

const BUSY: &str = "fill=random fill_mib=48 work=uniform work_mib=24 rate=20000 heartbeat_ms=20";
const QUIET: &str = "fill=random fill_mib=48 work=idle heartbeat_ms=20";

/// About five seconds for the first pass.
const SLOW: [&str; 5] = ["--bandwidth", "80Mbit", "--digests", "--resume-window", "60s"];

/// So that there is time for a cut after most of the first pass: a shown 60 % are three quarters of it.
const SLOWER: [&str; 2] = ["--bandwidth", "40Mbit"];

/// The status of a migration without a link.
const LOST: &str = "running (link lost)";

/// A relay before B, which A knows by it.
fn relay(pair: &mut Pair) -> Result<Relay> {
    expect_a_lost_peer(pair);
    let relay = Relay::before(&pair.b, Tampering::Cuts)?;
    pair.a.set_peer("b", &relay.url());
    pair.a.terminate()?;
    pair.a.start()?;
    Ok(relay)
}

fn record(pair: &Pair, id: &str) -> Result<Migration> {
    pair.a.ferry(&["migration", "show", id])?.exit(0)?.migration()
}

/// Begins to move the guest and waits until the copy has come so far, in percent.
fn begin(pair: &Pair, further: &[&str], percent: f64) -> Result<Underway> {
    pair.migrate_until("g", further, |shown| is_at(shown, percent))
}

fn is_at(shown: &Migration, percent: f64) -> Result<bool> {
    Ok(shown.record["status"] == "running" && shown.record["progress_percent"].as_f64() >= Some(percent))
}

/// Waits until A says that the link is lost and until when it waits.
fn wait_lost(pair: &Pair, id: &str) -> Result<Migration> {
    until("the source says that its link is lost", CALL, || {
        let shown = record(pair, id)?;
        ensure!(!shown.is_over(), "it ended: {}", shown.record);
        let is_lost = shown.record["status"] == LOST && shown.record["link_lost_until"].is_string();
        Ok(is_lost.then_some(shown))
    })
}

/// Waits until the copy went on over so many further links.
fn wait_resumed(pair: &Pair, id: &str, times: u64) -> Result<()> {
    until("the copy goes on", CALL, || {
        let shown = record(pair, id)?;
        ensure!(!shown.is_over() || times > 0, "it ended: {}", shown.record);
        Ok((shown.record["resumed_links"].as_u64() >= Some(times)).then_some(()))
    })
}

/// Without a cap from here on, so that it comes to an end.
fn hurry(pair: &Pair, id: &str) -> Result<()> {
    pair.a
        .ferry(&["migration", "retune", id, "--bandwidth", "none"])?
        .exit(0)
        .map(drop)
}

/// The migration completes, and the guest is whole and only there.
fn completes(pair: &Pair, underway: Underway, witness: &Witness) -> Result<Migration> {
    let moved = underway.call.wait()?.exit(0)?.migration()?.is("completed", "b")?;
    ensure!(moved.record["link_lost_until"].is_null(), "{}", moved.record);
    pair.runs_only_at(&pair.b, "g", witness)?;
    has_nothing(&pair.a)?;
    Ok(moved)
}

/// How many times the bytes of all populated memory were sent.
fn times_sent(moved: &Migration) -> Result<f64> {
    let populated = moved.number("memory_processed")?;
    let sent = moved.number("bytes_sent")?;
    eprintln!("{sent} bytes sent, {populated} bytes of pages");
    Ok(sent / (48 << 20) as f64)
}

fn a_link_cut_at_ten_points_of_the_copy_is_made_again_each_time(pair: &mut Pair) -> Result<()> {
    is_cut_at_ten_points(pair, &[])
}

fn a_link_over_grpc_cut_at_ten_points_of_the_copy_is_made_again_each_time(pair: &mut Pair) -> Result<()> {
    is_cut_at_ten_points(pair, &GRPC)
}

fn is_cut_at_ten_points(pair: &mut Pair, by: &[&str]) -> Result<()> {
    let relay = relay(pair)?;
    let witness = pair.run(&Guest::new("g").work(BUSY).vcpus(2))?;
    let underway = begin(pair, &[&SLOW, by].concat(), 1.0)?;

    let mut percent = 0.0;
    for cut in 1..=10u32 {
        until("the copy comes further", CALL, || {
            let shown = record(pair, &underway.id)?;
            ensure!(!shown.is_over(), "it ended: {}", shown.record);
            let now = shown.number("progress_percent")?;
            ensure!(now >= percent, "{now} % after {percent} %");
            percent = now;
            is_at(&shown, f64::from(cut * 7)).map(|is_there| is_there.then_some(()))
        })?;
        relay.cut();
        wait_lost(pair, &underway.id)?;
        witness.wait_for_beats_at("a", 3)?;
        relay.heal();
        wait_resumed(pair, &underway.id, u64::from(cut))?;
    }
    hurry(pair, &underway.id)?;

    let moved = completes(pair, underway, &witness)?;
    ensure!(moved.record["resumed_links"] == 10, "{}", moved.record);
    let events = pair.b.ferry(&["events", "g"])?.exit(0)?.json_lines()?;
    ensure!(events.iter().any(|event| event["action"] == "migrate-in"), "{events:?}");
    let events = pair.a.ferry(&["events", "g"])?.exit(0)?.json_lines()?;
    let made = |event: &&serde_json::Value| event["action"] == "reconnect" && event["result"] == "success";
    ensure!(events.iter().filter(made).count() == 10, "{events:?}");
    Ok(())
}

fn a_link_cut_in_later_rounds_is_made_again_each_time(pair: &mut Pair) -> Result<()> {
    is_cut_in_later_rounds(pair, &[])
}

fn a_link_over_grpc_cut_in_later_rounds_is_made_again_each_time(pair: &mut Pair) -> Result<()> {
    is_cut_in_later_rounds(pair, &GRPC)
}

/// Half a second and more for each round after the first one: what the guest writes is written all over by then. Told by what it changes it would end.
const ROUNDS: [&str; 4] = ["--bandwidth", "240Mbit", "--compress", "off"];

fn is_cut_in_later_rounds(pair: &mut Pair, by: &[&str]) -> Result<()> {
    let relay = relay(pair)?;
    let witness = pair.run(&Guest::new("g").work(BUSY).vcpus(2))?;
    let underway = begin(pair, &[&SLOW[2..], &ROUNDS, by].concat(), 1.0)?;

    let mut cut_after = 0;
    for cut in 1..=5 {
        until("another round is over", MOVE, || {
            let shown = record(pair, &underway.id)?;
            ensure!(!shown.is_over(), "it ended: {}", shown.record);
            let rounds = shown.record["rounds"].as_array().map_or(0, Vec::len);
            Ok((rounds > cut_after).then(|| cut_after = rounds))
        })?;
        relay.cut();
        wait_lost(pair, &underway.id)?;
        witness.wait_for_beats_at("a", 3)?;
        relay.heal();
        wait_resumed(pair, &underway.id, cut)?;
    }
    hurry(pair, &underway.id)?;

    let moved = completes(pair, underway, &witness)?;
    ensure!(moved.record["resumed_links"] == 5, "{}", moved.record);
    Ok(())
}

fn what_came_before_a_late_cut_is_not_sent_again(pair: &mut Pair) -> Result<()> {
    goes_on_from_what_came(pair, &[])
}

fn what_came_over_grpc_before_a_late_cut_is_not_sent_again(pair: &mut Pair) -> Result<()> {
    goes_on_from_what_came(pair, &GRPC)
}

fn goes_on_from_what_came(pair: &mut Pair, by: &[&str]) -> Result<()> {
    let relay = relay(pair)?;
    let witness = pair.run(&Guest::new("g").work(QUIET))?;
    let underway = begin(pair, &[&SLOWER, &SLOW[2..], by].concat(), 60.0)?;

    relay.cut();
    wait_lost(pair, &underway.id)?;
    relay.heal();

    let moved = completes(pair, underway, &witness)?;
    ensure!(moved.record["resumed_links"] == 1, "{}", moved.record);
    let times = times_sent(&moved)?;
    ensure!(times < 1.3, "{times} times: {}", moved.record);
    Ok(())
}

fn one_stream_of_four_is_made_again_with_the_others(pair: &mut Pair) -> Result<()> {
    let relay = relay(pair)?;
    let witness = pair.run(&Guest::new("g").work(BUSY).dirty("ring"))?;
    let underway = begin(pair, &[&SLOW[..], &["--streams", "4"]].concat(), 30.0)?;

    relay.cut_stream(2)?;
    wait_resumed(pair, &underway.id, 1)?;
    hurry(pair, &underway.id)?;

    let moved = completes(pair, underway, &witness)?;
    ensure!(moved.record["streams"] == 4, "{}", moved.record);
    Ok(())
}

/// 64 MiB, of which most holds something.
const DISK: u64 = 64 << 20;
const CONTENTS: usize = 48 << 20;

fn a_disk_that_is_copied_is_not_sent_again(pair: &mut Pair) -> Result<()> {
    let (a, b, both) = (
        pair.folder().join("at-a"),
        pair.folder().join("at-b"),
        pair.folder().join("disks"),
    );
    for folder in [&a, &b, &both] {
        fs::create_dir(folder)?;
    }
    pair.a.see(&a, &both);
    pair.b.see(&b, &both);
    pair.b.terminate()?;
    pair.b.start()?;
    let relay = relay(pair)?;
    let contents: Vec<u8> = (0..CONTENTS).map(|at| (at / 4096 * 7 + at % 251) as u8 | 1).collect();
    let disk = File::create(a.join("g.img"))?;
    disk.set_len(DISK)?;
    disk.write_all_at(&contents, 0)?;
    let image = both.join("g.img").display().to_string();
    let witness = pair.run(
        &Guest::new("g")
            .work("fill=random fill_mib=8 work=idle")
            .disk(&format!("path={image}")),
    )?;
    // Contents like these compress to nothing, and the copy would be over before the link is cut.
    let slower = [&SLOWER, &SLOW[2..], &["--compress", "off"]].concat();
    let underway = begin(pair, &slower, 60.0)?;

    relay.cut();
    wait_lost(pair, &underway.id)?;
    relay.heal();

    let moved = completes(pair, underway, &witness)?;
    let sent = moved.number("bytes_sent")?;
    ensure!(sent < 1.3 * CONTENTS as f64 + (16 << 20) as f64, "{}", moved.record);
    let there = fs::read(b.join("g.img"))?;
    ensure!(
        there.len() as u64 == DISK && there[..CONTENTS] == contents,
        "the disk is not what it was"
    );
    ensure!(there[CONTENTS..].iter().all(|&byte| byte == 0), "its end is not empty");
    Ok(())
}

fn rounds_before_post_copy_go_on_over_another_link(pair: &mut Pair) -> Result<()> {
    rounds_go_on(pair, &[])
}

fn rounds_over_grpc_before_post_copy_go_on_over_another_link(pair: &mut Pair) -> Result<()> {
    rounds_go_on(pair, &GRPC)
}

fn rounds_go_on(pair: &mut Pair, by: &[&str]) -> Result<()> {
    let relay = relay(pair)?;
    let witness = pair.run(&Guest::new("g").work(BUSY))?;
    let hybrid = [
        "--mode",
        "hybrid",
        "--bandwidth",
        "120Mbit",
        "--max-downtime",
        "1ms",
        "--resume-window",
        "60s",
    ];
    let underway = begin(pair, &[&hybrid, by].concat(), 30.0)?;

    relay.cut();
    wait_lost(pair, &underway.id)?;
    relay.heal();
    wait_resumed(pair, &underway.id, 1)?;
    pair.a.ferry(&["migration", "force-complete", &underway.id])?.exit(0)?;

    let moved = completes(pair, underway, &witness)?;
    ensure!(moved.number("late_pages")? > 0.0, "{}", moved.record);
    Ok(())
}

fn a_cold_move_goes_on_over_another_link(pair: &mut Pair) -> Result<()> {
    let relay = relay(pair)?;
    let witness = pair.run(&Guest::new("g").work(QUIET))?;
    let underway = begin(pair, &[&SLOW[..], &["--cold"]].concat(), 30.0)?;

    relay.cut();
    wait_lost(pair, &underway.id)?;
    relay.heal();

    let moved = completes(pair, underway, &witness)?;
    let times = times_sent(&moved)?;
    ensure!(times < 1.3, "{times} times: {}", moved.record);
    Ok(())
}

fn a_link_that_stays_lost_ends_the_migration_with_the_guest_where_it_was(pair: &mut Pair) -> Result<()> {
    stays_lost(pair, &[])
}

fn a_link_over_grpc_that_stays_lost_ends_the_migration_with_the_guest_where_it_was(pair: &mut Pair) -> Result<()> {
    stays_lost(pair, &GRPC)
}

fn stays_lost(pair: &mut Pair, by: &[&str]) -> Result<()> {
    let relay = relay(pair)?;
    let witness = pair.run(&Guest::new("g").work(BUSY))?;
    let short = ["--bandwidth", "80Mbit", "--resume-window", "1s"];
    let underway = begin(pair, &[&short, by].concat(), 20.0)?;

    relay.cut();

    let failed = underway.call.wait()?.exit(1)?.migration()?.is("failed", "a")?;
    let says = failed.text("error")?;
    ensure!(says.contains("was not made again within 1s"), "{says}");
    relay.heal();
    stays_and_moves_later(pair, &witness)
}

fn an_abort_is_obeyed_while_a_link_is_waited_for(pair: &mut Pair) -> Result<()> {
    let relay = relay(pair)?;
    let witness = pair.run(&Guest::new("g").work(BUSY))?;
    let underway = begin(pair, &SLOW, 20.0)?;
    relay.cut();
    wait_lost(pair, &underway.id)?;

    pair.a.ferry(&["migration", "abort", &underway.id])?.exit(0)?;

    underway.call.wait()?.exit(1)?.migration()?.is("cancelled", "a")?;
    relay.heal();
    stays_and_moves_later(pair, &witness)
}

/// Relays before both hosts, through which everything goes that their agents and VMMs say to each other.
fn between(pair: &mut Pair) -> Result<[Relay; 2]> {
    expect_a_lost_peer(pair);
    let before_b = Relay::before(&pair.b, Tampering::Cuts)?;
    let before_a = Relay::before(&pair.a, Tampering::Cuts)?;
    pair.a.set_peer("b", &before_b.url());
    pair.b.set_peer("a", &before_a.url());
    for host in [&mut pair.a, &mut pair.b] {
        host.terminate()?;
        host.start()?;
    }
    Ok([before_b, before_a])
}

const GRPC: [&str; 2] = ["--transport", "grpc"];

fn hosts_that_are_cut_off_from_each_other_go_on_once_they_are_not(pair: &mut Pair) -> Result<()> {
    are_cut_off_for_a_while(pair, &[])
}

fn hosts_that_are_cut_off_from_each_other_over_grpc_go_on_once_they_are_not(pair: &mut Pair) -> Result<()> {
    are_cut_off_for_a_while(pair, &GRPC)
}

/// Twice: the agents have noticed by the second time, or not.
fn are_cut_off_for_a_while(pair: &mut Pair, by: &[&str]) -> Result<()> {
    let relays = between(pair)?;
    let witness = pair.run(&Guest::new("g").work(BUSY).vcpus(2))?;
    let underway = begin(pair, &[&SLOW, by].concat(), 30.0)?;

    for (cut, beats) in [(1, 3), (2, 300)] {
        relays.iter().for_each(Relay::cut_off);
        wait_lost(pair, &underway.id)?;
        witness.wait_for_beats_at("a", beats)?;
        relays.iter().for_each(Relay::heal);
        wait_resumed(pair, &underway.id, cut)?;
    }
    hurry(pair, &underway.id)?;

    let moved = completes(pair, underway, &witness)?;
    ensure!(moved.record["resumed_links"] == 2, "{}", moved.record);
    Ok(())
}

fn hosts_that_stay_cut_off_from_each_other_leave_the_guest_where_it_was(pair: &mut Pair) -> Result<()> {
    stay_cut_off(pair, &[])
}

fn hosts_that_stay_cut_off_from_each_other_over_grpc_leave_the_guest_where_it_was(pair: &mut Pair) -> Result<()> {
    stay_cut_off(pair, &GRPC)
}

/// The guest is at A without a word of B; what B has left goes once it hears of that.
fn stay_cut_off(pair: &mut Pair, by: &[&str]) -> Result<()> {
    let relays = between(pair)?;
    let witness = pair.run(&Guest::new("g").work(BUSY))?;
    let short = ["--bandwidth", "80Mbit", "--resume-window", "1s"];
    let underway = begin(pair, &[&short, by].concat(), 20.0)?;

    relays.iter().for_each(Relay::cut_off);

    let failed = underway.call.wait()?.exit(1)?.migration()?.is("failed", "a")?;
    let says = failed.text("error")?;
    ensure!(says.contains("was not made again within 1s"), "{says}");
    witness.wait_for_beats_at("a", 5)?;
    relays.iter().for_each(Relay::heal);
    stays_and_moves_later(pair, &witness)
}

fn without_a_window_a_cut_link_ends_the_migration_at_once(pair: &mut Pair) -> Result<()> {
    let relay = relay(pair)?;
    let witness = pair.run(&Guest::new("g").work(BUSY))?;
    let underway = begin(pair, &["--bandwidth", "80Mbit"], 20.0)?;

    relay.cut();
    relay.heal();

    let failed = underway.call.wait()?.exit(1)?.migration()?.is("failed", "a")?;
    ensure!(failed.record["resumed_links"] == 0, "{}", failed.record);
    stays_and_moves_later(pair, &witness)
}

fn a_source_agent_killed_while_a_link_is_waited_for_makes_it_when_it_is_back(pair: &mut Pair) -> Result<()> {
    let relay = relay(pair)?;
    let witness = pair.run(&Guest::new("g").work(BUSY))?;
    let underway = begin(pair, &SLOW, 30.0)?;
    relay.cut();
    wait_lost(pair, &underway.id)?;

    pair.a.kill();
    witness.wait_for_beats_at("a", 10)?;
    relay.heal();
    pair.a.start()?;

    wait_resumed(pair, &underway.id, 1)?;
    hurry(pair, &underway.id)?;
    let moved = pair.wait_over(&underway.id)?.is("completed", "b")?;
    ensure!(moved.record["restarted_in"] == "copy", "{}", moved.record);
    pair.runs_only_at(&pair.b, "g", &witness)?;
    has_nothing(&pair.a)
}

fn a_destination_agent_killed_while_a_link_is_waited_for_takes_it_when_it_is_back(pair: &mut Pair) -> Result<()> {
    let relay = relay(pair)?;
    let witness = pair.run(&Guest::new("g").work(BUSY))?;
    let underway = begin(pair, &SLOW, 30.0)?;
    relay.cut();
    wait_lost(pair, &underway.id)?;

    pair.b.kill();
    relay.heal();
    witness.wait_for_beats_at("a", 10)?;
    pair.b.start()?;

    wait_resumed(pair, &underway.id, 1)?;
    hurry(pair, &underway.id)?;
    completes(pair, underway, &witness).map(drop)
}

fn a_destination_that_dies_while_a_link_is_waited_for_ends_the_migration(pair: &mut Pair) -> Result<()> {
    let relay = relay(pair)?;
    let witness = pair.run(&Guest::new("g").work(BUSY))?;
    let underway = begin(pair, &SLOW, 20.0)?;
    relay.cut();
    wait_lost(pair, &underway.id)?;

    process::signal(pair.b.vmm()?, Signal::KILL)?;

    // Long before its window is over.
    underway.call.wait()?.exit(1)?.migration()?.is("failed", "a")?;
    relay.heal();
    stays_and_moves_later(pair, &witness)
}

fn a_source_that_dies_while_a_link_is_waited_for_leaves_nothing_at_the_destination(pair: &mut Pair) -> Result<()> {
    let relay = relay(pair)?;
    pair.run(&Guest::new("g").work(BUSY))?;
    let underway = begin(pair, &SLOW, 20.0)?;
    relay.cut();
    wait_lost(pair, &underway.id)?;

    process::signal(pair.a.vmm()?, Signal::KILL)?;

    until("the migration is over", MOVE, || {
        Ok(record(pair, &underway.id)?.is_over().then_some(()))
    })?;
    pair.a.wait_for_status("g", "crashed")?;
    has_nothing(&pair.b)
}
