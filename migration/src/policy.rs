//! When to stop the guest: a measured round in, a decision out, with its grounds in words. Pure; time is only ever an argument.
//!
//! Each round tells what the link carries and what share of what it sent the guest has dirtied again. From that follows what the rounds to
//! come will leave, and so whether and when the blackout will be within its budget. Within it, the guest is stopped at the first round after
//! which another one would not leave clearly less; without an end in sight that is said, after the first round that brought the end no nearer.

mod forecast;
mod learned;
pub mod prediction;
#[cfg(test)]
mod tests;

use std::time::Duration;

use crate::postcopy::{Lateness, Shrinking};
use crate::source::{Manner, Overhead, RoundSummary, Terms};
use forecast::{Course, HOPELESS_SHARE, bytes_of};
pub use forecast::{Forecast, Moment};
use learned::Learned;

/// Last pages that cost no more than this are not worth another round.
const CHEAP_LAST_PAGES: Duration = Duration::from_millis(2);

/// Within the budget, a round that is expected to leave less of what it sends than this is worth its time, however little that is.
const WORTHWHILE_SHARE: f64 = 0.75;

/// And so is one that is expected to take this much off the blackout, if it leaves less than what rounds vary by ([`HOPELESS_SHARE`]): a guest that nearly
/// outruns its link comes within the budget just so, and stands still for all of it otherwise.
const WORTHWHILE_GAIN: Duration = Duration::from_millis(5);

/// After so many rounds within the budget, more rounds are not expected to make it better.
const ENOUGH_ROUNDS: u32 = 8;

/// What share of the last pages that the budget has time for may be those of copied disks, however fast the guest writes to them.
const LAST_PAGES_OF_DISKS: f64 = 0.5;

/// What a round is to leave of what it sends once vCPUs are throttled.
const THROTTLED_SHARE: f64 = 0.5;

/// The least that vCPUs are throttled by at first, and by how much more each time that was not enough, in percent: as QEMU does.
const FIRST_THROTTLE: u32 = 20;
const THROTTLE_STEP: u32 = 10;

/// What follows from a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Another round: the end comes nearer, or it is too early to tell.
    Continue,
    /// Another round, in which vCPUs are kept from running for more of the time.
    Throttle,
    /// Another round, for lack of anything better: as things are there is no end. The guest may come to write less.
    Infeasible,
    /// Stop the guest and hand it over.
    Switch,
    /// Stop the guest and hand it over without what is left, which comes late.
    Postcopy,
}

/// Why a migration is to be completed whatever its budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Force {
    /// Its user wants it.
    User,
    /// Its time is up, and its user wants that then.
    TimeUp,
}

impl Force {
    fn words(self) -> &'static str {
        match self {
            Self::User => "its user wants it completed",
            Self::TimeUp => "its time is up, and it is to be completed",
        }
    }
}

impl Verdict {
    /// As records have it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Continue => "continue",
            Self::Throttle => "throttle",
            Self::Infeasible => "infeasible",
            Self::Switch => "switch",
            Self::Postcopy => "postcopy",
        }
    }
}

/// A verdict with its grounds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// What to do.
    pub verdict: Verdict,
    /// The blackout if the guest were stopped now.
    pub predicted: Duration,
    /// Whether `predicted` is within the budget: enough for a switchover that is armed already.
    pub within_budget: bool,
    /// What the copy is expected to come to.
    pub forecast: Forecast,
    /// For how much of the time vCPUs are to be kept from running from now on, in percent.
    pub throttle: u32,
    /// The grounds, for a person.
    pub words: String,
}

/// What is known about one migration's convergence.
#[derive(Clone, Debug)]
pub struct Policy {
    terms: Terms,
    learned: Learned,
    rounds_within_budget: u32,
    /// A round that was begun within the budget left more than that: it is not tried a second time.
    was_led_out: bool,
    force: Option<Force>,
    throttle: u32,
    most_throttle: u32,
    lateness: Lateness,
    shrinking: Shrinking,
}

/// What a round left, and what that leads to.
struct Left {
    pages: u64,
    /// What sending them while the guest stands still takes.
    last_pages: Duration,
    /// What the round left of what it sent.
    share: f64,
    /// What the next one is expected to leave of these.
    next_share: f64,
    forecast: Forecast,
}

impl Left {
    fn is_worth_another_round(&self) -> bool {
        let gain = self.last_pages.mul_f64((1.0 - self.next_share).max(0.0));
        self.next_share <= WORTHWHILE_SHARE || self.next_share < HOPELESS_SHARE && gain >= WORTHWHILE_GAIN
    }
}

impl Policy {
    /// A policy that has not seen a round yet. It may have vCPUs kept from running for so much of the time, in percent.
    #[must_use]
    pub fn new(terms: Terms, overhead: Overhead, most_throttle: u32) -> Self {
        Self {
            terms,
            learned: Learned::new(overhead),
            rounds_within_budget: 0,
            was_led_out: false,
            force: None,
            throttle: 0,
            most_throttle,
            lateness: Lateness::Never,
            shrinking: Shrinking::default(),
        }
    }

    /// The same policy for a guest of which pages may come late.
    #[must_use]
    pub fn with_late_pages(self, lateness: Lateness) -> Self {
        Self { lateness, ..self }
    }

    /// Memory comes late from now on: what rounds bring is disks, of which nothing may.
    pub(crate) fn leave_memory(&mut self) {
        self.lateness = Lateness::AtOnce;
        self.rounds_within_budget = 0;
        self.was_led_out = false;
    }

    /// These terms hold from now on. What was learned of the link under another cap is worth what that leaves of it.
    pub fn follow(&mut self, terms: Terms) {
        self.learned.capped(self.terms.bandwidth, terms.bandwidth);
        self.was_led_out &= self.terms.manner == terms.manner;
        self.terms = terms;
    }

    /// Where it is to be completed whatever its budget, every round is the last one while the guest runs.
    pub fn force(&mut self, force: Option<Force>) {
        self.force = force;
    }

    /// Judges a round that ended at this moment of the copy.
    pub fn judge(&mut self, round: &RoundSummary, now: Moment) -> Decision {
        self.learned.round(round, now.round_trip);
        let Manner::Live { max_downtime } = self.terms.manner else {
            return self.handed_over_cold(round, now);
        };
        self.shrinking.left(round.dirty_pages);
        let left = self.left(round, now, max_downtime);
        let predicted = self.learned.blackout(round.dirty_pages);
        // Once memory comes late, a budget that is too small for stop and start alone has no round to wait for.
        let is_disk_settled = self.lateness == Lateness::AtOnce && left.last_pages <= CHEAP_LAST_PAGES;
        let within_budget = predicted <= max_downtime || is_disk_settled;
        if within_budget {
            self.rounds_within_budget += 1;
        } else {
            self.was_led_out |= self.rounds_within_budget > 0;
            self.rounds_within_budget = 0;
        }
        // What a round of whole pages left tells little of one in which they are told by what they changed. What takes too long without a page to send does.
        let is_hopeless = self.learned.blackout(0) > max_downtime;
        let is_telling = !now.deltas_begin || within_budget || is_hopeless || self.force.is_some();
        let judged = match self.force {
            // Where pages may come late, what must be completed is completed so.
            Some(force) if within_budget || matches!(self.lateness, Lateness::Never | Lateness::AtOnce) => {
                return self.handed_over_by_force(force, &left, predicted, max_downtime);
            }
            Some(force) => (Verdict::Postcopy, force.words().to_owned()),
            None if within_budget => self.within_budget(&left, now),
            None if !is_telling => {
                let stalled = match left.share >= HOPELESS_SHARE {
                    true => ", and the round left as much as it sent",
                    false => "",
                };
                let grounds =
                    format!("over the budget{stalled}, and from the next round on pages are told by what they changed");
                (Verdict::Continue, grounds)
            }
            None => self.over_budget(&left, max_downtime),
        };
        let (verdict, grounds) = if is_telling { self.perhaps_late(judged) } else { judged };
        if verdict == Verdict::Postcopy {
            // What comes late is not written any less by a guest that is kept from running.
            self.throttle = 0;
            return Decision {
                verdict,
                predicted: self.learned.blackout(0),
                within_budget: true,
                forecast: left.forecast,
                throttle: 0,
                words: format!("{grounds}: the rest comes late, {} dirty pages", left.pages),
            };
        }
        let mut words = format!(
            "{grounds}: {} dirty pages cost {:.1} ms, a blackout of {:.1} ms of {:.1} ms allowed",
            left.pages,
            milliseconds(left.last_pages),
            milliseconds(predicted),
            milliseconds(max_downtime),
        );
        if verdict != Verdict::Switch {
            left.forecast.describe(&mut words, self.learned.compressed_to());
        }
        Decision {
            verdict,
            predicted,
            within_budget,
            forecast: left.forecast,
            throttle: self.throttle,
            words,
        }
    }

    /// For how much of the time vCPUs are kept from running, in percent.
    #[must_use]
    pub fn throttle(&self) -> u32 {
        self.throttle
    }

    /// The host cannot keep vCPUs from running: nothing is expected of that any more.
    pub fn cannot_throttle(&mut self) {
        (self.throttle, self.most_throttle) = (0, 0);
    }

    /// Where pages may come late, what rounds do not bring within the budget does; throttling comes before that.
    fn perhaps_late(&self, (verdict, grounds): (Verdict, String)) -> (Verdict, String) {
        match (self.lateness, verdict) {
            (Lateness::WhenItPays, Verdict::Infeasible) => (Verdict::Postcopy, grounds),
            (Lateness::WhenItPays, Verdict::Continue) => match self.stalls() {
                Some(grounds) => (Verdict::Postcopy, grounds),
                None => (verdict, grounds),
            },
            _ => (verdict, grounds),
        }
    }

    /// Whether rounds lead nowhere, of those that did not lead into the budget.
    fn stalls(&self) -> Option<String> {
        self.shrinking.stalls().filter(|_| self.rounds_within_budget == 0)
    }

    /// Within the budget: whether another round would leave so much less that it is worth its time.
    fn within_budget(&self, left: &Left, now: Moment) -> (Verdict, String) {
        if left.last_pages <= CHEAP_LAST_PAGES {
            return (Verdict::Switch, "the last pages are cheap".to_owned());
        }
        if self.was_led_out {
            let grounds = "within the budget again, which another round had led out of";
            return (Verdict::Switch, grounds.to_owned());
        }
        if !left.is_worth_another_round() {
            let grounds = "within the budget, and another round would leave no less";
            return (Verdict::Switch, grounds.to_owned());
        }
        if self.rounds_within_budget >= ENOUGH_ROUNDS {
            let grounds = format!("{} rounds within the budget", self.rounds_within_budget);
            return (Verdict::Switch, grounds);
        }
        // The round and then the blackout, which is no longer than now.
        if now.since_order + self.learned.time_for(left.pages as f64) + left.last_pages > self.terms.timeout {
            let grounds = "within the budget, and no time for another round";
            return (Verdict::Switch, grounds.to_owned());
        }
        let next = percent(left.next_share);
        let grounds = format!("within the budget, and another round is expected to leave {next} % of it");
        (Verdict::Continue, grounds)
    }

    /// Over the budget: whether the rounds to come lead into it, and in time.
    fn over_budget(&mut self, left: &Left, max_downtime: Duration) -> (Verdict, String) {
        let alone = self.learned.blackout(0);
        if alone > max_downtime {
            let alone = milliseconds(alone);
            let grounds =
                format!("infeasible, over the budget without a page to send: stop and start take {alone:.1} ms");
            return (Verdict::Infeasible, grounds);
        }
        if left.share >= HOPELESS_SHARE {
            return self.without_end(left, "over the budget, and the round left as much as it sent");
        }
        match left.forecast.total {
            Some(total) if total > self.terms.timeout => {
                let (total, timeout) = (total.as_secs_f64(), self.terms.timeout.as_secs_f64());
                let grounds = format!("over the budget for {total:.1} s in all, of {timeout:.1} s allowed");
                self.without_end(left, &grounds)
            }
            Some(_) | None => (Verdict::Continue, "over the budget".to_owned()),
        }
    }

    /// As things are, the rounds to come do not lead into the budget: the guest has to write less, as far as its user allows that.
    fn without_end(&mut self, left: &Left, why: &str) -> (Verdict, String) {
        let wanted = self.wanted_throttle(left.next_share).min(self.most_throttle);
        if wanted > self.throttle {
            let before = std::mem::replace(&mut self.throttle, wanted);
            let grounds = format!("{why}; vCPUs are kept from running for {wanted} % of the time, before {before} %");
            return (Verdict::Throttle, grounds);
        }
        let grounds = match self.throttle {
            0 => format!("infeasible, {why}"),
            most => format!("infeasible, {why}, with vCPUs kept from running for {most} % of the time as it is"),
        };
        (Verdict::Infeasible, grounds)
    }

    /// So much that a round leaves half of what it sends, were the guest to write as much less as it runs less. It may write the same pages less
    /// often only, or catch up on what it was kept from: so each time by a step at least.
    fn wanted_throttle(&self, share: f64) -> u32 {
        let runs = f64::from(100 - self.throttle) * (THROTTLED_SHARE / share).min(1.0);
        let step = if self.throttle == 0 {
            FIRST_THROTTLE
        } else {
            THROTTLE_STEP
        };
        (100 - runs as u32).max(self.throttle + step)
    }

    fn handed_over_by_force(&self, force: Force, left: &Left, predicted: Duration, max_downtime: Duration) -> Decision {
        let why = force.words();
        Decision {
            verdict: Verdict::Switch,
            predicted,
            within_budget: true,
            forecast: left.forecast,
            throttle: self.throttle,
            words: format!(
                "{why}: {} dirty pages, a blackout of {:.1} ms, whatever the {:.1} ms allowed",
                left.pages,
                milliseconds(predicted),
                milliseconds(max_downtime),
            ),
        }
    }

    /// A guest that stands still is handed over after its one pass: nothing that it could still write is waited for, and it has no budget.
    fn handed_over_cold(&self, round: &RoundSummary, now: Moment) -> Decision {
        let predicted = self.learned.after_stop(round.dirty_pages);
        Decision {
            verdict: Verdict::Switch,
            predicted,
            within_budget: true,
            forecast: Forecast {
                bytes_per_second: self.throughput(),
                rounds: Some(0),
                total: Some(now.elapsed + predicted),
                bytes: Some(now.bytes + self.learned.on_the_link(round.dirty_pages as f64)),
                // It has stood still from the beginning.
                blackout: Some(now.elapsed + predicted),
                dirty_bytes_per_second: None,
            },
            throttle: 0,
            words: format!(
                "the guest stands still: {} pages are there, the rest takes {:.1} ms",
                round.pages,
                milliseconds(predicted)
            ),
        }
    }

    /// How many blocks of copied disks the guest may make dirty from the begin of a round on, besides a share of what the round sends: so many that
    /// what is left of the disks comes to half of what the blackout has time for. None where that would lead nowhere, or the guest stands still.
    #[must_use]
    pub fn disk_allowance(&self) -> Option<u64> {
        let Manner::Live { max_downtime } = self.terms.manner else {
            return None;
        };
        let mut most = self.learned.pages_in_blackout(max_downtime);
        if self.lateness == Lateness::AtOnce {
            // Whatever the budget, this is enough for the guest to be handed over.
            most = most.max(self.learned.pages_in(CHEAP_LAST_PAGES));
        }
        // Of blocks nobody knows what they changed, and how they compress is not how memory does.
        most *= self.learned.compressed_to();
        // Rounds come to leave twice as much as this.
        (most > 0.0).then(|| ((most * LAST_PAGES_OF_DISKS / 2.0) as u64).max(1))
    }

    /// What of the blackout is still to come for a stopped guest with this many pages left.
    #[must_use]
    pub fn after_stop(&self, pages: u64) -> Duration {
        self.learned.after_stop(pages)
    }

    /// Takes in how long stopping and exporting took. One slow stop weighs half, and never so much that no further one
    /// would be tried.
    pub fn stopped(&mut self, took: Duration) {
        if let Manner::Live { max_downtime } = self.terms.manner {
            self.learned.stopped(took, max_downtime);
        }
    }

    /// Takes in that a switchover was called off: the same prediction is trusted less from now on.
    pub fn disarmed(&mut self) {
        self.learned.disarmed();
        self.rounds_within_budget = 0;
    }

    /// Bytes of pages a second by the rounds that told something.
    #[must_use]
    pub fn throughput(&self) -> Option<u64> {
        // Whole bytes are plenty, and a throughput fits.
        self.learned.bytes_per_second().map(|rate| rate as u64)
    }

    /// What a round left, and what that leads to.
    fn left(&self, round: &RoundSummary, now: Moment, max_downtime: Duration) -> Left {
        let pages = round.dirty_pages;
        let share = ratio(pages as f64, round.pages as f64);
        let seconds = round.elapsed.as_secs_f64();
        let dirty_rate = (seconds > 0.0).then(|| bytes_of(pages as f64) / seconds);
        // A round of pages that are zero, or were not sent at all, is over sooner than one of what it left.
        let by_rates = dirty_rate
            .zip(self.learned.bytes_per_second())
            .map(|(dirty, sent)| ratio(dirty, sent));
        let next_share = share.max(by_rates.unwrap_or(0.0));
        let course = Course {
            left: pages as f64,
            share: next_share,
        };
        let rounds = course.rounds_until(self.learned.pages_in_blackout(max_downtime));
        let mut forecast = Forecast {
            bytes_per_second: self.throughput(),
            dirty_bytes_per_second: dirty_rate.map(|rate| rate as u64),
            rounds,
            ..Forecast::default()
        };
        if let Some(rounds) = rounds {
            let (sent, last) = (course.sent_in(rounds), course.left_after(rounds));
            let blackout = self.learned.blackout(last as u64);
            forecast.blackout = Some(blackout);
            forecast.total = Some(now.elapsed + self.learned.time_for(sent) + blackout);
            forecast.bytes = Some(now.bytes + self.learned.on_the_link(sent + last));
        }
        Left {
            pages,
            last_pages: self.learned.last_pages(pages),
            share,
            next_share,
            forecast,
        }
    }
}

/// What a share is of; of nothing, nothing is left.
fn ratio(part: f64, of: f64) -> f64 {
    if part == 0.0 { 0.0 } else { part / of.max(1.0) }
}

fn percent(share: f64) -> u64 {
    (share * 100.0) as u64
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
