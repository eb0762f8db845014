//! Compressed pages as they come from a peer, which may say anything.
//!
//! What a block unpacks to is bounded by its frame's table, which was checked before, and is never more than 2 MiB: that is all the memory there is for
//! it. A block that is damaged, too long, too short, or holds more or less than the table says is an error that names the frame.

use std::io::Read;

use zstd_safe::DCtx;

use super::{COMPRESSED_SUM_BYTES, Codec};
use crate::wire::FrameError;

/// What a frame says of its compressed pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Block {
    /// Of the frame, on its stream.
    pub(crate) sequence: u64,
    pub(crate) codec: Codec,
    /// Bytes on the stream, the sum too.
    pub(crate) sent: usize,
    /// Bytes of the pages that they stand for.
    pub(crate) pages: usize,
}

/// One stream's decompressor. Its buffers are there from the first compressed frame on, and never more than two frames.
#[derive(Default)]
pub(crate) struct Decompressor {
    block: Vec<u8>,
    pages: Vec<u8>,
    zstd: Option<DCtx<'static>>,
}

impl Decompressor {
    /// Reads a block and gives the pages that it stands for, or what they changed. The caller has checked both lengths against a frame's limit.
    pub(crate) fn unpack(&mut self, source: &mut impl Read, block: Block) -> Result<&mut [u8], FrameError> {
        let Block { sequence, codec, .. } = block;
        if block.sent <= COMPRESSED_SUM_BYTES || block.sent >= block.pages {
            return Err(FrameError::BlockLength {
                sequence,
                sent: block.sent as u64,
                pages: block.pages as u64,
            });
        }
        self.block.resize(block.sent, 0);
        source.read_exact(&mut self.block).map_err(FrameError::from_pages)?;
        let (sum, bytes) = self.block.split_at(COMPRESSED_SUM_BYTES);
        let computed = crc32fast::hash(bytes);
        if sum != computed.to_le_bytes() {
            return Err(FrameError::BlockChecksum { sequence, computed });
        }
        self.pages.resize(block.pages, 0);
        let fails = |reason| FrameError::Block {
            sequence,
            codec,
            pages: block.pages as u64,
            reason,
        };
        let unpacked = match codec {
            Codec::Lz4 => lz4_flex::block::decompress_into(bytes, &mut self.pages).map_err(|error| error.to_string()),
            Codec::Zstd => {
                if self.zstd.is_none() {
                    self.zstd = DCtx::try_create();
                }
                let context = self.zstd.as_mut().ok_or_else(|| fails("no memory".to_owned()))?;
                let unpacked = context.decompress(&mut self.pages[..], bytes);
                unpacked.map_err(|code| zstd_safe::get_error_name(code).to_owned())
            }
        };
        match unpacked {
            Ok(unpacked) if unpacked == block.pages => Ok(&mut self.pages),
            Ok(unpacked) => Err(fails(format!("it holds {unpacked}"))),
            Err(reason) => Err(fails(reason)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGES: usize = 16 << 12;

    fn text() -> Vec<u8> {
        (0..PAGES)
            .map(|index| b"pages of a guest, again and again; "[index % 35])
            .collect()
    }

    fn lz4(bytes: &[u8]) -> Vec<u8> {
        lz4_flex::block::compress(bytes)
    }

    fn zstd(bytes: &[u8]) -> Vec<u8> {
        let mut packed = vec![0; zstd_safe::compress_bound(bytes.len())];
        let len = zstd_safe::compress(&mut packed[..], bytes, 3).expect("there is room");
        packed.truncate(len);
        packed
    }

    fn summed(bytes: &[u8]) -> Vec<u8> {
        [&crc32fast::hash(bytes).to_le_bytes()[..], bytes].concat()
    }

    fn unpack(codec: Codec, sent: &[u8], pages: usize) -> Result<Vec<u8>, FrameError> {
        let block = Block {
            sequence: 7,
            codec,
            sent: sent.len(),
            pages,
        };
        Decompressor::default()
            .unpack(&mut &*sent, block)
            .map(|pages| pages.to_vec())
    }

    #[test]
    fn blocks_hold_what_their_table_says() {
        assert_eq!(unpack(Codec::Lz4, &summed(&lz4(&text())), PAGES).unwrap(), text());
        assert_eq!(unpack(Codec::Zstd, &summed(&zstd(&text())), PAGES).unwrap(), text());
    }

    #[test]
    fn bombs_are_refused_and_take_no_more_than_their_pages() {
        // 64 MiB of zeroes in a few KiB, in the place of 16 pages.
        let bomb = vec![0; 64 << 20];
        for (codec, bytes) in [
            (Codec::Lz4, lz4(&bomb)[..PAGES / 2].to_vec()),
            (Codec::Zstd, zstd(&bomb)),
        ] {
            let sent = summed(&bytes);
            let block = Block {
                sequence: 7,
                codec,
                sent: sent.len(),
                pages: PAGES,
            };
            let mut decompressor = Decompressor::default();
            let error = decompressor.unpack(&mut &*sent, block).unwrap_err();
            assert!(
                error.to_string().starts_with(&format!(
                    "the {codec} block of frame 7 is not its 65536 bytes of pages: "
                )),
                "{error}"
            );
            assert!(decompressor.pages.capacity() <= 2 * PAGES);
        }
    }

    #[test]
    fn blocks_that_hold_less_are_refused() {
        for (codec, bytes) in [(Codec::Lz4, lz4(&text())), (Codec::Zstd, zstd(&text()))] {
            let error = unpack(codec, &summed(&bytes), PAGES + 4096).unwrap_err();
            assert!(error.to_string().contains("it holds 65536"), "{error}");
        }
    }

    #[test]
    fn lengths_that_say_nothing_or_save_nothing_are_refused() {
        for sent in [0, COMPRESSED_SUM_BYTES, PAGES, PAGES + 1] {
            let error = unpack(Codec::Zstd, &vec![0; sent], PAGES).unwrap_err();
            assert!(matches!(error, FrameError::BlockLength { sequence: 7, .. }), "{error}");
        }
    }

    #[test]
    fn blocks_that_end_early_are_a_connection_that_broke() {
        let sent = summed(&zstd(&text()));
        let block = Block {
            sequence: 0,
            codec: Codec::Zstd,
            sent: sent.len(),
            pages: PAGES,
        };
        let error = Decompressor::default().unpack(&mut &sent[..20], block).unwrap_err();
        assert!(error.is_connection(), "{error}");
    }

    proptest! {
        #[test]
        fn a_flipped_bit_is_noticed(bit in 0usize..1000) {
            let mut sent = summed(&zstd(&text()));
            let bit = bit % (sent.len() * 8);
            sent[bit / 8] ^= 1 << (bit % 8);
            let is_noticed = matches!(unpack(Codec::Zstd, &sent, PAGES), Err(FrameError::BlockChecksum { sequence: 7, .. }));
            prop_assert!(is_noticed);
        }

        #[test]
        fn hostile_blocks_with_a_right_sum_are_pages_or_an_error(
            bytes in prop::collection::vec(any::<u8>(), 1..4000),
            pages in 1usize..=4,
        ) {
            for codec in [Codec::Lz4, Codec::Zstd] {
                if let Ok(unpacked) = unpack(codec, &summed(&bytes), pages << 12) {
                    prop_assert_eq!(unpacked.len(), pages << 12);
                }
            }
        }
    }
}
