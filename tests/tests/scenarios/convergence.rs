//! Whether a copy comes to an end, what is decided about that, and what its user can change meanwhile.

use anyhow::{Context, Result, ensure};
use ferry_tests::waiting::{CALL, MOVE};
use ferry_tests::witness::Beat;
use ferry_tests::{Answer, Guest, Host, Migration, Pair, process, until};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::scenario::{self, expect_a_lost_peer_and, on_kvm};

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = caps();
    trials.extend(on_kvm![
        a_copy_that_does_not_converge_says_so_after_one_stalled_round,
        a_copy_that_ends_tells_what_was_decided_and_expected,
        a_longer_blackout_that_is_allowed_meanwhile_ends_the_copy,
        an_agent_that_restarts_has_the_terms_that_were_changed,
        retuning_is_refused_while_nothing_is_copied_and_when_all_is_over,
        a_guest_that_does_not_converge_is_completed_when_its_time_is_up,
        an_agent_that_knows_no_pause_at_the_timeout_is_named,
        a_guest_that_writes_more_than_the_link_carries_is_throttled_until_it_moves,
        with_the_ring_only_the_vcpu_that_writes_is_throttled,
        with_the_ring_a_vcpu_that_writes_nothing_keeps_its_pace,
        an_abort_leaves_nothing_throttled,
    ]);
    trials
}

/// What a cap is on: rounds, and pages that come late; by the data port and over gRPC.
fn caps() -> Vec<Trial> {
    let cells = [
        ("precopy", "tcp"),
        ("precopy", "grpc"),
        ("postcopy", "tcp"),
        ("postcopy", "grpc"),
    ];
    let trial = |(mode, transport)| {
        let name = format!("scenarios::convergence::a_cap_on_bandwidth_holds_{mode}_{transport}");
        scenario::trial_on_kvm(&name, move |pair| a_cap_holds(pair, mode, transport))
    };
    cells.into_iter().map(trial).collect()
}

/// Writes 32 MiB again and again, as fast as it can.
const ALL_THE_TIME: &str = "fill=random fill_mib=32 work=uniform work_mib=32 rate=max heartbeat_ms=20";
/// Slower than that, so that each round leaves all of it; and less time for it than 32 MiB take.
/// Pages that are sent whole each time: by what they change it would end.
const TOO_SLOW: [&str; 7] = [
    "--bandwidth",
    "160Mbit",
    "--max-downtime",
    "150ms",
    "--compress",
    "off",
    "--digests",
];

fn a_copy_that_does_not_converge_says_so_after_one_stalled_round(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g").work(ALL_THE_TIME))?;
    let underway = pair.migrate_until("g", &TOO_SLOW, |record| Ok(record.rounds() >= 4))?;
    pair.a.ferry(&["migration", "abort", &underway.id])?.exit(0)?;

    let record = underway.call.wait()?.exit(1)?.migration()?.is("cancelled", "a")?;
    let rounds = record.record["rounds"].as_array().context("no rounds")?;
    let left = |round: &Value| round["dirty_pages"].as_f64().zip(round["pages"].as_f64());
    let stalled = rounds
        .iter()
        .position(|round| left(round).is_some_and(|(dirty, sent)| dirty >= 0.95 * sent))
        .context("no round stalled")?;
    let decision = &decisions(&record)?[stalled];
    ensure!(decision["deed"] == "infeasible", "{decision}");
    ensure!(decision["predicted_total_ms"].is_null(), "{decision}");
    ensure!(decision["dirty_bytes_per_s"].as_f64() > Some(0.0), "{decision}");
    let why = "the round left as much as it sent";
    ensure!(
        decision["words"].as_str().is_some_and(|words| words.contains(why)),
        "{decision}"
    );
    // At the other host it is the source's word, too.
    report(&pair.b, &underway.id)?.says(why)?;
    pair.runs_only_at(&pair.a, "g", &witness)
}

fn a_copy_that_ends_tells_what_was_decided_and_expected(pair: &mut Pair) -> Result<()> {
    let work = "fill=random fill_mib=64 work=uniform work_mib=16 rate=500 heartbeat_ms=20";
    let witness = pair.run(&Guest::new("g").work(work))?;

    let record = pair
        .migrate("g", &["--bandwidth", "400Mbit", "--digests"])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;

    let decisions = decisions(&record)?;
    let last = decisions.last().context("no decision")?;
    ensure!(last["deed"] == "switch", "{last}");
    let expected = |field: &str| last[field].as_f64().with_context(|| format!("no {field} in {last}"));
    ensure!(expected("predicted_blackout_ms")? <= 300.0, "{last}");
    // What is sent while the guest stands still is all that is added to it.
    let (sent, foreseen) = (record.number("bytes_sent")?, expected("predicted_bytes")?);
    ensure!((0.8..1.25).contains(&(sent / foreseen)), "{sent} of {foreseen}: {last}");
    // The cap is what the link carries, as far as the policy knows.
    let carried = expected("throughput_bytes_per_s")?;
    ensure!((25e6..52.5e6).contains(&carried), "{last}");
    let report = report(&pair.a, record.text("id")?)?;
    report.says("switch: ")?.says("g is on b")?;
    pair.runs_only_at(&pair.b, "g", &witness)
}

/// Within 5 % from above. That it is used as well is shown with a clock that nobody disturbs, in `precopy::bandwidth`: here a busy host may
/// be slower.
fn a_cap_holds(pair: &mut Pair, mode: &str, transport: &str) -> Result<()> {
    let work = "fill=random fill_mib=96 work=uniform work_mib=4 rate=100 check=off heartbeat_ms=20";
    let witness = pair.run(&Guest::new("g").work(work))?;

    let capped = ["--bandwidth", "320Mbit", "--mode", mode, "--transport", transport];
    let record = pair.migrate("g", &capped)?.exit(0)?.migration()?.is("completed", "b")?;

    let round = &record.record["rounds"][0];
    let (bytes, ms) = match mode {
        "postcopy" => (record.number("late_bytes")?, record.number("late_ms")?),
        _ => {
            let figures = round["bytes"].as_f64().zip(round["ms"].as_f64());
            figures.context("no first round")?
        }
    };
    ensure!(bytes > 96e6, "{bytes} bytes: {}", record.record);
    let share = bytes / (ms / 1e3) / 40e6;
    ensure!(share <= 1.05, "{share} of the cap: {}", record.record);
    ensure!(record.number("bandwidth_bytes_per_s")? == 40e6, "{}", record.record);
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn a_longer_blackout_that_is_allowed_meanwhile_ends_the_copy(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g").work(ALL_THE_TIME))?;
    let underway = pair.migrate_until("g", &TOO_SLOW, |record| Ok(record.rounds() >= 3))?;

    // At the other host: it is forwarded to the source.
    let retune = ["migration", "retune", &underway.id, "--max-downtime", "20s"];
    let answer = pair.b.ferry(&retune)?.exit(0)?.migration()?;

    ensure!(answer.number("max_downtime_ms")? == 20_000.0, "{}", answer.record);
    let record = underway.call.wait()?.exit(0)?.migration()?.is("completed", "b")?;
    let deeds: Vec<_> = decisions(&record)?
        .iter()
        .map(|decision| decision["deed"].clone())
        .collect();
    let at = deeds
        .iter()
        .position(|deed| deed == "retune")
        .context("it is not in the report")?;
    ensure!(deeds[..at].contains(&"infeasible".into()), "{deeds:?}");
    // A guest that had less of its processor for a round may have made another one pay.
    let paying = |deed: &&Value| *deed != "continue";
    only_switched(&deeds[at + 1..].iter().filter(paying).cloned().collect::<Vec<_>>())?;
    pair.a.ferry(&["events", "g"])?.exit(0)?.says("retune")?;
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn an_agent_that_restarts_has_the_terms_that_were_changed(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer_and(pair, &["transport", "source"]);
    let witness = pair.run(&Guest::new("g").work(ALL_THE_TIME))?;
    let underway = pair.migrate_until("g", &TOO_SLOW, |record| Ok(record.rounds() >= 2))?;
    let retune = ["migration", "retune", &underway.id];
    let first = ["--bandwidth", "200Mbit", "--timeout", "20m"];
    pair.a.ferry(&[&retune[..], &first].concat())?.exit(0)?;

    pair.a.kill();
    pair.a.start()?;

    let show = || pair.a.ferry(&["migration", "show", &underway.id])?.exit(0)?.migration();
    until("the VMM is heard again", MOVE, || {
        Ok((show()?.rounds() >= 3).then_some(()))
    })?;
    let record = show()?;
    ensure!(record.number("bandwidth_bytes_per_s")? == 25e6, "{}", record.record);
    ensure!(record.number("timeout_ms")? == 1_200_000.0, "{}", record.record);
    ensure!(record.number("max_downtime_ms")? == 150.0, "{}", record.record);
    pair.a
        .ferry(&[&retune[..], &["--max-downtime", "20s"]].concat())?
        .exit(0)?;
    underway.call.wait()?.exit(0)?.migration()?.is("completed", "b")?;
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn retuning_is_refused_while_nothing_is_copied_and_when_all_is_over(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g"))?;
    let underway = pair.migrate_until("g", &["--hold-at", "preparing"], |record| {
        Ok(record.text("status")? == "preparing")
    })?;

    let retune = ["migration", "retune", &underway.id, "--bandwidth", "none"];
    pair.a.ferry(&retune)?.exit(4)?.says("nothing is being copied")?;
    pair.a.ferry(&retune[..3])?.exit(2)?;
    pair.a.ferry(&["migration", "abort", &underway.id])?.exit(0)?;
    underway.call.wait()?.exit(1)?;
    pair.a.ferry(&retune)?.exit(4)?.says("it is over")?;

    let nobody = "00000000-0000-4000-8000-000000000000";
    pair.a
        .ferry(&["migration", "retune", nobody, "--timeout", "1m"])?
        .exit(3)?;
    pair.runs_only_at(&pair.a, "g", &witness)
}

fn a_guest_that_does_not_converge_is_completed_when_its_time_is_up(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g").work(ALL_THE_TIME))?;

    let in_time = ["--timeout", "4s", "--on-timeout", "pause"];
    let record = pair
        .migrate("g", &[&TOO_SLOW[..], &in_time].concat())?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;

    ensure!(record.number("total_ms")? >= 4000.0, "{}", record.record);
    let deeds: Vec<_> = decisions(&record)?
        .iter()
        .map(|decision| decision["deed"].clone())
        .collect();
    let at = deeds
        .iter()
        .position(|deed| deed == "pause")
        .context("it is not in the report")?;
    only_switched(&deeds[at + 1..])?;
    let words = record.text("decision")?;
    ensure!(words.contains("its time is up"), "{words}");
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn an_agent_that_knows_no_pause_at_the_timeout_is_named(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g"))?;
    pair.b.terminate()?;
    pair.b.arguments.extend(["--rpc-cap", "4.2"].map(str::to_owned));
    pair.verifies = false;
    pair.b.start()?;

    let pause = ["--on-timeout", "pause"];
    let refused = until("the older agent is heard", CALL, || {
        let answer = pair.migrate("g", &pause)?;
        Ok((answer.code == Some(4)).then_some(answer))
    })?;

    refused.says("host b speaks RPC version 4.2: a pause when the time is up needs 4.3")?;
    let throttled = pair.migrate("g", &["--auto-converge"])?.exit(4)?;
    throttled.says("throttling the guest needs 4.3")?;
    let verified = pair.migrate("g", &["--verify"])?.exit(4)?;
    verified.says("comparing what is moved needs 4.3")?;
    let compressed = pair.migrate("g", &["--compress", "lz4"])?.exit(4)?;
    compressed.says("compressing what is moved needs 4.3")?;
    pair.runs_only_at(&pair.a, "g", &witness)
}

/// A link that is too slow for the guest, also for one that has a part of its processor only.
const THROTTLING: [&str; 6] = [
    "--auto-converge",
    "--bandwidth",
    "240Mbit",
    "--compress",
    "off",
    "--digests",
];

/// Writes more than the link carries, and ends by itself with a blackout in its budget.
fn throttled(pair: &Pair, guest: &Guest, whom: &str) -> Result<Migration> {
    let witness = pair.run(guest)?;

    let record = pair
        .migrate("g", &THROTTLING)?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;

    let throttling = decisions(&record)?
        .iter()
        .find(|decision| decision["deed"] == "throttle");
    let throttling = throttling.with_context(|| format!("it was not throttled: {}", record.record))?;
    ensure!(
        throttling["words"].as_str().is_some_and(|words| words.contains(whom)),
        "{throttling}"
    );
    ensure!(
        (1.0..=99.0).contains(&record.number("throttle_percent")?),
        "{}",
        record.record
    );
    // How long the destination takes for its part is up to the machine: it was expected to fit.
    let switch = decisions(&record)?
        .iter()
        .rfind(|decision| decision["deed"] == "switch");
    let expected = switch.and_then(|switch| switch["predicted_blackout_ms"].as_f64());
    ensure!(expected.is_some_and(|expected| expected <= 300.0), "{}", record.record);
    let parts = ["pause", "drain", "last_pages"];
    let parts = parts.map(|part| record.number(&format!("downtime_ms.{part}")));
    let at_source: f64 = parts.into_iter().sum::<Result<f64>>()?;
    ensure!(at_source <= 300.0, "{at_source} ms: {}", record.record);
    pair.runs_only_at(&pair.b, "g", &witness)?;
    Ok(record)
}

fn a_guest_that_writes_more_than_the_link_carries_is_throttled_until_it_moves(pair: &mut Pair) -> Result<()> {
    let record = throttled(pair, &Guest::new("g").work(ALL_THE_TIME), "all vCPUs")?;
    // The log does not tell who writes, but where.
    let decision = &decisions(&record)?[1];
    let part = &decision["dirty_parts"][0];
    ensure!(
        part["address"] == 0 && part["dirty_pages"].as_u64() > Some(1000),
        "{decision}"
    );
    ensure!(decision["written_by_vcpu"] == Value::Array(Vec::new()), "{decision}");
    Ok(())
}

fn with_the_ring_only_the_vcpu_that_writes_is_throttled(pair: &mut Pair) -> Result<()> {
    // The second one is never brought up.
    let guest = Guest::new("g")
        .work(&format!("{ALL_THE_TIME} cpus=1"))
        .vcpus(2)
        .dirty("ring");
    let record = throttled(pair, &guest, "the vCPU that writes")?;
    let rounds: Vec<_> = decisions(&record)?
        .iter()
        .filter_map(|decision| decision["written_by_vcpu"].as_array().filter(|by| by.len() == 2))
        .collect();
    let first = rounds.first().context("no vCPU is told of")?;
    ensure!(first[0].as_u64() > Some(1000) && first[1] == 0, "{rounds:?}");
    Ok(())
}

fn with_the_ring_a_vcpu_that_writes_nothing_keeps_its_pace(pair: &mut Pair) -> Result<()> {
    // Of the work that each does beside its heartbeats: pages that the first one writes, and pages that the second one reads.
    let done = |beats: &[Beat]| -> Result<[f64; 2]> {
        let ends = beats.first().zip(beats.last()).context("no heartbeats")?;
        let [from, to] = [ends.0.heartbeat, ends.1.heartbeat];
        let time = (to.tsc - from.tsc) as f64;
        Ok([to.writes - from.writes, to.checked - from.checked].map(|pages| pages as f64 / time))
    };
    let work = format!("{ALL_THE_TIME} cpus=2 writers=1 check_rate=20000");
    let witness = pair.run(&Guest::new("g").work(&work).vcpus(2).dirty("ring"))?;
    let beats_at_a = || {
        witness
            .beats()
            .into_iter()
            .filter(|beat| beat.host == "a")
            .collect::<Vec<_>>()
    };
    until("heartbeats", CALL, || Ok((beats_at_a().len() > 50).then_some(())))?;
    let before = done(&beats_at_a()[25..])?;

    let moved = pair
        .migrate("g", &THROTTLING)?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;

    let beats = beats_at_a();
    let during = done(&beats[beats.len() - 10..])?;
    let [writes, checks] = [0, 1].map(|vcpu| during[vcpu] / before[vcpu]);
    ensure!(
        checks > 1.5 * writes,
        "{writes:.2} of the writes and {checks:.2} of the reads were left: {}",
        moved.record
    );
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn an_abort_leaves_nothing_throttled(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g").work(ALL_THE_TIME))?;
    let source = pair.a.vmm()?;
    let threads = process::threads(source);
    // It writes more than that with the little that it may be throttled.
    let slow = ["--bandwidth", "160Mbit", "--max-downtime", "150ms", "--compress", "off"];
    let little = ["--auto-converge", "--max-throttle", "30"];
    // More than that it may not be, and of that it does not end; it comes to it by steps.
    let all_that_it_may = |decision: &Value| decision["deed"] == "infeasible" && decision["throttle_percent"] == 30;
    let underway = pair.migrate_until("g", &[&slow[..], &little].concat(), |record| {
        let last = record.record["decisions"]
            .as_array()
            .and_then(|decisions| decisions.last());
        Ok(record.number("throttle_percent")? > 0.0 && last.is_some_and(all_that_it_may))
    })?;

    pair.a.ferry(&["migration", "abort", &underway.id])?.exit(0)?;

    let record = underway.call.wait()?.exit(1)?.migration()?.is("cancelled", "a")?;
    let last = decisions(&record)?.last().context("no decision")?;
    ensure!(all_that_it_may(last), "{last}");
    until("the source's VMM is as it was", CALL, || {
        Ok((process::threads(source) == threads).then_some(()))
    })?;
    pair.runs_only_at(&pair.a, "g", &witness)
}

/// Once more for each round that the grant took.
fn only_switched(deeds: &[Value]) -> Result<()> {
    let only = deeds.iter().all(|deed| deed == "switch");
    ensure!(only && !deeds.is_empty(), "{deeds:?}");
    Ok(())
}

/// In words, as people see it.
fn report(host: &Host, id: &str) -> Result<Answer> {
    host.plain_ferry(&["migration", "report", id, "--agent", &host.url()])?
        .exit(0)
}

fn decisions(record: &Migration) -> Result<&Vec<Value>> {
    let decisions = record.record["decisions"].as_array();
    decisions.with_context(|| format!("no decisions in {}", record.record))
}
