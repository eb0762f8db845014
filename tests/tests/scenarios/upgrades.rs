//! An agent that is upgraded while its VMMs, of the build before it, have guests, in mid-migration too.

use std::fs;

use anyhow::{Result, ensure};
use ferry_tests::{Guest, Pair, binary, until, waiting::MOVE};
use libtest_mimic::Trial;

use crate::scenario::{expect_a_lost_peer_and, on_kvm};

pub(crate) fn trials() -> Vec<Trial> {
    on_kvm![
        a_vmm_of_an_earlier_build_finishes_its_migration_under_a_new_agent,
        what_a_vmm_of_an_earlier_build_does_not_know_is_refused_by_name,
        a_migration_of_a_vmm_of_an_earlier_build_is_not_retuned,
    ]
}

const WORK: &str = "fill=random fill_mib=64 work=uniform work_mib=8 rate=1000 heartbeat_ms=20";
const OLD_VMMS: [&str; 2] = ["--vmm-protocol-cap", "1"];

fn a_vmm_of_an_earlier_build_finishes_its_migration_under_a_new_agent(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer_and(pair, &["transport", "source"]);
    start_old(pair)?;
    let witness = pair.run(&Guest::new("g").work(WORK))?;
    let vmm = pair.a.vmm()?;
    let began = pair.migrate("g", &["--detach", "--bandwidth", "160Mbit", "--digests"])?;
    let id = began.exit(0)?.migration()?.text("id")?.to_owned();
    until("pages are being sent", MOVE, || {
        let record = pair.a.ferry(&["migration", "show", &id])?.exit(0)?.migration()?;
        Ok((record.number("bytes_sent")? > f64::from(4 << 20)).then_some(()))
    })?;
    pair.keep_logs();

    pair.a.kill();
    upgrade(pair)?;

    ensure!(pair.a.vmm()? == vmm, "the VMM is another one");
    pair.wait_over(&id)?.is("completed", "b")?;
    pair.runs_only_at(&pair.b, "g", &witness)?;
    let told = fs::read_to_string(&pair.a.log)?;
    ensure!(told.contains("a VMM of an earlier build"), "{told}");
    // Its VMM at the destination is of that one's build.
    pair.b.ferry(&["stop", "g"])?.exit(4)?.says("no power button")?;
    Ok(())
}

fn what_a_vmm_of_an_earlier_build_does_not_know_is_refused_by_name(pair: &mut Pair) -> Result<()> {
    start_old(pair)?;
    let witness = pair.run(&Guest::new("g"))?;
    pair.a.terminate()?;
    upgrade(pair)?;

    let snapshot = pair.folder().join("snapshot").display().to_string();
    let asked: [(&[&str], &str); 4] = [
        (&["balloon", "g", "--size", "64M"], "the balloon came with version 2"),
        (&["stop", "g"], "the power button came with version 2"),
        (&["snapshot", "g", "--to", &snapshot], "snapshots came with version 2"),
        (
            &["migrate", "g", "--to", "b", "--transport", "grpc"],
            "moving its guest by --transport grpc came with version 2",
        ),
    ];
    for (words, says) in asked {
        pair.a.ferry(words)?.exit(4)?.says(says)?.says("speaks version 1")?;
    }
    // What can be told without it is.
    pair.migrate("g", &["--dry-run"])?
        .exit(0)?
        .says("a sample of what its guest writes came with version 2")?;
    ensure!(!fs::exists(&snapshot)?, "a folder is left");
    let compared = pair.migrate("g", &["--verify"])?.exit(1)?;
    compared.says("comparing what it sends came with version 2")?;
    pair.a.ferry(&["pause", "g"])?.exit(0)?;
    pair.a.ferry(&["resume", "g"])?.exit(0)?;
    pair.runs_only_at(&pair.a, "g", &witness)?;

    pair.migrate("g", &["--digests"])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn a_migration_of_a_vmm_of_an_earlier_build_is_not_retuned(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer_and(pair, &["transport", "source"]);
    start_old(pair)?;
    let witness = pair.run(&Guest::new("g").work(WORK))?;
    let began = pair.migrate("g", &["--detach", "--hold-at", "running"])?;
    let id = began.exit(0)?.migration()?.text("id")?.to_owned();
    until("rounds go on", MOVE, || {
        let record = pair.a.ferry(&["migration", "show", &id])?.exit(0)?.migration()?;
        Ok((record.rounds() >= 2).then_some(()))
    })?;
    pair.keep_logs();
    pair.a.kill();
    upgrade(pair)?;

    let retune = ["migration", "retune", &id, "--bandwidth", "8Mbit"];
    let refused = pair.a.ferry(&retune)?.exit(4)?;

    refused
        .says("retuning a migration came with version 2")?
        .says("speaks version 1")?;
    let record = pair.a.ferry(&["migration", "show", &id])?.exit(0)?.migration()?;
    ensure!(record.record["bandwidth_bytes_per_s"].is_null(), "{}", record.record);
    pair.a.ferry(&["migration", "abort", &id])?.exit(0)?;
    pair.wait_over(&id)?.is("cancelled", "a")?;
    pair.runs_only_at(&pair.a, "g", &witness)
}

/// A's agent starts anew; the VMMs that it starts speak the version before this build's.
fn start_old(pair: &mut Pair) -> Result<()> {
    pair.a.terminate()?;
    pair.a.arguments.extend(OLD_VMMS.map(str::to_owned));
    pair.verifies = false;
    pair.a.start()
}

/// A's agent, which does not run, is this build's from now on, and a file of its own.
fn upgrade(pair: &mut Pair) -> Result<()> {
    let newer = pair.folder().join("ferry-newer");
    fs::copy(binary::ferry()?, &newer)?;
    pair.a.become_binary(&newer);
    pair.a.arguments.retain(|word| !OLD_VMMS.contains(&word.as_str()));
    pair.a.start()
}
