//! Strangers at the ports: whatever they send, the agent answers its users and the guest moves.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ferry_tests::{Guest, Host, Pair, until, waiting::CALL};
use libtest_mimic::Trial;

use crate::scenario::on_kvm;

pub(crate) fn trials() -> Vec<Trial> {
    on_kvm![
        garbage_at_the_data_port_is_hung_up_on,
        a_connection_that_cannot_prove_the_secret_is_hung_up_on,
        a_silent_connection_is_hung_up_on,
        strangers_during_a_migration_change_nothing,
        garbage_at_the_api_port_changes_nothing,
    ]
}

fn garbage_at_the_data_port_is_hung_up_on(pair: &mut Pair) -> Result<()> {
    expect_strangers(pair);

    is_hung_up_on(&pair.b, &[0xff; 4096])?;

    moves(pair)
}

fn a_connection_that_cannot_prove_the_secret_is_hung_up_on(pair: &mut Pair) -> Result<()> {
    expect_strangers(pair);

    // Whatever the greeting looks like, zeros for the proof are wrong.
    is_hung_up_on(&pair.b, &[0; 512])?;
    is_hung_up_on(&pair.b, &[[1, 0, 0, 0].as_slice(), &[0; 252]].concat())?;

    moves(pair)
}

fn a_silent_connection_is_hung_up_on(pair: &mut Pair) -> Result<()> {
    expect_strangers(pair);

    is_hung_up_on(&pair.b, &[])?;

    moves(pair)
}

fn strangers_during_a_migration_change_nothing(pair: &mut Pair) -> Result<()> {
    expect_strangers(pair);
    let work = "fill=random fill_mib=48 work=uniform work_mib=8 rate=1000 heartbeat_ms=20";
    let witness = pair.run(&Guest::new("g").work(work))?;
    let call = pair.begin_migrate("g", &["--digests", "--bandwidth", "160Mbit"])?;
    until("the guest comes in", CALL, || {
        Ok((!pair.b.vmms().is_empty()).then_some(()))
    })?;

    let migration = pair.a.show("g")?["migration"]
        .as_str()
        .unwrap_or_default()
        .replace('-', "");
    let mut strangers = Vec::new();
    for index in 0..16 {
        let mut stranger = TcpStream::connect(("127.0.0.1", pair.b.data_port)).context("failed to connect")?;
        let _ = stranger.write_all(&wrong_proof(&migration, index)?);
        strangers.push(stranger);
    }

    call.wait()?.exit(0)?.migration()?.is("completed", "b")?;
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn garbage_at_the_api_port_changes_nothing(pair: &mut Pair) -> Result<()> {
    expect_strangers(pair);

    let mut stranger = TcpStream::connect(("127.0.0.1", pair.a.port)).context("failed to connect")?;
    let _ = stranger.write_all(&[0xff; 65536]);

    moves(pair)
}

/// What a page stream says of itself, with a proof by somebody who does not know the secret.
fn wrong_proof(migration: &str, index: u16) -> Result<Vec<u8>> {
    let bytes = (0..migration.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&migration[at..at + 2], 16));
    let mut claim = bytes.collect::<Result<Vec<_>, _>>()?;
    claim.extend(index.to_le_bytes());
    claim.extend([0x5a; 32]);
    Ok(claim)
}

/// Whether the agent closes a connection on which this was sent and nothing follows.
fn is_hung_up_on(host: &Host, bytes: &[u8]) -> Result<()> {
    let mut stranger = TcpStream::connect(("127.0.0.1", host.data_port)).context("failed to connect")?;
    stranger.set_read_timeout(Some(Duration::from_secs(30)))?;
    let _ = stranger.write_all(bytes);
    let mut answer = Vec::new();
    match stranger.read_to_end(&mut answer) {
        Ok(_) => {}
        Err(error) => {
            ensure!(
                error.kind() == std::io::ErrorKind::ConnectionReset,
                "the connection is still open: {error}"
            );
        }
    }
    ensure!(answer.len() < 4096, "a stranger was sent {} bytes", answer.len());
    Ok(())
}

fn moves(pair: &Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g"))?;
    pair.migrate("g", &["--digests"])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn expect_strangers(pair: &mut Pair) {
    for words in [
        "data port",
        "data connection",
        "connection",
        "secret",
        "greeting",
        "hello",
    ] {
        pair.expect_complaint(words);
    }
}
