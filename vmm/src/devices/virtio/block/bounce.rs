//! Requests whose buffers do not lie as direct I/O wants them: through a buffer that does.
//!
//! Drivers align what they transfer by the block size, a guest's user space need not.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestAddress};

use crate::memory::{GuestMemory, Span, total};

/// What every disk is content with.
const ALIGNMENT: usize = 4096;

/// At most so much is in the buffer at once.
const PIECE: usize = 1 << 20;

/// Reads from `offset` on into the spans.
pub(super) fn read(file: &File, offset: u64, memory: &GuestMemory, spans: &[Span]) -> io::Result<()> {
    let mut buffer = vec![0; PIECE.min(total(spans) as usize) + ALIGNMENT];
    let buffer = aligned(&mut buffer);
    let mut loaded: &[u8] = &[];
    let (mut offset, mut left) = (offset, total(spans));
    let mut position = 0;
    for span in spans {
        let mut done = 0;
        while done < span.len as usize {
            if position == loaded.len() {
                let size = left.min(buffer.len() as u64) as usize;
                file.read_exact_at(&mut buffer[..size], offset)?;
                (loaded, position) = (&buffer[..size], 0);
                offset += size as u64;
                left -= size as u64;
            }
            let part = (span.len as usize - done).min(loaded.len() - position);
            let address = GuestAddress(span.address + done as u64);
            let written = memory
                .tracked()
                .write_slice(&loaded[position..position + part], address);
            written.map_err(io::Error::other)?;
            (position, done) = (position + part, done + part);
        }
        if position == loaded.len() {
            (loaded, position) = (&[], 0);
        }
    }
    Ok(())
}

/// Writes the spans from `offset` on.
pub(super) fn write(file: &File, offset: u64, memory: &GuestMemory, spans: &[Span]) -> io::Result<()> {
    let mut buffer = vec![0; PIECE.min(total(spans) as usize) + ALIGNMENT];
    let buffer = aligned(&mut buffer);
    let (mut offset, mut filled) = (offset, 0);
    for span in spans {
        let mut done = 0;
        while done < span.len as usize {
            let part = (span.len as usize - done).min(buffer.len() - filled);
            let address = GuestAddress(span.address + done as u64);
            let read = memory.tracked().read_slice(&mut buffer[filled..filled + part], address);
            read.map_err(io::Error::other)?;
            (filled, done) = (filled + part, done + part);
            if filled == buffer.len() {
                file.write_all_at(buffer, offset)?;
                (offset, filled) = (offset + filled as u64, 0);
            }
        }
    }
    file.write_all_at(&buffer[..filled], offset)
}

/// The part of the buffer that begins aligned; as long as it was without the slack.
fn aligned(buffer: &mut [u8]) -> &mut [u8] {
    let skip = buffer.as_ptr().align_offset(ALIGNMENT);
    let len = buffer.len() - ALIGNMENT;
    &mut buffer[skip..skip + len]
}
