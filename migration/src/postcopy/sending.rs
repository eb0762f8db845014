//! One stream of late pages, at the source: what is asked for on it, or what nobody asked for.

use std::io::{self, Write as _};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use super::source::Shared;
use super::unsent::chunk_pages;
use crate::compress::{Compressor, How};
use crate::guest::{FrameRun, GuestError, GuestMemory};
use crate::precopy::{Contents, write_both};
use crate::verify::FrameSum;
use crate::wire::{FrameError, FrameReader, FrameWriter, StreamIdentity};
use crate::yielding::stand_back;

/// The frames of one stream.
pub(super) struct LateFrames<'a, 'b, M> {
    socket: &'a TcpStream,
    shared: &'a Shared<'b, M>,
    writer: FrameWriter,
    reader: FrameReader,
    contents: Contents,
    compressor: Compressor,
    /// Adds up pages, where the destination is to check them.
    sum: Option<FrameSum>,
}

impl<'a, 'b, M: GuestMemory> LateFrames<'a, 'b, M> {
    pub(super) fn new(stream: u16, socket: &'a TcpStream, shared: &'a Shared<'b, M>) -> Self {
        Self {
            socket,
            shared,
            writer: FrameWriter::new(stream),
            reader: FrameReader::new(stream),
            contents: Contents::default(),
            compressor: Compressor::default(),
            sum: shared.parameters.verify.then(FrameSum::default),
        }
    }

    pub(super) fn open(&mut self, identity: &StreamIdentity) -> Result<(), FrameError> {
        self.socket
            .write_all(self.writer.open(identity))
            .map_err(FrameError::Io)
    }

    /// Sends what nobody asked for, until closed.
    pub(super) fn push(&mut self) -> Result<(), FrameError> {
        let mut runs = Vec::new();
        stand_back();
        while self.shared.unsent.next(&mut runs) {
            self.send(&runs, Urgency::CanWait)?;
        }
        Ok(())
    }

    /// Sends what is asked for on this stream, until the stream ends.
    pub(super) fn answer(&mut self) -> Result<(), FrameError> {
        loop {
            let asked = self.reader.asked(&mut &*self.socket, self.shared.memory.shape())?;
            let Some(asked) = asked else { return Ok(()) };
            let (touched, beside) = (asked.touched.to_vec(), asked.beside.to_vec());
            self.shared.sockets.hear();
            self.shared.unsent.asked(&touched);
            self.shared.unsent.asked(&beside);
            // What somebody waits for has a frame of its own, before its neighbours.
            let chunk = chunk_pages(self.shared.memory.late_unit());
            for runs in [touched, beside] {
                for piece in pieces(&runs, chunk) {
                    self.send(&piece, Urgency::AwaitedNow)?;
                }
            }
        }
    }

    fn send(&mut self, runs: &[FrameRun], urgency: Urgency) -> Result<(), FrameError> {
        let Shared { memory, parameters, .. } = *self.shared;
        self.contents
            .split(memory, runs, memory.late_unit())
            .map_err(guest_failed)?;
        let data = &self.contents.data;
        let sum = match &mut self.sum {
            Some(sum) => Some(sum.of_memory(memory, data).map_err(guest_failed)?),
            None => None,
        };
        let method = parameters
            .compression
            .filter(|_| urgency == Urgency::CanWait && !data.is_empty());
        let block = match method {
            Some(method) => {
                let packed = self.compressor.pack(memory, data, How::whole(method));
                packed.map_err(guest_failed)?.block.zip(Some(method.codec()))
            }
            None => None,
        };
        let told = block.map(|(block, codec)| (block.len(), codec));
        let prefix = self.writer.late(self.contents.table.iter().copied(), told, sum);
        let bytes = match block {
            Some((block, _)) => (prefix.len() + block.len()) as u64,
            None => self.contents.totals(prefix.len()).bytes,
        };
        match urgency {
            Urgency::AwaitedNow => self.shared.bandwidth.spend(bytes),
            Urgency::CanWait => self.shared.bandwidth.wait(bytes),
        }
        let written = match block {
            Some((block, _)) => write_both(self.socket, prefix, block),
            None => memory.send(self.socket.as_fd(), prefix, data),
        };
        written.map_err(FrameError::Io)?;
        self.shared.sent.fetch_add(bytes, Ordering::Relaxed);
        Ok(())
    }
}

/// Whether the cap is waited for, and a compressor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Urgency {
    AwaitedNow,
    CanWait,
}

fn guest_failed(error: GuestError) -> FrameError {
    FrameError::Io(io::Error::other(error))
}

/// Runs as they fit into frames of so many pages.
fn pieces(runs: &[FrameRun], chunk: u64) -> Vec<Vec<FrameRun>> {
    let (mut pieces, mut piece, mut pages) = (Vec::new(), Vec::new(), 0);
    for &run in runs {
        let mut rest = run;
        while rest.count > 0 {
            if pages == chunk {
                pieces.push(std::mem::take(&mut piece));
                pages = 0;
            }
            let count = rest.count.min(chunk - pages);
            piece.push(FrameRun {
                first: rest.first,
                count,
            });
            pages += count;
            rest = FrameRun {
                first: rest.first + count,
                count: rest.count - count,
            };
        }
    }
    if !piece.is_empty() {
        pieces.push(piece);
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_cut_to_the_size_of_frames() {
        let run = |first, count| FrameRun { first, count };
        assert_eq!(pieces(&[], 256), Vec::<Vec<FrameRun>>::new());
        assert_eq!(
            pieces(&[run(0, 250), run(1000, 300)], 256),
            [
                vec![run(0, 250), run(1000, 6)],
                vec![run(1006, 256)],
                vec![run(1262, 38)]
            ]
        );
    }
}
