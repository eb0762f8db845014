//! What a relay does with a connection to the data port.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::thread;

use super::Shared;
use crate::messages::Speaker;
use crate::passing::{MESSAGE_HEADER, pass_bytes, pump, read_frame, read_message, says};
use crate::tampering::{Cut, CutPoint, Tampering};

/// Bytes of a page.
const PAGE: usize = 4096;
/// What a data port says first: a word and a nonce.
const GREETING: usize = 8 + 32;
/// What a connection to a data port says first: migration, index, proof.
const CLAIM: usize = 16 + 2 + 32;

impl Shared {
    /// The greeting, the claim and what the peer says of it; then what the connection is for.
    pub(super) fn relay_connection(&self, number: u64, source: &TcpStream, destination: &TcpStream) -> io::Result<()> {
        pass_bytes::<GREETING>(destination, source)?;
        let claim = pass_bytes::<CLAIM>(source, destination)?;
        pass_bytes::<1>(destination, source)?;
        let index = u16::from_le_bytes([claim[16], claim[17]]);
        let mut state = self.lock();
        let mut streams = state.streams.iter_mut();
        if let Some(stream) = streams.find(|stream| stream.number == number) {
            stream.index = Some(index);
        }
        drop(state);
        let index = index.checked_sub(1);
        match self.tampering() {
            Tampering::Messages(observer) if index.is_none() => thread::scope(|scope| {
                scope.spawn(|| observer.pass(Speaker::Destination, destination, source));
                observer.pass(Speaker::Source, source, destination);
            }),
            tampering => thread::scope(|scope| {
                let both = [
                    (Speaker::Destination, destination, source),
                    (Speaker::Source, source, destination),
                ];
                for (by, from, to) in both {
                    let tampering = &tampering;
                    scope.spawn(move || {
                        // An error is a connection that ended, and is noticed again.
                        let _ = self.tamper(index, tampering, by, (from, to));
                        pump(from, to, |_| {});
                    });
                }
            }),
        }
        Ok(())
    }

    /// Passes on what one side says until the place to tamper with is behind it.
    fn tamper(
        &self,
        index: Option<u16>,
        tampering: &Tampering,
        speaker: Speaker,
        ends: (&TcpStream, &TcpStream),
    ) -> io::Result<()> {
        match (index, tampering, speaker) {
            (
                _,
                Tampering::Message {
                    stream,
                    by,
                    field,
                    change,
                },
                _,
            ) if index == *stream && speaker == *by => self.until_changed(*field, *change, ends),
            (Some(index), Tampering::CutsAt { stream, at, cut }, Speaker::Source) if index == *stream => {
                self.until_sent(*at, cut, ends)
            }
            (Some(index), Tampering::CutsAt { stream, at, cut }, Speaker::Destination) if index == *stream => {
                self.until_said(*at, cut, ends)
            }
            (Some(index), Tampering::Frame { stream, number, change }, Speaker::Source) if index == *stream => {
                self.change_frame(*number, *change, ends)
            }
            (
                Some(index),
                Tampering::Pages {
                    streams,
                    number,
                    frames,
                    change,
                },
                Speaker::Source,
            ) if streams.contains(&index) => {
                let is_chosen = |at: u64| at >= *number && frames.is_none_or(|frames| at - number < frames);
                self.change_pages(is_chosen, *change, ends)
            }
            _ => Ok(()),
        }
    }

    fn until_changed(
        &self,
        field: u32,
        change: fn(&mut [u8]),
        (from, mut to): (&TcpStream, &TcpStream),
    ) -> io::Result<()> {
        loop {
            let mut message = read_message(from)?;
            let is_meant = says(&message, field);
            if is_meant {
                change(&mut message[MESSAGE_HEADER..]);
                self.done();
            }
            to.write_all(&message)?;
            if is_meant {
                return Ok(());
            }
        }
    }

    fn change_frame(
        &self,
        number: u64,
        change: fn(&mut [u8]),
        (from, mut to): (&TcpStream, &TcpStream),
    ) -> io::Result<()> {
        for _ in 0..number {
            pass_frame(from, to)?;
        }
        let (mut frame, _) = read_frame(from)?;
        change(&mut frame);
        self.done();
        to.write_all(&frame)
    }

    fn change_pages(
        &self,
        is_chosen: impl Fn(u64) -> bool,
        change: fn(&mut [u8]),
        (mut from, mut to): (&TcpStream, &TcpStream),
    ) -> io::Result<()> {
        for at in 0.. {
            let (frame, length) = read_frame(from)?;
            to.write_all(&frame)?;
            let mut pages = vec![0; length as usize];
            from.read_exact(&mut pages)?;
            if is_chosen(at) && !pages.is_empty() {
                pages.chunks_exact_mut(PAGE).for_each(change);
                self.done();
            }
            to.write_all(&pages)?;
        }
        Ok(())
    }

    /// Passes on what a destination says until it is time to cut.
    fn until_said(&self, at: CutPoint, cut: &Cut, (from, mut to): (&TcpStream, &TcpStream)) -> io::Result<()> {
        match at {
            CutPoint::Asked => {
                from.peek(&mut [0])?;
                self.cut(cut);
                self.done();
                Ok(())
            }
            CutPoint::Said(field) => loop {
                let message = read_message(from)?;
                if says(&message, field) {
                    self.cut(cut);
                    self.done();
                    return Ok(());
                }
                to.write_all(&message)?;
            },
            CutPoint::Frames(_) => Ok(()),
        }
    }

    /// Passes on what a source sends until it is time to cut.
    fn until_sent(&self, at: CutPoint, cut: &Cut, (from, to): (&TcpStream, &TcpStream)) -> io::Result<()> {
        let CutPoint::Frames(frames) = at else { return Ok(()) };
        for _ in 0..frames {
            pass_frame(from, to)?;
        }
        self.cut(cut);
        self.done();
        Ok(())
    }
}

fn pass_frame(from: &TcpStream, mut to: &TcpStream) -> io::Result<()> {
    let (frame, pages) = read_frame(from)?;
    to.write_all(&frame)?;
    io::copy(&mut from.take(pages), &mut to)?;
    Ok(())
}
