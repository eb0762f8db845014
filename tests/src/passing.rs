//! What a relay does with the bytes that pass: reads them as frames, and passes them on.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};

/// Computes the checksum of a frame's header and table anew, for a change that is about something else.
pub fn reseal(frame: &mut [u8]) {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&frame[..CHECKED]);
    hasher.update(&frame[HEADER..]);
    frame[CHECKED..HEADER].copy_from_slice(&hasher.finalize().to_le_bytes());
}

/// The same for a message of the control stream. One that has no checksum, as a very long one, stays as it is.
pub fn reseal_message(message: &mut [u8]) {
    if let Some((said, sum)) = message.split_last_chunk_mut()
        && let Some(said) = said.strip_suffix(&MESSAGE_SUM_KEY)
    {
        *sum = crc32fast::hash(said).to_le_bytes();
    }
}

/// Bytes of a frame's header.
pub const HEADER: usize = 32;
/// Bytes of it before its checksum.
const CHECKED: usize = 28;
/// Bytes of an entry of a frame's table.
pub(crate) const ENTRY: usize = 16;

/// Magic number and length before a message of the control stream.
pub(crate) const MESSAGE_HEADER: usize = 8;
/// Of a message's last field, its checksum: the key; four bytes follow.
const MESSAGE_SUM_KEY: [u8; 5] = [0xed, 0xc4, 0xe7, 0x8a, 0x0d];

/// Passes on exactly so many bytes, and tells them.
pub(crate) fn pass_bytes<const COUNT: usize>(mut from: &TcpStream, mut to: &TcpStream) -> io::Result<[u8; COUNT]> {
    let mut bytes = [0; COUNT];
    from.read_exact(&mut bytes)?;
    to.write_all(&bytes)?;
    Ok(bytes)
}

/// Header and table of the next frame, and how many bytes of pages follow.
pub(crate) fn read_frame(mut from: &TcpStream) -> io::Result<(Vec<u8>, u64)> {
    let mut frame = vec![0; HEADER];
    from.read_exact(&mut frame)?;
    let pages = read_u32(&frame, 24);
    frame.resize(HEADER + entries(&frame) * ENTRY, 0);
    from.read_exact(&mut frame[HEADER..])?;
    Ok((frame, pages as u64))
}

/// How many entries the table has of a frame with this header.
pub(crate) fn entries(header: &[u8]) -> usize {
    usize::from(u16::from_le_bytes([header[10], header[11]]))
}

/// The next message of a control stream, with magic number and length.
pub(crate) fn read_message(mut from: &TcpStream) -> io::Result<Vec<u8>> {
    let mut message = vec![0; MESSAGE_HEADER];
    from.read_exact(&mut message)?;
    message.resize(MESSAGE_HEADER + read_u32(&message, 4), 0);
    from.read_exact(&mut message[MESSAGE_HEADER..])?;
    Ok(message)
}

/// Whether a message of a control stream says what has this field's number: each says one thing, and a message in a field has a length.
pub(crate) fn says(message: &[u8], field: u32) -> bool {
    let mut tag = field << 3 | 2;
    for &byte in &message[MESSAGE_HEADER..] {
        let more = u8::from(tag > 0x7f) << 7;
        if byte != more | (tag & 0x7f) as u8 {
            return false;
        }
        tag >>= 7;
        if tag == 0 {
            return true;
        }
    }
    false
}

pub(crate) fn read_u32(bytes: &[u8], at: usize) -> usize {
    let four = bytes[at..at + 4].try_into().expect("four bytes are four bytes");
    u32::from_le_bytes(four) as usize
}

pub(crate) fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    bytes.windows(wanted.len()).position(|window| window == wanted)
}

/// Passes bytes on until either side ends, and then ends the other.
pub(crate) fn pump(mut from: &TcpStream, mut to: &TcpStream, mut change: impl FnMut(&mut [u8])) {
    let mut buffer = vec![0; 256 << 10];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => {
                change(&mut buffer[..read]);
                if to.write_all(&buffer[..read]).is_err() {
                    let _ = from.shutdown(Shutdown::Both);
                    break;
                }
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => {
                let _ = to.shutdown(Shutdown::Both);
                break;
            }
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}
