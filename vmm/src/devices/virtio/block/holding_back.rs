//! How much its guest may write to a disk that is being copied, so that the copy comes to an end: what is not sent yet of the disk is kept from growing.
//!
//! ```text
//!   credit  +=  one block for each two of this disk that are sent, one for each eight pages of anything else
//!           +=  the allowance, with each fetch (and what was left over from before is gone)
//!           -=  the blocks that a request makes dirty which were not
//!   request ──► no credit, and a block that is not dirty ──► waits in the available ring, and what is behind it
//!          └──► otherwise ──────────────────────────────► is carried out, on credit if need be
//! ```
//!
//! So what a round leaves of a disk is half of what it sent and the allowance, and after some rounds no more than twice that, however fast the
//! guest writes. A block that is dirty already costs nothing: it is sent once, whatever is written to it meanwhile. A request is carried
//! out whole, and what it took too much is missing to the next ones: half of what is sent pays for it.
//!
//! Nothing waits for long: whoever waited as long as [`PATIENCE`] is let go, and if nothing was sent meanwhile, everybody else is too, until something is.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};

/// How long a request waits at most: a link that carries nothing for half of that is given up by whoever copies over it.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// Credit is counted in parts of a block.
const BLOCK: i64 = 16;

/// What a block of this disk that is sent is worth, and a page of anything else: that is sent in turn with the disk, and would have its guest wait
/// all the while. Memory of which each round leaves less than four fifths comes to an end beside it.
const OWN: i64 = BLOCK / 2;
const OTHER: i64 = BLOCK / 8;

/// So many blocks at most are carried out on credit: what discards a whole disk costs nothing to send, and is not to be paid for by waiting.
const MOST_ON_CREDIT: i64 = 4096;

/// How long requests to a disk waited, because the copy of it was to get ahead.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WriteWaits {
    /// How many did, those that waited behind them not counted.
    pub count: u64,
    /// The longest.
    pub longest: Duration,
    /// All of them.
    pub total: Duration,
}

impl WriteWaits {
    /// Those of two disks.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            count: self.count + other.count,
            longest: self.longest.max(other.longest),
            total: self.total + other.total,
        }
    }

    fn add(&mut self, took: Duration) {
        *self = self.plus(Self {
            count: 1,
            longest: took,
            total: took,
        });
    }
}

/// What a guest may still write to a disk.
#[derive(Debug)]
pub(super) struct HoldingBack {
    /// What most disks are asked for most of the time.
    is_on: AtomicBool,
    state: Mutex<State>,
    /// Rung when who waits may ask again.
    bell: OwnedFd,
}

#[derive(Debug, Default)]
struct State {
    /// Blocks; none while nothing is held back.
    allowance: Option<u64>,
    credit: i64,
    /// Since when a request waits, if one does.
    waiting: Option<Instant>,
    /// When something was sent last.
    progress: Option<Instant>,
    /// Nothing is sent: nobody waits.
    is_let_go: bool,
    waits: WriteWaits,
}

impl HoldingBack {
    /// Nothing is held back.
    ///
    /// # Errors
    /// The process has no descriptors left.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            is_on: AtomicBool::new(false),
            state: Mutex::default(),
            bell: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?,
        })
    }

    /// Allows so many blocks with each fetch, or whatever is written.
    pub(super) fn allow(&self, blocks: Option<u64>, now: Instant) {
        let mut state = self.state();
        let was_on = state.allowance.is_some();
        state.allowance = blocks;
        self.is_on.store(blocks.is_some(), Ordering::SeqCst);
        match blocks {
            Some(_) if was_on => {}
            Some(_) => {
                state.credit = 0;
                state.earn_allowance(now);
            }
            None => {
                state.is_let_go = false;
                self.ring_if(state.waiting.is_some());
                state.end_wait(now);
            }
        }
    }

    /// Forgets who waited before.
    pub(super) fn begin(&self) {
        self.state().waits = WriteWaits::default();
    }

    /// What is dirty was fetched.
    pub(super) fn fetched(&self, now: Instant) {
        if self.is_on() {
            let mut state = self.state();
            state.earn_allowance(now);
            self.ring_if(state.may_go_on());
        }
    }

    /// Blocks of this disk were sent, and so many pages of anything else.
    pub(super) fn sent(&self, own: u64, others: u64, now: Instant) {
        if self.is_on() {
            let mut state = self.state();
            state.is_let_go = false;
            state.progress = Some(now);
            // A round has fewer pages than there are numbers.
            state.credit += own.cast_signed() * OWN + others.cast_signed() * OTHER;
            self.ring_if(state.may_go_on());
        }
    }

    /// Whether anything may have to wait.
    pub(super) fn is_on(&self) -> bool {
        self.is_on.load(Ordering::SeqCst)
    }

    /// Whether a request may be carried out that makes so many blocks dirty. If not, it is to be asked again when the bell has rung, or at
    /// [`until`](Self::until).
    pub(super) fn admits(&self, blocks: u64, now: Instant) -> bool {
        self.state().admits(blocks, now)
    }

    /// Nothing is waiting any more: what did was carried out, or forgotten by its guest.
    pub(super) fn nobody_waits(&self, now: Instant) {
        self.state().end_wait(now);
    }

    /// Until when what waits does at most.
    pub(super) fn until(&self) -> Option<Instant> {
        self.state().waiting.map(|since| since + PATIENCE)
    }

    /// How long was waited so far.
    pub(super) fn waits(&self, now: Instant) -> WriteWaits {
        let state = self.state();
        let mut waits = state.waits;
        if let Some(since) = state.waiting {
            waits.add(now.saturating_duration_since(since));
        }
        waits
    }

    pub(super) fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    /// The bell was heard.
    pub(super) fn heard(&self) {
        // It fails where it was not rung.
        let _ = rustix::io::read(&self.bell, &mut [0; 8]);
    }

    fn ring_if(&self, is_needed: bool) {
        if is_needed {
            // It only fails where it was rung and not heard for ever.
            let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn earn_allowance(&mut self, now: Instant) {
        let allowance = self.allowance.unwrap_or(0).min(1 << 40).cast_signed();
        self.credit = self.credit.min(0) + allowance * BLOCK;
        self.is_let_go = false;
        self.progress = Some(now);
    }

    fn may_go_on(&self) -> bool {
        self.waiting.is_some() && self.credit > 0
    }

    fn admits(&mut self, blocks: u64, now: Instant) -> bool {
        let Some(allowance) = self.allowance else {
            return true;
        };
        let waited_since = self.waiting.filter(|&since| now >= since + PATIENCE);
        if let Some(since) = waited_since {
            self.is_let_go = self.progress.is_none_or(|progress| progress <= since);
        }
        if blocks > 0 && self.credit <= 0 && !self.is_let_go && waited_since.is_none() {
            self.waiting.get_or_insert(now);
            return false;
        }
        let most = MOST_ON_CREDIT.max(allowance.min(1 << 40).cast_signed());
        let cost = blocks.min(1 << 40).cast_signed() * BLOCK;
        self.credit = (self.credit - cost).max(-most * BLOCK);
        self.end_wait(now);
        true
    }

    fn end_wait(&mut self, now: Instant) {
        if let Some(since) = self.waiting.take() {
            self.waits.add(now.saturating_duration_since(since));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn held_back(allowance: u64) -> (HoldingBack, Instant) {
        let (held, now) = (HoldingBack::new().expect("descriptor"), Instant::now());
        held.allow(Some(allowance), now);
        (held, now)
    }

    fn has_rung(held: &HoldingBack) -> bool {
        rustix::io::read(&held.bell, &mut [0; 8]).is_ok()
    }

    #[test]
    fn what_is_over_the_allowance_waits_for_what_is_sent() {
        let (held, now) = held_back(10);
        assert!(held.admits(9, now) && held.admits(4, now));
        assert!(
            !held.admits(1, now) && held.admits(0, now),
            "what is dirty already is free"
        );
        assert!(!held.admits(1, now));
        held.sent(6, 0, now);
        assert!(!has_rung(&held), "three blocks were carried out on credit");
        held.sent(0, 8, now + Duration::from_secs(2));
        assert!(has_rung(&held));
        assert!(held.admits(1, now + Duration::from_secs(3)));
        let waits = held.waits(now);
        assert_eq!(
            (waits.longest, waits.total),
            (Duration::from_secs(3), Duration::from_secs(3))
        );
    }

    #[test]
    fn a_fetch_allows_as_much_again_and_no_more() {
        let (held, now) = held_back(10);
        held.sent(1000, 0, now);
        held.fetched(now);
        assert!(held.admits(10, now) && !held.admits(1, now));
        held.fetched(now);
        assert!(has_rung(&held) && held.admits(30, now));
        held.fetched(now);
        assert!(
            !has_rung(&held) && !held.admits(1, now),
            "ten blocks are still to be paid for"
        );
    }

    #[test]
    fn nobody_waits_once_nothing_is_held_back() {
        let (held, now) = held_back(1);
        assert!(held.admits(5, now) && !held.admits(1, now));
        held.allow(None, now);
        assert!(has_rung(&held) && !held.is_on());
        assert!(held.admits(1000, now + Duration::from_secs(1)));
        assert_eq!((held.waits(now).count, held.until()), (1, None));
        held.begin();
        assert_eq!(held.waits(now), WriteWaits::default());
    }

    #[test]
    fn nobody_waits_longer_than_patience_goes_and_not_even_that_where_nothing_is_sent() {
        let (held, now) = held_back(1);
        assert!(held.admits(5, now));
        let late = now + PATIENCE;
        assert!(!held.admits(1, now) && held.until() == Some(late));
        held.sent(1, 0, now + PATIENCE / 2);
        assert!(held.admits(1, late), "it waited long enough");
        assert!(!held.admits(1, late), "others wait as before, for something was sent");
        assert!(held.admits(1, late + PATIENCE) && held.admits(9, late + PATIENCE));
        held.sent(0, 0, late + PATIENCE);
        assert!(!held.admits(1, late + PATIENCE), "something is sent again");
    }

    proptest! {
        /// A guest that writes whenever it may, to blocks that are all new, and rounds that send what it left.
        #[test]
        fn rounds_come_to_leave_little_of_a_disk_however_it_is_written(
            allowance in 1u64..5000,
            first in 0u64..1_000_000,
            request in 1u64..300,
            chunk in 1u64..512,
        ) {
            let (held, now) = held_back(allowance);
            let mut left = first;
            let mut least = u64::MAX;
            for _ in 0..40 {
                held.fetched(now);
                let (mut sent, mut written) = (0, 0);
                loop {
                    while held.admits(request, now) {
                        written += request;
                    }
                    if sent == left {
                        break;
                    }
                    let part = chunk.min(left - sent);
                    held.sent(part, 0, now);
                    sent += part;
                }
                left = written;
                least = least.min(left);
            }
            prop_assert!(left <= 2 * (allowance + request), "{left}");
            prop_assert!(least <= 2 * allowance + request, "{least}");
        }
    }
}
