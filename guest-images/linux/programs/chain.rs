//! Records that cover each other: each holds the sum of the one before, so that a record which is lost, doubled, old or
//! damaged is found by whoever reads them in order.
//!
//! ```text
//!   0     magic             8 bytes
//!   8     sequence number   from 0
//!   16    sum of the record before, 0 in the first
//!   24    filling           made from the sequence number
//!   4088  sum of all that
//! ```

use std::fmt;
use std::io::{self, Read};

/// Bytes of a record: a page, and a block of the file system.
pub const RECORD_BYTES: usize = 4096;

const MAGIC: u64 = u64::from_le_bytes(*b"FerryRec");
const SUM_AT: usize = RECORD_BYTES - 8;

/// Where a chain ends: what the next record will say of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct End {
    /// How many records there are.
    pub records: u64,
    /// The sum of the last one.
    pub sum: u64,
}

/// A chain that does not hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Broken {
    /// Which record, counted by where it lies.
    pub record: u64,
    /// What is wrong with it.
    pub why: &'static str,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.record, self.why)
    }
}

impl End {
    /// Makes the next record.
    pub fn append(&mut self) -> [u8; RECORD_BYTES] {
        let mut record = [0; RECORD_BYTES];
        let mut filling = self.records;
        for (index, word) in record.chunks_exact_mut(8).enumerate() {
            let value = match index {
                0 => MAGIC,
                1 => self.records,
                2 => self.sum,
                _ => {
                    filling = mix(filling.wrapping_add(index as u64));
                    filling
                }
            };
            word.copy_from_slice(&value.to_le_bytes());
        }
        let sum = sum(&record);
        record[SUM_AT..].copy_from_slice(&sum.to_le_bytes());
        *self = Self {
            records: self.records + 1,
            sum,
        };
        record
    }

    /// Takes the next record that was read.
    ///
    /// # Errors
    /// If it is not the next.
    pub fn follow(&mut self, record: &[u8; RECORD_BYTES]) -> Result<(), Broken> {
        let word = |at: usize| u64::from_le_bytes(record[at..at + 8].try_into().expect("eight bytes"));
        let broken = |why| {
            Err(Broken {
                record: self.records,
                why,
            })
        };
        if word(0) != MAGIC {
            return broken("no record");
        }
        if word(SUM_AT) != sum(record) {
            return broken("damaged");
        }
        if word(8) != self.records {
            return broken("another record's place");
        }
        if word(16) != self.sum {
            return broken("follows another record");
        }
        *self = Self {
            records: self.records + 1,
            sum: word(SUM_AT),
        };
        Ok(())
    }
}

/// Reads a chain to its end. What is less than a record at the end was never acknowledged and does not count.
///
/// # Errors
/// If it cannot be read.
pub fn verify(mut chain: impl Read) -> io::Result<Result<End, Broken>> {
    let mut end = End::default();
    let mut record = [0; RECORD_BYTES];
    loop {
        match chain.read_exact(&mut record) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(Ok(end)),
            other => other?,
        }
        if let Err(broken) = end.follow(&record) {
            return Ok(Err(broken));
        }
    }
}

/// Of everything before the sum's own place.
fn sum(record: &[u8; RECORD_BYTES]) -> u64 {
    record[..SUM_AT].chunks_exact(8).fold(MAGIC, |sum, word| {
        mix(sum ^ u64::from_le_bytes(word.try_into().expect("eight bytes")))
    })
}

/// Spreads every bit over all bits: the finalizer of SplitMix64.
fn mix(value: u64) -> u64 {
    let value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ value >> 31
}
