//! When frames passed a card, for whoever wants to know how long its network had nothing of it.
//!
//! Only what one station says to one other counts. What goes to many is sent without anybody asking for it: a card that makes itself known after a
//! move would else seem to have answered, and a guest that nobody talks to would seem to be in use.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::HEADER_BYTES;
use super::receive::byte_at;
use crate::memory::{GuestMemory, Span};

/// When frames passed a network card, since its machine was made. Clones are handles of the same.
#[derive(Debug, Clone)]
pub struct CardTraffic(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    made: Instant,
    sent: Direction,
    received: Direction,
}

/// Nanoseconds since the card was made, and 1; 0: never.
#[derive(Debug, Default)]
struct Direction {
    first: AtomicU64,
    last: AtomicU64,
}

/// The first and the last frame of one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Passed {
    /// When the first one passed.
    pub first: Instant,
    /// When the last one did.
    pub last: Instant,
}

impl Default for CardTraffic {
    fn default() -> Self {
        Self(Arc::new(Inner {
            made: Instant::now(),
            sent: Direction::default(),
            received: Direction::default(),
        }))
    }
}

impl CardTraffic {
    /// Frames that the guest sent to one other station; none if there was none.
    #[must_use]
    pub fn sent(&self) -> Option<Passed> {
        self.passed(&self.0.sent)
    }

    /// Frames for the card's own address that the guest was given; none if there was none.
    #[must_use]
    pub fn received(&self) -> Option<Passed> {
        self.passed(&self.0.received)
    }

    fn passed(&self, direction: &Direction) -> Option<Passed> {
        let at = |time: &AtomicU64| {
            let after = time.load(Ordering::Acquire).checked_sub(1)?;
            Some(self.0.made + Duration::from_nanos(after))
        };
        let last = at(&direction.last)?;
        Some(Passed {
            first: at(&direction.first).unwrap_or(last),
            last,
        })
    }

    /// The guest sent what these spans hold, header and frame.
    pub(super) fn note_sent(&self, spans: &[Span], memory: &GuestMemory) {
        const TO_MANY: u8 = 1;
        if to(spans, memory).is_some_and(|address| address[0] & TO_MANY == 0) {
            self.note(&self.0.sent);
        }
    }

    /// The card with this address was given what these spans hold, header and frame.
    pub(super) fn note_received(&self, own: [u8; 6], spans: &[Span], memory: &GuestMemory) {
        if to(spans, memory) == Some(own) {
            self.note(&self.0.received);
        }
    }

    /// One thread only notes.
    fn note(&self, direction: &Direction) {
        let after = u64::try_from(self.0.made.elapsed().as_nanos()).unwrap_or(u64::MAX - 1) + 1;
        if direction.first.load(Ordering::Relaxed) == 0 {
            direction.first.store(after, Ordering::Release);
        }
        direction.last.store(after, Ordering::Release);
    }
}

/// Whom a frame is for.
fn to(spans: &[Span], memory: &GuestMemory) -> Option<[u8; 6]> {
    let at = |index| byte_at(spans, HEADER_BYTES + index);
    let byte = |index| memory.tracked().read_obj::<u8>(GuestAddress(at(index)?)).ok();
    let first = at(0)?;
    if at(5)? == first + 5 {
        return memory.tracked().read_obj(GuestAddress(first)).ok();
    }
    Some([byte(0)?, byte(1)?, byte(2)?, byte(3)?, byte(4)?, byte(5)?])
}
