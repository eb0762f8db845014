//! Rounds: what the guest has ever populated, then what it wrote meanwhile, until the budget allows the switchover.

use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use ferry_proto::stream::v1::{self, from_source::Message as Said};

use crate::Link;
use crate::PageSet;
use crate::error_chain;
use crate::guest::{GuestError, GuestMemory as _, Population, SourceGuest, Throttled};
use crate::handover::Attempt;
use crate::policy::{Decision, Moment, Policy, Verdict};
use crate::postcopy::Lateness;
use crate::precopy::{Finished, Pace, Round, Streams};
use crate::source::cold::Halt;
use crate::source::conversation::{Conversation, Heard, TICK, unexpected};
use crate::source::heat::Heat;
use crate::source::hints::Hints;
use crate::source::meter::Meter;
use crate::source::resume::Kept;
use crate::source::verifying::Comparing;
use crate::source::{Decided, Journey, Manner, RoundSummary, SourceError, SourceReport, SourceSummary, Stop, Written};
use crate::wire::{StreamTotals, population_to_wire};

/// How long a small round waits for the grant before the next one: the guest dirties little in it, and the host rests.
pub(crate) const BETWEEN_SMALL_ROUNDS: Duration = Duration::from_millis(5);

/// The parts of memory of which is told which have most dirty pages, of 128 MiB, and how many are told.
const PART_FRAMES: u64 = 32 << 10;
const TOLD_PARTS: usize = 3;

/// The copy while the guest runs.
pub(super) struct Copy<'c, 'a, G: SourceGuest> {
    pub(super) guest: &'c mut G,
    /// The attempt to be armed next, or the one under way.
    pub(super) attempt: &'c mut Attempt,
    pub(super) summary: &'c mut SourceSummary,
    /// Set once a guest that moves cold stands still.
    pub(super) halt: &'c mut Option<Halt>,
    /// The newest connections for late pages.
    late_link: Option<&'c Link>,
    /// Set with GO, if pages come late.
    pub(super) missing: &'c mut Option<PageSet>,
    /// Set if the link is lost and another one may follow.
    pub(super) kept: &'c mut Option<Kept>,
    pub(super) conversation: &'c mut Conversation<'a>,
    pub(super) streams: &'c Streams<G::Clearer>,
    /// How far it is, over all links.
    pub(super) so_far: Kept,
    /// An empty set, kept to save allocations.
    spare: Option<PageSet>,
    /// What each vCPU had written when it was last asked.
    written_before: Vec<u64>,
    /// What went over the links before this one.
    sent_before: StreamTotals,
}

impl<'c, 'a, G: SourceGuest> Copy<'c, 'a, G> {
    /// Takes up the copy where the link before this one left it, or begins to track the guest's writes.
    pub(super) fn take_up(
        journey: &'c mut Journey<'_, G>,
        conversation: &'c mut Conversation<'a>,
        streams: &'c Streams<G::Clearer>,
    ) -> Result<Self, Stop> {
        let so_far = match journey.kept.take() {
            Some(kept) => kept,
            None => begin(journey.guest, conversation)?,
        };
        let Journey {
            guest,
            attempt,
            summary,
            halt,
            late_streams: _,
            late_link,
            missing,
            kept: to_keep,
            sent,
        } = journey;
        let spare = Some(PageSet::new(guest.memory().shape()));
        let written_before = guest.written_by_vcpu().unwrap_or_default();
        Ok(Self {
            guest,
            attempt,
            summary,
            halt,
            late_link: late_link.as_deref(),
            missing,
            kept: to_keep,
            conversation,
            streams,
            so_far,
            spare,
            written_before,
            sent_before: *sent,
        })
    }

    /// Sends the map of what is populated, and waits until the destination is ready for pages.
    pub(super) fn populate(&mut self) -> Result<(), Stop> {
        let Some(population) = &self.so_far.population else {
            return Ok(());
        };
        // Nothing is to be backed ahead of pages that come when they are touched.
        let told = if self.so_far.is_late {
            &Population::default()
        } else {
            population
        };
        for part in population_to_wire(told) {
            self.conversation.say(Said::Population(part));
        }
        self.conversation.wait_for(self.guest, |heard| match heard {
            Heard::PopulationReady => Ok(()),
            other => Err(other),
        })?;
        self.so_far.population = None;
        self.summary.copied = Some(self.so_far.meter.copied());
        self.conversation.asked.report(SourceReport::Copying {
            populated_pages: self.so_far.pending.count(),
            copied: self.so_far.meter.copied(),
        });
        self.so_far.copying_since = Instant::now();
        Ok(())
    }

    /// What went over this link and those before it.
    pub(super) fn sum(&self) -> StreamTotals {
        self.sent_before.plus(self.streams.sum())
    }

    /// Whether a grant may be on its way for an attempt that was asked for.
    pub(super) fn is_armed(&self) -> bool {
        let cancelled = self.conversation.asked.grants.cancelled();
        let is_void = cancelled.is_some_and(|cancelled| {
            cancelled.migration == self.attempt.migration && cancelled.attempt >= self.attempt.attempt
        });
        self.so_far.announced == Some(self.attempt.attempt) && !is_void
    }

    /// Whether the guest is to stand still while it is copied.
    pub(super) fn is_cold(&self) -> bool {
        self.conversation.asked.parameters.manner == Manner::Cold
    }

    /// Rounds until the budget allows the switchover, and small ones on until a grant is held.
    pub(super) fn until_armed(&mut self) -> Result<Attempt, Stop> {
        loop {
            let was_late = self.so_far.is_late;
            if was_late && !self.has_disks() {
                return self.until_armed_late();
            }
            let began = Instant::now();
            let decision = self.running_round()?;
            if self.so_far.is_late && !was_late {
                continue;
            }
            let pause = match decision.verdict {
                Verdict::Switch | Verdict::Postcopy => {
                    self.announce(decision.predicted)?;
                    BETWEEN_SMALL_ROUNDS
                }
                Verdict::Continue | Verdict::Throttle | Verdict::Infeasible => {
                    BETWEEN_SMALL_ROUNDS.saturating_sub(began.elapsed())
                }
            };
            let grant = self.wait_for_grant(pause)?;
            if let Some(grant) = grant.filter(|_| decision.within_budget) {
                return Ok(grant);
            }
        }
    }

    /// No more rounds: the guest runs on until a grant is held.
    fn until_armed_late(&mut self) -> Result<Attempt, Stop> {
        loop {
            self.conversation.look_after(self.guest)?;
            if let Some(heard) = self.conversation.next(Duration::ZERO)? {
                return Err(unexpected(&heard).into());
            }
            let predicted = self.so_far.policy.after_stop(0);
            self.announce(predicted)?;
            if let Some(grant) = self.wait_for_grant(BETWEEN_SMALL_ROUNDS)? {
                return Ok(grant);
            }
        }
    }

    /// Sends what is pending, waits for the barrier, fetches what the guest wrote meanwhile, and judges.
    fn running_round(&mut self) -> Result<Decision, Stop> {
        self.conversation.look_after(self.guest)?;
        let (began, before, pages) = (Instant::now(), self.sum(), self.due());
        let saved_before = self.streams.packing.saved();
        let (number, mut hinted_pages) = (self.so_far.round, 0);
        self.conversation
            .lasting
            .round_begins(number, self.so_far.policy.throttle());
        if pages > 0 {
            let clearer = Some(self.guest.clearer());
            let set = self.take_due();
            let sets = self.so_far.heat.part(set);
            self.so_far.meter.round_begins(&sets);
            self.streams.feed.start(Round {
                number,
                sets,
                clearer,
                pace: self.pace(),
                // What comes late is in no round.
                free: self.so_far.hints.asked().filter(|_| !self.so_far.is_late),
            });
            self.wait(|heard| matches!(heard, Heard::RoundSent))?;
            let Finished { set: sent, free } = self.close_round(number)?;
            hinted_pages = free.as_ref().map_or(0, PageSet::count);
            self.left_out(free);
            self.spare = self.so_far.heat.went(sent);
            self.spare.iter_mut().for_each(PageSet::clear);
        } else if let Some(heard) = self.conversation.next(Duration::ZERO)? {
            // Nothing is awaited of a destination that has all; that it is gone must be noticed all the same.
            return Err(unexpected(&heard).into());
        }
        let elapsed = began.elapsed();
        self.fetch_dirty()?;
        let sent = self.sum();
        let dirty_pages = self.due();
        self.so_far
            .meter
            .round_ends(&self.so_far.pending, self.so_far.pending.count());
        self.summary.copied = Some(self.so_far.meter.copied());
        let round = RoundSummary {
            number,
            pages: pages - hinted_pages,
            hinted_pages,
            zero_pages: sent.zero_pages - before.zero_pages,
            bytes: sent.bytes - before.bytes,
            saved: self.streams.packing.saved() - saved_before,
            elapsed,
            dirty_pages,
        };
        self.so_far.policy.follow(self.conversation.lasting.terms());
        self.so_far.policy.force(self.conversation.lasting.force());
        let now = Moment {
            elapsed: self.so_far.copying_since.elapsed(),
            since_order: self.conversation.lasting.since_order(),
            bytes: sent.bytes,
            round_trip: self.round_trips(),
            deltas_begin: self.streams.packing.deltas_begin(number, dirty_pages),
        };
        let decision = self.so_far.policy.judge(&round, now);
        if decision.verdict == Verdict::Postcopy {
            self.so_far.is_late = true;
            self.so_far.policy.leave_memory();
        }
        let throttled = self.throttle(decision.throttle);
        let held_back = self.hold_back_disk_writes();
        if pages > 0 || self.so_far.is_late || self.summary.rounds.is_empty() {
            let written = self.written();
            let decided = Decided::on(&round, &decision)
                .throttled(throttled)
                .holding_back(held_back);
            self.note(round, decided.written(written));
        }
        Ok(decision)
    }

    /// What the blackout waits for the destination: comparing is a way to it and back more.
    fn round_trips(&self) -> Option<Duration> {
        let trips = 1 + u32::from(self.streams.digests.is_some());
        self.conversation.round_trip().map(|trip| trip * trips)
    }

    /// Who wrote since this was asked last, and where.
    fn written(&mut self) -> Written {
        let now = self.guest.written_by_vcpu().unwrap_or_default();
        let since = |(vcpu, now): (usize, &u64)| now.saturating_sub(*self.written_before.get(vcpu).unwrap_or(now));
        let by_vcpu = now.iter().enumerate().map(since).collect();
        self.written_before = now;
        Written {
            by_vcpu,
            parts: self.so_far.pending.busiest(PART_FRAMES, TOLD_PARTS),
        }
    }

    /// Has the guest's vCPUs throttled as the policy wants it; again after each round, for other ones may write by now.
    ///
    /// # Errors
    /// They cannot be: the policy has to do without.
    fn throttle(&mut self, percent: u32) -> Result<Throttled, GuestError> {
        if percent == 0 && self.summary.throttle == 0 {
            return Ok(Throttled::None);
        }
        let throttled = self.guest.throttle(percent).inspect_err(|cause| {
            tracing::warn!(error = error_chain(cause), percent, "the vCPUs cannot be throttled");
            self.so_far.policy.cannot_throttle();
        })?;
        Ok(if percent == 0 { Throttled::None } else { throttled })
    }

    /// The disks are there once; from here on the guest writes to them no faster than the copy gets ahead of it.
    fn hold_back_disk_writes(&mut self) -> Option<u64> {
        let blocks = self.so_far.policy.disk_allowance().filter(|_| self.has_disks());
        self.guest.hold_back_disk_writes(blocks);
        self.summary.disk_waits = self.guest.disk_waits();
        blocks
    }

    /// Nothing is kept from a guest that stands still: only its user's cap slows the copy.
    fn pace(&self) -> Pace {
        if self.is_cold() { Pace::Hurried } else { Pace::Yielding }
    }

    /// The barrier: returns the round's set once the destination has all of it. Every page of the round was written to
    /// its stream before.
    pub(super) fn close_round(&mut self, number: u32) -> Result<Finished, Stop> {
        self.tell_barrier(number);
        self.end_round(number)
    }

    /// Waits while the guest runs until the destination has all of a round whose end it was told.
    pub(super) fn end_round(&mut self, number: u32) -> Result<Finished, Stop> {
        self.wait(|heard| matches!(heard, Heard::BarrierReached(round) if *round == number))?;
        self.closed_round(number)
    }

    /// Tells that a round has ended.
    pub(super) fn tell_barrier(&mut self, number: u32) {
        let totals = self.streams.each().into_iter().map(v1::StreamTotals::from).collect();
        self.conversation
            .say(Said::Barrier(v1::Barrier { round: number, totals }));
    }

    /// The destination has all of a round.
    pub(super) fn closed_round(&mut self, number: u32) -> Result<Finished, Stop> {
        self.so_far.round = number + 1;
        self.streams
            .feed
            .finish()
            .ok_or_else(|| SourceError::Misbehaved("no round was open".to_owned()).into())
    }

    /// Waits for one thing while the guest runs; anything else is misbehaviour.
    pub(super) fn wait(&mut self, wanted: impl Fn(&Heard) -> bool) -> Result<(), Stop> {
        loop {
            self.conversation.look_after(self.guest)?;
            self.conversation.lasting.tell_compression();
            self.tell_progress();
            match self.conversation.next(TICK)? {
                Some(heard) if wanted(&heard) => return Ok(()),
                Some(other) => return Err(unexpected(&other).into()),
                None => {}
            }
        }
    }

    pub(super) fn fetch_dirty(&mut self) -> Result<(), Stop> {
        self.end_hints();
        let fetched = self.guest.fetch_dirty(&mut self.so_far.pending);
        fetched.map_err(|cause| {
            SourceError::Guest {
                step: "tell what it wrote",
                cause,
            }
            .into()
        })
    }

    /// Before a guest is given away of which pages come late: the connections for these have been idle since they were made.
    pub(super) fn late_link_is_there(&self) -> Result<(), Stop> {
        let there = self.late_link.map_or(Ok(()), Link::is_there);
        there.map_err(|cause| SourceError::LateLinkLost(cause).into())
    }

    /// An empty set of its pages.
    pub(super) fn empty_set(&mut self) -> PageSet {
        let new = || PageSet::new(self.guest.memory().shape());
        self.spare.take().unwrap_or_else(new)
    }

    /// Whether disks move with the guest.
    pub(super) fn has_disks(&self) -> bool {
        !self.disks().is_empty()
    }

    /// The regions that are disks.
    fn disks(&self) -> Vec<usize> {
        let memory = self.guest.memory();
        let regions = memory.shape().regions().iter().enumerate();
        let disks = regions.filter(|&(_, &region)| memory.is_disk(region));
        disks.map(|(index, _)| index).collect()
    }

    /// How many of the pending pages must be there before the guest is handed over.
    pub(super) fn due(&self) -> u64 {
        if !self.so_far.is_late {
            return self.so_far.pending.count();
        }
        let of_disk = |index| {
            self.so_far
                .pending
                .count_in(index, 0, self.so_far.pending.region(index).frames)
        };
        self.disks().into_iter().map(of_disk).sum()
    }

    /// These, to be sent as a round.
    pub(super) fn take_due(&mut self) -> PageSet {
        let mut set = self.empty_set();
        if self.so_far.is_late {
            for index in self.disks() {
                set.insert_words(index, self.so_far.pending.words(index));
            }
            self.so_far.pending.subtract(&set);
        } else {
            set = std::mem::replace(&mut self.so_far.pending, set);
        }
        self.so_far.hints.are_sent(&set);
        set
    }
}

/// Begins to track, and looks up what is populated.
fn begin<G: SourceGuest>(guest: &mut G, conversation: &Conversation<'_>) -> Result<Kept, Stop> {
    let failed = |step| move |cause| SourceError::Guest { step, cause };
    guest.start_tracking().map_err(failed("track its writes"))?;
    let hints = Hints::ask(guest);
    let population = guest.populated().map_err(failed("tell what is populated"))?;
    let mut pending = PageSet::new(guest.memory().shape());
    population.populated.iter().for_each(|&run| pending.insert(run));
    let parameters = conversation.asked.parameters;
    let most_throttle = parameters.most_throttle.map_or(0, NonZeroU32::get);
    let now = Instant::now();
    Ok(Kept {
        is_late: parameters.lateness == Lateness::AtOnce,
        policy: Policy::new(conversation.lasting.terms(), parameters.overhead, most_throttle)
            .with_late_pages(parameters.lateness),
        meter: Meter::new(&*guest.memory(), &pending),
        pending,
        hints,
        heat: Heat::default(),
        round: 1,
        rest_until: now,
        announced: None,
        told: (now, 0),
        copying_since: now,
        population: Some(population),
        unacknowledged: None,
        comparing: Comparing::default(),
    })
}
