//! What a link carries: by its name, and measured.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::mpsc::{self, Sender};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use ferry_tests::{ShapedLink, shaped, until};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Bytes a second of a rate as `tc` has it, in bits: `1gbit`, `250mbit`.
///
/// # Errors
/// If it is written in another way: `tc` knows many.
pub(super) fn nominal(rate: &str) -> Result<f64> {
    let lower = rate.to_ascii_lowercase();
    let units = [("kbit", 1e3), ("mbit", 1e6), ("gbit", 1e9)];
    let found = units.iter().find_map(|(unit, bits)| {
        let number: f64 = lower.strip_suffix(unit)?.parse().ok()?;
        (number > 0.0 && number.is_finite()).then_some(number * bits / 8.0)
    });
    found.with_context(|| {
        format!("{rate:?} says in no way that is known here how much that is: write it as 1gbit or 250mbit")
    })
}

/// Bytes a second that one connection to the other side carries, when nothing else is sent.
///
/// # Errors
/// If there is no connection, or not all comes.
pub(super) fn measured(link: &ShapedLink) -> Result<f64> {
    let namespace = File::open(link.namespace()).context("failed to open the other network")?;
    let (tell, told) = mpsc::channel();
    thread::scope(|scope| {
        // A thread of its own: it does not come back from the other network.
        let receiving = scope.spawn(|| receive(&namespace, tell));
        let sent = told
            .recv()
            .context("nobody listens on the other side")
            .and_then(|port| Ok(send(port)?));
        let received = receiving.join().map_err(|_| anyhow!("the receiving thread panicked"))?;
        let (bytes, arrived) = received.context("the other side failed")?;
        let began = sent?;
        ensure!(bytes == PIECES * PIECE, "{bytes} bytes came of {}", PIECES * PIECE);
        Ok(bytes as f64 / arrived.duration_since(began).as_secs_f64())
    })
}

/// How many bytes came, and when the last one did.
fn receive(namespace: &File, port: Sender<u16>) -> Result<(usize, Instant)> {
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
        .context("failed to enter the other network")?;
    let listener = TcpListener::bind((shaped::FAR, 0)).context("failed to listen")?;
    listener.set_nonblocking(true)?;
    port.send(listener.local_addr()?.port())?;
    let mut stream = until("somebody connects", PATIENCE, || match listener.accept() {
        Ok((stream, _)) => Ok(Some(stream)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error.into()),
    })?;
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let (mut sum, mut piece) = (0, vec![0; PIECE]);
    loop {
        match stream.read(&mut piece)? {
            0 => return Ok((sum, Instant::now())),
            bytes => sum += bytes,
        }
    }
}

/// When it began to send.
fn send(port: u16) -> io::Result<Instant> {
    let mut stream = TcpStream::connect((shaped::FAR, port))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let piece = vec![0x5a; PIECE];
    let began = Instant::now();
    for _ in 0..PIECES {
        stream.write_all(&piece)?;
    }
    stream.shutdown(Shutdown::Write)?;
    Ok(began)
}

const PIECE: usize = 1 << 20;
const PIECES: usize = 64;

/// How long either side waits for the other one.
const PATIENCE: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_in_bits() {
        assert_eq!(nominal("1gbit").unwrap(), 125e6);
        assert_eq!(nominal("2.5Mbit").unwrap(), 312_500.0);
        for unclear in ["1", "1gbps", "gbit", "-1gbit", "0gbit", "nangbit"] {
            assert!(nominal(unclear).is_err(), "{unclear}");
        }
    }
}
