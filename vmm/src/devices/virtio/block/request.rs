//! A request as the guest writes it (virtio 1.2, 5.2.6).

use vm_memory::{Bytes, GuestAddress};

use super::super::device::Broken;
use super::super::queue::Chain;
use super::SECTOR;
use crate::memory::{GuestMemory, Span, total};

/// What the guest wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Request {
    /// Read from this byte on into the data.
    Read { offset: u64, data: Vec<Span> },
    /// Write the data from this byte on.
    Write { offset: u64, data: Vec<Span> },
    /// Make all writes that were completed durable.
    Flush,
    /// Tell the serial number.
    Serial { data: Vec<Span> },
    /// These bytes are not needed any more.
    Discard(Vec<Extent>),
    /// These bytes are to read as zeroes.
    WriteZeroes(Vec<Extent>),
    /// Something that is not known here, or not possible on this disk.
    Unsupported,
    /// Something that cannot be done: outside the disk, or not in sectors.
    Impossible,
}

/// Bytes of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) offset: u64,
    pub(super) len: u64,
    /// Space may be given back.
    pub(super) unmap: bool,
}

/// Request types.
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const HEADER_BYTES: u64 = 16;
const EXTENT_BYTES: usize = 16;

/// The most extents of one request, which is what the configuration space says of discarding; it said so of zeroing, too.
pub(super) const MOST_EXTENTS: usize = 16;

impl Request {
    /// Parses a chain; also says where the status goes.
    ///
    /// # Errors
    /// A chain without room for header or status: there is nobody to tell.
    pub(super) fn parse(chain: &Chain, memory: &GuestMemory, sectors: u64) -> Result<(Self, Span), Broken> {
        let (header, rest) = split(&chain.readable, HEADER_BYTES);
        if total(&header) < HEADER_BYTES {
            return Err(Broken("a disk request has no header".to_owned()));
        }
        let room = total(&chain.writable);
        let Some(data_room) = room.checked_sub(1) else {
            return Err(Broken("a disk request has no room for its status".to_owned()));
        };
        let (data, status) = split(&chain.writable, data_room);
        let header = gather(memory, &header)?;
        let kind = u32::from_le_bytes(header[..4].try_into().expect("four bytes"));
        let sector = u64::from_le_bytes(header[8..].try_into().expect("eight bytes"));
        let inside = |spans: &[Span]| extent_of(sector, total(spans) / SECTOR, sectors).map(|extent| extent.offset);
        let whole = |spans: &[Span]| total(spans).is_multiple_of(SECTOR);
        let request = match kind {
            IN => match inside(&data).filter(|_| whole(&data)) {
                Some(offset) => Self::Read { offset, data },
                None => Self::Impossible,
            },
            OUT => match inside(&rest).filter(|_| whole(&rest)) {
                Some(offset) => Self::Write { offset, data: rest },
                None => Self::Impossible,
            },
            FLUSH => Self::Flush,
            GET_ID => Self::Serial { data },
            DISCARD => extents(memory, &rest, sectors)?.map_or(Self::Impossible, Self::Discard),
            WRITE_ZEROES => extents(memory, &rest, sectors)?.map_or(Self::Impossible, Self::WriteZeroes),
            _ => Self::Unsupported,
        };
        Ok((request, status[0]))
    }
}

/// The extents of a discard or write-zeroes request; `None` if there are too many or one is not on the disk.
fn extents(memory: &GuestMemory, spans: &[Span], sectors: u64) -> Result<Option<Vec<Extent>>, Broken> {
    if total(spans) > (MOST_EXTENTS * EXTENT_BYTES) as u64 || !total(spans).is_multiple_of(EXTENT_BYTES as u64) {
        return Ok(None);
    }
    let bytes = gather(memory, spans)?;
    let extent = |bytes: &[u8]| {
        let sector = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
        let count = u32::from_le_bytes(bytes[8..12].try_into().expect("four bytes"));
        let flags = u32::from_le_bytes(bytes[12..].try_into().expect("four bytes"));
        let extent = extent_of(sector, count.into(), sectors)?;
        Some(Extent {
            unmap: flags & 1 != 0,
            ..extent
        })
    };
    Ok(bytes.chunks_exact(EXTENT_BYTES).map(extent).collect())
}

fn extent_of(sector: u64, count: u64, sectors: u64) -> Option<Extent> {
    sector.checked_add(count).filter(|&end| end <= sectors)?;
    Some(Extent {
        offset: sector * SECTOR,
        len: count * SECTOR,
        unmap: false,
    })
}

/// The first `len` bytes of the spans, and the rest.
pub(super) fn split(spans: &[Span], len: u64) -> (Vec<Span>, Vec<Span>) {
    let (mut head, mut tail, mut left) = (Vec::new(), Vec::new(), len);
    for &span in spans {
        // Never more than the span has, so it fits.
        let taken = left.min(span.len.into()) as u32;
        left -= u64::from(taken);
        if taken > 0 {
            head.push(Span { len: taken, ..span });
        }
        if taken < span.len {
            tail.push(Span {
                address: span.address + u64::from(taken),
                len: span.len - taken,
            });
        }
    }
    (head, tail)
}

/// The bytes of spans that are known to be few.
fn gather(memory: &GuestMemory, spans: &[Span]) -> Result<Vec<u8>, Broken> {
    let mut bytes = vec![0; total(spans) as usize];
    let mut rest = &mut bytes[..];
    for span in spans {
        let (part, after) = rest.split_at_mut(span.len as usize);
        memory
            .tracked()
            .read_slice(part, GuestAddress(span.address))
            .map_err(Broken::new)?;
        rest = after;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn spans(lens: &[u32]) -> Vec<Span> {
        let mut address = 0x1000;
        let span = |&len: &u32| {
            let span = Span { address, len };
            address += u64::from(len) + 16;
            span
        };
        lens.iter().map(span).collect()
    }

    #[test]
    fn spans_are_split_inside_and_between() {
        let (head, tail) = split(&spans(&[10, 10]), 10);
        assert_eq!(
            (total(&head), tail),
            (
                10,
                vec![Span {
                    address: 0x101a,
                    len: 10
                }]
            )
        );
        let (head, tail) = split(&spans(&[10, 10]), 14);
        assert_eq!(
            head[1],
            Span {
                address: 0x101a,
                len: 4
            }
        );
        assert_eq!(
            tail,
            [Span {
                address: 0x101e,
                len: 6
            }]
        );
    }

    #[test]
    fn extents_end_with_the_disk() {
        assert_eq!(extent_of(6, 2, 8).map(|extent| extent.len), Some(1024));
        assert_eq!(extent_of(7, 2, 8), None);
        assert_eq!(extent_of(u64::MAX, 2, 8), None);
    }

    proptest! {
        #[test]
        fn a_split_loses_nothing(lens in prop::collection::vec(1u32..100, 0..8), at in 0u64..900) {
            let whole = spans(&lens);
            let (head, tail) = split(&whole, at);
            prop_assert_eq!(total(&head), at.min(total(&whole)));
            prop_assert_eq!(total(&head) + total(&tail), total(&whole));
        }
    }
}
