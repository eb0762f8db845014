//! Streams that go over gRPC, read off the bytes of a connection: HTTP/2's frames, the messages in them, the pieces in those.
//!
//! Each stream has a connection of its own with one call, so what its DATA frames hold is one row of messages. Of a connection whose first
//! message is none of a stream's nothing more is read.

use crate::passing::{ENTRY, HEADER, MESSAGE_HEADER, entries, read_u32, says};
use crate::tampering::CutPoint;

/// What a client says first.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Bytes of a frame's header, and its type if it carries messages.
const FRAME_HEADER: usize = 9;
const DATA: u8 = 0;
/// Bytes before a message: whether it is compressed, and its length.
const PREFIX: usize = 5;

/// Tags of the pieces of a stream, of their field in the message and of the index in a claim.
const CLAIM: u8 = 1 << 3 | 2;
const NONCE: u8 = 2 << 3 | 2;
const LAST: u8 = 6 << 3 | 2;
const BYTES: u8 = 5 << 3 | 2;
const INDEX: u8 = 2 << 3;
/// Bytes of a nonce, and of a migration's id in a claim.
const NONCE_LENGTH: usize = 32;
const ID_LENGTH: usize = 36;

/// A piece of a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Piece {
    /// The source claims the stream with this index.
    Claim(u16),
    /// What a VMM said.
    Bytes(Vec<u8>),
    /// Anything else.
    Other,
}

/// Reads a message that is one piece, as every encoder writes it: a tag, a length, that many bytes. And its tag.
fn piece(message: &[u8]) -> Option<(u8, Piece)> {
    let (&tag, rest) = message.split_first()?;
    let (length, content) = varint(rest)?;
    if content.len() != length as usize || !(CLAIM..=LAST).contains(&tag) {
        return None;
    }
    let piece = match tag {
        CLAIM => {
            // The id is a text: a tag and a length of one byte each.
            let id = content.get(..2 + ID_LENGTH)?;
            let index = content.get(id.len()..)?.strip_prefix(&[INDEX]);
            let index = index.map_or(Some(0), |index| varint(index).map(|(index, _)| index))?;
            Piece::Claim(
                u16::try_from(index)
                    .ok()
                    .filter(|_| id[..2] == [CLAIM, ID_LENGTH as u8])?,
            )
        }
        BYTES => Piece::Bytes(content.to_vec()),
        _ => Piece::Other,
    };
    Some((tag, piece))
}

fn varint(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let mut value = 0;
    for (at, byte) in bytes.iter().enumerate().take(5) {
        value |= u64::from(byte & 0x7f) << (7 * at);
        if byte & 0x80 == 0 {
            return Some((value, &bytes[at + 1..]));
        }
    }
    None
}

/// What was said in one direction of a connection so far.
#[derive(Default)]
pub(crate) struct Carried {
    /// Of a frame that is not whole yet.
    frames: Vec<u8>,
    /// Of a message that is not.
    messages: Vec<u8>,
    stage: Stage,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Stage {
    #[default]
    Silent,
    Stream,
    SomethingElse,
}

impl Carried {
    /// Whether it is a stream, as far as was said yet.
    pub(crate) fn is_stream(&self) -> bool {
        self.stage == Stage::Stream
    }

    /// The pieces that are whole with these bytes.
    pub(crate) fn pieces(&mut self, bytes: &[u8]) -> Vec<Piece> {
        if self.stage == Stage::SomethingElse {
            return Vec::new();
        }
        self.frames.extend_from_slice(bytes);
        if self.frames.starts_with(PREFACE) {
            self.frames.drain(..PREFACE.len());
        }
        let mut at = 0;
        while let Some(header) = self.frames.get(at..at + FRAME_HEADER) {
            let length = u32::from_be_bytes([0, header[0], header[1], header[2]]) as usize;
            let is_data = header[3] == DATA;
            let Some(content) = self.frames.get(at + FRAME_HEADER..at + FRAME_HEADER + length) else {
                break;
            };
            if is_data {
                self.messages.extend_from_slice(content);
            }
            at += FRAME_HEADER + length;
        }
        self.frames.drain(..at);
        let mut pieces = Vec::new();
        while let Some(prefix) = self.messages.get(..PREFIX) {
            let end = PREFIX + u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]) as usize;
            let Some(message) = self.messages.get(PREFIX..end) else {
                break;
            };
            let piece = piece(message);
            self.messages.drain(..end);
            match (self.stage, piece) {
                (Stage::Silent, Some((tag, piece)))
                    if tag == CLAIM || tag == NONCE && end == PREFIX + 2 + NONCE_LENGTH =>
                {
                    self.stage = Stage::Stream;
                    pieces.push(piece);
                }
                (Stage::Stream, piece) => pieces.extend(piece.map(|(_, piece)| piece)),
                _ => {
                    *self = Self {
                        stage: Stage::SomethingElse,
                        ..Self::default()
                    };
                    return pieces;
                }
            }
        }
        pieces
    }
}

/// Waits on one side of a stream for the point at which to cut.
pub(crate) struct Awaited {
    at: CutPoint,
    /// Of what is not whole yet.
    bytes: Vec<u8>,
    /// Bytes of a frame's pages that are still to come; none between frames.
    pages: Option<usize>,
    /// Frames that were whole.
    frames: u64,
}

impl Awaited {
    pub(crate) fn new(at: CutPoint) -> Self {
        Self {
            at,
            bytes: Vec::new(),
            pages: None,
            frames: 0,
        }
    }

    /// Whether the destination has said with these bytes what is waited for.
    pub(crate) fn is_said(&mut self, bytes: &[u8]) -> bool {
        match self.at {
            CutPoint::Asked => !bytes.is_empty(),
            CutPoint::Frames(_) => false,
            CutPoint::Said(field) => {
                self.bytes.extend_from_slice(bytes);
                while let Some(message) = self.take(MESSAGE_HEADER, |header| read_u32(header, 4)) {
                    if says(&message, field) {
                        return true;
                    }
                }
                false
            }
        }
    }

    /// Whether the source has sent with these bytes what is waited for.
    pub(crate) fn is_sent(&mut self, bytes: &[u8]) -> bool {
        let CutPoint::Frames(frames) = self.at else {
            return false;
        };
        self.bytes.extend_from_slice(bytes);
        while self.has_passed_a_frame() {
            self.frames += 1;
            if self.frames == frames {
                return true;
            }
        }
        false
    }

    fn has_passed_a_frame(&mut self) -> bool {
        if self.pages.is_none() {
            let table = self.take(HEADER, |header| entries(header) * ENTRY);
            self.pages = table.map(|frame| read_u32(&frame, 24));
        }
        let Some(pages) = &mut self.pages else { return false };
        let here = self.bytes.len().min(*pages);
        self.bytes.drain(..here);
        *pages -= here;
        let is_whole = *pages == 0;
        if is_whole {
            self.pages = None;
        }
        is_whole
    }

    /// A header and what belongs to it, once all of it is here.
    fn take(&mut self, header: usize, further: impl Fn(&[u8]) -> usize) -> Option<Vec<u8>> {
        let end = header + further(self.bytes.get(..header)?);
        self.bytes.get(..end)?;
        Some(self.bytes.drain(..end).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn framed(kind: u8, payload: &[u8]) -> Vec<u8> {
        let length = (payload.len() as u32).to_be_bytes();
        [&length[1..], &[kind, 0, 0, 0, 0, 1], payload].concat()
    }

    fn message(tag: u8, content: &[u8]) -> Vec<u8> {
        let length = 2 + content.len() as u32;
        [&[0][..], &length.to_be_bytes(), &[tag, content.len() as u8], content].concat()
    }

    /// Of stream 300.
    fn claim() -> Vec<u8> {
        let id = [b'a'; ID_LENGTH];
        message(CLAIM, &[&[CLAIM, ID_LENGTH as u8], &id[..], &[INDEX, 0xac, 2]].concat())
    }

    #[test]
    fn pieces_are_found_however_they_are_cut() {
        let row = [claim(), message(BYTES, b"abc"), message(LAST, b"")].concat();
        let (first, second) = row.split_at(9);
        let said = [
            PREFACE,
            &framed(4, &[0; 6]),
            &framed(DATA, first),
            &framed(1, b"x"),
            &framed(DATA, second),
        ]
        .concat();
        for size in [1, 7, said.len()] {
            let mut carried = Carried::default();
            let found: Vec<Piece> = said.chunks(size).flat_map(|bytes| carried.pieces(bytes)).collect();
            assert_eq!(found, [Piece::Claim(300), Piece::Bytes(b"abc".to_vec()), Piece::Other]);
        }
    }

    #[test]
    fn another_call_is_no_stream_for_good() {
        let mut carried = Carried::default();
        let other = framed(DATA, &message(BYTES, b"abc"));
        assert_eq!(carried.pieces(&other), []);
        assert_eq!(carried.pieces(&framed(DATA, &claim())), []);
    }

    #[test]
    fn frames_and_words_are_counted_however_they_come() {
        let mut frame = vec![0; HEADER + ENTRY];
        (frame[10], frame[24]) = (1, 5);
        frame.extend([7; 5]);
        let mut awaited = Awaited::new(CutPoint::Frames(3));
        let sent = frame.repeat(3);
        let at = sent.iter().position(|byte| awaited.is_sent(&[*byte]));
        assert_eq!(at, Some(sent.len() - 1));

        let word = |field: u8| [&b"FCTL\x02\0\0\0"[..], &[field << 3 | 2, 0]].concat();
        let mut awaited = Awaited::new(CutPoint::Said(5));
        let said = [word(4), word(5)].concat();
        let at = said.iter().position(|byte| awaited.is_said(&[*byte]));
        assert_eq!(at, Some(said.len() - 1));
    }
}
