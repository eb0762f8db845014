//! What outlives a link: orders, the clock, what was decided, and the wait for another link after one was lost.

use std::cell::{Cell, OnceCell, RefCell};
use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::thread;
use std::time::{Duration, Instant};

use crate::compress::Packing;
use crate::error_chain;
use crate::guest::{GuestCondition, GuestMemory, SourceGuest};
use crate::link::Link;
use crate::policy::Force;
use crate::precopy::Bandwidth;
use crate::source::conversation::TICK;
use crate::source::{Asked, Decided, NewTerms, OnTimeout, SourceError, SourceOrder, SourceReport, Stop, Terms};
use crate::verify::PageDigests;
use crate::wire::RESUMES_SINCE;

/// What the script knows whatever becomes of its link.
pub(super) struct Lasting<'a> {
    pub(super) asked: Asked<'a>,
    started: Instant,
    /// Set for good, by [`SourceOrder::ForceComplete`] or when the time was up.
    force: Cell<Option<Force>>,
    /// What holds now, by its parameters and what its user changed since.
    terms: Cell<Terms>,
    /// The round that goes on, and the throttle in it.
    round: Cell<(u32, u32)>,
    decided: RefCell<Vec<Decided>>,
    /// The version that the destination chose on the first link; none before.
    protocol: Cell<Option<u32>>,
    /// Another link that came while one was in use.
    next: Cell<Option<Box<Link>>>,
    /// Since when there is no link on which the copy goes on.
    lost: Cell<Option<Instant>>,
    /// For how long there was none, in all.
    waited: Cell<Duration>,
    /// Of all pages that went, over whichever link.
    digests: OnceCell<Arc<PageDigests>>,
    packing: Arc<Packing>,
}

impl<'a> Lasting<'a> {
    pub(super) fn new(asked: Asked<'a>) -> Self {
        Self {
            asked,
            started: Instant::now(),
            force: Cell::new(None),
            terms: Cell::new(asked.parameters.into()),
            round: Cell::default(),
            decided: RefCell::default(),
            protocol: Cell::new(None),
            next: Cell::default(),
            lost: Cell::new(None),
            waited: Cell::default(),
            digests: OnceCell::new(),
            packing: Arc::new(Packing::new(asked.parameters.compression)),
        }
    }

    /// Where digests of pages are kept as they go, if both sides are to compare.
    pub(super) fn digests(&self, memory: &impl GuestMemory) -> Option<Arc<PageDigests>> {
        let make = || Arc::new(PageDigests::new(memory.shape()));
        let verify = self.asked.parameters.verify;
        verify.then(|| Arc::clone(self.digests.get_or_init(make)))
    }

    /// What is done about compression, over whichever link.
    pub(super) fn packing(&self) -> Arc<Packing> {
        Arc::clone(&self.packing)
    }

    /// Tells what was changed about compression since this was done last.
    pub(super) fn tell_compression(&self) {
        for words in self.packing.changes() {
            self.tell(Decided::compress(self.round.get(), words));
        }
    }

    /// Why it is to be completed whatever its budget, if it is.
    pub(super) fn force(&self) -> Option<Force> {
        self.force.get()
    }

    /// What holds now.
    pub(super) fn terms(&self) -> Terms {
        self.terms.get()
    }

    /// This round goes on from now on, with vCPUs throttled so much.
    pub(super) fn round_begins(&self, round: u32, throttle: u32) {
        self.round.set((round, throttle));
    }

    /// Keeps a decision for the report.
    pub(super) fn note(&self, decided: Decided) {
        self.decided.borrow_mut().push(decided);
    }

    /// What was decided so far.
    pub(super) fn decided(&self) -> Vec<Decided> {
        self.decided.borrow().clone()
    }

    /// The destination speaks this version.
    pub(super) fn speaks(&self, protocol: u32) {
        self.protocol.set(Some(protocol));
    }

    /// The copy goes on over the link that there is now.
    pub(super) fn goes_on(&self) {
        if let Some(since) = self.lost.take() {
            self.waited.set(self.waited.get() + since.elapsed());
        }
    }

    /// Since it was ordered: its time counts from then.
    pub(super) fn since_order(&self) -> Duration {
        self.started.elapsed()
    }

    /// For how long there was no link on which the copy went on.
    pub(super) fn waited(&self) -> Duration {
        self.waited.get()
    }

    /// Whether a link that is lost may be made again.
    pub(super) fn may_resume(&self) -> bool {
        !self.asked.parameters.resume_window.is_zero()
            && self.protocol.get().is_none_or(|protocol| protocol >= RESUMES_SINCE)
    }

    /// What an end of the script means: a lost link, if it may be made again.
    pub(super) fn lost(&self, stop: Stop) -> Stop {
        match stop {
            Stop::Error(error) if self.may_resume() && error.is_lost_link() => Stop::LinkLost(error),
            stop => stop,
        }
    }

    /// Waits for another link, for as long as its user allows from the loss on; the guest is looked after meanwhile.
    pub(super) fn another_link<G: SourceGuest>(&self, guest: &mut G, lost: SourceError) -> Result<Link, Stop> {
        let window = self.asked.parameters.resume_window;
        let until = self.lost.get().unwrap_or_else(Instant::now) + window;
        self.lost.set(Some(until - window));
        while let Ok(order) = self.asked.orders.try_recv() {
            self.obey(order, None)?;
        }
        // Nobody is to make another one beside it.
        if let Some(link) = self.next.take() {
            return Ok(*link);
        }
        tracing::info!(error = error_chain(&lost), "the link to the destination is lost");
        self.asked.report(SourceReport::LinkLost {
            reason: error_chain(&lost),
            patience: until.saturating_duration_since(Instant::now()),
        });
        loop {
            if let Some(link) = self.next.take() {
                return Ok(*link);
            }
            if let GuestCondition::Ended(end) = guest.poll() {
                return Err(Stop::GuestEnded(end));
            }
            self.look_at_clock()?;
            if Instant::now() >= until {
                let lost = Box::new(lost);
                return Err(SourceError::LinkStaysLost { window, lost }.into());
            }
            match self.asked.orders.recv_timeout(TICK) {
                Ok(order) => self.obey(order, None)?,
                Err(RecvTimeoutError::Timeout) => {}
                // Nobody can bring a link; the window holds all the same.
                Err(RecvTimeoutError::Disconnected) => thread::sleep(TICK),
            }
        }
    }

    /// Whether the time is up.
    pub(super) fn look_at_clock(&self) -> Result<(), Stop> {
        if self.since_order() >= self.terms.get().timeout {
            self.time_up()?;
        }
        Ok(())
    }

    /// Obeys an order; `bandwidth` is that of the link in use.
    pub(super) fn obey(&self, order: SourceOrder, bandwidth: Option<&Bandwidth>) -> Result<(), Stop> {
        match order {
            SourceOrder::Abort { reason } => return Err(SourceError::Aborted(reason).into()),
            SourceOrder::ForceComplete => self.force.set(self.force.get().or(Some(Force::User))),
            SourceOrder::Retune(new) => self.retune(new, bandwidth),
            // If the one in use is not known to be lost yet, the destination will cut it.
            SourceOrder::Reconnect(link) => self.next.set(Some(link)),
        }
        Ok(())
    }

    /// The time is up: for good, or only for the guest to run.
    fn time_up(&self) -> Result<(), Stop> {
        let terms = self.terms.get();
        match (self.asked.parameters.on_timeout, self.force.get()) {
            (OnTimeout::Abort, _) => {
                let (after, last) = (terms.timeout, self.last_words());
                Err(SourceError::TimedOut { after, last }.into())
            }
            (OnTimeout::Pause, Some(Force::TimeUp)) => Ok(()),
            (OnTimeout::Pause, None | Some(Force::User)) => {
                self.force.set(Some(Force::TimeUp));
                let lateness = self.asked.parameters.lateness;
                self.tell(Decided::time_up(self.round.get(), &terms, lateness));
                Ok(())
            }
        }
    }

    /// What was decided on the last round.
    fn last_words(&self) -> Option<String> {
        let decided = self.decided.borrow();
        let last = decided.iter().rev().find(|decided| decided.blackout.is_some())?;
        Some(format!("after round {}: {}", last.round, last.words))
    }

    /// Keeps a decision that is about no round's figures, and tells it.
    pub(super) fn tell(&self, decided: Decided) {
        self.note(decided.clone());
        self.asked.report(SourceReport::Decided(decided));
    }

    fn retune(&self, new: NewTerms, bandwidth: Option<&Bandwidth>) {
        let terms = self.terms.get().changed(new);
        self.terms.set(terms);
        if let Some(bandwidth) = bandwidth {
            bandwidth.set(terms.bandwidth);
        }
        self.tell(Decided::retuned(self.round.get(), &terms));
    }
}
