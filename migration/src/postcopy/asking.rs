//! The asking half of a session of late pages, at the destination.
//!
//! Whoever asks holds the table of missing pages, and is the one that gives zeroes to those who touch other pages: it never waits for the
//! source. What the connection does not take at once is kept, and goes with the next frame or the next look.

use std::io;
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{SendFlags, send};

use crate::guest::FrameRun;
use crate::link::Sockets;
use crate::wire::{FrameWriter, MAX_RUNS, Wish};

/// The asking direction of a session's urgent streams.
pub(super) struct Asking {
    pub(super) sockets: Arc<Sockets>,
    streams: Vec<Stream>,
    turn: usize,
    /// How long the source may read nothing of what it is asked.
    patience: Duration,
}

/// What is asked on one stream.
struct Stream {
    writer: FrameWriter,
    /// What the connection did not take yet; a page is asked for once in a session, so it has an end.
    unsent: Vec<u8>,
    /// Since when it takes nothing.
    stuck: Option<Instant>,
}

impl Asking {
    /// The first `urgent` streams of a session, on which nothing was asked for yet.
    pub(super) fn new(sockets: Arc<Sockets>, urgent: u16, patience: Duration) -> Self {
        let stream = |index| Stream {
            writer: FrameWriter::new(index),
            unsent: Vec::new(),
            stuck: None,
        };
        Self {
            sockets,
            streams: (0..urgent).map(stream).collect(),
            turn: 0,
            patience,
        }
    }

    /// Asks for these on the stream whose turn it is. Never blocks. One that breaks is noticed by who reads it.
    pub(super) fn ask(&mut self, table: &[(FrameRun, Wish)]) {
        for part in table.chunks(MAX_RUNS) {
            self.turn = (self.turn + 1) % self.streams.len();
            let Stream { writer, unsent, .. } = &mut self.streams[self.turn];
            unsent.extend_from_slice(writer.asked(part.iter().copied()));
            self.send(self.turn);
        }
    }

    /// Sends what was kept. A source that reads nothing for too long has lost the session.
    pub(super) fn go_on(&mut self) {
        for index in 0..self.streams.len() {
            if !self.streams[index].unsent.is_empty() {
                self.send(index);
            }
        }
    }

    fn send(&mut self, index: usize) {
        let stream = &mut self.streams[index];
        let is_lost = match stream.send(&self.sockets.pages[index]) {
            Ok(()) => stream.stuck.is_some_and(|since| since.elapsed() >= self.patience),
            Err(_) => true,
        };
        if is_lost {
            stream.unsent.clear();
            self.sockets.cut();
        }
    }
}

impl Stream {
    /// As much as the connection takes.
    fn send(&mut self, socket: &TcpStream) -> io::Result<()> {
        let mut sent = 0;
        while sent < self.unsent.len() {
            match send(socket, &self.unsent[sent..], SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(count) => sent += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(error) => return Err(error.into()),
            }
        }
        self.unsent.drain(..sent);
        if self.unsent.is_empty() {
            self.stuck = None;
        } else if sent > 0 || self.stuck.is_none() {
            self.stuck = Some(Instant::now());
        }
        Ok(())
    }
}

/// What a frame asks for.
#[derive(Default)]
pub(super) struct Wishes(Vec<(FrameRun, Wish)>);

impl Wishes {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn add(&mut self, run: FrameRun, wish: Wish) {
        self.0.push((run, wish));
    }

    /// Ascending, neighbours of one kind merged.
    pub(super) fn sorted(mut self) -> Vec<(FrameRun, Wish)> {
        self.0.sort_unstable_by_key(|(run, _)| run.first);
        let mut merged: Vec<(FrameRun, Wish)> = Vec::new();
        for (run, wish) in self.0 {
            match merged.last_mut() {
                Some((last, kind)) if *kind == wish && last.end() == run.first => last.count += run.count,
                _ => merged.push((run, wish)),
            }
        }
        merged
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;
    use crate::guest::{MemoryShape, Region};
    use crate::link::{Link, Liveness};
    use crate::wire::FrameReader;

    fn run(first: u64, count: u64) -> FrameRun {
        FrameRun { first, count }
    }

    #[test]
    fn neighbours_of_one_kind_are_merged_and_what_is_touched_stays_apart() {
        let mut wishes = Wishes::default();
        wishes.add(run(5, 1), Wish::Touched);
        for first in [4, 6, 7, 9] {
            wishes.add(run(first, 1), Wish::Beside);
        }
        let sorted = [
            (run(4, 1), Wish::Beside),
            (run(5, 1), Wish::Touched),
            (run(6, 2), Wish::Beside),
            (run(9, 1), Wish::Beside),
        ];
        assert_eq!(wishes.sorted(), sorted);
    }

    fn connections() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (near, listener.accept().unwrap().0)
    }

    /// Asks on one stream, and its other end.
    fn asking(patience: Duration) -> (Asking, TcpStream) {
        let ((control, _), (near, far)) = (connections(), connections());
        let link = Link {
            control,
            pages: vec![near],
            late: None,
        };
        let sockets = Sockets::new(link, Liveness::default()).unwrap();
        (Asking::new(Arc::new(sockets), 1, patience), far)
    }

    /// Asks until the connection takes no more; for how many pages.
    fn fill(asking: &mut Asking) -> u64 {
        let mut asked = 0;
        while asking.streams[0].unsent.is_empty() {
            asking.ask(&[(run(asked, 1), Wish::Touched)]);
            asked += 1;
        }
        asked
    }

    #[test]
    fn a_source_that_reads_nothing_holds_nobody_up_and_hears_of_every_page_once_it_reads() {
        let (mut asking, far) = asking(Duration::from_secs(60));
        let asked = fill(&mut asking) + 1;
        asking.ask(&[(run(asked - 1, 1), Wish::Touched)]);
        let shape = MemoryShape::new(vec![Region {
            start_frame: 0,
            frames: 1 << 40,
        }]);
        let read = std::thread::spawn(move || {
            let (mut reader, shape, mut far) = (FrameReader::new(0), shape.unwrap(), far);
            for page in 0..asked {
                let heard = reader.asked(&mut far, &shape).unwrap().unwrap();
                assert_eq!(heard.touched, [run(page, 1)]);
            }
        });
        while !read.is_finished() {
            asking.go_on();
            std::thread::yield_now();
        }
        read.join().unwrap();
        assert!(asking.streams[0].unsent.is_empty() && asking.streams[0].stuck.is_none());
    }

    #[test]
    fn a_source_that_reads_nothing_for_too_long_has_lost_the_session() {
        let (mut asking, far) = asking(Duration::from_secs(60));
        fill(&mut asking);
        asking.patience = Duration::ZERO;
        let socket = asking.sockets.pages[0].try_clone().unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
        // The connection may take some more first.
        while socket.peek(&mut [0]).is_err() {
            asking.ask(&[(run(0, 1), Wish::Touched)]);
        }
        assert!(asking.streams[0].unsent.is_empty());
        drop(far);
    }
}
