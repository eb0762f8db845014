//! What a guest may have of its host: how fast its network card is, and how much memory it keeps.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use ferry_tests::linux::{BOOT, Linux, carry_out, wait_printed};
use ferry_tests::waiting::CALL;
use ferry_tests::{Pair, until};
use libtest_mimic::Trial;
use rustix::net::sockopt::set_socket_send_buffer_size;
use serde_json::Value;

use crate::scenario::{in_a_network, ip};

pub(crate) fn trials() -> Vec<Trial> {
    in_a_network![a_limited_card_moves_less_than_another_here_and_there]
}

/// The limit of the slow card, as it is written and in bytes a second.
const RATE: &str = "64Kbit";
const RATE_BYTES: f64 = 8_000.0;
/// What a card that was idle may move at once: so much is not looked at. A frame that begins in time may be as long.
const BURST: u64 = 65_562;

fn a_limited_card_moves_less_than_another_here_and_there(pair: &mut Pair) -> Result<()> {
    let ends = [End::make("br0", "10.9.0.1")?, End::make("br1", "10.8.0.1")?];
    Linux::new("g")?
        .nic("bridge=br0")
        .nic(&format!("bridge=br1,rate={RATE}"))
        .words("ferry.ip=10.9.0.2/24")
        .run(&pair.a)?;
    ensure!(pair.a.show("g")?["nics"][1]["rate_bytes_per_s"] == RATE_BYTES as u64);
    wait_printed(&pair.a, "ECHO port=7000", 1, BOOT)?;
    let type_in = |line: &str| carry_out(&pair.a, "g", line, BOOT);
    type_in("$b ip addr add 10.8.0.2/24 dev eth1")?;
    type_in("$b ip link set eth1 up")?;
    type_in("ferry-guest flood 10.9.0.1:7001 &")?;
    type_in("ferry-guest flood 10.8.0.1:7001 &")?;
    let _talks = ends.into_iter().map(End::talk).collect::<Result<Vec<_>>>()?;

    is_slower()?;

    pair.migrate("g", &[])?.exit(0)?.migration()?.is("completed", "b")?;
    ensure!(pair.b.show("g")?["nics"][1]["rate_bytes_per_s"] == RATE_BYTES as u64);
    is_slower()
}

/// Each way the slow card moves what its rate allows, and the other card several times as much in the same time.
fn is_slower() -> Result<()> {
    until("one tap is on each bridge", CALL, || {
        Ok((moved("br0").is_ok() && moved("br1").is_ok()).then_some(()))
    })?;
    wait_moved("br1", moved("br1")?, BURST * 3 / 2)?;
    let began = Instant::now();
    let (fast, slow) = (moved("br0")?, moved("br1")?);
    wait_moved("br1", slow, 2 * BURST)?;
    let (fast, slow) = (since(fast, moved("br0")?), since(slow, moved("br1")?));
    let allowed = RATE_BYTES * began.elapsed().as_secs_f64() + BURST as f64;
    eprintln!("limited {slow:?} of {allowed:.0}, unlimited {fast:?}");
    for way in slow {
        ensure!(
            way as f64 <= allowed,
            "the limited card moved {slow:?} bytes, the rate allows {allowed:.0} each way"
        );
    }
    let total = |ways: [u64; 2]| ways.iter().sum::<u64>();
    ensure!(
        total(fast) > 3 * total(slow),
        "the limited card moved {slow:?} bytes, the other one only {fast:?}"
    );
    Ok(())
}

/// Waits until so many more bytes went each way over the card on this bridge.
fn wait_moved(bridge: &str, from: [u64; 2], bytes: u64) -> Result<()> {
    let what = format!("{bytes} bytes go each way over the card on {bridge}");
    until(&what, BOOT, || {
        Ok(since(from, moved(bridge)?)
            .iter()
            .all(|&moved| moved > bytes)
            .then_some(()))
    })
}

/// Bytes that the guest sent and received by its card on this bridge, as the kernel counts them at the tap.
fn moved(bridge: &str) -> Result<[u64; 2]> {
    let shown: Value = serde_json::from_str(&ip(&["-json", "-statistics", "link", "show", "master", bridge])?)?;
    let ports: Vec<&Value> = shown
        .as_array()
        .into_iter()
        .flatten()
        .filter(|port| port["ifname"].is_string())
        .collect();
    ensure!(ports.len() == 1, "{shown}");
    let bytes = |way: &str| ports[0]["stats64"][way]["bytes"].as_u64();
    bytes("rx")
        .zip(bytes("tx"))
        .map(|(sent, received)| [sent, received])
        .with_context(|| shown.to_string())
}

fn since(before: [u64; 2], now: [u64; 2]) -> [u64; 2] {
    [now[0].saturating_sub(before[0]), now[1].saturating_sub(before[1])]
}

/// The host's end of a network: it waits for one connection.
struct End(TcpListener);

impl End {
    /// A bridge with an address, and a server at it.
    fn make(bridge: &str, address: &str) -> Result<Self> {
        ip(&["link", "add", bridge, "type", "bridge"])?;
        ip(&["address", "add", &format!("{address}/24"), "dev", bridge])?;
        ip(&["link", "set", bridge, "up"])?;
        Ok(Self(TcpListener::bind((address, 7001))?))
    }

    /// Takes the connection, sends as fast as it can and reads all that comes.
    fn talk(self) -> Result<Talk> {
        self.0.set_nonblocking(true)?;
        let stream = until("the guest connects", CALL, || match self.0.accept() {
            Ok((stream, _)) => Ok(Some(stream)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error.into()),
        })?;
        stream.set_nonblocking(false)?;
        // What waits at a slow card is old before it gets there.
        set_socket_send_buffer_size(&stream, 64 << 10)?;
        let (mut reading, mut writing) = (stream.try_clone()?, stream.try_clone()?);
        let threads = [
            thread::spawn(move || {
                let mut bytes = [0; 1 << 16];
                while matches!(reading.read(&mut bytes), Ok(1..)) {}
            }),
            thread::spawn(move || while writing.write_all(&[0; 1 << 14]).is_ok() {}),
        ];
        Ok(Talk {
            stream,
            threads: Some(threads),
        })
    }
}

/// A connection that is in use until it is dropped.
struct Talk {
    stream: TcpStream,
    threads: Option<[JoinHandle<()>; 2]>,
}

impl Drop for Talk {
    fn drop(&mut self) {
        let _ = self.stream.shutdown(Shutdown::Both);
        for thread in self.threads.take().into_iter().flatten() {
            let _ = thread.join();
        }
    }
}
