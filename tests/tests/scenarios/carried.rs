//! `--transport grpc`: every stream goes through both agents. What holds of a move by the data port holds of this one, but for what an agent's end does.

use std::fs;

use anyhow::{Context, Result, ensure};
use ferry_proto::agent::v1::stream_piece::Piece;
use ferry_proto::agent::v1::streams_client::StreamsClient;
use ferry_proto::agent::v1::{StreamClaim, StreamPiece};
use ferry_tests::{Guest, Pair, Relay, Tampering, Witness, pair::Underway, process, until, waiting::CALL};
use libtest_mimic::Trial;
use rustix::process::Signal;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

use crate::agents;
use crate::scenario::{self, expect_a_lost_peer, has_nothing, on_kvm, stays_and_moves_later};

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = matrix();
    trials.extend(on_kvm![
        where_the_data_port_is_closed_grpc_is_named_and_goes,
        a_move_over_grpc_leaves_nothing_behind,
        an_abort_over_grpc_in_mid_stream_leaves_the_guest_at_the_source,
        a_destination_vmm_killed_in_mid_stream_over_grpc_leaves_the_guest_at_the_source,
        a_destination_agent_killed_in_mid_stream_over_grpc_leaves_the_guest_at_the_source,
        a_source_agent_killed_in_mid_stream_over_grpc_leaves_the_guest_at_the_source,
        a_stalled_destination_agent_over_grpc_leaves_the_guest_at_the_source,
        agents_killed_when_armed_over_grpc_leave_one_guest,
        agents_killed_at_random_moments_over_grpc_never_make_two_guests,
        pages_that_come_late_over_grpc_outlive_both_agents,
        a_stream_that_cannot_prove_the_secret_is_refused_by_name,
        a_host_that_does_not_know_it_is_named,
    ]);
    trials
}

/// One vCPU and two, one stream and four, both ways of tracking, all modes.
fn matrix() -> Vec<Trial> {
    let cells = [
        (1, "1", "log", "precopy"),
        (2, "4", "ring", "precopy"),
        (2, "4", "log", "hybrid"),
        (1, "1", "ring", "postcopy"),
    ];
    let trial = |(vcpus, streams, dirty, mode): (u32, &'static str, &'static str, &'static str)| {
        let name =
            format!("scenarios::carried::a_busy_guest_moves_over_grpc_{mode}_{vcpus}_vcpus_{streams}_streams_{dirty}");
        scenario::trial_on_kvm(&name, move |pair| {
            let witness = pair.run(&Guest::new("g").work(BUSY).vcpus(vcpus).dirty(dirty))?;
            moves(pair, &["--streams", streams, "--mode", mode], &witness)
        })
    };
    cells.into_iter().map(trial).collect()
}

const BUSY: &str = "fill=random fill_mib=48 work=uniform work_mib=24 rate=20000 heartbeat_ms=20";
const CALM: &str = "fill=random fill_mib=64 work=uniform work_mib=8 rate=1000 heartbeat_ms=20";

const GRPC: [&str; 2] = ["--transport", "grpc"];

/// There and back, each page whole.
fn moves(pair: &Pair, further: &[&str], witness: &Witness) -> Result<()> {
    for (host, other) in [(&pair.a, &pair.b), (&pair.b, &pair.a)] {
        let words = [&["migrate", "g", "--to", other.name, "--verify"][..], &GRPC, further].concat();
        let moved = host.ferry(&words)?.exit(0)?.migration()?.is("completed", other.name)?;
        ensure!(moved.record["transport"] == "grpc", "{}", moved.record);
        let seen = other
            .ferry(&["migration", "show", moved.text("id")?])?
            .exit(0)?
            .migration()?;
        ensure!(seen.record["transport"] == "grpc", "{}", seen.record);
        pair.runs_only_at(other, "g", witness)?;
    }
    Ok(())
}

/// A peer of A's whose data port nobody gets through to.
fn closed(pair: &mut Pair) -> Result<Relay> {
    let relay = Relay::before(&pair.b, Tampering::Cuts)?;
    relay.close_data_port();
    pair.a.set_peer("b", &relay.url());
    pair.a.terminate()?;
    pair.a.start()?;
    Ok(relay)
}

fn where_the_data_port_is_closed_grpc_is_named_and_goes(pair: &mut Pair) -> Result<()> {
    let _relay = closed(pair)?;
    // It writes so little that the copy ends, however slow the relay is beside others.
    let work = "fill=random fill_mib=48 work=uniform work_mib=1 rate=1000 heartbeat_ms=20";
    let witness = pair.run(&Guest::new("g").work(work))?;

    let failed = pair
        .migrate("g", &[])?
        .exit(1)?
        .says("data port")?
        .says("--transport grpc")?;

    failed.migration()?.is("failed", "a")?;
    pair.runs_only_at(&pair.a, "g", &witness)?;
    has_nothing(&pair.b)?;
    let moved = pair.migrate("g", &[&GRPC[..], &["--digests"]].concat())?.exit(0)?;
    moved.migration()?.is("completed", "b")?;
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn descriptors(process: u32) -> usize {
    let open = fs::read_dir(format!("/proc/{process}/fd"));
    open.into_iter().flatten().count()
}

/// Agents and VMMs have the same files open as before, soon.
fn a_move_over_grpc_leaves_nothing_behind(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g").work(CALM))?;
    moves(pair, &["--streams", "4"], &witness)?;
    let agents = [pair.a.pid(), pair.b.pid()].map(|pid| pid.unwrap_or_default());
    let vmm = descriptors(pair.a.vmm()?);
    let before = agents.map(descriptors);

    moves(pair, &["--streams", "4"], &witness)?;

    until("the agents have closed every stream", CALL, || {
        let now = agents.map(descriptors);
        // What the command line's calls have open comes and goes.
        Ok((now.iter().zip(&before).all(|(now, before)| now <= before)).then_some(()))
    })?;
    let left = descriptors(pair.a.vmm()?);
    ensure!(left == vmm, "{left} files are open in the VMM, {vmm} were");
    Ok(())
}

/// A migration over gRPC that takes ten seconds, in the middle of its first round.
fn begin_slow(pair: &Pair) -> Result<Underway> {
    let slow = [&GRPC[..], &["--streams", "2", "--bandwidth", "80Mbit"]].concat();
    pair.migrate_until("g", &slow, |record| {
        Ok(record.number("bytes_sent")? > f64::from(1 << 20) && record.rounds() == 0)
    })
}

fn an_abort_over_grpc_in_mid_stream_leaves_the_guest_at_the_source(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g").work(CALM))?;
    let source = pair.a.vmm()?;
    let (threads, open) = (process::threads(source), descriptors(source));
    let underway = begin_slow(pair)?;

    pair.a.ferry(&["migration", "abort", &underway.id])?.exit(0)?;

    underway.call.wait()?.exit(1)?.migration()?.is("cancelled", "a")?;
    until("the source's VMM is as it was", CALL, || {
        Ok((process::threads(source) == threads && descriptors(source) == open).then_some(()))
    })?;
    stays_and_moves_later(pair, &witness)
}

fn a_destination_vmm_killed_in_mid_stream_over_grpc_leaves_the_guest_at_the_source(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer(pair);
    let witness = pair.run(&Guest::new("g").work(CALM))?;
    let underway = begin_slow(pair)?;

    process::signal(pair.b.vmm()?, Signal::KILL)?;

    underway.call.wait()?.exit(1)?.migration()?.is("failed", "a")?;
    stays_and_moves_later(pair, &witness)
}

fn a_destination_agent_killed_in_mid_stream_over_grpc_leaves_the_guest_at_the_source(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer(pair);
    let witness = pair.run(&Guest::new("g").work(CALM))?;
    let underway = begin_slow(pair)?;

    pair.b.kill();

    underway.call.wait()?.exit(1)?.migration()?.is("failed", "a")?;
    witness.wait_for_beats_at("a", 5)?;
    pair.b.start()?;
    stays_and_moves_later(pair, &witness)
}

fn a_source_agent_killed_in_mid_stream_over_grpc_leaves_the_guest_at_the_source(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer(pair);
    let witness = pair.run(&Guest::new("g").work(CALM))?;
    let underway = begin_slow(pair)?;

    pair.a.kill();
    witness.wait_for_beats_at("a", 5)?;
    pair.a.start()?;

    pair.wait_over(&underway.id)?.is("failed", "a")?;
    stays_and_moves_later(pair, &witness)
}

fn a_stalled_destination_agent_over_grpc_leaves_the_guest_at_the_source(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer(pair);
    let witness = pair.run(&Guest::new("g").work(CALM))?;
    let underway = begin_slow(pair)?;
    let agent = pair.b.pid().context("agent b is gone")?;

    process::signal(agent, Signal::STOP)?;

    let over = underway.call.wait();
    process::signal(agent, Signal::CONT)?;
    over?.exit(1)?.migration()?.is("failed", "a")?;
    stays_and_moves_later(pair, &witness)
}

/// The streams end with the agents, and with them the attempt: nothing was handed over.
fn agents_killed_when_armed_over_grpc_leave_one_guest(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer(pair);
    let witness = pair.run(&Guest::new("g").work(CALM))?;
    let held = [&GRPC[..], &["--hold-at", "armed"]].concat();
    let armed = |pair: &Pair| -> Result<Underway> {
        pair.migrate_until("g", &held, |record| Ok(record.text("step")? == "arm"))
    };

    let underway = armed(pair)?;
    pair.a.kill();
    witness.wait_for_beats_at("a", 5)?;
    pair.a.start()?;
    pair.wait_over(&underway.id)?.is("failed", "a")?;
    pair.runs_only_at(&pair.a, "g", &witness)?;
    has_nothing(&pair.b)?;

    let underway = armed(pair)?;
    pair.b.kill();
    witness.wait_for_beats_at("a", 5)?;
    pair.b.start()?;
    pair.wait_over(&underway.id)?.is("failed", "a")?;
    stays_and_moves_later(pair, &witness)
}

fn agents_killed_at_random_moments_over_grpc_never_make_two_guests(pair: &mut Pair) -> Result<()> {
    agents::die_at_random_moments(pair, &GRPC)
}

/// The guest waits for pages while an agent is away, and goes on with other streams once it is back.
fn pages_that_come_late_over_grpc_outlive_both_agents(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer(pair);
    let witness = pair.run(&Guest::new("g").work(BUSY))?;
    let late = [&GRPC[..], &["--mode", "postcopy", "--bandwidth", "80Mbit"]].concat();
    let call = pair.begin_migrate("g", &late)?;
    let id = until("the guest runs without all of its memory", CALL, || {
        let listed = pair.a.ferry(&["migration", "list"])?.exit(0)?.json_lines()?;
        let Some(last) = listed.last() else { return Ok(None) };
        ensure!(last["status"] != "completed", "it was too fast: {last}");
        let is_late = last["status"] == "running (post-copy)" && last["guest_location"] == "b";
        Ok(last["id"].as_str().filter(|_| is_late).map(str::to_owned))
    })?;

    pair.b.kill();
    pair.b.start()?;
    witness.wait_for_beats_at("b", 10)?;
    pair.a.kill();
    pair.a.start()?;
    witness.wait_for_beats_at("b", 10)?;

    let record = pair.wait_over(&id)?.is("completed", "b")?;
    drop(call);
    ensure!(record.record["restarted_in"] == "serve", "{}", record.record);
    ensure!(record.number("late_missing")? == 0.0, "{}", record.record);
    pair.runs_only_at(&pair.b, "g", &witness)?;
    has_nothing(&pair.a)
}

fn a_stream_that_cannot_prove_the_secret_is_refused_by_name(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g").work(CALM))?;
    let underway = begin_slow(pair)?;
    let stranger = Stranger::at(&pair.b.url())?;
    let claim = |migration: &str, index| {
        Piece::Claim(StreamClaim {
            migration: migration.to_owned(),
            index,
        })
    };

    let unproven = stranger.says([claim(&underway.id, 1), Piece::Proof(vec![0x5a; 32])])?;
    is_refused(
        &unproven,
        &format!("stream 1 did not prove the secret of migration {}", underway.id),
    )?;
    let talks = [claim(&underway.id, 0), Piece::Bytes(b"FCTL".as_slice().into())];
    is_refused(&stranger.says(talks)?, "did not prove the secret")?;
    let nobody = "5f0c6a52-6d0e-4b8f-9a8b-0a7d3c1e2f40";
    is_refused(&stranger.says([claim(nobody, 0)])?, "is not expected on host b")?;
    let first = stranger.says([Piece::Proof(vec![0; 32])])?;
    ensure!(first.code() == Code::InvalidArgument, "{first}");

    underway.call.wait()?.exit(0)?.migration()?.is("completed", "b")?;
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn is_refused(status: &Status, words: &str) -> Result<()> {
    let is = status.code() == Code::FailedPrecondition && status.message().contains(words);
    ensure!(is, "{words:?} expected: {status}");
    Ok(())
}

/// Somebody who reaches an agent's port and knows no secret.
struct Stranger {
    runtime: Runtime,
    url: String,
}

impl Stranger {
    fn at(url: &str) -> Result<Self> {
        Ok(Self {
            runtime: Runtime::new()?,
            url: url.to_owned(),
        })
    }

    /// Says these one after the other, and tells what the call ended with.
    fn says<const COUNT: usize>(&self, pieces: [Piece; COUNT]) -> Result<Status> {
        let call = async {
            let mut client = StreamsClient::connect(self.url.clone()).await?;
            let (outgoing, said) = mpsc::channel(COUNT);
            for piece in pieces {
                outgoing.send(StreamPiece { piece: Some(piece) }).await?;
            }
            let mut answers = match client.carry(ReceiverStream::new(said)).await {
                Ok(answers) => answers.into_inner(),
                Err(status) => return Ok(status),
            };
            loop {
                match answers.message().await {
                    Ok(Some(_)) => {}
                    Ok(None) => anyhow::bail!("a stranger's stream ended as if it was well"),
                    Err(status) => return Ok(status),
                }
            }
        };
        self.runtime
            .block_on(async { tokio::time::timeout(CALL, call).await })?
    }
}

fn a_host_that_does_not_know_it_is_named(pair: &mut Pair) -> Result<()> {
    pair.b.arguments.extend(["--rpc-cap".to_owned(), "4.2".to_owned()]);
    pair.b.terminate()?;
    pair.b.start()?;
    let witness = pair.run(&Guest::new("g"))?;

    let told = pair.migrate("g", &GRPC)?.exit(4)?;

    told.says("RPC_VERSION")?.says("host b")?.says("--transport grpc")?;
    pair.runs_only_at(&pair.a, "g", &witness)
}
