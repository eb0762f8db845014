//! The switchover: the guest stands still from here to GO, or until it was called off.
//!
//! Order matters and is: stop, export, *then* the last dirty log, because exporting finishes what writes to
//! memory; and the grant is traded before GO is written, never after. Between the two the disks are let go.

use std::time::{Duration, Instant};

use ferry_proto::stream::v1::{self, from_source::Message as Said};

use crate::PageSet;
use crate::digest;
use crate::guest::{GuestCondition, GuestEnd, GuestError, GuestMemory as _, GuestWas, SourceGuest, StopTimes};
use crate::handover::{Attempt, Traded};
use crate::policy::Force;
use crate::postcopy;
use crate::precopy::{Pace, Round, Standing};
use crate::source::cold::STOP_TRY;
use crate::source::conversation::{Heard, TICK, unexpected};
use crate::source::rounds::Copy;
use crate::source::verifying;
use crate::source::{Blackout, Decided, Manner, RoundSummary, SourceError, SourceReport, Stop};
use crate::wire::{StreamTotals, attempt_to_wire};

/// What came of a switchover.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Switched {
    /// The guest is given away.
    GoSent,
    /// It runs on, and rounds may go on.
    CalledOff,
}

/// Why the guest is not given away.
pub(super) enum Setback {
    /// Not this time: rounds go on.
    CallOff(String),
    /// The migration ends.
    End(Stop),
}

impl From<Stop> for Setback {
    fn from(stop: Stop) -> Self {
        Self::End(stop)
    }
}

/// How far the last round came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LastRound {
    NotStarted,
    UnderWay,
    Sent,
    /// The destination was told its end, and has not answered.
    Told,
}

/// Stops the guest and hands it over under `grant`, or lets it run on.
pub(super) fn attempt<G: SourceGuest>(copy: &mut Copy<'_, '_, G>, grant: Attempt) -> Result<Switched, Stop> {
    *copy.attempt = grant;
    copy.conversation
        .asked
        .report(SourceReport::Switching { attempt: grant });
    let (began, mut last_round) = (Instant::now(), LastRound::NotStarted);
    match hand_over(copy, grant, &mut last_round) {
        Ok(blackout) => {
            copy.summary.blackout = Some(blackout);
            Ok(Switched::GoSent)
        }
        Err(setback) => call_off(copy, (grant, began), setback, last_round),
    }
}

/// The blackout's source part. Where it returns an error, the guest stands still and the grant is not traded for GO.
fn hand_over<G: SourceGuest>(
    copy: &mut Copy<'_, '_, G>,
    grant: Attempt,
    last_round: &mut LastRound,
) -> Result<Blackout, Setback> {
    let parameters = copy.conversation.asked.parameters;
    let began = Instant::now();
    let mut budget = Budget::new(
        copy.conversation.lasting.terms().manner,
        copy.conversation.lasting.force(),
        began,
    );
    if copy.so_far.is_late {
        budget.widen(grant.attempt);
    }
    let stop = stop_guest(copy, budget.deadline.unwrap_or(began + STOP_TRY))?;
    // What waits still is in the guest's queues, and goes with it.
    copy.summary.disk_waits = copy.guest.disk_waits();
    // A guest that moves cold stands still for long.
    let (pause_began, stop, copied_cold) = match &*copy.halt {
        Some(halt) => (halt.began, halt.times, began - halt.complete),
        None => (began, stop, Duration::ZERO),
    };

    let export_began = Instant::now();
    let state = copy
        .guest
        .export()
        .map_err(|cause| could_not("export its state", cause))?;
    let state_checksum = digest::bytes(&state);
    let verified_state = match parameters.digests {
        true => Some(
            copy.guest
                .state_digest(&state)
                .map_err(|cause| could_not("digest its state", cause))?,
        ),
        false => None,
    };
    let attempt = Some(attempt_to_wire(grant));
    copy.conversation.say(Said::State(v1::State {
        attempt: attempt.clone(),
        machine_state: state,
    }));
    let last_pages_began = Instant::now();
    copy.so_far.policy.stopped(began.elapsed());

    if copy.so_far.is_late && !copy.has_disks() {
        copy.fetch_dirty()?;
        copy.so_far.meter.last_round_ends();
        copy.summary.copied = Some(copy.so_far.meter.copied());
    } else {
        send_last_pages(copy, &budget, last_round)?;
    }
    let late = copy.so_far.is_late.then(|| leave_late(copy, grant));
    let last_pages = copied_cold + last_pages_began.elapsed();
    let compared = verifying::agree(copy, &budget, grant, late.as_ref(), last_round)?;
    let totals: Vec<_> = copy.streams.each().into_iter().map(v1::StreamTotals::from).collect();

    let digests_began = Instant::now();
    let digests = match verified_state {
        Some(state) => {
            let (attempt, totals) = (attempt.clone(), totals.clone());
            copy.conversation
                .say(Said::DigestRequest(v1::DigestRequest { attempt, totals }));
            let so_far = &mut copy.so_far;
            let clean = so_far.hints.make_zero(&*copy.guest.memory(), &so_far.pending);
            clean.map_err(|cause| could_not("make free pages zero", cause))?;
            let memory =
                digest::memory(&*copy.guest.memory()).map_err(|cause| could_not("digest its memory", cause))?;
            Some(v1::Digests {
                memory: memory.to_le_bytes().to_vec(),
                state: state.to_le_bytes().to_vec(),
            })
        }
        None => None,
    };
    let digested = if digests.is_some() {
        digests_began.elapsed()
    } else {
        Duration::ZERO
    };
    budget.extend(digested);
    budget.check("the last pages were sent")?;

    let manifest = v1::Manifest {
        attempt,
        rounds: copy.so_far.round,
        totals,
        state_checksum: state_checksum.to_le_bytes().to_vec(),
        paused_by_user: parameters.guest_was == GuestWas::PausedByUser,
        digests,
        late: late.as_ref().map(|missing| v1::LateTable {
            pages: missing.count(),
            checksum: postcopy::checksum(missing).to_le_bytes().to_vec(),
        }),
    };
    copy.conversation.look_around()?;
    if copy.so_far.is_late {
        copy.late_link_is_there()?;
    }
    // What was heard meanwhile ends the migration: nothing is awaited here.
    if let Some(heard) = copy.conversation.next(Duration::ZERO)? {
        return Err(Setback::End(unexpected(&heard).into()));
    }
    if !copy.conversation.asked.grants.trade_for_go(grant) {
        return Err(Setback::CallOff("the agent took the grant back".to_owned()));
    }
    // Not before: until the trade the guest may run on. Not after: the destination takes them when it has read GO.
    copy.guest.release_disks();
    copy.conversation.say(Said::Go(v1::Go {
        manifest: Some(manifest),
    }));
    copy.summary.late_pages = late.as_ref().map_or(0, PageSet::count);
    *copy.missing = late.filter(|missing| !missing.is_empty());
    let state = last_pages_began - export_began;
    Ok(Blackout {
        pause_began,
        go_sent: Instant::now(),
        stop,
        state,
        last_pages,
        verify: compared + digested,
    })
}

/// The time that the guest may stand still.
pub(super) struct Budget {
    /// None for a guest that moves cold, or by force: it may for as long as the migration takes.
    deadline: Option<Instant>,
    allowed: Duration,
}

impl Budget {
    fn new(manner: Manner, force: Option<Force>, began: Instant) -> Self {
        match manner {
            Manner::Live { max_downtime } if force.is_none() => Self {
                deadline: Some(began + max_downtime),
                allowed: max_downtime,
            },
            Manner::Live { .. } | Manner::Cold => Self {
                deadline: None,
                allowed: Duration::MAX,
            },
        }
    }

    /// With pages that come late nothing is left to wait for that could make the next try shorter: what stopping and exporting take is what
    /// it is. So that it ends, each try has twice the time of the one before it.
    fn widen(&mut self, attempt: u32) {
        let further = self.allowed.saturating_mul((1 << attempt.clamp(1, 16) >> 1) - 1);
        self.allowed = self.allowed.saturating_add(further);
        self.extend(further);
    }

    pub(super) fn left(&self) -> Duration {
        self.deadline.map_or(Duration::MAX, |deadline| {
            deadline.saturating_duration_since(Instant::now())
        })
    }

    fn extend(&mut self, by: Duration) {
        self.deadline = self.deadline.map(|deadline| deadline + by);
    }

    pub(super) fn check(&self, when: &str) -> Result<(), Setback> {
        let over = self.deadline.map_or(Duration::ZERO, |deadline| {
            Instant::now().saturating_duration_since(deadline)
        });
        if over.is_zero() {
            return Ok(());
        }
        let (over, allowed) = (over.as_secs_f64() * 1e3, self.allowed.as_secs_f64() * 1e3);
        Err(Setback::CallOff(format!(
            "over the budget of {allowed:.1} ms by {over:.1} ms when {when}"
        )))
    }
}

fn stop_guest<G: SourceGuest>(copy: &mut Copy<'_, '_, G>, deadline: Instant) -> Result<StopTimes, Setback> {
    let stopped = copy.guest.stop(deadline);
    if let GuestCondition::Ended(end) = copy.guest.poll() {
        return Err(Setback::End(Stop::GuestEnded(end)));
    }
    stopped.map_err(|cause| Setback::CallOff(format!("the guest did not stand still: {cause}")))
}

/// Says what is missing, by whole units. It all stays pending: the switchover may be called off.
fn leave_late<G: SourceGuest>(copy: &mut Copy<'_, '_, G>, grant: Attempt) -> PageSet {
    copy.so_far.pending.round_out(copy.guest.memory().late_unit());
    let missing = copy.so_far.pending.clone();
    if let Some(digests) = &copy.streams.digests {
        digests.leave_out(&missing);
    }
    for part in postcopy::parts(&missing, grant) {
        copy.conversation.say(Said::Missing(part));
    }
    missing
}

/// Fetches the last dirty log and sends what must be there, unless that cannot be done within the budget.
fn send_last_pages<G: SourceGuest>(
    copy: &mut Copy<'_, '_, G>,
    budget: &Budget,
    last_round: &mut LastRound,
) -> Result<(), Setback> {
    let sending = LastPages::begin(copy);
    copy.fetch_dirty()?;
    let pages = copy.due();
    let needed = copy.so_far.policy.after_stop(pages);
    let left = budget.left();
    if needed > left {
        let (needed, left) = (needed.as_secs_f64() * 1e3, left.as_secs_f64() * 1e3);
        return Err(Setback::CallOff(format!(
            "{pages} last pages and the start need {needed:.1} ms, {left:.1} ms are left"
        )));
    }
    let set = (pages > 0).then(|| copy.take_due());
    sending.send(copy, set, budget, last_round)
}

/// Pages that are sent while the guest stands still: how it was before.
pub(super) struct LastPages {
    began: Instant,
    sent: StreamTotals,
    saved: u64,
}

impl LastPages {
    pub(super) fn begin<G: SourceGuest>(copy: &Copy<'_, '_, G>) -> Self {
        Self {
            began: Instant::now(),
            sent: copy.streams.sum(),
            saved: copy.streams.packing.saved(),
        }
    }

    /// Sends them as a round, within the budget. With none, there is no round; it is told all the same.
    pub(super) fn send<G: SourceGuest>(
        self,
        copy: &mut Copy<'_, '_, G>,
        set: Option<PageSet>,
        budget: &Budget,
        last_round: &mut LastRound,
    ) -> Result<(), Setback> {
        let mut pages = 0;
        if let Some(set) = set {
            let sets = vec![set];
            pages = copy.so_far.meter.round_begins(&sets);
            *last_round = LastRound::UnderWay;
            copy.streams.feed.start(Round {
                number: copy.so_far.round,
                sets,
                clearer: None,
                pace: Pace::Unlimited,
                free: None,
            });
            wait_within(copy, budget, "the last pages were being sent", |heard| match heard {
                Heard::RoundSent => Ok(()),
                other => Err(other),
            })?;
            *last_round = LastRound::Sent;
        }
        let sent = copy.streams.sum();
        copy.so_far.meter.last_round_ends();
        copy.summary.copied = Some(copy.so_far.meter.copied());
        copy.summary.rounds.push(RoundSummary {
            number: copy.so_far.round,
            pages,
            hinted_pages: 0,
            zero_pages: sent.zero_pages - self.sent.zero_pages,
            bytes: sent.bytes - self.sent.bytes,
            saved: copy.streams.packing.saved() - self.saved,
            elapsed: self.began.elapsed(),
            dirty_pages: 0,
        });
        Ok(())
    }
}

/// Waits for one thing while the guest stands still, and not beyond the budget; anything else is misbehaviour.
pub(super) fn wait_within<G: SourceGuest, T>(
    copy: &mut Copy<'_, '_, G>,
    budget: &Budget,
    when: &str,
    wanted: impl Fn(Heard) -> Result<T, Heard>,
) -> Result<T, Setback> {
    loop {
        match copy.conversation.next(TICK.min(budget.left()))?.map(&wanted) {
            Some(Ok(heard)) => return Ok(heard),
            Some(Err(other)) => return Err(Setback::End(unexpected(&other).into())),
            None => {
                budget.check(when)?;
                copy.conversation.look_around()?;
            }
        }
    }
}

/// The way back: the grant first, then the guest, then everything that can wait.
fn call_off<G: SourceGuest>(
    copy: &mut Copy<'_, '_, G>,
    (grant, began): (Attempt, Instant),
    setback: Setback,
    last_round: LastRound,
) -> Result<Switched, Stop> {
    let asked = copy.conversation.asked;
    if asked.grants.trade_for_cancelled(grant) == Traded::GoSent {
        // Whoever traded it: from GO-sent on the guest may be another host's, and must not run here.
        return Ok(Switched::GoSent);
    }
    if let Setback::End(stop @ Stop::GuestEnded(_)) = setback {
        return Err(stop);
    }
    // One that moves cold stands still until the migration ends: whoever ends it wakes it.
    if copy.halt.is_none() {
        copy.guest
            .resume(asked.parameters.guest_was)
            .map_err(|cause| Stop::GuestEnded(GuestEnd::Crashed(format!("it could not run on: {cause}"))))?;
    }
    let reason = match setback {
        Setback::End(stop) => return Err(stop),
        Setback::CallOff(reason) => reason,
    };
    let at = (copy.so_far.round, copy.so_far.policy.throttle());
    let stood_still = copy.halt.is_none().then(|| began.elapsed());
    copy.conversation
        .lasting
        .tell(Decided::called_off(at, stood_still, &reason));
    let wire = Some(attempt_to_wire(grant));
    copy.conversation.say(Said::Disarm(v1::Disarm {
        attempt: wire,
        reason: reason.clone(),
    }));
    close_last_round(copy, last_round)?;
    copy.disarmed(grant);
    asked.report(SourceReport::Disarmed { attempt: grant, reason });
    Ok(Switched::CalledOff)
}

/// Ends the round that was sent while the guest stood still. All of its pages stay pending: they were not re-armed, so
/// a write to one of them since need not be reported.
fn close_last_round<G: SourceGuest>(copy: &mut Copy<'_, '_, G>, last_round: LastRound) -> Result<(), Stop> {
    verifying::hear_out(copy)?;
    match last_round {
        LastRound::NotStarted => return Ok(()),
        LastRound::UnderWay if copy.streams.feed.cut() == Standing::Open => {
            copy.wait(|heard| matches!(heard, Heard::RoundSent))?;
        }
        LastRound::UnderWay | LastRound::Sent | LastRound::Told => {}
    }
    let number = copy.so_far.round;
    if last_round != LastRound::Told {
        copy.tell_barrier(number);
    }
    let last = copy.end_round(number)?;
    copy.so_far.pending.union_with(&last.set);
    Ok(())
}

fn could_not(step: &'static str, cause: GuestError) -> Setback {
    Setback::End(SourceError::Guest { step, cause }.into())
}
