//! Streams that go over gRPC are cut like connections to the data port, counted with them, and tampered with.

use std::net::TcpStream;

use super::{Shared, Stream};
use crate::carried::{Carried, Piece, Said, Traced};
use crate::messages::Speaker;
use crate::tampering::{CutPoint, Tampering};

/// One direction of a connection to the agent's port, which may be a stream.
pub(super) struct CarriedStream {
    number: u64,
    speaker: Speaker,
    pieces: Carried,
    index: Option<u16>,
    said: Said,
}

impl CarriedStream {
    pub(super) fn new(number: u64, speaker: Speaker) -> Self {
        Self {
            number,
            speaker,
            pieces: Carried::default(),
            index: None,
            said: Said::default(),
        }
    }

    /// Whether what passes is a stream's: pages, mostly, in which nobody looks for a request.
    pub(super) fn is_stream(&self) -> bool {
        self.pieces.is_stream()
    }
}

impl Shared {
    /// Looks at what is not passed on yet, and may change it. Of what is cut now it never is passed on.
    pub(super) fn look(&self, stream: &mut CarriedStream, read: &mut [u8], ends: [&TcpStream; 2]) {
        stream.said.pass();
        for piece in stream.pieces.pieces(read) {
            match piece {
                Piece::Claim(index) => self.claimed(stream.number, index, ends),
                Piece::Bytes(bytes) => self.look_at_bytes(stream, &bytes, read),
                Piece::Other => {}
            }
        }
    }

    fn claimed(&self, number: u64, index: u16, ends: [&TcpStream; 2]) {
        let [Ok(caller), Ok(callee)] = ends.map(TcpStream::try_clone) else {
            return;
        };
        let stream = Stream {
            number,
            index: Some(index),
            ends: [caller, callee],
        };
        let mut state = self.lock();
        if state.is_cut {
            stream.cut();
        } else {
            state.streams.push(stream);
        }
    }

    fn look_at_bytes(&self, stream: &mut CarriedStream, bytes: &Traced, read: &mut [u8]) {
        if stream.index.is_none() {
            let state = self.lock();
            let known = state.streams.iter().find(|known| known.number == stream.number);
            stream.index = known.and_then(|known| known.index);
        }
        let Some(index) = stream.index.map(|index| index.checked_sub(1)) else {
            return;
        };
        let (said, is_sources) = (&mut stream.said, stream.speaker == Speaker::Source);
        match self.tampering() {
            Tampering::CutsAt { stream, at, cut } if index == Some(stream) => {
                said.hear(bytes);
                let is_there = match at {
                    CutPoint::Asked => !is_sources,
                    CutPoint::Frames(frames) => is_sources && said.has_passed(frames),
                    CutPoint::Said(field) => !is_sources && said.message(field).is_some(),
                };
                if is_there {
                    self.cut(&cut);
                    self.done();
                }
            }
            Tampering::Frame { stream, number, change } if is_sources && index == Some(stream) => {
                said.hear(bytes);
                while let Some(frame) = said.frame_after(number) {
                    if frame.change(read, change) {
                        self.done();
                        break;
                    }
                }
            }
            Tampering::Message {
                stream: of,
                by,
                field,
                change,
            } if index == of && by == stream.speaker => {
                said.hear(bytes);
                while let Some(message) = said.message(field) {
                    if message.change(read, change) {
                        self.done();
                        break;
                    }
                }
            }
            _ => {}
        }
    }
}
