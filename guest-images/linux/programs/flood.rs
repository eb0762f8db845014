//! Sends as fast as it can over TCP, and reads all that comes back, so that the other end can tell how fast a card is.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::thread;

/// Large, because each system call costs much where ring 0 is emulated.
const PIECE: usize = 64 << 10;

/// Goes on until the connection breaks.
pub fn run(server: &str) -> io::Result<()> {
    let mut stream = TcpStream::connect(server)?;
    println!("FLOOD to={server}");
    let mut reading = stream.try_clone()?;
    thread::spawn(move || {
        let mut bytes = vec![0; PIECE];
        while matches!(reading.read(&mut bytes), Ok(1..)) {}
    });
    let bytes = vec![0; PIECE];
    loop {
        stream.write_all(&bytes)?;
    }
}
