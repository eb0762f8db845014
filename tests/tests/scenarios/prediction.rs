//! `migrate --dry-run`: what a guest's migration would come to, every reason why it would be refused, and a guest that is none the worse for it.

use anyhow::{Context, Result, ensure};
use ferry_tests::waiting::CALL;
use ferry_tests::{Call, Guest, Pair, until};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::scenario::{in_a_network, ip, on_kvm, stays_and_moves_later};

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = on_kvm![
        a_guest_that_writes_is_sampled_and_none_the_worse_for_it,
        with_the_ring_each_vcpu_has_its_figure,
        what_is_foretold_of_an_idle_guest_comes,
        a_hot_set_is_foretold_to_converge_where_its_rate_would_not,
        a_guest_that_writes_all_the_time_is_foretold_never_to_end_and_what_would_help,
        what_pages_change_is_looked_at_and_foretold,
        the_link_is_known_by_the_last_migration,
        a_stopped_instance_has_all_its_reasons_and_no_prediction,
        an_unknown_instance_is_not_predicted,
        a_migration_that_begins_ends_the_sample,
        a_caller_that_hangs_up_ends_the_sample,
        an_older_agent_that_foretells_nothing_is_named,
    ];
    trials.extend(in_a_network![every_reason_against_a_host_is_told_with_its_remedy]);
    trials
}

const WORK: &str = "fill=random fill_mib=16 work=uniform work_mib=16 rate=1000 heartbeat_ms=20";
const PAGE: f64 = 4096.0;
/// Pages that such a guest writes to.
const AREA: f64 = 16.0 * 256.0;

/// What a dry run told.
fn dry_run(pair: &Pair, further: &[&str], exit: i32) -> Result<Value> {
    let words = [&["--dry-run"], further].concat();
    pair.migrate("g", &words)?.exit(exit)?.json()
}

fn prediction(told: &Value) -> Result<&Value> {
    let prediction = &told["prediction"];
    ensure!(prediction["unknown"].is_null(), "{told}");
    Ok(prediction)
}

fn number(value: &Value, field: &str) -> Result<f64> {
    value[field]
        .as_f64()
        .with_context(|| format!("no number {field} in {value}"))
}

/// Pages found after each time in seconds.
fn looks(prediction: &Value) -> Result<Vec<(f64, f64)>> {
    let written = prediction["written"].as_array().context("nothing was looked at")?;
    let look = |look: &Value| Ok((number(look, "after_ms")? / 1e3, number(look, "bytes")? / PAGE));
    written.iter().map(look).collect()
}

/// Different pages of the area that writes at this rate hit in this time.
fn hit(rate: f64, seconds: f64) -> f64 {
    AREA * (1.0 - (-rate * seconds / AREA).exp())
}

/// A tracking that went on would have what was written before in its first look.
fn starts_empty(prediction: &Value, rate: f64) -> Result<()> {
    let (after, pages) = looks(prediction)?[0];
    // What the machine itself writes, and a guest that makes up for a time in which it did not run.
    let allowed = 4.0 * rate * after + 200.0;
    ensure!(pages <= allowed, "{pages} pages after {after} s: {prediction}");
    Ok(())
}

fn a_guest_that_writes_is_sampled_and_none_the_worse_for_it(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g").work(WORK))?;

    let told = dry_run(pair, &[], 0)?;

    ensure!(
        told["destination"] == "b" && told["refusals"] == Value::Array(Vec::new()),
        "{told}"
    );
    let first = prediction(&told)?;
    let looks = looks(first)?;
    ensure!(
        looks.len() == 6 && looks.is_sorted_by(|one, other| one < other),
        "{looks:?}"
    );
    let (after, pages) = looks[5];
    ensure!(after >= 3.0, "{looks:?}");
    let share = pages / hit(1000.0, after);
    ensure!((0.5..2.0).contains(&share), "{share} of what it writes: {looks:?}");
    let part = &first["dirty_parts"][0];
    ensure!(
        part["address"] == 0 && number(part, "dirty_bytes_per_s")? > 0.0,
        "{first}"
    );
    ensure!(
        first["dirty_bytes_per_s_by_vcpu"] == Value::Array(Vec::new()),
        "{first}"
    );
    ensure!(first["end"] == "whole", "{first}");
    let again = dry_run(pair, &["--sample", "300ms"], 0)?;
    starts_empty(prediction(&again)?, 1000.0)?;
    let none = dry_run(pair, &["--sample", "none"], 0)?;
    ensure!(none["prediction"].is_null(), "{none}");
    stays_and_moves_later(pair, &witness)
}

fn with_the_ring_each_vcpu_has_its_figure(pair: &mut Pair) -> Result<()> {
    // The second one is never brought up.
    let guest = Guest::new("g").work(&format!("{WORK} cpus=1")).vcpus(2).dirty("ring");
    let witness = pair.run(&guest)?;

    let told = dry_run(pair, &[], 0)?;

    let found = prediction(&told)?;
    let by_vcpu = found["dirty_bytes_per_s_by_vcpu"].as_array().context("no vCPUs")?;
    let rates: Vec<f64> = by_vcpu.iter().filter_map(Value::as_f64).collect();
    ensure!(
        rates.len() == 2 && rates[0] > 100.0 * PAGE && rates[1] < rates[0] / 10.0,
        "{found}"
    );
    starts_empty(prediction(&dry_run(pair, &["--sample", "300ms"], 0)?)?, 1000.0)?;
    stays_and_moves_later(pair, &witness)
}

fn what_is_foretold_of_an_idle_guest_comes(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g").work("fill=random fill_mib=48 work=idle heartbeat_ms=20"))?;
    let cap = ["--bandwidth", "800Mbit"];

    let told = dry_run(pair, &[&cap[..], &["--sample", "1s"]].concat(), 0)?;
    let record = pair.migrate("g", &cap)?.exit(0)?.migration()?.is("completed", "b")?;

    let found = prediction(&told)?;
    ensure!(found["end"] == "whole" && number(found, "rounds")? < 8.0, "{found}");
    comes(found, &record.record, "bytes", "bytes_sent", 0.7..1.4)?;
    // How long the rest takes is up to the machine.
    let sending_ms = number(found, "bytes")? / 100e6 * 1e3;
    ensure!(
        (0.4..1.0).contains(&(sending_ms / number(found, "total_ms")?)),
        "{found}"
    );
    pair.runs_only_at(&pair.b, "g", &witness)
}

/// What was foretold is within so much of what came.
fn comes(found: &Value, record: &Value, foretold: &str, came: &str, band: std::ops::Range<f64>) -> Result<()> {
    let share = number(found, foretold)? / number(record, came)?;
    ensure!(
        band.contains(&share),
        "{foretold}: {share} of what came: {found}, {record}"
    );
    Ok(())
}

fn a_hot_set_is_foretold_to_converge_where_its_rate_would_not(pair: &mut Pair) -> Result<()> {
    // Nine of ten writes go to a tenth of it.
    let work = "fill=random fill_mib=16 work=hotcold work_mib=32 rate=20000 heartbeat_ms=20";
    let witness = pair.run(&Guest::new("g").work(work))?;
    let cap = ["--bandwidth", "240Mbit"];

    let told = dry_run(pair, &cap, 0)?;
    let record = pair.migrate("g", &cap)?.exit(0)?.migration()?.is("completed", "b")?;

    let found = prediction(&told)?;
    let rates: Vec<f64> = looks(found)?.iter().map(|look| look.1 / look.0).collect();
    // The first ones take some hundredths of a second, in which the guest may not have had its processor.
    let first = rates[..3].iter().copied().fold(0.0, f64::max);
    ensure!(first > 2.0 * rates[5], "no curve: {found}");
    ensure!(
        found["end"] == "whole" && found["remedies"] == Value::Array(Vec::new()),
        "{found}"
    );
    ensure!(number(found, "blackout_ms")? <= 300.0, "{found}");
    comes(found, &record.record, "bytes", "bytes_sent", 0.5..2.0)?;
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn a_guest_that_writes_all_the_time_is_foretold_never_to_end_and_what_would_help(pair: &mut Pair) -> Result<()> {
    let work = "fill=random fill_mib=32 work=uniform work_mib=32 rate=max heartbeat_ms=20";
    let witness = pair.run(&Guest::new("g").work(work))?;
    // Told by what it changes it would end.
    let too_slow = ["--bandwidth", "400Mbit", "--max-downtime", "150ms", "--compress", "off"];

    let told = dry_run(pair, &too_slow, 0)?;

    let found = prediction(&told)?;
    ensure!(found["end"] == "never", "{found}");
    let words = found["words"].as_str().context("no words")?;
    ensure!(
        words.contains("not expected to end") && words.contains("infeasible"),
        "{words}"
    );
    let remedies = found["remedies"].as_array().context("no remedies")?;
    let arguments: Vec<_> = remedies
        .iter()
        .filter_map(|remedy| remedy["argument"].as_str())
        .collect();
    let downtime = arguments
        .iter()
        .find(|argument| argument.starts_with("--max-downtime "));
    let downtime = downtime.with_context(|| format!("{arguments:?}"))?;
    for other in ["--auto-converge", "--mode hybrid"] {
        ensure!(arguments.contains(&other), "{arguments:?}");
    }
    // What is said to help does.
    let patient: Vec<_> = ["--bandwidth", "400Mbit", "--compress", "off", "--digests"]
        .into_iter()
        .chain(downtime.split(' '))
        .collect();
    pair.migrate("g", &patient)?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn what_pages_change_is_looked_at_and_foretold(pair: &mut Pair) -> Result<()> {
    // All of it is written again while it is sent.
    let work = "fill=random fill_mib=32 work=uniform work_mib=32 rate=20000 heartbeat_ms=20";
    let witness = pair.run(&Guest::new("g").work(work))?;
    let cap = ["--bandwidth", "240Mbit"];

    let whole = dry_run(pair, &[&cap[..], &["--compress", "off"]].concat(), 0)?;
    ensure!(prediction(&whole)?["end"] == "never", "{whole}");
    let told = dry_run(pair, &cap, 0)?;
    let record = pair.migrate("g", &cap)?.exit(0)?.migration()?.is("completed", "b")?;

    let found = prediction(&told)?;
    let words = found["compression"].as_str().context("nothing of compression")?;
    ensure!(
        words.contains("are told by what they changed, which leaves "),
        "{words}"
    );
    ensure!(found["end"] == "whole", "{found}");
    comes(found, &record.record, "bytes", "bytes_sent", 0.5..2.0)?;
    ensure!(record.number("compression.delta_pages")? > 1000.0, "{}", record.record);
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn the_link_is_known_by_the_last_migration(pair: &mut Pair) -> Result<()> {
    let work = "fill=random fill_mib=64 work=uniform work_mib=4 rate=100 heartbeat_ms=20";
    let witness = pair.run(&Guest::new("g").work(work))?;
    let quick = ["--sample", "100ms"];
    let before = dry_run(pair, &quick, 0)?;
    ensure!(from(&before)?.contains("by sending for a moment"), "{before}");
    let capped = dry_run(pair, &["--sample", "100ms", "--bandwidth", "1Gbit"], 0)?;
    ensure!(from(&capped)?.contains("assumed"), "{capped}");

    let there = pair.migrate("g", &[])?.exit(0)?.migration()?.is("completed", "b")?;

    let back = pair.b.ferry(&["migrate", "g", "--to", "a"])?.exit(0)?;
    back.migration()?.is("completed", "a")?;

    let told = dry_run(pair, &quick, 0)?;
    ensure!(from(&told)?.contains(there.text("id")?), "{told}");
    let first = &there.record["rounds"][0];
    let measured = number(first, "bytes")? / number(first, "ms")? * 1e3;
    let share = number(prediction(&told)?, "bandwidth_bytes_per_s")? / measured;
    ensure!((0.8..1.3).contains(&share), "{share}: {told}");

    // A move by one transport tells nothing of another.
    let over_grpc = [&quick[..], &["--transport", "grpc"]].concat();
    let told = dry_run(pair, &over_grpc, 0)?;
    ensure!(from(&told)?.contains("through both agents"), "{told}");
    ensure!(number(prediction(&told)?, "bandwidth_bytes_per_s")? > 0.0, "{told}");
    pair.runs_only_at(&pair.a, "g", &witness)
}

fn from(told: &Value) -> Result<&str> {
    prediction(told)?["bandwidth_from"]
        .as_str()
        .context("nothing of the link")
}

fn a_stopped_instance_has_all_its_reasons_and_no_prediction(pair: &mut Pair) -> Result<()> {
    pair.run(&Guest::new("g"))?;
    pair.a.ferry(&["stop", "g", "--force"])?.exit(0)?;

    let told = dry_run(pair, &[], 4)?;

    ensure!(told["destination"] == "", "{told}");
    let refusal = &told["refusals"][0];
    ensure!(
        refusal["reason"] == "INSTANCE_STATE" && refusal["host"] == "a",
        "{told}"
    );
    ensure!(
        refusal["remedy"].as_str().is_some_and(|remedy| !remedy.is_empty()),
        "{told}"
    );
    // The host is asked all the same.
    let host = &told["hosts"][0];
    ensure!(
        host["host"] == "b" && host["reason"].is_null() && host["taken"] == false,
        "{told}"
    );
    let unknown = told["prediction"]["unknown"].as_str().context("it was predicted")?;
    ensure!(unknown.contains("g is stopped"), "{unknown}");
    let cold = dry_run(pair, &["--cold"], 0)?;
    ensure!(cold["destination"] == "b", "{cold}");
    Ok(())
}

fn an_unknown_instance_is_not_predicted(pair: &mut Pair) -> Result<()> {
    pair.migrate("nobody", &["--dry-run"])?.exit(3)?.says("nobody")?;
    Ok(())
}

/// A dry run that looks at the guest for longer than anything here takes.
fn long_sample(pair: &Pair) -> Result<Call> {
    let call = pair.begin_migrate("g", &["--dry-run", "--sample", "30s"])?;
    until("the guest is looked at", CALL, || {
        let logs = pair.a.ferry(&["logs", "g"])?.exit(0)?;
        Ok(logs.stdout.contains("looking at what the guest writes").then_some(()))
    })?;
    Ok(call)
}

fn a_migration_that_begins_ends_the_sample(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g").work(WORK))?;
    let sampling = long_sample(pair)?;

    pair.migrate("g", &["--digests"])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;

    let told = sampling.wait()?.exit(0)?.json()?;
    let unknown = told["prediction"]["unknown"].as_str().context("it was predicted")?;
    ensure!(unknown.contains("a migration of the guest began"), "{unknown}");
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn a_caller_that_hangs_up_ends_the_sample(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g").work(WORK))?;
    let sampling = long_sample(pair)?;

    sampling.kill()?;

    until("the sample has ended", CALL, || {
        let logs = pair.a.ferry(&["logs", "g"])?.exit(0)?;
        Ok(logs.stdout.contains("nobody waits for it any more").then_some(()))
    })?;
    let told = dry_run(pair, &["--sample", "300ms"], 0)?;
    starts_empty(prediction(&told)?, 1000.0)?;
    stays_and_moves_later(pair, &witness)
}

fn an_older_agent_that_foretells_nothing_is_named(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g"))?;
    pair.a.terminate()?;
    pair.a.arguments.extend(["--rpc-cap", "4.2"].map(str::to_owned));
    pair.a.start()?;

    let told = until("the older agent is heard", CALL, || {
        let told = pair
            .b
            .ferry(&["migrate", "g", "--to", "b", "--dry-run", "--sample", "100ms"])?;
        let told = told.exit(0)?.json()?;
        Ok(told["prediction"]["unknown"].is_string().then_some(told))
    })?;

    let unknown = told["prediction"]["unknown"].as_str().unwrap_or_default();
    ensure!(unknown.contains("a prediction needs 4.3"), "{unknown}");
    ensure!(told["destination"] == "b", "{told}");
    pair.runs_only_at(&pair.a, "g", &witness)
}

fn every_reason_against_a_host_is_told_with_its_remedy(pair: &mut Pair) -> Result<()> {
    let little = ["--ram-allocation-ratio", "0.01", "--cpu-allocation-ratio", "0.5"];
    pair.b.arguments.extend(little.map(str::to_owned));
    pair.b.terminate()?;
    pair.b.start()?;
    for bridge in ["br0", "br1"] {
        ip(&["link", "add", bridge, "type", "bridge"])?;
        ip(&["link", "set", bridge, "up"])?;
    }
    let disk = pair.folder().join("disk.img");
    std::fs::File::create(&disk)?.set_len(1 << 20)?;
    let disk = format!("path={}", disk.display());
    let guest = Guest::new("g")
        .memory_mib(1024)
        .vcpus(2)
        .nic("bridge=br0")
        .nic("bridge=br1")
        .disk(&disk);
    let witness = pair.run(&guest)?;
    // The guest keeps its taps: to B it is as if A alone had the bridges.
    for (bridge, away) in [("br0", "br8"), ("br1", "br9")] {
        ip(&["link", "set", bridge, "name", away])?;
    }

    let told = dry_run(pair, &["--storage", "copy"], 4)?;

    let refusals = told["hosts"][0]["refusals"].as_array().context("no refusals")?;
    let reasons: Vec<_> = refusals
        .iter()
        .filter_map(|refusal| refusal["reason"].as_str())
        .collect();
    let expected = [
        "INSUFFICIENT_MEMORY",
        "INSUFFICIENT_VCPUS",
        "DISKS",
        "NETWORK",
        "NETWORK",
    ];
    ensure!(reasons == expected, "{told}");
    for refusal in refusals {
        let has = |field: &str| refusal[field].as_str().is_some_and(|text| !text.is_empty());
        ensure!(has("why") && has("remedy") && refusal["host"] == "b", "{refusal}");
    }
    let named = |bridge: &str| {
        refusals
            .iter()
            .any(|refusal| refusal["why"].as_str().is_some_and(|why| why.contains(bridge)))
    };
    ensure!(named("br0") && named("br1"), "{told}");
    // The guest is looked at all the same.
    ensure!(prediction(&told)?["end"] == "whole", "{told}");
    let human = [
        "migrate",
        "g",
        "--to",
        "b",
        "--dry-run",
        "--sample",
        "100ms",
        "--storage",
        "copy",
        "--agent",
        &pair.a.url(),
    ];
    let told = pair.a.plain_ferry(&human)?.exit(4)?;
    told.says("INSUFFICIENT_VCPUS")?
        .says("--cpu-allocation-ratio")?
        .says("expected: ")?
        .says("link: ")?;
    pair.runs_only_at(&pair.a, "g", &witness)
}
