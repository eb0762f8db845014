//! Casts from a conductor on another host that are lost, or come twice: each is one migration all the same.

use anyhow::{Result, ensure};
use ferry_rpc::faults::{Moment, Site, Word};
use ferry_tests::{Answer, Call, Guest, Host, Pair, until, waiting::CALL, waiting::MOVE};
use libtest_mimic::Trial;

use crate::gate::Gate;
use crate::scenario::{expect_a_lost_peer_and, has_nothing, on_kvm};

pub(crate) fn trials() -> Vec<Trial> {
    on_kvm![
        a_cast_that_is_lost_is_sent_again_until_it_has_a_receipt,
        a_cast_whose_receipt_is_lost_is_the_same_migration_when_it_is_sent_again,
        a_cast_that_comes_twice_is_one_migration,
        a_record_for_a_cast_of_4_0_that_is_lost_or_comes_twice_is_one_migration,
        a_source_that_dies_before_it_accepts_has_the_cast_again,
        a_source_that_dies_when_it_has_accepted_says_so_to_the_cast_that_comes_again,
    ]
}

/// A guest at A, and the agent of B, which is asked to move it, behind a gate.
fn behind_a_gate(pair: &mut Pair, further: &[&str]) -> Result<Gate> {
    expect_a_lost_peer_and(pair, &["--fault-gate"]);
    let gate = Gate::open(pair.folder())?;
    pair.b.arguments.extend(further.iter().map(|&word| word.to_owned()));
    put_behind(&gate, &mut pair.b)?;
    pair.run(&Guest::new("g"))?;
    Ok(gate)
}

/// From now on this host's agent asks there.
fn put_behind(gate: &Gate, host: &mut Host) -> Result<()> {
    let flag = ["--fault-gate".to_owned(), gate.socket().display().to_string()];
    host.arguments.extend(flag);
    host.terminate()?;
    host.start()
}

fn begin(pair: &Pair) -> Result<Call> {
    pair.b.begin(&["migrate", "g", "--to", "b"])
}

/// How often agent B has come by there, and went on.
fn times(gate: &Gate, moment: Moment, site: Site) -> usize {
    gate.story().matches(&format!("b {moment} {site};")).count()
}

/// The guest has moved, by one migration.
fn moved_once(pair: &Pair, answer: Answer) -> Result<()> {
    answer.exit(0)?.migration()?.is("completed", "b")?;
    let listed = pair.a.ferry(&["migration", "list"])?.exit(0)?.json_lines()?;
    ensure!(listed.len() == 1, "{listed:?}");
    has_nothing(&pair.a)?;
    pair.exists_only_at(&pair.b, "g")
}

/// Whether the conductor says that the source had the cast before.
fn is_a_replay(pair: &Pair) -> Result<bool> {
    let log = std::fs::read_to_string(&pair.b.log)?;
    Ok(log
        .lines()
        .any(|line| line.contains(" cast ") && line.contains("replay=true")))
}

fn a_cast_that_is_lost_is_sent_again_until_it_has_a_receipt(pair: &mut Pair) -> Result<()> {
    let gate = behind_a_gate(pair, &[])?;
    gate.lose(Moment::Before, Site::CallCast);
    let moving = begin(pair)?;
    until("the cast was lost three times", CALL, || {
        Ok((times(&gate, Moment::Before, Site::CallCast) >= 3).then_some(()))
    })?;
    let listed = pair.a.ferry(&["migration", "list"])?.exit(0)?.json_lines()?;
    ensure!(listed.is_empty(), "{listed:?}");

    gate.heal();

    moved_once(pair, moving.wait()?)?;
    ensure!(!is_a_replay(pair)?, "the source had no cast before");
    Ok(())
}

fn a_cast_whose_receipt_is_lost_is_the_same_migration_when_it_is_sent_again(pair: &mut Pair) -> Result<()> {
    let gate = behind_a_gate(pair, &[])?;
    gate.lose(Moment::After, Site::CallCast);
    let moving = begin(pair)?;
    until("two receipts were lost", CALL, || {
        Ok((times(&gate, Moment::After, Site::CallCast) >= 2).then_some(()))
    })?;

    gate.heal();

    moved_once(pair, moving.wait()?)?;
    ensure!(is_a_replay(pair)?, "the source had it");
    Ok(())
}

fn a_cast_that_comes_twice_is_one_migration(pair: &mut Pair) -> Result<()> {
    let gate = behind_a_gate(pair, &[])?;
    gate.hold(Moment::Before, Site::CallCast);
    let moving = begin(pair)?;
    ensure!(gate.wait_held(MOVE), "agent b casts nothing");

    gate.say(Word::Double);

    moved_once(pair, moving.wait()?)?;
    ensure!(is_a_replay(pair)?, "the receipt is the second one's");
    Ok(())
}

fn a_record_for_a_cast_of_4_0_that_is_lost_or_comes_twice_is_one_migration(pair: &mut Pair) -> Result<()> {
    let gate = behind_a_gate(pair, &["--rpc-cap", "4.0"])?;
    gate.lose(Moment::After, Site::CallCreate);
    let moving = begin(pair)?;
    until("two answers were lost", CALL, || {
        Ok((times(&gate, Moment::After, Site::CallCreate) >= 2).then_some(()))
    })?;
    gate.hold(Moment::Before, Site::CallCreate);
    ensure!(gate.wait_held(MOVE), "agent b does not ask again");
    gate.heal();

    gate.say(Word::Double);

    moved_once(pair, moving.wait()?)
}

fn a_source_that_dies_before_it_accepts_has_the_cast_again(pair: &mut Pair) -> Result<()> {
    let moved = killed_when_it_accepts(pair, Moment::Before)?;
    moved_once(pair, moved)?;
    ensure!(!is_a_replay(pair)?, "the source had not accepted it");
    Ok(())
}

fn a_source_that_dies_when_it_has_accepted_says_so_to_the_cast_that_comes_again(pair: &mut Pair) -> Result<()> {
    let moved = killed_when_it_accepts(pair, Moment::After)?;
    moved_once(pair, moved)?;
    ensure!(is_a_replay(pair)?, "the source had accepted it");
    Ok(())
}

/// What came of a migration whose source's agent is killed before or after it writes down that it accepts it, and is started again.
fn killed_when_it_accepts(pair: &mut Pair, moment: Moment) -> Result<Answer> {
    let gate = behind_a_gate(pair, &[])?;
    put_behind(&gate, &mut pair.a)?;
    gate.hold(moment, Site::RowAccepted);
    let moving = begin(pair)?;
    ensure!(gate.wait_held(MOVE), "agent a accepts nothing");
    pair.a.kill();
    gate.say(Word::Go);
    pair.a.start()?;
    moving.wait()
}
