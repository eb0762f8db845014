//! One stream of late pages, at the destination: frames in, pages supplied.

use std::io::Read as _;
use std::net::TcpStream;

use super::URGENT_STREAMS;
use super::destination::Event;
use super::waiting::Shared;
use crate::guest::FRAME_SIZE;
use crate::link::Sockets;
use crate::wire::{FrameError, FrameReader, StreamIdentity};
use crate::yielding::stand_back;

/// Takes the frames of one stream in.
pub(super) struct Taker<'a> {
    pub(super) stream: u16,
    pub(super) socket: &'a TcpStream,
    pub(super) sockets: &'a Sockets,
    pub(super) shared: &'a Shared,
}

impl Taker<'_> {
    /// Until the last page is here, or its memory fails.
    ///
    /// # Errors
    /// The stream ended, or broke.
    pub(super) fn run(&self, identity: &StreamIdentity) -> Result<Event, Option<FrameError>> {
        let mut reader = FrameReader::new(self.stream);
        let mut socket = self.socket;
        let mut contents = Vec::new();
        // What nobody waits for yields to the guest, and to what somebody waits for.
        if usize::from(self.stream) >= URGENT_STREAMS {
            stand_back();
        }
        reader.open(&mut socket, identity)?.ok_or(None)?;
        loop {
            let pages = reader.pages(&mut socket, &self.shared.shape)?.ok_or(None)?;
            self.sockets.hear();
            let bytes = pages.data.iter().map(|run| run.count).sum::<u64>() * FRAME_SIZE;
            contents.resize(contents.len().max(bytes as usize), 0);
            let contents = &mut contents[..bytes as usize];
            socket.read_exact(contents).map_err(FrameError::from_pages)?;
            self.sockets.hear();
            let supplied = self.shared.pages.supply(pages.data, contents).and_then(|()| {
                let mut zero = pages.zero.iter();
                zero.try_for_each(|&run| self.shared.pages.supply_zeroes(run))
            });
            if let Err(error) = supplied {
                return Ok(Event::Failed(error));
            }
            self.shared.supplied(pages.data);
            self.shared.supplied(pages.zero);
            if self.shared.left() == 0 {
                return Ok(Event::AllHere);
            }
        }
    }
}
