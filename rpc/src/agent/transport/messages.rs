//! The messages of a call of `Streams.Carry`, without a copy of what they carry.
//!
//! ```text
//!   0 · length (4, big-endian) · 0x2a · length (varint) · what the VMM said     StreamPiece { bytes }, as gRPC has it
//! ```
//!
//! What is generated from the `.proto` writes and reads the same, and copies each byte twice on either side. Here what was read off a socket gets its
//! head in place, and what comes is handed on in the parts in which it came, each piece long before its end. All other pieces are
//! short, and are what is generated.

use std::sync::{Arc, Mutex, PoisonError};

use ferry_proto::agent::v1::StreamPiece;
use ferry_proto::agent::v1::stream_piece::Piece;
use prost::Message;
use prost::bytes::{Buf, BufMut, Bytes, BytesMut};

use super::piece;

/// The most bytes of one piece: about what a socket's buffer holds.
pub(super) const PIECE: usize = 256 << 10;

/// gRPC's own: not compressed, and a length.
const PREFIX: usize = 5;
/// The tag of `StreamPiece.bytes`: field 5, a length and so many bytes.
const BYTES: u8 = 5 << 3 | 2;
/// The tag, and the length of the longest piece.
const FIELD: usize = 1 + 3;
/// What is before the bytes of a piece at most.
const HEAD: usize = PREFIX + FIELD;

const _: () = assert!(PIECE < 1 << 21, "a varint of three bytes");

/// The longest message with its prefix.
pub(super) const LONGEST: usize = HEAD + PIECE;

/// A message of so many bytes is read as a whole, whatever is in it; a longer one is a piece of bytes.
const SHORT: usize = 1 << 10;

/// Buffers that wait to be used again.
const KEPT: usize = 8;

/// One piece as a message.
pub(super) fn message(what: Piece) -> Bytes {
    let what = piece(what);
    let length = what.encoded_len();
    let mut message = BytesMut::with_capacity(PREFIX + length);
    message.put_u8(0);
    message.put_u32(length as u32);
    message.extend_from_slice(&what.encode_to_vec());
    message.freeze()
}

/// Room for what is read off a socket, used again and again: to touch new memory takes longer than to copy into it.
#[derive(Clone, Debug, Default)]
pub(super) struct Rooms(Arc<Mutex<Vec<Box<[u8]>>>>);

impl Rooms {
    /// Room for one piece.
    pub(super) fn room(&self) -> Room {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        Room {
            bytes: kept.unwrap_or_else(|| vec![0; LONGEST].into()),
            home: self.clone(),
        }
    }
}

/// Room for one piece, and for what is before it in its message.
#[derive(Debug)]
pub(super) struct Room {
    bytes: Box<[u8]>,
    home: Rooms,
}

impl Room {
    /// Where the piece belongs.
    pub(super) fn space(&mut self) -> &mut [u8] {
        &mut self.bytes[HEAD..]
    }

    /// The message with the first so many bytes of it. The room is free again once it is sent.
    pub(super) fn message(mut self, length: usize) -> Bytes {
        let mut head = [0; HEAD];
        let mut rest = &mut head[PREFIX..];
        rest.put_u8(BYTES);
        prost::encoding::encode_varint(length as u64, &mut rest);
        let field = FIELD - rest.len();
        head[1..PREFIX].copy_from_slice(&((field + length) as u32).to_be_bytes());
        let head = &head[..PREFIX + field];
        let begin = HEAD - head.len();
        self.bytes[begin..HEAD].copy_from_slice(head);
        Bytes::from_owner(self).slice(begin..HEAD + length)
    }
}

impl AsRef<[u8]> for Room {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let mut kept = self.home.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() < KEPT {
            kept.push(std::mem::take(&mut self.bytes));
        }
    }
}

/// What comes in a call.
#[derive(Debug)]
pub(super) enum Heard {
    /// Something of a piece of bytes, in their order.
    Bytes(Bytes),
    /// Any other piece.
    Word(Piece),
}

/// It is no message of a stream.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Malformed {
    #[error("a compressed message")]
    Compressed,
    #[error("too large a piece")]
    TooLarge,
    #[error("an empty message")]
    Empty,
    #[error("a message that is no piece")]
    NoPiece,
}

/// Reads messages out of the parts in which they come. No more than a short message is collected.
#[derive(Debug, Default)]
pub(super) struct Reading {
    /// What is not looked at yet.
    part: Bytes,
    /// The beginning of a message, as far as it has come.
    begun: Vec<u8>,
    /// Bytes of the present piece that are still to come.
    left: usize,
}

impl Reading {
    /// What came next. Whatever came before has been read.
    pub(super) fn take_in(&mut self, part: Bytes) {
        self.part = part;
    }

    /// What is there by now.
    ///
    /// # Errors
    /// It is no message of a stream; what follows is not to be read.
    pub(super) fn next(&mut self) -> Result<Option<Heard>, Malformed> {
        while self.left == 0 {
            let wanted = self.wanted()?;
            let missing = wanted - self.begun.len();
            let here = missing.min(self.part.len());
            self.begun.extend_from_slice(&self.part[..here]);
            self.part.advance(here);
            if here < missing {
                return Ok(None);
            }
            if let Some(heard) = self.begin()? {
                return Ok(Some(heard));
            }
        }
        let here = self.left.min(self.part.len());
        self.left -= here;
        Ok((here > 0).then(|| Heard::Bytes(self.part.split_to(here))))
    }

    /// How much of a message must be there to go on with it.
    fn wanted(&self) -> Result<usize, Malformed> {
        match self.length()? {
            None => Ok(PREFIX),
            Some(length) if length <= SHORT => Ok(PREFIX + length),
            Some(_) => Ok(HEAD),
        }
    }

    /// The length that the message says it has, if it has said so.
    fn length(&self) -> Result<Option<usize>, Malformed> {
        let Some((&[compressed, ref length @ ..], _)) = self.begun.split_first_chunk::<PREFIX>() else {
            return Ok(None);
        };
        if compressed != 0 {
            return Err(Malformed::Compressed);
        }
        let length = u32::from_be_bytes(*length) as usize;
        if length > FIELD + PIECE {
            return Err(Malformed::TooLarge);
        }
        Ok(Some(length))
    }

    /// What as much of a message as was wanted amounts to; nothing, if it is its prefix alone.
    fn begin(&mut self) -> Result<Option<Heard>, Malformed> {
        let Some(length) = self.length()? else { return Ok(None) };
        if length <= SHORT {
            // The prefix alone may have been wanted before the length was known.
            if self.begun.len() < PREFIX + length {
                return Ok(None);
            }
            let read = StreamPiece::decode(&self.begun[PREFIX..]).map_err(|_| Malformed::NoPiece)?;
            self.begun.clear();
            return match read.piece.ok_or(Malformed::Empty)? {
                Piece::Bytes(bytes) => Ok(Some(Heard::Bytes(bytes))),
                word => Ok(Some(Heard::Word(word))),
            };
        }
        if self.begun.len() < HEAD {
            return Ok(None);
        }
        let mut field = &self.begun[PREFIX..];
        let is_bytes = field.get_u8() == BYTES;
        let bytes = prost::encoding::decode_varint(&mut field).map_err(|_| Malformed::NoPiece)?;
        let head = FIELD - field.len();
        if !is_bytes || bytes != (length - head) as u64 {
            return Err(Malformed::NoPiece);
        }
        // A short length leaves room for the first of the bytes.
        let first = Bytes::copy_from_slice(field);
        self.left = length - head - first.len();
        self.begun.clear();
        Ok((!first.is_empty()).then_some(Heard::Bytes(first)))
    }
}

/// Reads what a peer may send at once and in parts whose length the first byte says, which comes to the same. For the fuzz target.
#[cfg(any(fuzzing, test))]
pub(crate) fn read_hostile(bytes: &[u8]) {
    let Some((&part, bytes)) = bytes.split_first() else {
        return;
    };
    let in_parts = read(bytes, 1 << (part % 12));
    assert_eq!(in_parts, read(bytes, bytes.len().max(1)));
}

/// What is heard when it comes in parts of this length: the bytes in one, each word after how many of them, and what ended it.
#[cfg(any(fuzzing, test))]
fn read(all: &[u8], part: usize) -> (Vec<u8>, Vec<(usize, Piece)>, Option<Malformed>) {
    let (mut reading, mut bytes, mut words) = (Reading::default(), Vec::new(), Vec::new());
    for part in all.chunks(part) {
        reading.take_in(Bytes::copy_from_slice(part));
        loop {
            match reading.next() {
                Ok(Some(Heard::Bytes(some))) => bytes.extend_from_slice(&some),
                Ok(Some(Heard::Word(word))) => words.push((bytes.len(), word)),
                Ok(None) => break,
                Err(malformed) => return (bytes, words, Some(malformed)),
            }
            assert!(reading.begun.len() <= PREFIX + SHORT);
        }
    }
    (bytes, words, None)
}

#[cfg(test)]
mod tests {
    use ferry_proto::agent::v1::{StreamClaim, StreamEnd, StreamTaken};

    use super::*;

    /// As gRPC has it, by what is generated.
    fn generated(what: Piece) -> Vec<u8> {
        let encoded = piece(what).encode_to_vec();
        let mut message = vec![0];
        message.extend_from_slice(&(encoded.len() as u32).to_be_bytes());
        message.extend_from_slice(&encoded);
        message
    }

    fn bytes(length: usize) -> Vec<u8> {
        (0..length).map(|at| (at * 7 % 251) as u8).collect()
    }

    fn written(said: &[u8]) -> Bytes {
        let mut room = Rooms::default().room();
        room.space()[..said.len()].copy_from_slice(said);
        room.message(said.len())
    }

    const LENGTHS: [usize; 10] = [1, 100, 127, 128, 1021, 1022, 16_383, 16_384, PIECE - 1, PIECE];

    #[test]
    fn a_piece_is_written_as_what_is_generated_writes_it() {
        for length in LENGTHS {
            let said = bytes(length);
            assert!(written(&said) == generated(Piece::Bytes(said.into())), "{length}");
        }
        let word = Piece::Nonce(vec![7; 32]);
        assert_eq!(message(word.clone()), generated(word));
    }

    #[test]
    fn messages_are_read_whatever_the_parts_in_which_they_come() {
        let claim = Piece::Claim(StreamClaim {
            migration: "m".to_owned(),
            index: 3,
        });
        let words = [claim, Piece::Taken(StreamTaken {}), Piece::End(StreamEnd {})];
        let mut all: Vec<u8> = words[..2].iter().cloned().flat_map(generated).collect();
        let mut said = Vec::new();
        for length in LENGTHS {
            said.extend(bytes(length));
            all.extend(generated(Piece::Bytes(bytes(length).into())));
        }
        all.extend(generated(words[2].clone()));
        for part in [1, 2, 7, 4096, 65_537, all.len()] {
            let (heard, told, malformed) = read(&all, part);
            let told: Vec<_> = told.into_iter().map(|(_, word)| word).collect();
            assert!(
                heard == said && told == words && malformed.is_none(),
                "in parts of {part}"
            );
        }
    }

    #[test]
    fn a_room_is_used_again_once_its_message_is_gone() {
        let rooms = Rooms::default();
        let message = rooms.room().message(10);
        assert!(rooms.0.lock().unwrap().is_empty());
        let clone = message.clone();
        drop(message);
        assert!(rooms.0.lock().unwrap().is_empty());
        drop(clone);
        assert_eq!(rooms.0.lock().unwrap().len(), 1);
        let many: Vec<_> = (0..2 * KEPT).map(|_| rooms.room()).collect();
        drop(many);
        assert_eq!(rooms.0.lock().unwrap().len(), KEPT);
    }

    #[test]
    fn what_is_no_message_of_a_stream_is_refused_before_it_is_collected() {
        let refused = |bytes: &[u8]| read(bytes, bytes.len()).2.unwrap();
        assert_eq!(refused(&[1, 0, 0, 0, 2]), Malformed::Compressed);
        assert_eq!(refused(&[0, 0xff, 0xff, 0xff, 0xff]), Malformed::TooLarge);
        assert_eq!(
            refused(&generated(Piece::Bytes(bytes(PIECE + 1).into()))),
            Malformed::TooLarge
        );
        assert_eq!(refused(&[0, 0, 0, 0, 0]), Malformed::Empty);
        assert_eq!(refused(&[0, 0, 0, 0, 1, 0xff]), Malformed::NoPiece);
        // Long ones: another field, a length that does not fill the message, and none at all.
        assert_eq!(refused(&generated(Piece::Nonce(bytes(5000)))), Malformed::NoPiece);
        assert_eq!(refused(&[0, 0, 0, 0x10, 0, BYTES, 0x80, 0x10, 0]), Malformed::NoPiece);
        assert_eq!(
            refused(&[0, 0, 0, 0x10, 0, BYTES, 0xff, 0xff, 0xff]),
            Malformed::NoPiece
        );
    }
}
