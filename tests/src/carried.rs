//! Streams that go over gRPC, read off the bytes of a connection: HTTP/2's frames, the messages in them, the pieces in those.
//!
//! Each stream has a connection of its own with one call, so what its DATA frames hold is one row of messages. Of a connection whose first
//! message is none of a stream's nothing more is read.

use crate::passing::{ENTRY, HEADER, MESSAGE_HEADER, entries, read_u32, says};

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
    Bytes(Traced),
    /// Anything else.
    Other,
}

/// Bytes that were passed on or are about to be, and where those are among the ones just read: there they can be changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Traced {
    pub(crate) bytes: Vec<u8>,
    places: Vec<Option<usize>>,
}

impl Traced {
    fn push(&mut self, bytes: &[u8], place: impl Fn(usize) -> Option<usize>) {
        self.bytes.extend_from_slice(bytes);
        self.places.extend((0..bytes.len()).map(place));
    }

    fn append(&mut self, other: &Self) {
        self.bytes.extend_from_slice(&other.bytes);
        self.places.extend_from_slice(&other.places);
    }

    fn take(&mut self, count: usize) -> Self {
        Self {
            bytes: self.bytes.drain(..count).collect(),
            places: self.places.drain(..count).collect(),
        }
    }

    fn without(mut self, first: usize) -> Self {
        self.take(first);
        self
    }

    /// All of them were passed on.
    fn pass(&mut self) {
        self.places.fill(None);
    }

    /// Changes them among those just read; not if one of them was passed on.
    pub(crate) fn change(&self, read: &mut [u8], change: impl Fn(&mut [u8])) -> bool {
        let Some(places) = self.places.iter().copied().collect::<Option<Vec<usize>>>() else {
            return false;
        };
        let mut changed = self.bytes.clone();
        change(&mut changed);
        for (place, byte) in places.into_iter().zip(changed) {
            read[place] = byte;
        }
        true
    }
}

/// How many bytes come before what a VMM said in a message of this length that starts so; nothing if it is another one, or too little is here.
fn before_bytes(start: &[u8], length: usize) -> Option<usize> {
    let (&BYTES, rest) = start.split_first()? else {
        return None;
    };
    let (content, after) = varint(rest)?;
    let before = start.len() - after.len();
    (before + content as usize == length).then_some(before)
}

/// Reads a message that is one piece, as every encoder writes it: a tag, a length, that many bytes. And its tag.
fn piece(traced: Traced) -> Option<(u8, Piece)> {
    let message = &traced.bytes;
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
///
/// What a VMM said is handed on as it comes, not once its message is whole: by then most of it was passed on, and could not be changed.
#[derive(Default)]
pub(crate) struct Carried {
    frames: Frames,
    /// Of a message that is not known for what it is, or not handed on yet.
    messages: Traced,
    /// Bytes that are still to come of what a VMM said in one message; none between such messages.
    open: Option<usize>,
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

    /// The pieces that came with these bytes; of what a VMM said as much as is here.
    pub(crate) fn pieces(&mut self, read: &[u8]) -> Vec<Piece> {
        let mut pieces = Vec::new();
        if self.stage == Stage::SomethingElse {
            return pieces;
        }
        self.messages.pass();
        self.frames.contents(read, &mut self.messages);
        while let Some(piece) = self.next_piece() {
            pieces.extend(piece);
        }
        pieces
    }

    /// Takes the next step through the messages: with a piece, or without one. Nothing if more must come first.
    fn next_piece(&mut self) -> Option<Option<Piece>> {
        let here = &self.messages.bytes;
        if let Some(open) = self.open {
            let here = here.len().min(open);
            self.open = (open > here).then_some(open - here);
            let said = self.messages.take(here);
            return (here > 0 || open == 0).then_some(Some(Piece::Bytes(said)));
        }
        let prefix = here.get(..PREFIX)?;
        let length = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]) as usize;
        if self.is_stream()
            && let Some(before) = before_bytes(&here[PREFIX..], length)
        {
            self.messages.take(PREFIX + before);
            self.open = Some(length - before);
            return Some(None);
        }
        if here.len() < PREFIX + length {
            return None;
        }
        let piece = piece(self.messages.take(PREFIX + length).without(PREFIX));
        match (self.stage, piece) {
            (Stage::Silent, Some((tag, piece))) if tag == CLAIM || tag == NONCE && length == 2 + NONCE_LENGTH => {
                self.stage = Stage::Stream;
                Some(Some(piece))
            }
            (Stage::Stream, piece) => Some(piece.map(|(_, piece)| piece)),
            _ => {
                *self = Self {
                    stage: Stage::SomethingElse,
                    ..Self::default()
                };
                None
            }
        }
    }
}

/// The frames of HTTP/2 so far.
#[derive(Default)]
struct Frames {
    /// Of a header, or of the preface, that is not whole yet.
    header: Vec<u8>,
    /// Bytes of the frame that are still to come, and whether they carry messages.
    left: usize,
    is_data: bool,
}

impl Frames {
    /// Adds what of these bytes carries messages.
    fn contents(&mut self, read: &[u8], messages: &mut Traced) {
        let mut at = 0;
        while at < read.len() {
            if self.left > 0 {
                let end = read.len().min(at + self.left);
                if self.is_data {
                    messages.push(&read[at..end], |index| Some(at + index));
                }
                self.left -= end - at;
                at = end;
                continue;
            }
            self.header.push(read[at]);
            at += 1;
            if self.header == PREFACE {
                self.header.clear();
            } else if let &[a, b, c, kind, ..] = &self.header[..]
                && self.header.len() == FRAME_HEADER
                && !PREFACE.starts_with(&self.header)
            {
                self.left = u32::from_be_bytes([0, a, b, c]) as usize;
                self.is_data = kind == DATA;
                self.header.clear();
            }
        }
    }
}

/// What is said on one side of a stream, frame by frame or message by message: it carries the one or the other.
#[derive(Default)]
pub(crate) struct Said {
    /// Of what is not whole yet.
    bytes: Traced,
    /// Bytes of a frame's pages that are still to come; none between frames.
    pages: Option<usize>,
    /// Frames that were whole.
    frames: u64,
}

impl Said {
    /// Further bytes. What was there before is passed on by now.
    pub(crate) fn hear(&mut self, piece: &Traced) {
        self.bytes.append(piece);
    }

    /// What was heard and is not whole is passed on by now.
    pub(crate) fn pass(&mut self) {
        self.bytes.pass();
    }

    /// Whether so many frames have passed.
    pub(crate) fn has_passed(&mut self, frames: u64) -> bool {
        while self.frames < frames {
            if self.pages.is_none() && self.table().is_none() || !self.has_passed_pages() {
                return false;
            }
        }
        true
    }

    /// Header and table of the next frame that can be changed, after so many.
    pub(crate) fn frame_after(&mut self, frames: u64) -> Option<Traced> {
        loop {
            if self.pages.is_none() {
                let table = self.table()?;
                if self.frames >= frames {
                    return Some(table);
                }
            }
            if !self.has_passed_pages() {
                return None;
            }
        }
    }

    /// The next message that says this.
    pub(crate) fn message(&mut self, field: u32) -> Option<Traced> {
        loop {
            let message = self.take(MESSAGE_HEADER, |header| read_u32(header, 4))?;
            if says(&message.bytes, field) {
                return Some(message.without(MESSAGE_HEADER));
            }
        }
    }

    fn table(&mut self) -> Option<Traced> {
        let table = self.take(HEADER, |header| entries(header) * ENTRY)?;
        self.pages = Some(read_u32(&table.bytes, 24));
        Some(table)
    }

    fn has_passed_pages(&mut self) -> bool {
        let Some(pages) = &mut self.pages else { return false };
        let here = self.bytes.bytes.len().min(*pages);
        self.bytes.take(here);
        *pages -= here;
        let is_whole = *pages == 0;
        if is_whole {
            self.pages = None;
            self.frames += 1;
        }
        is_whole
    }

    /// A header and what belongs to it, once all of it is here.
    fn take(&mut self, header: usize, further: impl Fn(&[u8]) -> usize) -> Option<Traced> {
        let end = header + further(self.bytes.bytes.get(..header)?);
        (self.bytes.bytes.len() >= end).then(|| self.bytes.take(end))
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
            let [Piece::Claim(300), said @ .., Piece::Other] = &found[..] else {
                panic!("{size}: {found:?}");
            };
            let said = said.iter().flat_map(|piece| match piece {
                Piece::Bytes(said) => said.bytes.clone(),
                other => panic!("{size}: {other:?}"),
            });
            assert_eq!(said.collect::<Vec<u8>>(), b"abc");
        }
    }

    #[test]
    fn another_call_is_no_stream_for_good() {
        let mut carried = Carried::default();
        let other = framed(DATA, &message(BYTES, b"abc"));
        assert_eq!(carried.pieces(&other), []);
        assert_eq!(carried.pieces(&framed(DATA, &claim())), []);
    }

    /// A frame of one entry and five bytes of pages.
    fn frame() -> Vec<u8> {
        let mut frame = vec![0; HEADER + ENTRY];
        (frame[10], frame[24]) = (1, 5);
        frame.extend([7; 5]);
        frame
    }

    fn word(field: u8) -> Vec<u8> {
        [&b"FCTL\x02\0\0\0"[..], &[field << 3 | 2, 0]].concat()
    }

    /// These in messages of this size, each in a read of its own; at which of them it is there.
    fn heard_at(size: usize, row: &[u8], mut is_there: impl FnMut(&mut Said, &mut [u8]) -> bool) -> Option<usize> {
        let (mut carried, mut said) = (Carried::default(), Said::default());
        carried.pieces(&framed(DATA, &claim()));
        row.chunks(size).position(|bytes| {
            let mut read = framed(DATA, &message(BYTES, bytes));
            said.pass();
            let pieces = carried.pieces(&read);
            let [Piece::Bytes(piece)] = &pieces[..] else {
                panic!("{pieces:?}");
            };
            said.hear(piece);
            is_there(&mut said, &mut read)
        })
    }

    #[test]
    fn frames_and_words_are_counted_however_they_come() {
        let sent = frame().repeat(3);
        assert_eq!(heard_at(1, &sent, |said, _| said.has_passed(3)), Some(sent.len() - 1));
        let told = [word(4), word(5)].concat();
        assert_eq!(
            heard_at(1, &told, |said, _| said.message(5).is_some()),
            Some(told.len() - 1)
        );
    }

    #[test]
    fn a_frame_at_the_start_of_a_message_is_changed_before_the_message_is_whole() {
        let (mut carried, mut said) = (Carried::default(), Said::default());
        carried.pieces(&framed(DATA, &claim()));
        let sent = framed(DATA, &message(BYTES, &frame()));
        let (first, rest) = sent.split_at(sent.len() - 3);
        let mut read = first.to_vec();
        let [Piece::Bytes(piece)] = &carried.pieces(&read)[..] else {
            panic!("not what a VMM said");
        };
        said.hear(piece);
        let table = said.frame_after(0).expect("its table is here");
        assert!(table.change(&mut read, |frame| frame[0] = 9));
        assert_ne!(read, first);
        assert_eq!(carried.pieces(rest).len(), 1);
    }

    #[test]
    fn what_is_not_passed_on_yet_is_changed_where_it_was_read() {
        const BEFORE: usize = FRAME_HEADER + PREFIX + 2;
        let sent = frame().repeat(4);
        let change = |said: &mut Said, read: &mut [u8]| {
            let before = read.to_vec();
            let table = said.frame_after(1);
            let is_changed = table.is_some_and(|table| table.change(read, |frame| frame[0] = 9));
            let changed: Vec<usize> = (0..read.len()).filter(|&at| read[at] != before[at]).collect();
            assert_eq!(changed, [BEFORE + 53][..usize::from(is_changed)]);
            is_changed
        };
        assert_eq!(heard_at(120, &sent, change), Some(0));
        // Of each that is left, a part was passed on by the time that the rest is here.
        assert_eq!(heard_at(60, &sent, change), None);
    }
}
