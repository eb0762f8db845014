//! What a migration is expected to come to before it begins: the very policy that it will have, on rounds that a sample of the guest foretells.
//!
//! ```text
//!   pages ──link──► time ──writes──► pages dirtied meanwhile ──policy──► switch, or the next round
//! ```
//!
//! So whatever the policy would decide is what is foretold, throttling and pages that come late included. Pure.

mod remedies;
#[cfg(test)]
mod tests;
mod writes;

use std::time::Duration;

use super::{Moment, Policy, Verdict};
use crate::compress::Packed;
use crate::guest::FRAME_SIZE;
use crate::postcopy::Lateness;
use crate::source::{BETWEEN_SMALL_ROUNDS, Manner, OnTimeout, Overhead, RoundSummary, Terms};
pub use remedies::{Remedies, remedies};
pub use writes::Writes;

/// Small rounds that go on while the switchover is armed.
const ROUNDS_TO_ARM: u32 = 3;

/// A round that leaves this share of what the one before it left is the last one that tells anything new.
const STALLED_SHARE: f64 = 0.999;

/// Only after so many rounds is it told whether they lead anywhere, or the rest comes late.
const TELLING_ROUNDS: usize = 3;

/// More rounds than any migration has that comes to an end.
const MOST_ROUNDS: usize = 20_000;

/// What is known of a guest.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sampled {
    /// Pages that the first pass sends or tells: populated ones, and those of disks that move along.
    pub pages: u64,
    /// Those of them that are blocks of disks: these never come late.
    pub disk_pages: u64,
    /// Those of them that are zero, told and not sent.
    pub zero_pages: u64,
    /// What it writes.
    pub writes: Writes,
    /// Where it writes; empty: nobody knows.
    pub places: Vec<Place>,
}

/// A part of what a guest writes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Place {
    /// How much of the first pass comes before it, 0 to 1.
    pub position: f64,
    /// Its share of all that is written, 0 to 1.
    pub share: f64,
}

/// What is known of the way from one host to the other.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Way {
    /// Bytes a second that it carries, without any cap.
    pub bytes_per_second: f64,
    /// What a round takes beside its pages: a word to the destination and back, and looks at what is dirty.
    pub round: Duration,
    /// Pages a second that are found to be zero.
    pub zero_pages_per_second: f64,
    /// What a migration takes beside its rounds and its blackout.
    pub preparation: Duration,
    /// What of the blackout is neither a last page nor a word on its way.
    pub stop_and_start: Duration,
    /// The same as the migration's policy is told of it.
    pub overhead: Overhead,
    /// How pages are compressed; `None`: they travel as they are.
    pub packed: Option<Packed>,
    /// How pages are told by what they changed that are sent again; `None`: whole.
    pub deltas: Option<Deltas>,
}

/// Pages that are told by what they changed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Deltas {
    /// What that comes to.
    pub told: Packed,
    /// Of how many pages copies are kept at most: others are sent whole.
    pub copies: u64,
}

/// What is wanted of the migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// What it may take.
    pub terms: Terms,
    /// What happens when its time is up.
    pub on_timeout: OnTimeout,
    /// Whether pages may come late.
    pub lateness: Lateness,
    /// For how much of the time vCPUs may be kept from running, in percent; 0: they are left alone.
    pub most_throttle: u32,
    /// Whether memory at both ends is compared while the guest stands still.
    pub verify: bool,
}

/// How it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest is handed over whole, as it is wanted.
    Whole,
    /// The guest is handed over, and pages of it come after that.
    Late,
    /// Its time is up, and it stands still for what is left.
    Paused,
    /// It is given up when its time is up, with the guest where it is.
    Never,
}

/// What it is expected to come to. Of one that never ends it is what was reached by then.
#[derive(Clone, Debug, PartialEq)]
pub struct Prediction {
    /// How it ends.
    pub end: End,
    /// From the order until the guest runs at the destination.
    pub total: Duration,
    /// How long it stands still; of one that never ends, how long it would have to.
    pub blackout: Duration,
    /// Rounds while it runs.
    pub rounds: u32,
    /// Bytes sent by the time it runs at the destination.
    pub bytes: u64,
    /// Bytes that come after that.
    pub late_bytes: u64,
    /// How long they take.
    pub late: Duration,
    /// For how much of the time vCPUs are kept from running in the end, in percent.
    pub throttle: u32,
    /// Of the copy, when it was within its budget first; `None`: never.
    pub within_budget_after: Option<Duration>,
    /// The policy's last words.
    pub words: String,
}

/// Pages of a round, by how they travel.
#[derive(Clone, Copy, Debug, Default)]
struct Pages {
    whole: f64,
    /// Told by what they changed.
    told: f64,
    zero: f64,
}

impl Pages {
    fn bytes(self) -> f64 {
        (self.whole + self.told) * FRAME_SIZE as f64
    }
}

impl Way {
    /// How long the link takes for these.
    fn time(&self, pages: Pages, bytes_per_second: f64) -> Duration {
        let cost = |packed: Option<Packed>| match packed {
            Some(packed) => packed.cost(bytes_per_second),
            None => 1.0 / bytes_per_second.max(1.0),
        };
        let told = self.deltas.map(|deltas| deltas.told);
        let bytes = pages.whole * cost(self.packed) + pages.told * cost(told);
        let seconds = bytes * FRAME_SIZE as f64 + pages.zero / self.zero_pages_per_second.max(1.0);
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX / 8)
    }

    /// What of the blackout is no last page: one way for the word that has the guest start, and to compare there and back once more.
    fn switchover(&self, wanted: &Wanted) -> Duration {
        let to_compare = self.round * u32::from(wanted.verify);
        self.stop_and_start
            .saturating_add(self.round / 2)
            .saturating_add(to_compare)
    }

    /// Bytes that are sent of these pages.
    fn sent(&self, pages: Pages) -> f64 {
        let left = |packed: Option<Packed>| packed.map_or(1.0, |packed| packed.left);
        let told = self.deltas.map(|deltas| deltas.told);
        (pages.whole * left(self.packed) + pages.told * left(told)) * FRAME_SIZE as f64
    }

    /// What it carries under a cap.
    fn capped(&self, terms: &Terms) -> f64 {
        let cap = terms.bandwidth.map_or(f64::INFINITY, |cap| cap.get() as f64);
        self.bytes_per_second.min(cap)
    }
}

impl Sampled {
    /// Pages that are dirty after a first pass of this length: what was written before its turn came goes with it.
    fn after_first_pass(&self, pass: Duration) -> f64 {
        if self.places.is_empty() {
            let parts = 0..FIRST_PASS_PARTS;
            let after = |part: u32| pass * (2 * part + 1) / (2 * FIRST_PASS_PARTS);
            return parts.map(|part| self.writes.within(after(part))).sum::<f64>() / f64::from(FIRST_PASS_PARTS);
        }
        let dirty = |place: &Place| {
            let after = pass.mul_f64((1.0 - place.position).clamp(0.0, 1.0));
            place.share * self.writes.within(after)
        };
        self.places.iter().map(dirty).sum()
    }
}

/// Where nobody knows where a guest writes, it writes everywhere: in so many parts.
const FIRST_PASS_PARTS: u32 = 16;

/// Foretells a migration.
#[must_use]
pub fn predict(guest: &Sampled, way: &Way, wanted: &Wanted) -> Prediction {
    let all = Pages {
        whole: guest.pages.saturating_sub(guest.zero_pages) as f64,
        told: 0.0,
        zero: guest.zero_pages as f64,
    };
    let rate = way.capped(&wanted.terms);
    let first_pass = way.round.saturating_add(way.time(all, rate));
    if wanted.terms.manner == Manner::Cold {
        let blackout = first_pass.saturating_add(way.switchover(wanted));
        return Prediction {
            end: if first_pass > wanted.terms.timeout {
                End::Never
            } else {
                End::Whole
            },
            total: way.preparation.saturating_add(blackout),
            blackout,
            rounds: 1,
            bytes: way.sent(all) as u64,
            late_bytes: 0,
            late: Duration::ZERO,
            throttle: 0,
            within_budget_after: Some(first_pass),
            words: "the guest stands still while all of it is copied".to_owned(),
        };
    }
    let course = Course {
        guest,
        way,
        wanted,
        rate,
        policy: Policy::new(wanted.terms, way.overhead, wanted.most_throttle).with_late_pages(wanted.lateness),
        rounds: Vec::new(),
        copied: Duration::ZERO,
        bytes: 0.0,
        within_budget_after: None,
        most_again: 0.0,
    };
    if wanted.lateness == Lateness::AtOnce {
        return course.at_once();
    }
    course.run(all)
}

/// The rounds of one migration.
struct Course<'a> {
    guest: &'a Sampled,
    way: &'a Way,
    wanted: &'a Wanted,
    /// Bytes a second while the guest runs.
    rate: f64,
    policy: Policy,
    rounds: Vec<RoundSummary>,
    copied: Duration,
    bytes: f64,
    within_budget_after: Option<Duration>,
    /// The most pages that a round after the first one had: of all of these a copy was wanted.
    most_again: f64,
}

impl Course<'_> {
    fn run(mut self, mut pages: Pages) -> Prediction {
        let mut pause = Duration::ZERO;
        loop {
            let elapsed = self.send(pages);
            let dirty = match self.rounds.len() {
                0 => self.guest.after_first_pass(elapsed),
                _ => self.written(pause + elapsed),
            };
            let round = self.round(pages, elapsed, dirty);
            let now = Moment {
                elapsed: self.copied,
                since_order: self.copied,
                bytes: self.bytes as u64,
                round_trip: Some(self.way.round.saturating_mul(1 + u32::from(self.wanted.verify))),
                deltas_begin: self.deltas_begin(dirty),
            };
            let decision = self.policy.judge(&round, now);
            let before = self.rounds.last().map(|before| before.dirty_pages);
            self.rounds.push(round);
            if decision.verdict != Verdict::Postcopy && decision.within_budget && self.within_budget_after.is_none() {
                self.within_budget_after = Some(self.copied);
            }
            match decision.verdict {
                Verdict::Switch => return self.switched(dirty, End::Whole, decision.words),
                Verdict::Postcopy => return self.late(dirty, decision.words),
                Verdict::Continue | Verdict::Throttle | Verdict::Infeasible => {}
            }
            let is_stalled = decision.verdict != Verdict::Throttle
                && self.rounds.len() >= TELLING_ROUNDS
                && before.is_some_and(|before| dirty >= before as f64 * STALLED_SHARE);
            if is_stalled || self.copied > self.wanted.terms.timeout || self.rounds.len() >= MOST_ROUNDS {
                return self.without_end(dirty, decision.words);
            }
            pages = self.again(dirty);
            pause = BETWEEN_SMALL_ROUNDS.saturating_sub(elapsed);
            self.copied += pause;
        }
    }

    /// Disks that move along are copied first, in a round of their own, and are whole when the guest is handed over.
    fn at_once(mut self) -> Prediction {
        let Sampled {
            pages,
            disk_pages,
            zero_pages,
            ..
        } = *self.guest;
        let memory = pages.saturating_sub(disk_pages).saturating_sub(zero_pages) as f64;
        if disk_pages == 0 {
            let words = "the guest is handed over at once, and all of its memory comes late".to_owned();
            return self.late(memory, words);
        }
        let disks = Pages {
            whole: disk_pages as f64,
            ..Pages::default()
        };
        let elapsed = self.send(disks);
        self.rounds.push(self.round(disks, elapsed, 0.0));
        if self.copied > self.wanted.terms.timeout && self.wanted.on_timeout == OnTimeout::Abort {
            let words = "the disks that move with the guest are not copied in time".to_owned();
            return self.ended(0.0, End::Never, words);
        }
        let words =
            "the guest is handed over as soon as its disks are copied, and all of its memory comes late".to_owned();
        self.late(memory, words)
    }

    /// Has these pages sent; how long that takes.
    fn send(&mut self, pages: Pages) -> Duration {
        let elapsed = self.way.round.saturating_add(self.way.time(pages, self.rate));
        self.bytes += self.way.sent(pages);
        self.copied += elapsed;
        elapsed
    }

    /// As the engine has it: the round that ends is the second one, and of what it left there are copies enough.
    fn deltas_begin(&self, dirty: f64) -> bool {
        let has_copies = |deltas: Deltas| dirty <= 2.0 * deltas.copies as f64;
        self.rounds.len() == 1 && self.way.deltas.is_some_and(has_copies)
    }

    /// So many pages are sent again: whole for the second time, and from then on those of which there is a copy are told by what they changed.
    fn again(&mut self, pages: f64) -> Pages {
        // Of all that was written by now, those have one that were sent again before.
        let written = self.written(self.copied).max(self.most_again).max(1.0);
        let copies = self
            .way
            .deltas
            .map_or(0.0, |deltas| self.most_again.min(deltas.copies as f64));
        let of_copies = copies / written;
        self.most_again = self.most_again.max(pages);
        Pages {
            whole: pages * (1.0 - of_copies),
            told: pages * of_copies,
            zero: 0.0,
        }
    }

    /// What the guest writes in this time, as far as it is let run.
    fn written(&self, time: Duration) -> f64 {
        let runs = 1.0 - f64::from(self.policy.throttle()) / 100.0;
        self.guest.writes.within_share(time, runs)
    }

    fn round(&self, pages: Pages, elapsed: Duration, dirty: f64) -> RoundSummary {
        let sent = self.way.sent(pages);
        RoundSummary {
            number: self.rounds.len() as u32 + 1,
            pages: (pages.whole + pages.told + pages.zero) as u64,
            hinted_pages: 0,
            zero_pages: pages.zero as u64,
            bytes: sent as u64,
            saved: (pages.bytes() - sent).max(0.0) as u64,
            elapsed,
            dirty_pages: dirty.ceil() as u64,
        }
    }

    /// The policy switches: small rounds go on while that is armed, and what the last of them leaves is sent while the guest stands still.
    fn switched(mut self, mut dirty: f64, end: End, words: String) -> Prediction {
        for _ in 0..ROUNDS_TO_ARM {
            let pages = self.again(dirty);
            let elapsed = self.send(pages);
            dirty = self.written(BETWEEN_SMALL_ROUNDS + elapsed);
        }
        self.ended(dirty, end, words)
    }

    /// With so many pages left for the blackout, whatever it comes to.
    fn ended(mut self, dirty: f64, end: End, words: String) -> Prediction {
        let pages = self.again(dirty);
        let last_pages = self.way.time(pages, self.way.bytes_per_second);
        let blackout = self.way.switchover(self.wanted).saturating_add(last_pages);
        Prediction {
            end,
            total: self
                .way
                .preparation
                .saturating_add(self.copied)
                .saturating_add(blackout),
            blackout,
            rounds: self.rounds.len() as u32,
            bytes: (self.bytes + self.way.sent(pages)) as u64,
            late_bytes: 0,
            late: Duration::ZERO,
            throttle: self.policy.throttle(),
            within_budget_after: self.within_budget_after,
            words,
        }
    }

    fn without_end(mut self, dirty: f64, words: String) -> Prediction {
        match self.wanted.on_timeout {
            OnTimeout::Abort => self.ended(dirty, End::Never, words),
            OnTimeout::Pause => {
                // It goes on in the same way until then.
                let left = self.wanted.terms.timeout.saturating_sub(self.copied);
                self.copied += left;
                self.bytes += left.as_secs_f64() * self.rate;
                match self.wanted.lateness {
                    Lateness::Never => self.ended(dirty, End::Paused, words),
                    _ => self.late(dirty, words),
                }
            }
        }
    }

    /// So many pages are left for after the handover.
    fn late(self, pages: f64, words: String) -> Prediction {
        // As the last ones of the rounds do; without rounds nothing has been found to pay.
        let in_use = |packed: &Packed| packed.is_named || !self.rounds.is_empty();
        let way = Way {
            packed: self.way.packed.filter(in_use),
            ..*self.way
        };
        let pages = Pages {
            whole: pages,
            ..Pages::default()
        };
        let late = way.time(pages, self.rate);
        let late_bytes = way.sent(pages) as u64;
        let ended = self.ended(0.0, End::Late, words);
        Prediction {
            late_bytes,
            late,
            throttle: 0,
            ..ended
        }
    }
}
