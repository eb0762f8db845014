//! Frames of the page streams: a fixed header, a table of page runs, then the pages. `docs/wire.md` draws them.
//!
//! Header and table carry a checksum; pages do not, because the guest may write one while it is being sent. Compressed ones
//! were copied before, and do. A frame is at most [`MAX_RUNS`] runs and [`MAX_DATA_PAGES`] pages, and everything a peer says is checked before it is used.

mod error;
mod reader;
mod writer;

use uuid::Uuid;
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

#[cfg(any(fuzzing, test))]
use crate::compress::COMPRESSED_SUM_BYTES;
use crate::handover::Epoch;
pub use error::FrameError;
pub(super) use reader::read_or_end;
pub(crate) use reader::{FrameReader, Pages, Sums};
pub(crate) use writer::FrameWriter;

/// The most entries in a frame's table.
pub(crate) const MAX_RUNS: usize = 512;
/// The most pages whose bytes follow one table: 2 MiB.
pub(crate) const MAX_DATA_PAGES: u64 = 512;

/// The first bytes of every frame, `FPAG` in ASCII.
const MAGIC: u32 = u32::from_le_bytes(*b"FPAG");
/// The version of this layout.
const VERSION: u16 = 1;

const KIND_OPEN: u8 = 1;
const KIND_PAGES: u8 = 2;
const KIND_ASKED: u8 = 3;
const RUN_DATA: u32 = 1;
const RUN_ZERO: u32 = 2;
/// No run: in the place of a page's number, what the pages of the frame add up to.
const SUM: u32 = 3;
/// What the pages changed since they were sent last follows in the block.
const RUN_DELTA: u32 = 4;
/// In a frame that asks.
const RUN_TOUCHED: u32 = 1;
const RUN_BESIDE: u32 = 2;

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Header {
    magic: U32,
    version: U16,
    kind: u8,
    /// How the pages are compressed; 0: they are not.
    codec: u8,
    stream: U16,
    /// Entries of 16 bytes in the table.
    entries: U16,
    round: U32,
    /// Frames on this stream before this one.
    sequence: U64,
    /// Bytes after the table.
    payload: U32,
    /// CRC-32 of the header up to here and of the table.
    checksum: U32,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Entry {
    first: U64,
    count: U32,
    kind: U32,
}

/// The table of an opening frame: three entries' worth.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Opening {
    instance: [u8; 16],
    migration: [u8; 16],
    epoch: U64,
    streams: U32,
    session: U32,
}

const HEADER_BYTES: usize = size_of::<Header>();
const ENTRY_BYTES: usize = size_of::<Entry>();
const CHECKED_BYTES: usize = HEADER_BYTES - size_of::<U32>();
const OPENING_ENTRIES: u16 = 3;
const _: () = assert!(HEADER_BYTES == 32 && ENTRY_BYTES == 16);
const _: () = assert!(size_of::<Opening>() == ENTRY_BYTES * OPENING_ENTRIES as usize);

/// What a page stream says about itself in its first frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StreamIdentity {
    pub(crate) instance: Uuid,
    pub(crate) migration: Uuid,
    pub(crate) epoch: Epoch,
    pub(crate) streams: u32,
    /// Which link of the migration it is, from 0.
    pub(crate) session: u32,
}

/// What a run of a table tells about its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// Their bytes follow the table, in the table's order.
    Data,
    /// They are all zero.
    Zero,
    /// What they changed since they were sent last follows, in the table's order: the bytes that they had xor those that they have. In a block only.
    Delta,
}

/// Why pages that come late are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wish {
    /// Somebody waits for them.
    Touched,
    /// They are beside one that somebody waits for.
    Beside,
}

fn checksum(header: &Header, table: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&header.as_bytes()[..CHECKED_BYTES]);
    hasher.update(table);
    hasher.finalize()
}

/// The same bytes with the checksum of each frame in them made right, as far as they are frames: a hostile peer's sum up, too.
#[cfg(any(fuzzing, test))]
pub(crate) fn summed_up(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let mut rest = bytes.as_mut_slice();
    while let Some((frame, after)) = rest.split_at_mut_checked(HEADER_BYTES) {
        let Ok(mut header) = Header::read_from_bytes(frame) else {
            break;
        };
        let table = usize::from(header.entries.get()) * ENTRY_BYTES;
        let Some((table, pages)) = after.split_at_mut_checked(table) else {
            break;
        };
        header.checksum = checksum(&header, table).into();
        frame.copy_from_slice(header.as_bytes());
        let Some((payload, next)) = pages.split_at_mut_checked(header.payload.get() as usize) else {
            break;
        };
        if header.codec != 0
            && let Some((sum, block)) = payload.split_at_mut_checked(COMPRESSED_SUM_BYTES)
        {
            sum.copy_from_slice(&crc32fast::hash(block).to_le_bytes());
        }
        rest = next;
    }
    bytes
}

#[cfg(test)]
mod tests;
