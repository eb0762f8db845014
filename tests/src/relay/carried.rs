//! Streams that go over gRPC are cut like connections to the data port, and counted with them.

use std::net::TcpStream;

use super::{Shared, Stream};
use crate::carried::{Awaited, Carried, Piece};
use crate::messages::Speaker;
use crate::tampering::Tampering;

/// One direction of a connection to the agent's port, which may be a stream.
pub(super) struct CarriedStream {
    number: u64,
    speaker: Speaker,
    said: Carried,
    index: Option<u16>,
    awaited: Option<Awaited>,
}

impl CarriedStream {
    pub(super) fn new(number: u64, speaker: Speaker) -> Self {
        Self {
            number,
            speaker,
            said: Carried::default(),
            index: None,
            awaited: None,
        }
    }

    /// Whether what passes is a stream's: pages, mostly, in which nobody looks for a request.
    pub(super) fn is_stream(&self) -> bool {
        self.said.is_stream()
    }
}

impl Shared {
    /// Looks at what is not passed on yet. Of what is cut now it never is.
    pub(super) fn look(&self, stream: &mut CarriedStream, bytes: &[u8], ends: [&TcpStream; 2]) {
        for piece in stream.said.pieces(bytes) {
            match piece {
                Piece::Claim(index) => self.claimed(stream.number, index, ends),
                Piece::Bytes(bytes) => self.look_at_bytes(stream, &bytes),
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
            state.refused += 1;
            stream.cut();
        } else {
            state.streams.push(stream);
        }
    }

    fn look_at_bytes(&self, stream: &mut CarriedStream, bytes: &[u8]) {
        let Tampering::CutsAt {
            stream: wanted,
            at,
            cut,
        } = self.tampering()
        else {
            return;
        };
        if stream.index.is_none() {
            let state = self.lock();
            let known = state.streams.iter().find(|known| known.number == stream.number);
            stream.index = known.and_then(|known| known.index);
        }
        if stream.index.and_then(|index| index.checked_sub(1)) != Some(wanted) {
            return;
        }
        let awaited = stream.awaited.get_or_insert_with(|| Awaited::new(at));
        let is_there = match stream.speaker {
            Speaker::Source => awaited.is_sent(bytes),
            Speaker::Destination => awaited.is_said(bytes),
        };
        if is_there {
            self.cut(&cut);
            self.done();
        }
    }
}
