//! The asking half of a session of late pages, at the destination.

use std::io::Write as _;
use std::sync::Arc;

use crate::guest::FrameRun;
use crate::link::Sockets;
use crate::wire::{FrameWriter, MAX_RUNS, Wish};

/// The asking direction of a session's urgent streams.
pub(super) struct Asking {
    pub(super) sockets: Arc<Sockets>,
    writers: Vec<FrameWriter>,
    turn: usize,
}

impl Asking {
    /// The first `urgent` streams of a session, on which nothing was asked for yet.
    pub(super) fn new(sockets: Arc<Sockets>, urgent: u16) -> Self {
        Self {
            sockets,
            writers: (0..urgent).map(FrameWriter::new).collect(),
            turn: 0,
        }
    }

    /// Asks for these on the stream whose turn it is. One that breaks is noticed by who reads it.
    pub(super) fn ask(&mut self, table: &[(FrameRun, Wish)]) {
        for part in table.chunks(MAX_RUNS) {
            self.turn = (self.turn + 1) % self.writers.len();
            let frame = self.writers[self.turn].asked(part.iter().copied());
            if (&self.sockets.pages[self.turn]).write_all(frame).is_err() {
                self.sockets.cut();
            }
        }
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
    use super::*;

    #[test]
    fn neighbours_of_one_kind_are_merged_and_what_is_touched_stays_apart() {
        let run = |first, count| FrameRun { first, count };
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
}
