//! One stream of late pages, at the destination: frames in, checked where that is wanted, pages supplied.

use std::io::Read as _;
use std::net::TcpStream;

use super::URGENT_STREAMS;
use super::destination::Event;
use super::waiting::Shared;
use crate::compress::{Codecs, Decompressor};
use crate::guest::{FRAME_SIZE, FrameRun, GuestError};
use crate::link::Sockets;
use crate::verify::FrameSum;
use crate::wire::{FrameError, FrameReader, Pages, StreamIdentity, Sums};
use crate::yielding::stand_back;

/// Takes the frames of one stream in.
pub(super) struct Taker<'a> {
    pub(super) stream: u16,
    pub(super) socket: &'a TcpStream,
    pub(super) sockets: &'a Sockets,
    pub(super) shared: &'a Shared,
    /// What pages may be compressed with.
    pub(super) codecs: Codecs,
    /// Whether frames say what their pages add up to.
    pub(super) sums: Sums,
}

impl Taker<'_> {
    /// Until the last page is here, or its memory fails, or a page is damaged on its way each time.
    ///
    /// # Errors
    /// The stream ended, or broke.
    pub(super) fn run(&self, identity: &StreamIdentity) -> Result<Event, Option<FrameError>> {
        let mut reader = FrameReader::new(self.stream)
            // Who has no page yet cannot be told what it changed.
            .with_codecs(self.codecs.without_deltas())
            .with_sums(self.sums);
        let mut socket = self.socket;
        let (mut plain, mut decompressor, sum) = (Vec::new(), Decompressor::default(), FrameSum::default());
        // What nobody waits for yields to the guest, and to what somebody waits for.
        if usize::from(self.stream) >= URGENT_STREAMS {
            stand_back();
        }
        reader.open(&mut socket, identity)?.ok_or(None)?;
        loop {
            let pages = reader.pages(&mut socket, &self.shared.shape)?.ok_or(None)?;
            self.sockets.hear();
            let unit = self.shared.unit;
            let mut runs = pages.data.iter().chain(pages.zero);
            if let Some(part) = runs.find(|run| !run.is_of_whole(unit)) {
                let FrameRun { first, count } = *part;
                return Err(Some(FrameError::PartOfUnit { first, count, unit }));
            }
            let contents = match pages.block {
                Some(block) => &*decompressor.unpack(&mut socket, block)?,
                None => {
                    let bytes = pages.data.iter().map(|run| run.count).sum::<u64>() * FRAME_SIZE;
                    plain.resize(plain.len().max(bytes as usize), 0);
                    let plain = &mut plain[..bytes as usize];
                    socket.read_exact(plain).map_err(FrameError::from_pages)?;
                    &*plain
                }
            };
            self.sockets.hear();
            let is_damaged = pages.sum.is_some_and(|told| told != sum.of_bytes(pages.data, contents));
            let taken = match is_damaged {
                true => self.shared.damaged(&pages),
                false => self.supply(&pages, contents),
            };
            if let Err(error) = taken {
                return Ok(Event::Failed(error));
            }
            if self.shared.left() == 0 {
                return Ok(Event::AllHere);
            }
        }
    }

    fn supply(&self, pages: &Pages<'_>, contents: &[u8]) -> Result<(), GuestError> {
        self.shared.pages.supply(pages.data, contents)?;
        let mut zero = pages.zero.iter();
        zero.try_for_each(|&run| self.shared.pages.supply_zeroes(run))?;
        self.shared.supplied(pages.data);
        self.shared.supplied(pages.zero);
        Ok(())
    }
}
