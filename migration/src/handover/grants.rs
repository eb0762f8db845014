//! VMM A's half: the switch grant, and the fact GO.
//!
//! ```text
//!             offer                trade_for_go
//!   nothing ────────► held(M,n,e) ─────────────► GO sent
//!      ▲                 │ trade_for_cancelled
//!      └─────────────────┘ CANCELLED(M,n): a grant for (M,n) is refused for ever
//! ```
//!
//! Two threads meet in [`Grants`]: the one that serves the agent (offers, and asks for CANCELLED) and the one that runs the
//! migration (trades). Whoever comes first wins; the other is told what came of it. [`GrantRegister`] is what they share.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::Attempt;

/// What a grant was traded for. Final for its attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Traded {
    /// The switchover was called off; the guest runs on under the epoch it had.
    Cancelled,
    /// GO was sent, or is being sent: only the decision register knows the rest.
    GoSent,
}

/// Why an offered grant was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GrantRefused {
    /// CANCELLED was answered for this attempt, a later one was seen, or the migration is over here.
    #[error("{0} was called off before")]
    Stale(Attempt),
    /// Another attempt's grant is held.
    #[error("the grant of {0} is still held")]
    OtherHeld(Attempt),
    /// GO was sent under an earlier grant.
    #[error("GO was sent for {0}")]
    GoWasSent(Attempt),
}

/// The register itself: plain data, without anybody who waits. [`Grants`] is what threads share; a model checker takes this.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct GrantRegister {
    held: Option<Attempt>,
    go_sent: Option<Attempt>,
    /// The last attempt for which CANCELLED was answered. Attempts of one migration only grow, and a VMM serves
    /// one migration at a time, so the newest one is enough to refuse all earlier ones.
    cancelled: Option<Attempt>,
    /// The last migration that is over here: no grant of it is taken any more.
    closed: Option<Uuid>,
}

impl GrantRegister {
    /// Takes a grant from the agent. Offering the one that is held already changes nothing.
    ///
    /// # Errors
    /// Refused if this attempt or a later one was cancelled, another one is held, or GO was sent.
    pub fn offer(&mut self, attempt: Attempt) -> Result<(), GrantRefused> {
        if let Some(sent) = self.go_sent {
            return Err(GrantRefused::GoWasSent(sent));
        }
        if self.is_cancelled(attempt) || self.closed == Some(attempt.migration) {
            return Err(GrantRefused::Stale(attempt));
        }
        match self.held {
            Some(held) if held != attempt => Err(GrantRefused::OtherHeld(held)),
            _ => {
                self.held = Some(attempt);
                Ok(())
            }
        }
    }

    /// The grant that is held now, not yet traded.
    #[must_use]
    pub fn held(&self) -> Option<Attempt> {
        self.held
    }

    /// The attempt for which GO was sent.
    #[must_use]
    pub fn go_sent(&self) -> Option<Attempt> {
        self.go_sent
    }

    /// The newest attempt that was traded for CANCELLED.
    #[must_use]
    pub fn cancelled(&self) -> Option<Attempt> {
        self.cancelled
    }

    /// Whether a grant is held or was traded for GO-sent: the user's pause and resume are refused then.
    #[must_use]
    pub fn binds(&self) -> bool {
        self.held.is_some() || self.go_sent.is_some()
    }

    /// Trades the held grant of `attempt` for GO-sent, right before GO is written.
    ///
    /// Returns whether this call traded it: false if it was cancelled or never held, and then GO must not be sent.
    #[must_use]
    pub fn trade_for_go(&mut self, attempt: Attempt) -> bool {
        if self.held != Some(attempt) {
            return false;
        }
        self.held = None;
        self.go_sent = Some(attempt);
        true
    }

    /// Trades `attempt` for CANCELLED, held or not yet offered, unless GO was sent for it. From CANCELLED on a grant for it is refused.
    pub fn trade_for_cancelled(&mut self, attempt: Attempt) -> Traded {
        if self
            .go_sent
            .is_some_and(|sent| sent.migration == attempt.migration && sent.attempt >= attempt.attempt)
        {
            return Traded::GoSent;
        }
        if self
            .held
            .is_some_and(|held| held.migration == attempt.migration && held.attempt <= attempt.attempt)
        {
            self.held = None;
        }
        if !self.is_cancelled(attempt) {
            self.cancelled = Some(attempt);
        }
        Traded::Cancelled
    }

    /// The migration of `attempt` is over before GO: CANCELLED for this attempt and for any later one whose grant is held or on
    /// its way. A grant that stayed would bind the guest for ever.
    pub fn close(&mut self, attempt: Attempt) -> Traded {
        if self.go_sent.is_some_and(|sent| sent.migration == attempt.migration) {
            return Traded::GoSent;
        }
        let held = self.held.filter(|held| held.migration == attempt.migration);
        let newest = held.filter(|held| held.attempt > attempt.attempt).unwrap_or(attempt);
        self.closed = Some(attempt.migration);
        self.trade_for_cancelled(newest)
    }

    /// Forgets GO-sent, because the guest resumes here under a higher epoch (D = SRC). Its migration is over.
    pub fn superseded(&mut self) {
        if let Some(sent) = self.go_sent.take() {
            self.cancelled = Some(sent);
            self.closed = Some(sent.migration);
        }
    }

    fn is_cancelled(&self, attempt: Attempt) -> bool {
        self.cancelled
            .is_some_and(|cancelled| cancelled.migration == attempt.migration && cancelled.attempt >= attempt.attempt)
    }
}

/// The grant register of one VMM, shared by the thread that serves the agent and the one that runs the migration.
#[derive(Debug, Default)]
pub struct Grants {
    register: Mutex<GrantRegister>,
    changed: Condvar,
}

impl Grants {
    /// A register that holds nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes a grant from the agent: [`GrantRegister::offer`].
    ///
    /// # Errors
    /// Refused if this attempt or a later one was cancelled, another one is held, or GO was sent.
    pub fn offer(&self, attempt: Attempt) -> Result<(), GrantRefused> {
        let offered = self.lock().offer(attempt);
        self.changed.notify_all();
        offered
    }

    /// The grant that is held now, not yet traded.
    #[must_use]
    pub fn held(&self) -> Option<Attempt> {
        self.lock().held()
    }

    /// The attempt for which GO was sent.
    #[must_use]
    pub fn go_sent(&self) -> Option<Attempt> {
        self.lock().go_sent()
    }

    /// The newest attempt that was traded for CANCELLED.
    #[must_use]
    pub fn cancelled(&self) -> Option<Attempt> {
        self.lock().cancelled()
    }

    /// Whether a grant is held or was traded for GO-sent: the user's pause and resume are refused then.
    #[must_use]
    pub fn binds(&self) -> bool {
        self.lock().binds()
    }

    /// Waits until a grant is held, `timeout` at most.
    #[must_use]
    pub fn wait_held(&self, timeout: Duration) -> Option<Attempt> {
        let deadline = Instant::now() + timeout;
        let mut register = self.lock();
        while register.held.is_none() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            register = self
                .changed
                .wait_timeout(register, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        register.held
    }

    /// Trades the held grant for GO-sent: [`GrantRegister::trade_for_go`]. Called by the migration right before it writes GO.
    #[must_use]
    pub fn trade_for_go(&self, attempt: Attempt) -> bool {
        let traded = self.lock().trade_for_go(attempt);
        self.changed.notify_all();
        traded
    }

    /// Trades `attempt` for CANCELLED unless GO was sent for it: [`GrantRegister::trade_for_cancelled`].
    pub fn trade_for_cancelled(&self, attempt: Attempt) -> Traded {
        let traded = self.lock().trade_for_cancelled(attempt);
        self.changed.notify_all();
        traded
    }

    /// The migration is over before GO: [`GrantRegister::close`].
    pub fn close(&self, attempt: Attempt) -> Traded {
        let traded = self.lock().close(attempt);
        self.changed.notify_all();
        traded
    }

    /// Forgets GO-sent, because the guest resumes here under a higher epoch (D = SRC). Its migration is over.
    pub fn superseded(&self) {
        self.lock().superseded();
    }

    fn lock(&self) -> MutexGuard<'_, GrantRegister> {
        self.register.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handover::Epoch;

    fn attempt(number: u32) -> Attempt {
        Attempt {
            instance: Uuid::from_u128(1),
            migration: Uuid::from_u128(2),
            attempt: number,
            epoch: Epoch(3),
        }
    }

    #[test]
    fn a_grant_is_traded_for_go_once() {
        let grants = Grants::new();
        grants.offer(attempt(1)).unwrap();
        assert!(grants.trade_for_go(attempt(1)));
        assert!(!grants.trade_for_go(attempt(1)));
        assert_eq!(grants.trade_for_cancelled(attempt(1)), Traded::GoSent);
    }

    #[test]
    fn a_cancelled_attempt_is_refused_for_ever_and_the_next_is_taken() {
        let grants = Grants::new();
        assert_eq!(grants.trade_for_cancelled(attempt(2)), Traded::Cancelled);
        assert_eq!(grants.offer(attempt(1)), Err(GrantRefused::Stale(attempt(1))));
        assert_eq!(grants.offer(attempt(2)), Err(GrantRefused::Stale(attempt(2))));
        assert_eq!(grants.offer(attempt(3)), Ok(()));
    }

    #[test]
    fn cancelling_a_held_grant_stops_go() {
        let grants = Grants::new();
        grants.offer(attempt(1)).unwrap();
        assert_eq!(grants.trade_for_cancelled(attempt(1)), Traded::Cancelled);
        assert!(!grants.trade_for_go(attempt(1)));
        assert!(!grants.binds());
    }

    #[test]
    fn a_late_cancel_of_an_earlier_attempt_leaves_the_newer_grant() {
        let grants = Grants::new();
        grants.trade_for_cancelled(attempt(1));
        grants.offer(attempt(2)).unwrap();
        assert_eq!(grants.trade_for_cancelled(attempt(1)), Traded::Cancelled);
        assert_eq!(grants.held(), Some(attempt(2)));
    }

    #[test]
    fn after_go_no_grant_is_taken_until_a_higher_epoch_resumed_the_guest() {
        let grants = Grants::new();
        grants.offer(attempt(1)).unwrap();
        assert!(grants.trade_for_go(attempt(1)));
        assert_eq!(grants.offer(attempt(2)), Err(GrantRefused::GoWasSent(attempt(1))));
        grants.superseded();
        assert_eq!(grants.offer(attempt(1)), Err(GrantRefused::Stale(attempt(1))));
        let next_migration = Attempt {
            migration: Uuid::from_u128(3),
            ..attempt(1)
        };
        assert_eq!(grants.offer(next_migration), Ok(()));
    }

    #[test]
    fn a_migration_that_is_over_leaves_no_grant_behind() {
        let grants = Grants::new();
        grants.offer(attempt(2)).unwrap();
        // It had not looked at the grant of the second attempt yet.
        assert_eq!(grants.close(attempt(1)), Traded::Cancelled);
        assert!(!grants.binds());
        assert_eq!(grants.offer(attempt(3)), Err(GrantRefused::Stale(attempt(3))));
        assert_eq!(grants.trade_for_cancelled(attempt(2)), Traded::Cancelled);
    }
}
