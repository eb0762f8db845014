//! Journals, hosts, records and clocks that are not what they should be: refused by name, and the guest runs on.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use ferry_proto::agent::v1::compute_client::ComputeClient;
use ferry_proto::agent::v1::{AttemptRequest, InstanceSpec, PreLiveMigrationRequest};
use ferry_tests::{Guest, Pair, until, waiting::MOVE};
use libtest_mimic::Trial;
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use tokio::runtime::Runtime;
use tonic::{Code, Status};

use crate::journal;
use crate::scenario::{command, expect_a_lost_peer, has_nothing, on_kvm, stays_and_moves_later, without_kvm};

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = without_kvm![
        a_journal_of_another_host_is_refused_with_both_names,
        a_host_is_not_its_own_peer,
    ];
    trials.extend(on_kvm![
        a_host_that_has_this_ones_id_is_no_destination,
        a_host_at_the_destinations_url_that_is_another_does_not_get_the_guest,
        a_peers_record_of_another_epoch_is_refused_and_decides_nothing,
        a_destination_that_has_less_memory_than_it_says_leaves_the_guest_where_it_is,
        a_wall_clock_that_jumps_changes_nothing_but_what_it_is_asked_for,
    ]);
    trials
}

fn a_journal_of_another_host_is_refused_with_both_names(pair: &mut Pair) -> Result<()> {
    pair.a.start()?;
    pair.a.terminate()?;
    let before = journal::of(&pair.a)?.rows("meta")?;
    pair.a.name = "x";

    pair.a.spawn_agent()?;

    ensure!(pair.a.wait_ended()? == Some(1), "it does not end");
    let told = fs::read_to_string(&pair.a.log)?;
    ensure!(told.contains(r#"belongs to host "a", this agent is "x""#), "{told}");
    ensure!(told.contains("--host-id or --data-dir"), "{told}");
    pair.expect_complaint("belongs to host");
    ensure!(
        journal::of(&pair.a)?.rows("meta")? == before,
        "it is another host's now"
    );
    pair.a.name = "a";
    pair.a.start()
}

fn a_host_is_not_its_own_peer(pair: &mut Pair) -> Result<()> {
    let own = format!("x={}", pair.a.url());

    let told = pair.a.plain_ferry(&["agent", "--host-id", "x", "--peer", &own])?;

    told.exit(2)?.says("own host id")?;
    Ok(())
}

fn a_host_that_has_this_ones_id_is_no_destination(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g"))?;
    pair.b.terminate()?;
    let (name, folder, arguments) = (pair.b.name, pair.b.data_dir.clone(), pair.b.arguments.clone());
    pair.b.name = "a";
    pair.b.data_dir = pair.folder().join("a-again");
    pair.b.arguments.clear();
    pair.b.start()?;

    let told = pair.migrate("g", &[])?.exit(4)?;

    ensure!(told.json()?["reason"] == "DESTINATION_IS_OTHER", "{told}");
    has_nothing(&pair.b)?;
    pair.b.terminate()?;
    (pair.b.name, pair.b.data_dir, pair.b.arguments) = (name, folder, arguments);
    pair.b.start()?;
    stays_and_moves_later(pair, &witness)
}

/// Whoever was asked to migrate knows the hosts by their own URLs; the source has another's for the destination.
fn a_host_at_the_destinations_url_that_is_another_does_not_get_the_guest(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer(pair);
    pair.start_three(&[])?;
    let witness = pair.run(&Guest::new("g"))?;
    let third = pair.c.as_ref().context("there is no third host")?;
    let (url, url_of_b) = (third.url(), pair.b.url());
    pair.a.set_peer("b", &url);
    pair.a.terminate()?;
    pair.a.start()?;

    let told = third.ferry(&["migrate", "g", "--to", "b"])?.exit(1)?;

    let record = told.migration()?.is("failed", "a")?;
    ensure!(
        record.text("error")?.contains(r#"host "c" answers, not host b"#),
        "{}",
        record.record
    );
    ensure!(pair.a.show("g")?["fault"]["reason"] == "DESTINATION_IS_OTHER");
    has_nothing(third)?;
    pair.a.set_peer("b", &url_of_b);
    pair.a.terminate()?;
    pair.a.start()?;
    stays_and_moves_later(pair, &witness)
}

fn a_peers_record_of_another_epoch_is_refused_and_decides_nothing(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g"))?;
    let began = pair.migrate("g", &["--detach", "--hold-at", "armed"])?.exit(0)?;
    let migration = began.migration()?.text("id")?.to_owned();
    let journal = journal::of(&pair.b)?;
    until("agent B expects the guest", MOVE, || {
        Ok(journal.decision_of(&migration, "OPEN")?.then_some(()))
    })?;
    let instance = pair.a.show("g")?["id"].as_str().context("no id")?.to_owned();
    let of = |instance: &str, epoch, source: &str| AttemptRequest {
        instance: instance.to_owned(),
        migration: migration.clone(),
        attempt: 1,
        epoch,
        source: source.to_owned(),
        journal: String::new(),
    };
    let another = "5f0c6a52-6d0e-4b8f-9a8b-0a7d3c1e2f40";
    let wrong = [
        of(&instance, 7, "a"),
        of(another, 1, "a"),
        of(&instance, 1, "b"),
        of(&instance, u64::MAX, "a"),
    ];

    let is_refusal = |status: &Status| {
        matches!(
            status.code(),
            Code::FailedPrecondition | Code::InvalidArgument | Code::NotFound
        )
    };
    let (runtime, url) = (Runtime::new()?, pair.b.url());
    let mut compute = runtime.block_on(ComputeClient::connect(url))?;
    for request in wrong.clone() {
        let decided = runtime.block_on(compute.decide(request.clone()));
        let expected = runtime.block_on(compute.expect(request.clone()));
        for status in [decided.err(), expected.err()] {
            let status = status.with_context(|| format!("{request:?} was obeyed"))?;
            ensure!(is_refusal(&status), "{request:?}: {status}");
        }
    }

    let prepare = |request: AttemptRequest| PreLiveMigrationRequest {
        migration: request.migration,
        instance: request.instance,
        epoch: request.epoch,
        source: request.source,
        rpc_version: "4.3".to_owned(),
        streams: 1,
        storage: "auto".to_owned(),
        mode: "precopy".to_owned(),
        spec: Some(InstanceSpec {
            kernel: "ab".repeat(32),
            ..InstanceSpec::default()
        }),
        ..PreLiveMigrationRequest::default()
    };
    // The right one but for its source's journal, too: the secret is that journal's.
    for request in wrong.into_iter().chain([of(&instance, 1, "a")]) {
        let told = runtime.block_on(compute.pre_live_migration(prepare(request.clone())));
        let status = told
            .err()
            .with_context(|| format!("{request:?} was given the secret"))?;
        ensure!(is_refusal(&status), "{request:?}: {status}");
    }

    ensure!(journal.decision_of(&migration, "OPEN")?, "D is not what it was");
    pair.a.ferry(&["migration", "abort", &migration])?.exit(0)?;
    pair.wait_over(&migration)?.is("cancelled", "a")?;
    stays_and_moves_later(pair, &witness)
}

/// B tells of its host's memory, and its processes may have a part of that only.
fn a_destination_that_has_less_memory_than_it_says_leaves_the_guest_where_it_is(pair: &mut Pair) -> Result<()> {
    const LARGE_MIB: u64 = 6 << 10;
    const ALLOWED: u64 = 4 << 30;
    expect_a_lost_peer(pair);
    let witness = pair.run(&Guest::new("g").memory_mib(LARGE_MIB))?;
    let agent = i32::try_from(pair.b.pid().context("agent B runs")?)?;
    let limit = |bytes| Rlimit {
        current: bytes,
        maximum: None,
    };
    let set = |bytes| prlimit(Pid::from_raw(agent), Resource::As, limit(bytes));
    set(Some(ALLOWED))?;

    let told = pair.migrate("g", &[])?;

    ensure!(matches!(told.code, Some(1 | 4)), "{told}");
    let told = told.says("memory")?;
    ensure!(told.clone().says("host b").is_ok(), "{told}");
    set(None)?;
    stays_and_moves_later(pair, &witness)
}

/// The wall clock of agent A is read through a library that adds what a file says.
fn a_wall_clock_that_jumps_changes_nothing_but_what_it_is_asked_for(pair: &mut Pair) -> Result<()> {
    const DAY: i64 = 86_400;
    let by = pair.folder().join("jump");
    fs::write(&by, "0")?;
    let library = jumping_clock(pair)?;
    pair.a.environment.extend([
        ("LD_PRELOAD".to_owned(), library.display().to_string()),
        ("FERRY_TEST_JUMP".to_owned(), by.display().to_string()),
    ]);
    pair.a.terminate()?;
    pair.a.start()?;
    let work = "fill=random fill_mib=64 work=uniform work_mib=8 rate=1000 heartbeat_ms=20";
    let witness = pair.run(&Guest::new("g").work(work))?;

    let underway = pair.migrate_until("g", &["--bandwidth", "80Mbit", "--digests"], |record| {
        Ok(record.number("bytes_sent")? > f64::from(4 << 20))
    })?;
    fs::write(&by, (-3 * DAY).to_string())?;
    let ended = underway.call.wait()?.exit(0)?.migration()?.is("completed", "b")?;

    ensure!(
        ended.text("ended")? < ended.text("started")?,
        "the clock did not jump: {}",
        ended.record
    );
    let total = ended.number("total_ms")?;
    ensure!((1.0..MOVE.as_secs_f64() * 1000.0).contains(&total), "{total} ms");
    let blackout = ended.number("downtime_ms.total")?;
    ensure!((0.0..=total).contains(&blackout), "{blackout} ms of {total} ms");
    pair.runs_only_at(&pair.b, "g", &witness)?;

    // Back, ahead of everybody, and over a restart.
    fs::write(&by, (30 * DAY).to_string())?;
    let back = pair
        .b
        .ferry(&["migrate", "g", "--to", "a", "--digests"])?
        .exit(0)?
        .migration()?;
    back.is("completed", "a")?;
    pair.a.terminate()?;
    fs::write(&by, (-DAY).to_string())?;
    pair.a.start()?;
    pair.runs_only_at(&pair.a, "g", &witness)?;
    ensure!(pair.a.ferry(&["migration", "list"])?.exit(0)?.json_lines()?.len() == 2);
    ensure!(pair.b.ferry(&["host", "show", "a"])?.exit(0)?.json()?["reachable"] == true);
    Ok(())
}

/// A library in front of libc whose `CLOCK_REALTIME` is off by the seconds in the file that `FERRY_TEST_JUMP` names.
fn jumping_clock(pair: &Pair) -> Result<PathBuf> {
    const SOURCE: &str = r#"
        #define _GNU_SOURCE
        #include <stdio.h>
        #include <stdlib.h>
        #include <sys/syscall.h>
        #include <time.h>
        #include <unistd.h>

        int clock_gettime(clockid_t clock, struct timespec *now) {
            int result = syscall(SYS_clock_gettime, clock, now);
            const char *path = getenv("FERRY_TEST_JUMP");
            FILE *file = clock == CLOCK_REALTIME && path ? fopen(path, "r") : NULL;
            long seconds = 0;
            if (file) {
                if (fscanf(file, "%ld", &seconds) == 1) now->tv_sec += seconds;
                fclose(file);
            }
            return result;
        }
    "#;
    let (source, library) = (pair.folder().join("jump.c"), pair.folder().join("jump.so"));
    fs::write(&source, SOURCE)?;
    let (from, to) = (source.display().to_string(), library.display().to_string());
    command("cc", &["-shared", "-fPIC", "-O1", "-o", &to, &from])?;
    Ok(library)
}
