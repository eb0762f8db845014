//! The guest after GO: stopped, and perhaps another host's already.

use std::fmt;
use std::net::TcpStream;

use crate::handover::{Attempt, Permit};
use crate::postcopy::PagesToServe;
use crate::source::SourceSummary;

/// A guest whose GO was sent. It cannot run: only a permit of a higher epoch, which its agent gives on D = SRC, brings it
/// back. Dropping it destroys the copy, which is right on RUNNING and nowhere else.
///
/// It keeps the connections open until then, because closing them could discard a GO that is still on its way.
pub struct Parked<G> {
    pub(super) guest: G,
    pub(super) attempt: Attempt,
    pub(super) summary: SourceSummary,
    pub(super) sockets: Vec<TcpStream>,
    pub(super) late: Option<PagesToServe>,
}

/// Why a parked guest did not come back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotResumable {
    /// The permit names another instance.
    #[error("the permit is for instance {}, the guest is {}", .0.instance, .1.instance)]
    OtherInstance(Permit, Attempt),
    /// The permit's epoch is not above the one whose right GO gave away.
    #[error("the permit's epoch {} is not above epoch {}, which was given away by GO", .0.epoch, .1.epoch)]
    NotNew(Permit, Attempt),
}

impl<G> Parked<G> {
    /// The attempt whose GO was sent.
    #[must_use]
    pub fn attempt(&self) -> Attempt {
        self.attempt
    }

    /// What was measured.
    #[must_use]
    pub fn summary(&self) -> &SourceSummary {
        &self.summary
    }

    /// The guest, to look at.
    #[must_use]
    pub fn guest(&self) -> &G {
        &self.guest
    }

    /// What is to be served, if GO listed missing pages; once. Whoever serves it reads the guest's memory only, so the guest may be given
    /// back, or be destroyed but for its memory, meanwhile.
    #[must_use]
    pub fn take_late(&mut self) -> Option<PagesToServe> {
        self.late.take()
    }

    /// Gives the guest back, still stopped and still tracked, against a permit of an epoch that it has not had.
    ///
    /// # Errors
    /// Hands itself back with the reason if the permit is another guest's or too old.
    pub fn resume(self, permit: Permit) -> Result<G, (Box<Self>, NotResumable)> {
        let reason = if permit.instance != self.attempt.instance {
            NotResumable::OtherInstance(permit, self.attempt)
        } else if permit.epoch <= self.attempt.epoch {
            NotResumable::NotNew(permit, self.attempt)
        } else {
            return Ok(self.guest);
        };
        Err((Box::new(self), reason))
    }
}

impl<G> fmt::Debug for Parked<G> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Parked")
            .field("attempt", &self.attempt)
            .field("summary", &self.summary)
            .field("connections", &self.sockets.len())
            .finish_non_exhaustive()
    }
}
