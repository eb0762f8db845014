//! When to stop the guest: a measured round in, a decision out. Pure; time is only ever an argument.

use std::time::Duration;

use crate::guest::FRAME_SIZE;
use crate::source::{Manner, Overhead, RoundSummary};

/// Last pages that cost no more than this are not worth another round.
const CHEAP_LAST_PAGES: Duration = Duration::from_millis(2);

/// After so many rounds within the budget, more rounds are not expected to make it better.
const ENOUGH_ROUNDS: u32 = 8;

/// A round below this many bytes measures latency, not throughput.
const TELLING_BYTES: u64 = 4 << 20;

/// What is assumed of a link on which no round has told anything yet: slow, so that a guess errs towards copying on.
const UNMEASURED_BYTES_PER_SECOND: f64 = 200e6;

/// What follows from a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Another round.
    Continue,
    /// Stop the guest and hand it over.
    Switch,
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
    /// The grounds, for a person.
    pub words: String,
}

/// What is known about one migration's convergence.
#[derive(Clone, Debug)]
pub struct Policy {
    manner: Manner,
    overhead: Overhead,
    round_trip: Duration,
    bytes_per_second: Option<f64>,
    rounds_within_budget: u32,
    dirty_before: Option<u64>,
    disarmed: u32,
    is_forced: bool,
}

impl Policy {
    /// A policy that has not seen a round yet.
    #[must_use]
    pub fn new(manner: Manner, overhead: Overhead) -> Self {
        Self {
            manner,
            overhead,
            round_trip: Duration::ZERO,
            bytes_per_second: None,
            rounds_within_budget: 0,
            dirty_before: None,
            disarmed: 0,
            is_forced: false,
        }
    }

    /// From now on every round is the last one while the guest runs: its user wants it completed whatever its budget.
    pub fn force(&mut self) {
        self.is_forced = true;
    }

    /// Judges a round that ended, given the control stream's round trip if one was measured.
    pub fn judge(&mut self, round: &RoundSummary, round_trip: Option<Duration>) -> Decision {
        self.learn_throughput(round);
        self.round_trip = round_trip.unwrap_or(self.round_trip);
        let before = self.dirty_before.replace(round.dirty_pages).unwrap_or(round.pages);

        let Manner::Live { max_downtime } = self.manner else {
            return self.handed_over_cold(round);
        };
        let last_pages = self.last_pages(round.dirty_pages);
        let predicted = self.overhead.stop + self.after_stop(round.dirty_pages);
        let within_budget = predicted <= max_downtime;
        if within_budget {
            self.rounds_within_budget += 1;
        } else {
            self.rounds_within_budget = 0;
        }
        if self.is_forced {
            return self.handed_over_by_force(round, predicted, max_downtime);
        }
        let shrank = round.dirty_pages.saturating_mul(4) <= before.saturating_mul(3);
        let (verdict, grounds) = if !within_budget {
            (Verdict::Continue, "over the budget".to_owned())
        } else if last_pages <= CHEAP_LAST_PAGES {
            (Verdict::Switch, "the last pages are cheap".to_owned())
        } else if !shrank {
            (
                Verdict::Switch,
                format!("within the budget, and the dirty set no longer shrinks ({before} pages before)"),
            )
        } else if self.rounds_within_budget >= ENOUGH_ROUNDS {
            (
                Verdict::Switch,
                format!("{} rounds within the budget", self.rounds_within_budget),
            )
        } else {
            (
                Verdict::Continue,
                format!("within the budget, but the dirty set still shrinks ({before} pages before)"),
            )
        };
        let words = format!(
            "{grounds}: {} dirty pages cost {:.1} ms, a blackout of {:.1} ms of {:.1} ms allowed",
            round.dirty_pages,
            milliseconds(last_pages),
            milliseconds(predicted),
            milliseconds(max_downtime),
        );
        Decision {
            verdict,
            predicted,
            within_budget,
            words,
        }
    }

    fn handed_over_by_force(&self, round: &RoundSummary, predicted: Duration, max_downtime: Duration) -> Decision {
        Decision {
            verdict: Verdict::Switch,
            predicted,
            within_budget: true,
            words: format!(
                "its user wants it completed: {} dirty pages, a blackout of {:.1} ms, whatever the {:.1} ms allowed",
                round.dirty_pages,
                milliseconds(predicted),
                milliseconds(max_downtime),
            ),
        }
    }

    /// A guest that stands still is handed over after its one pass: nothing that it could still write is waited for, and it has no budget.
    fn handed_over_cold(&self, round: &RoundSummary) -> Decision {
        let predicted = self.after_stop(round.dirty_pages);
        Decision {
            verdict: Verdict::Switch,
            predicted,
            within_budget: true,
            words: format!(
                "the guest stands still: {} pages are there, the rest takes {:.1} ms",
                round.pages,
                milliseconds(predicted)
            ),
        }
    }

    /// What of the blackout is still to come for a stopped guest with this many pages left.
    #[must_use]
    pub fn after_stop(&self, pages: u64) -> Duration {
        self.last_pages(pages) + self.overhead.start + self.round_trip
    }

    /// Takes in how long stopping and exporting took. One slow stop weighs half, and never so much that no further one
    /// would be tried.
    pub fn stopped(&mut self, took: Duration) {
        let Manner::Live { max_downtime } = self.manner else {
            return;
        };
        let learned = (self.overhead.stop + took) / 2;
        self.overhead.stop = self.overhead.stop.max(learned.min(max_downtime / 2));
    }

    /// Takes in that a switchover was called off: the same prediction is trusted less from now on.
    pub fn disarmed(&mut self) {
        self.disarmed += 1;
        self.rounds_within_budget = 0;
    }

    /// Bytes a second by the rounds that told something.
    #[must_use]
    pub fn throughput(&self) -> Option<u64> {
        // Whole bytes are plenty, and a throughput fits.
        self.bytes_per_second.map(|rate| rate as u64)
    }

    /// The cost of sending this many pages, half as much again for each switchover that was called off.
    fn last_pages(&self, pages: u64) -> Duration {
        let rate = self.bytes_per_second.unwrap_or(UNMEASURED_BYTES_PER_SECOND).max(1.0);
        let caution = 1.5f64.powi(self.disarmed.min(8).cast_signed());
        let seconds = pages as f64 * FRAME_SIZE as f64 / rate * caution;
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX / 4)
    }

    fn learn_throughput(&mut self, round: &RoundSummary) {
        if round.elapsed.is_zero() || round.bytes < TELLING_BYTES {
            return;
        }
        let measured = round.bytes as f64 / round.elapsed.as_secs_f64();
        self.bytes_per_second = Some(match self.bytes_per_second {
            Some(before) => (before + measured) / 2.0,
            None => measured,
        });
    }
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BUDGET: Manner = live(300);

    const fn live(milliseconds: u64) -> Manner {
        Manner::Live {
            max_downtime: Duration::from_millis(milliseconds),
        }
    }

    const OVERHEAD: Overhead = Overhead {
        stop: Duration::from_millis(2),
        start: Duration::from_millis(5),
    };

    /// A round at 1 GB/s.
    fn round(pages: u64, dirty_pages: u64) -> RoundSummary {
        let bytes = pages * FRAME_SIZE;
        RoundSummary {
            pages,
            bytes,
            elapsed: Duration::from_nanos(bytes),
            dirty_pages,
            ..RoundSummary::default()
        }
    }

    fn verdicts(policy: &mut Policy, rounds: &[(u64, u64)]) -> Vec<Verdict> {
        rounds
            .iter()
            .map(|&(pages, dirty)| policy.judge(&round(pages, dirty), None).verdict)
            .collect()
    }

    #[test]
    fn an_idle_guest_is_switched_after_the_first_pass() {
        let mut policy = Policy::new(BUDGET, OVERHEAD);
        assert_eq!(verdicts(&mut policy, &[(100_000, 10)]), [Verdict::Switch]);
    }

    #[test]
    fn rounds_go_on_while_they_shrink_the_dirty_set() {
        let mut policy = Policy::new(BUDGET, OVERHEAD);
        let rounds = [(100_000, 50_000), (50_000, 25_000), (25_000, 12_000), (12_000, 400)];
        assert_eq!(
            verdicts(&mut policy, &rounds),
            [Verdict::Continue, Verdict::Continue, Verdict::Continue, Verdict::Switch]
        );
    }

    #[test]
    fn a_dirty_set_that_no_longer_shrinks_is_switched_once_within_the_budget() {
        let mut policy = Policy::new(BUDGET, OVERHEAD);
        assert_eq!(
            verdicts(&mut policy, &[(100_000, 30_000), (30_000, 29_000)]),
            [Verdict::Continue, Verdict::Switch]
        );
    }

    #[test]
    fn a_guest_over_the_budget_is_never_switched() {
        let mut policy = Policy::new(BUDGET, OVERHEAD);
        assert_eq!(
            verdicts(&mut policy, &[(100_000, 100_000); 50]),
            [Verdict::Continue; 50]
        );
    }

    #[test]
    fn one_that_its_user_wants_completed_is_switched_whatever_it_costs() {
        let mut policy = Policy::new(BUDGET, OVERHEAD);
        policy.judge(&round(100_000, 100_000), None);
        policy.force();
        let decision = policy.judge(&round(100_000, 100_000), None);
        assert!(
            decision.verdict == Verdict::Switch && decision.within_budget,
            "{decision:?}"
        );
        assert!(decision.predicted > Duration::from_millis(300), "{decision:?}");
        assert!(decision.words.contains("its user wants it"), "{decision:?}");
    }

    #[test]
    fn eight_rounds_within_the_budget_are_enough() {
        let mut policy = Policy::new(BUDGET, OVERHEAD);
        let dirty = [60_000, 45_000, 33_000, 24_000, 18_000, 13_000, 9_700, 7_200, 5_400];
        let rounds: Vec<(u64, u64)> = dirty.windows(2).map(|pair| (pair[0], pair[1])).collect();
        let verdicts = verdicts(&mut policy, &rounds);
        assert_eq!(verdicts[..7], [Verdict::Continue; 7]);
        assert_eq!(verdicts[7], Verdict::Switch);
    }

    #[test]
    fn a_disarmed_switchover_makes_the_same_prediction_count_for_more() {
        let mut policy = Policy::new(BUDGET, OVERHEAD);
        let before = policy.judge(&round(100_000, 50_000), None).predicted;
        policy.disarmed();
        let after = policy.judge(&round(100_000, 50_000), None).predicted;
        assert!(after > before);
    }

    #[test]
    fn a_slow_stop_is_learned_without_ruling_out_the_next_one() {
        let mut policy = Policy::new(BUDGET, OVERHEAD);
        let before = policy.judge(&round(100_000, 10), None).predicted;
        policy.stopped(Duration::from_secs(5));
        let decision = policy.judge(&round(100_000, 10), None);
        assert!(decision.predicted > before);
        assert_eq!(decision.verdict, Verdict::Switch);
    }

    #[test]
    fn overhead_above_the_budget_is_said_to_be_over_it() {
        let mut policy = Policy::new(live(5), OVERHEAD);
        let decision = policy.judge(&round(10_000, 0), None);
        assert_eq!(decision.verdict, Verdict::Continue);
        assert!(decision.words.starts_with("over the budget"), "{}", decision.words);
    }

    proptest! {
        #[test]
        fn a_guest_that_stands_still_is_handed_over_whatever_is_left(
            pages in 0u64..1 << 40,
            dirty_pages in 0u64..1 << 40,
            stopped in 0u64..1 << 40,
        ) {
            let mut policy = Policy::new(Manner::Cold, OVERHEAD);
            policy.stopped(Duration::from_nanos(stopped));
            let decision = policy.judge(&round(pages, dirty_pages), None);
            prop_assert_eq!(decision.verdict, Verdict::Switch);
            prop_assert!(decision.within_budget);
        }

        #[test]
        fn switching_is_never_predicted_over_the_budget(
            rounds in prop::collection::vec((0u64..1 << 40, 0u64..1 << 40, 0u64..1 << 40), 1..30),
            budget in 0u64..10_000,
            round_trip in 0u64..1_000,
        ) {
            let mut policy = Policy::new(live(budget), OVERHEAD);
            let budget = Duration::from_millis(budget);
            for (bytes, nanoseconds, dirty_pages) in rounds {
                let round = RoundSummary {
                    bytes,
                    elapsed: Duration::from_nanos(nanoseconds),
                    dirty_pages,
                    ..RoundSummary::default()
                };
                let decision = policy.judge(&round, Some(Duration::from_millis(round_trip)));
                prop_assert_eq!(decision.within_budget, decision.predicted <= budget);
                prop_assert!(decision.verdict == Verdict::Continue || decision.within_budget);
            }
        }

        #[test]
        fn more_pages_never_cost_less(left in 0u64..1 << 40, right in 0u64..1 << 40) {
            let policy = Policy::new(BUDGET, OVERHEAD);
            prop_assert!(policy.after_stop(left.min(right)) <= policy.after_stop(left.max(right)));
        }
    }
}
