//! Pages that the guest says are free, and that are not sent therefore.
//!
//! ```text
//!   tracking on ─► asked ─► named pages are left out of what is due ─► ended ─► first fetch of what was written ─► …
//! ```
//!
//! Which pages may be left out, and why no write is lost by it: a page that was named was free at some time after tracking began. What it held then is
//! nothing to the guest, and whatever the guest writes to it later is tracked. So it need not be sent *as long as no word of those writes was
//! used up*: neither by re-arming its range (`precopy/feed.rs` leaves it out before that, or not at all) nor by a fetch. Hence all ends right before the first fetch, and what
//! is named later is not heard. Nobody waits for the guest: one that says nothing, or has no driver, is copied as if it had not been asked.
//!
//! What the destination has for such a page is zero, or what came over an earlier link; what is here is whatever was there. Neither is wrong, but
//! they differ. Digests that are kept as pages go know nothing of pages that never went. For those of all memory, which only tests ask for,
//! such pages are made zero here while the guest stands still: it was promised nothing about what they hold.

use std::sync::Arc;

use crate::PageSet;
use crate::guest::{FreePages, GuestError, GuestMemory, SourceGuest};
use crate::source::rounds::Copy;

/// What one copy does about pages that are free.
pub(super) struct Hints {
    asked: Option<Arc<dyn FreePages>>,
    /// Pages that were left out and not sent since.
    unsent: Option<PageSet>,
}

impl Hints {
    /// Asks the guest. Its writes are tracked.
    pub(super) fn ask(guest: &mut impl SourceGuest) -> Self {
        Self {
            asked: guest.ask_for_free_pages(),
            unsent: None,
        }
    }

    /// Who tells, as long as the guest is asked.
    pub(super) fn asked(&self) -> Option<Arc<dyn FreePages>> {
        self.asked.clone()
    }

    /// Asks no more.
    pub(super) fn end(&mut self, guest: &mut impl SourceGuest) {
        if self.asked.take().is_some() {
            guest.end_free_pages();
        }
    }

    /// These pages were left out.
    pub(super) fn leaves_out(&mut self, free: Option<PageSet>) {
        match (&mut self.unsent, free) {
            (Some(unsent), Some(free)) => unsent.union_with(&free),
            (unsent @ None, free) => *unsent = free,
            (Some(_), None) => {}
        }
    }

    /// These pages are sent now, or are to be.
    pub(super) fn are_sent(&mut self, set: &PageSet) {
        if let Some(unsent) = &mut self.unsent {
            unsent.subtract(set);
        }
    }

    /// Makes what was left out as zero as it is at the destination, but for what is `pending`: that was written since. Nobody runs.
    pub(super) fn make_zero(&mut self, memory: &impl GuestMemory, pending: &PageSet) -> Result<(), GuestError> {
        self.are_sent(pending);
        let mut runs = self.unsent.iter().flat_map(PageSet::runs);
        runs.try_for_each(|run| memory.write_zeroes(run))
    }
}

impl<G: SourceGuest> Copy<'_, '_, G> {
    /// Ends what is asked, before what was written is fetched for the first time. What no round has taken yet is still to be left out: all of
    /// memory, of a guest whose pages come late or which was stopped for its copy.
    pub(super) fn end_hints(&mut self) {
        let Some(asked) = self.so_far.hints.asked() else { return };
        let mut said = Vec::new();
        asked.take(&mut said);
        self.so_far.hints.end(self.guest);
        let mut free = self.so_far.pending.emptied();
        let pending = &mut self.so_far.pending;
        let count: u64 = said.iter().map(|&run| pending.move_to(run, &mut free)).sum();
        if count > 0 {
            self.summary.hinted_pages += count;
            self.so_far.hints.leaves_out(Some(free));
        }
    }

    /// These pages were left out of a round.
    pub(super) fn left_out(&mut self, free: Option<PageSet>) {
        self.summary.hinted_pages += free.as_ref().map_or(0, PageSet::count);
        self.so_far.hints.leaves_out(free);
    }
}
