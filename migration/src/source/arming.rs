//! From "it may be armed" to the grant: asking for a switchover, and asking again later after one was called off.

use std::time::{Duration, Instant};

use crate::guest::{DiskCondition, SourceGuest};
use crate::handover::Attempt;
use crate::source::rounds::Copy;
use crate::source::{SourceError, SourceReport, Stop};

/// How long after the first switchover that was called off the next one is asked for, halved; doubled each time.
const REST_AFTER_DISARM: Duration = Duration::from_millis(50);

impl<G: SourceGuest> Copy<'_, '_, G> {
    /// Notes that a switchover was called off: the next one is asked for after a pause that grows.
    pub(super) fn disarmed(&mut self, grant: Attempt) {
        self.so_far.policy.disarmed();
        let doubled = REST_AFTER_DISARM * (1 << grant.attempt.min(6));
        self.so_far.rest_until = Instant::now() + doubled;
        self.attempt.attempt = grant.attempt + 1;
    }

    /// Tells, once for each attempt, that it may be armed: as soon as the disks are settled. Until then small rounds go on.
    ///
    /// # Errors
    /// Pages would come late, over a link that is lost; or might, and it can be made again.
    pub(super) fn announce(&mut self, predicted: Duration) -> Result<(), Stop> {
        if Instant::now() < self.so_far.rest_until {
            return Ok(());
        }
        // The agent may have called the attempt off by itself: a grant for it would be refused.
        if let Some(cancelled) = self.conversation.asked.grants.cancelled()
            && cancelled.migration == self.attempt.migration
            && cancelled.attempt >= self.attempt.attempt
        {
            self.attempt.attempt = cancelled.attempt + 1;
        }
        let attempt = self.attempt.attempt;
        // One that must be completed does not wait for a guest that never stops writing.
        let must_settle = self.conversation.lasting.force().is_none();
        if self.so_far.announced == Some(attempt)
            || (self.guest.settle_disks() == DiskCondition::Settling && must_settle)
        {
            return Ok(());
        }
        // One that is to go whole may still come to be late once it is armed, when no link is made again any more.
        if self.so_far.is_late || self.conversation.lasting.may_resume() {
            self.late_link_is_there()?;
        }
        self.so_far.announced = Some(attempt);
        self.conversation
            .asked
            .report(SourceReport::Converged { attempt, predicted });
        Ok(())
    }

    pub(super) fn wait_for_grant(&mut self, pause: Duration) -> Result<Option<Attempt>, Stop> {
        let Some(grant) = self.conversation.asked.grants.wait_held(pause) else {
            return Ok(None);
        };
        let ours = Attempt {
            attempt: grant.attempt,
            ..*self.attempt
        };
        if grant != ours || grant.attempt < self.attempt.attempt {
            return Err(SourceError::ForeignGrant(grant).into());
        }
        Ok(Some(grant))
    }
}
