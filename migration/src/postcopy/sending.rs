//! One stream of late pages, at the source: what is asked for on it, or what nobody asked for.

use std::io::{self, Write as _};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::source::Shared;
use super::unsent::chunk_pages;
use crate::compress::{Compressor, GuestIs, How, Measured, PackedFrame, Plan, Sampled};
use crate::guest::{FRAME_SIZE, FrameRun, GuestError, GuestMemory};
use crate::precopy::{Contents, write_both};
use crate::verify::FrameSum;
use crate::wire::{FrameError, FrameReader, FrameWriter, StreamIdentity};
use crate::yielding::stand_back;

/// Late pages are of no round; to who packs them each travels for the first time.
const ROUND: u32 = 1;

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
            for change in self.shared.parameters.packing.changes() {
                tracing::info!(change, "late pages are sent otherwise from now on");
            }
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
        let pages = data.iter().map(|run| run.count).sum();
        let plan = match urgency {
            Urgency::CanWait if pages > 0 => parameters.packing.plan(pages, ROUND, GuestIs::NotWaiting),
            _ => Plan::default(),
        };
        let sampled = match plan.sample {
            Some(method) => self.compressor.sample(memory, data, method).map_err(guest_failed)?,
            None => None,
        };
        let packed = match plan.method {
            Some(method) => self.compressor.pack(memory, data, How::whole(method)),
            None => Ok(PackedFrame::default()),
        };
        let packed = packed.map_err(guest_failed)?;
        let block = packed.block.zip(packed.method);
        let told = block.map(|(block, method)| (block.len(), method.codec()));
        let prefix = self.writer.late(self.contents.table.iter().copied(), told, sum);
        let bytes = match block {
            Some((block, _)) => (prefix.len() + block.len()) as u64,
            None => self.contents.totals(prefix.len()).bytes,
        };
        let began = Instant::now();
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
        if urgency == Urgency::CanWait && pages > 0 {
            self.shared.learn(pages * FRAME_SIZE, &packed, sampled, began.elapsed());
        }
        Ok(())
    }
}

impl<M> Shared<'_, M> {
    /// Takes in what a frame told of the link, and of the ways to compress.
    fn learn(&self, bytes: u64, packed: &PackedFrame<'_>, sampled: Option<Sampled>, sending: Duration) {
        let measured = Measured {
            bytes,
            sent: packed.block.map_or(bytes, |block| block.len() as u64),
            method: packed.method,
            copies: 0,
            deltas: 0,
            compressing: packed.took.time,
            worked: packed.took.work,
            sending,
            sampled,
            streams: self.pushing_streams(),
            cap: self.bandwidth.cap(),
        };
        self.parameters.packing.sent(&measured, GuestIs::NotWaiting);
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
