//! Which pages a memory image holds, piece by piece, and what they sum up to: plain numbers.
//!
//! Layout, little-endian: the magic, the version (u32), the size of a piece in bytes (u32); then for each piece of the shape, ascending, the
//! digest of its pages (XXH3, 128 bits) and one bit for each page, the lowest first, that says whether the image holds it. Pages that it
//! does not hold are zeroes.

use thiserror::Error;

use super::shape::{FrameRun, MemoryShape, PAGE_SIZE, push_run};

/// How much of memory has one digest: what a processor's own cache holds, and little to read again.
pub(super) const PIECE_SIZE: u64 = 1 << 20;
const PIECE_PAGES: u64 = PIECE_SIZE / PAGE_SIZE;
const WORDS: usize = (PIECE_PAGES / 64) as usize;

const MAGIC: [u8; 8] = *b"FERRYMEM";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 16;
const DIGEST_BYTES: usize = 16;
const RECORD_BYTES: usize = DIGEST_BYTES + WORDS * 8;

/// Why bytes are not the table of a memory image.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum TableError {
    /// They do not begin as a table does.
    #[error("decode the table of pieces: it is none")]
    NoTable,
    /// It was written in a way that is not read here.
    #[error(
        "decode the table of pieces: it is of version {version} with pieces of {piece_bytes} bytes, known is version 1 with 1048576"
    )]
    Unknown {
        /// Its version.
        version: u32,
        /// The size of its pieces.
        piece_bytes: u32,
    },
    /// It is of a guest with more or less memory.
    #[error("decode the table of pieces: it has {found} bytes, {expected} are of a guest with this memory")]
    Size {
        /// How long it is.
        found: usize,
        /// How long it must be.
        expected: usize,
    },
    /// It has pages where the guest has none.
    #[error("decode the table of pieces: piece {0} has pages beyond its end")]
    BeyondEnd(usize),
}

/// The table of a memory image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PieceTable {
    pub(super) pieces: Vec<Piece>,
}

/// One piece.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Piece {
    /// A bit for each page that the image holds.
    present: [u64; WORDS],
    /// Of those pages, one after the other.
    pub(super) digest: u128,
}

impl Piece {
    /// The image holds the pages of `run`, which lies inside the piece `frames`.
    pub(super) fn insert(&mut self, frames: FrameRun, run: FrameRun) {
        for frame in run.first..run.end() {
            let page = frame - frames.first;
            self.present[(page / 64) as usize] |= 1 << (page % 64);
        }
    }

    /// The pages that the image holds of the piece `frames`, ascending.
    pub(super) fn runs(&self, frames: FrameRun) -> Vec<FrameRun> {
        let mut runs = Vec::new();
        for page in (0..frames.count).filter(|page| self.present[(page / 64) as usize] >> (page % 64) & 1 == 1) {
            push_run(
                &mut runs,
                FrameRun {
                    first: frames.first + page,
                    count: 1,
                },
            );
        }
        runs
    }

    /// How many pages the image holds of it.
    pub(super) fn pages(&self) -> u64 {
        self.present.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    fn has_pages_from(&self, count: u64) -> bool {
        (count..PIECE_PAGES).any(|page| self.present[(page / 64) as usize] >> (page % 64) & 1 == 1)
    }
}

/// The pieces of a shape, ascending: each region from its start on, the last one of a region as long as what is left.
pub(super) fn pieces_of(shape: &MemoryShape) -> Vec<FrameRun> {
    let of_region = |region: FrameRun| {
        (region.first..region.end())
            .step_by(PIECE_PAGES as usize)
            .map(move |first| FrameRun {
                first,
                count: PIECE_PAGES.min(region.end() - first),
            })
    };
    shape.runs().into_iter().flat_map(of_region).collect()
}

impl PieceTable {
    /// How many pages the image holds.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pieces.iter().map(Piece::pages).sum()
    }

    /// How long the table of a guest with this memory is, in bytes.
    #[must_use]
    pub fn len_for(shape: &MemoryShape) -> usize {
        HEADER_BYTES + pieces_of(shape).len() * RECORD_BYTES
    }

    /// Encodes it.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_BYTES + self.pieces.len() * RECORD_BYTES);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend((PIECE_SIZE as u32).to_le_bytes());
        for Piece { present, digest } in &self.pieces {
            bytes.extend(digest.to_le_bytes());
            present.iter().for_each(|word| bytes.extend(word.to_le_bytes()));
        }
        bytes
    }

    /// Decodes the table of a guest whose memory has this shape.
    ///
    /// # Errors
    ///
    /// If it is no such table.
    pub fn from_bytes(bytes: &[u8], shape: &MemoryShape) -> Result<Self, TableError> {
        let (header, records) = bytes.split_at_checked(HEADER_BYTES).ok_or(TableError::NoTable)?;
        let rest = header.strip_prefix(&MAGIC).ok_or(TableError::NoTable)?;
        let (version, piece_bytes) = (number(&rest[..4]), number(&rest[4..]));
        if (version, u64::from(piece_bytes)) != (VERSION, PIECE_SIZE) {
            return Err(TableError::Unknown { version, piece_bytes });
        }
        let (found, expected) = (bytes.len(), Self::len_for(shape));
        if found != expected {
            return Err(TableError::Size { found, expected });
        }
        let pieces = records
            .chunks_exact(RECORD_BYTES)
            .zip(pieces_of(shape))
            .enumerate()
            .map(|(index, (record, frames))| {
                let piece = Piece::from_record(record);
                if piece.has_pages_from(frames.count) {
                    return Err(TableError::BeyondEnd(index));
                }
                Ok(piece)
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { pieces })
    }
}

impl Piece {
    /// Of exactly a record's bytes.
    fn from_record(record: &[u8]) -> Self {
        let (digest, words) = record.split_at(DIGEST_BYTES);
        let mut present = [0; WORDS];
        for (word, bytes) in present.iter_mut().zip(words.chunks_exact(8)) {
            *word = u64::from_le_bytes(bytes.try_into().expect("chunks of eight"));
        }
        Self {
            present,
            digest: u128::from_le_bytes(digest.try_into().expect("split there")),
        }
    }
}

/// Of exactly four bytes.
fn number(bytes: &[u8]) -> u32 {
    u32::from_le_bytes(bytes.try_into().expect("four bytes of a header"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Two regions, the second one page longer than a piece.
    fn shape() -> MemoryShape {
        MemoryShape::from_size((3 << 30) + PIECE_SIZE + PAGE_SIZE)
    }

    fn table(shape: &MemoryShape) -> PieceTable {
        let pieces = pieces_of(shape);
        let mut table = PieceTable {
            pieces: vec![Piece::default(); pieces.len()],
        };
        let run = FrameRun {
            first: pieces[1].first + 63,
            count: 3,
        };
        table.pieces[1].insert(pieces[1], run);
        table.pieces[1].digest = 7 << 100;
        table
    }

    #[test]
    fn pieces_cover_the_shape() {
        let pieces = pieces_of(&shape());
        assert_eq!(pieces.len(), 3074);
        let last = FrameRun {
            first: (4 << 30) / PAGE_SIZE + PIECE_PAGES,
            count: 1,
        };
        assert_eq!(pieces.last(), Some(&last));
    }

    #[test]
    fn bytes_survive_decoding() {
        let table = table(&shape());
        let bytes = table.to_bytes();
        assert_eq!(bytes.len(), PieceTable::len_for(&shape()));
        assert_eq!(PieceTable::from_bytes(&bytes, &shape()), Ok(table.clone()));
        assert_eq!(table.pages(), 3);
        let frames = pieces_of(&shape())[1];
        let run = FrameRun {
            first: frames.first + 63,
            count: 3,
        };
        assert_eq!(table.pieces[1].runs(frames), [run]);
    }

    #[test]
    fn the_layout_is_the_documented_one() {
        let bytes = table(&MemoryShape::from_size(2 * PIECE_SIZE)).to_bytes();
        assert_eq!(&bytes[..16], b"FERRYMEM\x01\0\0\0\0\0\x10\0");
        let second = &bytes[16 + 48..];
        assert_eq!((second[12], second[16 + 7], second[16 + 8]), (7 << 4, 0x80, 0b11));
    }

    #[test]
    fn what_is_no_table_of_this_memory_is_refused() {
        let small = MemoryShape::from_size(2 * PIECE_SIZE);
        let bytes = table(&small).to_bytes();
        let refused = |bytes: &[u8], shape: &MemoryShape| PieceTable::from_bytes(bytes, shape).expect_err("refused");
        assert_eq!(refused(&bytes[..15], &small), TableError::NoTable);
        assert_eq!(refused(&[b'x'; 112], &small), TableError::NoTable);
        assert!(matches!(
            refused(&bytes[..111], &small),
            TableError::Size {
                found: 111,
                expected: 112
            }
        ));
        assert!(matches!(refused(&bytes, &shape()), TableError::Size { .. }));
        let mut newer = bytes.clone();
        newer[8] = 2;
        assert!(matches!(
            refused(&newer, &small),
            TableError::Unknown { version: 2, .. }
        ));
        let shorter = MemoryShape::from_size(2 * PIECE_SIZE - PAGE_SIZE);
        let mut beyond = bytes;
        beyond[111] = 0x80;
        assert_eq!(refused(&beyond, &shorter), TableError::BeyondEnd(1));
    }

    proptest! {
        /// Whatever is in the file, it is a table or it is refused; one that is taken is what was written.
        #[test]
        fn any_bytes_are_decoded_or_refused(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), is_one in any::<bool>()) {
            let shape = MemoryShape::from_size(PIECE_SIZE + PAGE_SIZE);
            if is_one {
                let whole = table(&shape).to_bytes();
                bytes.resize(whole.len(), 0);
                bytes[..16].copy_from_slice(&whole[..16]);
            }
            if let Ok(table) = PieceTable::from_bytes(&bytes, &shape) {
                prop_assert_eq!(table.to_bytes(), bytes);
            }
        }
    }
}
