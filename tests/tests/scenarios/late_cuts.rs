//! Links that are cut while pages come late: at the first word and the last one, all of them or one alone, and mended at once or after a while;
//! to the data port and over gRPC.

use anyhow::{Context, Result, ensure};
use ferry_tests::messages::from_destination::{ALL_HERE, MISSING};
use ferry_tests::messages::of_one_stream::{CONTROL, PUSHED, URGENT};
use ferry_tests::waiting::CALL;
use ferry_tests::{Answer, Cut, CutPoint, Guest, Pair, Tampering, Witness, until};
use libtest_mimic::Trial;

use crate::postcopy::{BUSY, begin_with, completes};
use crate::scenario::{self, between, expect_a_lost_peer, has_nothing, on_kvm};

pub(crate) fn trials() -> Vec<Trial> {
    let by = |transport| points().into_iter().map(move |point| point.trial(transport));
    let mut trials: Vec<Trial> = by("tcp").chain(by("grpc")).collect();
    trials.extend(on_kvm![
        one_that_is_lost_before_the_handover_keeps_the_guest_here,
        one_that_is_lost_before_the_handover_over_grpc_keeps_the_guest_here,
        one_that_is_lost_before_the_handover_is_made_again,
        one_that_is_lost_before_the_handover_over_grpc_is_made_again,
        who_needs_no_page_runs_on_while_the_link_is_cut,
        one_vcpu_waits_for_a_page_and_the_other_one_works_on,
    ]);
    trials
}

/// Pages take about two seconds, and each connection has its share of them.
const MOVE: [&str; 6] = ["--mode", "postcopy", "--streams", "1", "--bandwidth", "320Mbit"];

/// Where a link is cut.
struct Point {
    name: &'static str,
    stream: u16,
    at: CutPoint,
    cut: Cut,
    /// How often another link is tried in vain before the link is mended.
    in_vain: u64,
}

fn points() -> Vec<Point> {
    let point = |name, stream, at, cut, in_vain| Point {
        name,
        stream,
        at,
        cut,
        in_vain,
    };
    let urgent = || Cut::Streams(URGENT);
    let alone = |stream| Cut::Streams(stream..=stream);
    vec![
        point(
            "all_before_the_first_word",
            CONTROL,
            CutPoint::Said(MISSING),
            Cut::All,
            0,
        ),
        point("all_at_the_first_page_asked_for", 2, CutPoint::Asked, Cut::All, 0),
        point("all_when_some_are_pushed", PUSHED, CutPoint::Frames(10), Cut::All, 0),
        point("all_for_a_while", PUSHED, CutPoint::Frames(20), Cut::All, 4),
        point("all_at_the_last_pages", PUSHED, CutPoint::Frames(40), Cut::All, 0),
        point("all_at_the_last_word", CONTROL, CutPoint::Said(ALL_HERE), Cut::All, 0),
        point(
            "urgent_ones_at_the_first_page_asked_for",
            3,
            CutPoint::Asked,
            urgent(),
            0,
        ),
        point(
            "urgent_ones_when_some_are_pushed",
            PUSHED,
            CutPoint::Frames(15),
            urgent(),
            0,
        ),
        point("one_that_pushes", PUSHED, CutPoint::Frames(12), alone(PUSHED), 0),
        point("one_that_answers", 2, CutPoint::Frames(8), alone(2), 0),
        point("the_control_stream", PUSHED, CutPoint::Frames(25), alone(CONTROL), 0),
    ]
}

impl Point {
    fn trial(self, transport: &'static str) -> Trial {
        let over = match transport {
            "tcp" => String::new(),
            other => format!("_over_{other}"),
        };
        let name = format!("scenarios::late_cuts::{}{over}", self.name);
        scenario::trial_on_kvm(&name, move |pair| self.heals(pair, transport))
    }

    fn heals(&self, pair: &mut Pair, transport: &str) -> Result<()> {
        expect_a_lost_peer(pair);
        let relay = between(
            pair,
            Tampering::CutsAt {
                stream: self.stream,
                at: self.at,
                cut: self.cut.clone(),
            },
        )?;
        let witness = pair.run(&Guest::new("g").work(BUSY).vcpus(2))?;
        let call = pair.begin_migrate("g", &[&MOVE[..], &["--transport", transport]].concat())?;

        relay.wait_tampered()?;
        if self.in_vain > 0 {
            relay.wait_tried_in_vain(self.in_vain)?;
            ensure!(pair.b.show("g")?["status"] == "running");
        }
        relay.heal();

        let moved = call.wait()?.exit(0)?.migration()?.is("completed", "b")?;
        ensure!(moved.record["transport"] == transport, "{}", moved.record);
        ensure!(
            moved.number("late_pages")? > 0.0 && moved.number("late_missing")? == 0.0,
            "{}",
            moved.record
        );
        let id = moved.record["id"].as_str().unwrap_or_default();
        completes(pair, id, &witness)
    }
}

/// Begins a move in rounds, in the first of which the idle connection is cut on which late pages are to be pushed.
fn begin_and_lose_one(pair: &mut Pair, further: &[&str]) -> Result<(Witness, Answer)> {
    expect_a_lost_peer(pair);
    let relay = between(
        pair,
        Tampering::CutsAt {
            stream: 0,
            at: CutPoint::Frames(10),
            cut: Cut::Streams(PUSHED..=PUSHED),
        },
    )?;
    let witness = pair.run(&Guest::new("g").work(BUSY).vcpus(2))?;
    // The guest writes four times what that carries, and more than that on a host that keeps it from half of it.
    let hybrid = ["--mode", "hybrid", "--streams", "1", "--bandwidth", "160Mbit"];
    let whole_pages = ["--compress", "off", "--max-downtime", "20ms"];
    let call = pair.begin_migrate("g", &[&hybrid[..], &whole_pages, further].concat())?;
    relay.wait_tampered()?;
    let ended = call.wait()?;
    Ok((witness, ended))
}

fn one_that_is_lost_before_the_handover_keeps_the_guest_here(pair: &mut Pair) -> Result<()> {
    keeps_the_guest_here(pair, "tcp")
}

fn one_that_is_lost_before_the_handover_over_grpc_keeps_the_guest_here(pair: &mut Pair) -> Result<()> {
    keeps_the_guest_here(pair, "grpc")
}

fn keeps_the_guest_here(pair: &mut Pair, transport: &str) -> Result<()> {
    let (witness, ended) = begin_and_lose_one(pair, &["--transport", transport])?;
    let failed = ended.exit(1)?.migration()?.is("failed", "a")?;
    let error = failed.record["error"].as_str().unwrap_or_default();
    ensure!(
        error.contains("a connection for late pages to the destination was lost before it was needed"),
        "{error}"
    );
    witness.wait_for_beats_at("a", 3)?;
    has_nothing(&pair.b)
}

fn one_that_is_lost_before_the_handover_is_made_again(pair: &mut Pair) -> Result<()> {
    is_made_again(pair, "tcp")
}

fn one_that_is_lost_before_the_handover_over_grpc_is_made_again(pair: &mut Pair) -> Result<()> {
    is_made_again(pair, "grpc")
}

fn is_made_again(pair: &mut Pair, transport: &str) -> Result<()> {
    let further = ["--transport", transport, "--resume-window", "2m"];
    let (witness, ended) = begin_and_lose_one(pair, &further)?;
    let moved = ended.exit(0)?.migration()?.is("completed", "b")?;
    ensure!(moved.record["resumed_links"] == 1, "{}", moved.record);
    ensure!(moved.number("late_pages")? > 0.0, "{}", moved.record);
    let id = moved.record["id"].as_str().unwrap_or_default();
    completes(pair, id, &witness)
}

fn who_needs_no_page_runs_on_while_the_link_is_cut(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer(pair);
    let relay = between(pair, Tampering::Cuts)?;
    // It touches what it beats with, and nothing else. That its memory came as it was the hosts find out.
    let idle = "fill=random fill_mib=64 work=idle check=off heartbeat_ms=20";
    let witness = pair.run(&Guest::new("g").work(idle))?;
    let underway = begin_with(pair, &["--verify"])?;
    witness.wait_for_beats_at("b", 10)?;

    relay.cut();
    relay.wait_tried_in_vain(3)?;
    let missing = || {
        let record = pair
            .a
            .ferry(&["migration", "show", &underway.id])?
            .exit(0)?
            .migration()?;
        ensure!(!record.is_over(), "it ended: {}", record.record);
        record.number("late_missing")
    };
    let before = missing()?;
    witness.wait_for_beats_at("b", 100)?;
    ensure!(before > 0.0 && missing()? == before, "pages came over a cut link");
    until("the source says that the guest waits", CALL, || {
        let record = pair
            .a
            .ferry(&["migration", "show", &underway.id])?
            .exit(0)?
            .migration()?;
        let words = record.record["decision"].as_str().unwrap_or_default();
        Ok(words.contains("waits for pages").then_some(()))
    })?;
    relay.heal();

    let moved = underway.call.wait()?.exit(0)?.migration()?.is("completed", "b")?;
    ensure!(
        moved.number("late_verified")? == moved.number("late_pages")?,
        "{}",
        moved.record
    );
    completes(pair, &underway.id, &witness)
}

/// The first vCPU writes to few pages, all of which it has soon; the second one reads one page after the other, and comes to one that is not here.
fn one_vcpu_waits_for_a_page_and_the_other_one_works_on(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer(pair);
    let relay = between(pair, Tampering::Cuts)?;
    let works = "fill=random fill_mib=64 work=uniform work_mib=1 rate=20000 writers=1 check_rate=4000 heartbeat_ms=20";
    let witness = pair.run(&Guest::new("g").work(works).vcpus(2))?;
    let underway = begin_with(pair, &[])?;
    witness.wait_for_beats_at("b", 10)?;

    relay.cut();
    relay.wait_tried_in_vain(3)?;
    let last = || {
        let beats = witness.beats();
        beats.last().map(|beat| beat.heartbeat).context("there was a heartbeat")
    };
    // It reads some 80 pages from one heartbeat to the next.
    let waits = until("the second vCPU waits", CALL, || {
        let before = last()?;
        witness.wait_for_beats_at("b", 50)?;
        let after = last()?;
        Ok((after.checked == before.checked).then_some(after))
    })?;
    witness.wait_for_beats_at("b", 50)?;
    let later = last()?;
    ensure!(
        later.checked == waits.checked,
        "it read pages over a cut link: {later:?}"
    );
    ensure!(
        later.writes > waits.writes,
        "the first vCPU stood still as well: {later:?}"
    );
    relay.heal();

    until("the second vCPU reads on", CALL, || {
        Ok((last()?.checked > later.checked).then_some(()))
    })?;
    underway.call.wait()?.exit(0)?;
    completes(pair, &underway.id, &witness)
}
