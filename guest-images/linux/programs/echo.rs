//! Sends back every number that it receives over TCP, so that the other end can tell loss, doubling and silence.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;

/// Serves for ever, each connection on a thread of its own.
pub fn run(port: u16) -> io::Result<()> {
    let listener = TcpListener::bind(("0.0.0.0", port))?;
    println!("ECHO port={port}");
    loop {
        let (stream, peer) = listener.accept()?;
        thread::spawn(move || {
            println!("ECHO from={peer}");
            match serve(&stream) {
                Ok(count) => println!("ECHO over n={count}"),
                Err(error) => println!("ECHO failed {error}"),
            }
        });
    }
}

/// Echoes numbers of 8 bytes until the other end closes; they must ascend by one.
fn serve(mut stream: &TcpStream) -> io::Result<u64> {
    stream.set_nodelay(true)?;
    let mut count = 0;
    let mut expected = None;
    let mut bytes = [0; 8];
    loop {
        match stream.read_exact(&mut bytes) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(count),
            other => other?,
        }
        let number = u64::from_le_bytes(bytes);
        if expected.is_some_and(|expected| expected != number) {
            return Err(io::Error::other(format!("{number} does not follow")));
        }
        expected = Some(number.wrapping_add(1));
        count += 1;
        stream.write_all(&bytes)?;
    }
}
