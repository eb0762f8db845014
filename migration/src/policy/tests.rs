mod late;
mod properties;

use std::num::NonZeroU64;

use super::*;
use crate::guest::FRAME_SIZE;

const BUDGET: Manner = live(300);
const TIMEOUT: Duration = Duration::from_secs(900);

const fn live(milliseconds: u64) -> Manner {
    Manner::Live {
        max_downtime: Duration::from_millis(milliseconds),
    }
}

const OVERHEAD: Overhead = Overhead {
    stop: Duration::from_millis(2),
    start: Duration::from_millis(5),
};

const TERMS: Terms = Terms {
    manner: BUDGET,
    timeout: TIMEOUT,
    bandwidth: None,
};

fn policy(manner: Manner) -> Policy {
    Policy::new(Terms { manner, ..TERMS }, OVERHEAD, 0)
}

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

/// What is decided after rounds at 1 GB/s, each told as pages sent and pages dirty by its end.
fn decisions(policy: &mut Policy, rounds: &[(u64, u64)]) -> Vec<Decision> {
    let mut now = Moment::default();
    let mut judge = |&(pages, dirty): &(u64, u64)| {
        let round = round(pages, dirty);
        now.elapsed += round.elapsed;
        now.bytes += round.bytes;
        policy.judge(&round, now)
    };
    rounds.iter().map(&mut judge).collect()
}

fn verdicts(policy: &mut Policy, rounds: &[(u64, u64)]) -> Vec<Verdict> {
    let decisions = decisions(policy, rounds);
    decisions.into_iter().map(|decision| decision.verdict).collect()
}

fn judged(policy: &mut Policy, pages: u64, dirty_pages: u64) -> Decision {
    policy.judge(&round(pages, dirty_pages), Moment::default())
}

use Verdict::{Continue, Infeasible, Postcopy, Switch, Throttle};

#[test]
fn the_last_round_of_whole_pages_tells_nothing_of_those_that_are_told_by_what_they_changed() {
    let begins = Moment {
        deltas_begin: true,
        ..Moment::default()
    };
    let stalled = round(200_000, 200_000);
    let policies = || {
        let terms = Terms {
            manner: BUDGET,
            ..TERMS
        };
        [
            (policy(BUDGET), Infeasible),
            (Policy::new(terms, OVERHEAD, 99), Throttle),
            (policy(BUDGET).with_late_pages(Lateness::WhenItPays), Postcopy),
        ]
    };
    for (mut policy, verdict) in policies() {
        assert_eq!(policy.judge(&stalled, begins).verdict, Continue);
        assert_eq!(policy.throttle(), 0);
        // The next one does.
        assert_eq!(policy.judge(&stalled, Moment::default()).verdict, verdict);
    }
    // What is within the budget, or its user wants, is no matter of that.
    let decision = policy(BUDGET).judge(&round(200_000, 100), begins);
    assert_eq!(decision.verdict, Switch);
    let mut forced = policy(BUDGET);
    forced.force(Some(Force::User));
    assert_eq!(forced.judge(&stalled, begins).verdict, Switch);
}

/// A round of so many pages that are told by what they changed, each in an eighth of its bytes and its time.
fn told(pages: u64, dirty_pages: u64) -> RoundSummary {
    let whole = round(pages, dirty_pages);
    RoundSummary {
        bytes: whole.bytes / 8,
        saved: whole.bytes - whole.bytes / 8,
        elapsed: whole.elapsed / 8,
        ..whole
    }
}

/// Two rounds of whole pages, and one of pages that are told by what they changed. It may bring within the budget what no number of the first kind would,
/// be it as stalled as they are: so the second one calls nothing infeasible yet, throttles nobody and hands nothing over. It says that it stalled; the third
/// one decides.
#[test]
fn where_deltas_begin_a_stalled_round_is_told_at_once_and_the_next_one_decides() {
    let table = [
        (
            "it writes more than deltas carry, too",
            [
                round(2_000_000, 1_000_000),
                round(1_000_000, 1_000_000),
                told(1_000_000, 1_000_000),
            ],
            [Continue, Continue, Infeasible],
        ),
        (
            "it writes as much as deltas carry, of which the blackout takes more than of whole pages",
            [round(400_000, 200_000), round(200_000, 200_000), told(200_000, 200_000)],
            [Continue, Continue, Switch],
        ),
        (
            "it writes more than whole pages carry, and less than deltas do",
            [
                round(2_000_000, 1_000_000),
                round(1_000_000, 1_000_000),
                told(1_000_000, 500_000),
            ],
            [Continue, Continue, Continue],
        ),
        (
            "the first round stalls as well: no deltas come after it",
            [
                round(1_000_000, 1_000_000),
                round(1_000_000, 1_000_000),
                told(1_000_000, 1_000_000),
            ],
            [Infeasible, Continue, Infeasible],
        ),
    ];
    for (name, rounds, expected) in table {
        let decisions = judged_where_deltas_begin(&mut policy(BUDGET), &rounds);
        let verdicts: Vec<_> = decisions.iter().map(|decision| decision.verdict).collect();
        assert_eq!(verdicts, expected, "{name}");
        let told = &decisions[1].words;
        let why = "the round left as much as it sent, and from the next round on pages are told by what they changed";
        assert!(
            told.contains(why) && told.contains("the guest writes"),
            "{name}: {told}"
        );
    }
}

#[test]
fn what_deltas_do_not_mend_is_infeasible_where_they_begin_too() {
    let rounds = [round(400_000, 200_000), round(200_000, 200_000), told(200_000, 200_000)];
    let mut alone = policy(live(5));
    let decisions = judged_where_deltas_begin(&mut alone, &rounds);
    assert!(
        decisions.iter().all(|decision| decision.verdict == Infeasible),
        "{decisions:?}"
    );
    assert!(decisions[1].words.contains("without a page to send"), "{decisions:?}");
}

/// What is decided after rounds with deltas from the third one on.
fn judged_where_deltas_begin(policy: &mut Policy, rounds: &[RoundSummary]) -> Vec<Decision> {
    let judge = |(index, round)| {
        let now = Moment {
            deltas_begin: index == 1,
            ..Moment::default()
        };
        policy.judge(round, now)
    };
    rounds.iter().enumerate().map(judge).collect()
}

/// A name, rounds, and what follows from each.
type Case = (&'static str, &'static [(u64, u64)], &'static [Verdict]);

/// Rounds at 1 GB/s, and what follows from each, with 300 ms allowed: 71,500 pages or so.
#[test]
fn what_follows_from_rounds() {
    let table: &[Case] = &[
        ("an idle guest", &[(100_000, 10)], &[Switch]),
        ("nothing dirty", &[(100_000, 0)], &[Switch]),
        ("nothing to send", &[(0, 0)], &[Switch]),
        (
            "rounds that halve",
            &[(100_000, 50_000), (50_000, 25_000), (25_000, 12_000), (12_000, 400)],
            &[Continue, Continue, Continue, Switch],
        ),
        (
            "within the budget, and it no longer shrinks",
            &[(100_000, 30_000), (30_000, 29_000)],
            &[Continue, Switch],
        ),
        (
            "within the budget, and it shrinks by less than is felt",
            &[(100_000, 6_000), (6_000, 4_900)],
            &[Continue, Switch],
        ),
        (
            "a round that led out of the budget is not tried a second time",
            &[(400_000, 70_000), (70_000, 75_000), (75_000, 60_000)],
            &[Continue, Infeasible, Switch],
        ),
        (
            "over the budget, and each round leaves what it sent",
            &[(400_000, 200_000), (200_000, 200_000), (200_000, 199_000)],
            &[Continue, Infeasible, Infeasible],
        ),
        (
            "it shrinks slowly, comes within the budget all the same, and goes on for as long as it shrinks",
            &[
                (100_000, 90_000),
                (90_000, 80_000),
                (80_000, 71_000),
                (71_000, 64_000),
                (64_000, 63_000),
            ],
            &[Continue, Continue, Continue, Continue, Switch],
        ),
        (
            "a guest that stops writing",
            &[(400_000, 200_000), (200_000, 200_000), (200_000, 100)],
            &[Continue, Infeasible, Switch],
        ),
        (
            "a guest that begins to write within the budget",
            &[(100_000, 40_000), (40_000, 60_000)],
            &[Continue, Switch],
        ),
    ];
    for (name, rounds, expected) in table {
        assert_eq!(verdicts(&mut policy(BUDGET), rounds), *expected, "{name}");
    }
}

#[test]
fn one_stalled_round_is_enough_to_say_that_it_is_infeasible_and_why() {
    let rounds = [(400_000, 200_000), (200_000, 200_000)];
    let last = decisions(&mut policy(BUDGET), &rounds).pop().unwrap();
    assert_eq!(last.verdict, Infeasible);
    assert!(
        last.words.contains("the round left as much as it sent"),
        "{}",
        last.words
    );
    let rates = "the guest writes 1000.0 MB/s, the link carries 1000.0 MB/s";
    assert!(last.words.contains(rates), "{}", last.words);
    assert_eq!((last.forecast.total, last.forecast.rounds), (None, None));
}

#[test]
fn overhead_above_the_budget_is_infeasible_whatever_is_left() {
    let decision = judged(&mut policy(live(5)), 10_000, 0);
    assert_eq!(decision.verdict, Infeasible);
    assert!(decision.words.contains("without a page to send"), "{}", decision.words);
    assert!(decision.words.contains("take 7.0 ms"), "{}", decision.words);
}

#[test]
fn a_copy_that_ends_after_its_time_is_infeasible() {
    let hurried = |timeout| Policy::new(Terms { timeout, ..TERMS }, OVERHEAD, 0);
    let rounds = [(1_000_000, 500_000)];
    let in_time = verdicts(&mut hurried(Duration::from_secs(60)), &rounds);
    assert_eq!(in_time, [Continue]);
    let late = decisions(&mut hurried(Duration::from_secs(5)), &rounds).pop().unwrap();
    assert_eq!(late.verdict, Infeasible);
    assert!(late.words.contains("of 5.0 s allowed"), "{}", late.words);
}

#[test]
fn what_is_expected_of_rounds_that_halve_is_what_comes_of_them() {
    let rounds = [
        (1 << 20, 1 << 19),
        (1 << 19, 1 << 18),
        (1 << 18, 1 << 17),
        (1 << 17, 1 << 16),
    ];
    let decisions = decisions(&mut policy(BUDGET), &rounds);
    let first = &decisions[0];
    assert_eq!(first.forecast.rounds, Some(3));
    // All rounds and the last pages, at a byte a nanosecond.
    let pages = (1 << 20) + (1 << 19) + (1 << 18) + (1 << 17) + (1 << 16);
    assert_eq!(first.forecast.bytes, Some(pages * FRAME_SIZE));
    let total = Duration::from_nanos(pages * FRAME_SIZE) + OVERHEAD.stop + OVERHEAD.start;
    let expected = first.forecast.total.unwrap();
    assert!(
        expected.abs_diff(total) < Duration::from_micros(1),
        "{expected:?} {total:?}"
    );
    let last = &decisions[3];
    assert!(last.within_budget);
    assert!(first.forecast.blackout.unwrap().abs_diff(last.predicted) < Duration::from_micros(1));
}

#[test]
fn a_first_pass_over_zero_pages_does_not_promise_what_the_link_does_not_keep() {
    let mut policy = policy(BUDGET);
    judged(&mut policy, 100_000, 0);
    // A hundred times as many pages as a round of data could have had in this time, and all that the link could carry meanwhile dirty again.
    let zeroes = RoundSummary {
        pages: 1_000_000,
        bytes: 10_000 * FRAME_SIZE,
        elapsed: Duration::from_nanos(10_000 * FRAME_SIZE),
        dirty_pages: 10_000,
        ..RoundSummary::default()
    };
    let decision = policy.judge(&zeroes, Moment::default());
    assert_eq!(decision.verdict, Switch, "{}", decision.words);
    assert!(decision.words.contains("would leave no less"), "{}", decision.words);
}

#[test]
fn one_that_its_user_wants_completed_is_switched_whatever_it_costs() {
    let mut policy = policy(BUDGET);
    judged(&mut policy, 100_000, 100_000);
    policy.force(Some(Force::User));
    let decision = judged(&mut policy, 100_000, 100_000);
    assert!(decision.verdict == Switch && decision.within_budget, "{decision:?}");
    assert!(decision.predicted > Duration::from_millis(300), "{decision:?}");
    assert!(decision.words.contains("its user wants it"), "{decision:?}");
    policy.force(Some(Force::TimeUp));
    let decision = judged(&mut policy, 100_000, 100_000);
    assert!(
        decision.verdict == Switch && decision.words.contains("its time is up"),
        "{decision:?}"
    );
}

#[test]
fn eight_rounds_within_the_budget_are_enough() {
    let dirty = [60_000, 44_000, 32_000, 23_000, 17_000, 12_000, 8_900, 6_500, 4_800];
    let rounds: Vec<(u64, u64)> = dirty.windows(2).map(|pair| (pair[0], pair[1])).collect();
    let verdicts = verdicts(&mut policy(BUDGET), &rounds);
    assert_eq!(verdicts[..7], [Continue; 7]);
    assert_eq!(verdicts[7], Switch);
}

#[test]
fn within_the_budget_no_round_is_begun_that_is_not_over_in_time() {
    let after = |milliseconds| {
        let terms = Terms {
            timeout: Duration::from_secs(1),
            ..TERMS
        };
        let now = Moment {
            since_order: Duration::from_millis(milliseconds),
            ..Moment::default()
        };
        Policy::new(terms, OVERHEAD, 0).judge(&round(100_000, 50_000), now)
    };
    // A round and the blackout after it are at most twice 205 ms.
    assert_eq!(after(580).verdict, Continue);
    let late = after(600);
    assert_eq!(late.verdict, Switch);
    assert!(late.words.contains("no time for another round"), "{}", late.words);
}

#[test]
fn a_longer_blackout_that_is_allowed_later_ends_what_was_infeasible() {
    let mut policy = policy(BUDGET);
    assert_eq!(
        verdicts(&mut policy, &[(400_000, 200_000), (200_000, 200_000)])[1],
        Infeasible
    );
    policy.follow(Terms {
        manner: live(900),
        ..TERMS
    });
    assert_eq!(judged(&mut policy, 200_000, 200_000).verdict, Switch);
    policy.follow(TERMS);
    assert_eq!(judged(&mut policy, 200_000, 200_000).verdict, Infeasible);
}

#[test]
fn what_was_learned_of_a_link_holds_under_a_tighter_cap_and_not_under_a_looser_one() {
    let capped = |cap| Terms {
        bandwidth: NonZeroU64::new(cap),
        ..TERMS
    };
    let mut policy = policy(BUDGET);
    judged(&mut policy, 100_000, 10);
    policy.follow(capped(100_000_000));
    assert_eq!(policy.throughput(), Some(100_000_000));
    policy.follow(capped(100_000_000));
    assert_eq!(policy.throughput(), Some(100_000_000));
    policy.follow(capped(200_000_000));
    assert_eq!(policy.throughput(), None);
}

fn throttling(most: u32) -> Policy {
    Policy::new(TERMS, OVERHEAD, most)
}

#[test]
fn a_guest_that_writes_too_much_is_throttled_until_it_converges() {
    let mut policy = throttling(99);
    // It writes twice what the link carries while it runs, 200,000 pages a round at most.
    let mut sent = 400_000;
    let mut throttles = Vec::new();
    let ended = (0..20).any(|_| {
        let runs = f64::from(100 - policy.throttle()) / 100.0;
        let dirty = ((sent as f64 * 2.0 * runs) as u64).min(200_000);
        let decision = judged(&mut policy, sent, dirty);
        throttles.push(decision.throttle);
        assert_ne!(decision.verdict, Infeasible, "{}", decision.words);
        sent = dirty.max(1);
        decision.verdict == Switch
    });
    assert!(ended, "{throttles:?}");
    assert!(
        throttles.is_sorted() && throttles.iter().all(|&percent| percent <= 99),
        "{throttles:?}"
    );
    assert!(throttles.contains(&50) && throttles.last() < Some(&99), "{throttles:?}");
}

#[test]
fn a_guest_that_one_may_not_throttle_enough_is_infeasible() {
    let mut policy = throttling(30);
    let stalled = [(200_000, 200_000); 4];
    let verdicts = verdicts(&mut policy, &stalled);
    assert_eq!(verdicts, [Throttle, Infeasible, Infeasible, Infeasible]);
    let words = judged(&mut policy, 200_000, 200_000).words;
    assert!(
        words.contains("kept from running for 30 % of the time as it is"),
        "{words}"
    );
}

#[test]
fn what_throttling_does_not_mend_is_not_throttled() {
    let terms = Terms {
        manner: live(5),
        ..TERMS
    };
    let mut policy = Policy::new(terms, OVERHEAD, 99);
    assert_eq!(verdicts(&mut policy, &[(200_000, 200_000)]), [Infeasible]);
    assert_eq!(policy.throttle(), 0);
    let mut policy = throttling(99);
    assert_eq!(
        verdicts(&mut policy, &[(400_000, 200_000), (200_000, 60_000)]),
        [Continue, Continue]
    );
    assert_eq!(policy.throttle(), 0);
}

#[test]
fn a_disarmed_switchover_makes_the_same_prediction_count_for_more() {
    let mut policy = policy(BUDGET);
    let before = judged(&mut policy, 100_000, 50_000).predicted;
    policy.disarmed();
    let after = judged(&mut policy, 100_000, 50_000).predicted;
    assert!(after > before);
}

#[test]
fn a_slow_stop_is_learned_without_ruling_out_the_next_one() {
    let mut policy = policy(BUDGET);
    let before = judged(&mut policy, 100_000, 10).predicted;
    policy.stopped(Duration::from_secs(5));
    let decision = judged(&mut policy, 100_000, 10);
    assert!(decision.predicted > before);
    assert_eq!(decision.verdict, Switch);
}

/// A round at 1 GB/s of pages, compressed to a quarter.
fn compressed(pages: u64, dirty_pages: u64) -> RoundSummary {
    let plain = round(pages, dirty_pages);
    RoundSummary {
        bytes: plain.bytes / 4,
        saved: plain.bytes - plain.bytes / 4,
        ..plain
    }
}

#[test]
fn what_the_link_carries_is_counted_in_pages_and_what_is_sent_in_bytes() {
    let mut policy = policy(BUDGET);
    let decision = policy.judge(&compressed(1_000_000, 200_000), Moment::default());
    assert_eq!(policy.throughput(), Some(1_000_000_000));
    assert_eq!(
        decision.predicted,
        judged(&mut self::policy(BUDGET), 1_000_000, 200_000).predicted
    );
    let plain = decisions(&mut self::policy(BUDGET), &[(1_000_000, 200_000)]).remove(0);
    let sent = plain.forecast.bytes.unwrap() - 1_000_000 * FRAME_SIZE;
    assert_eq!(decision.forecast.bytes, Some(sent / 4));
    assert!(
        decision
            .words
            .contains("the link carries 1000.0 MB/s, compressed to 25 %"),
        "{}",
        decision.words
    );
}

#[test]
fn a_tighter_cap_leaves_of_compressed_pages_what_it_leaves_of_their_bytes() {
    let mut policy = policy(BUDGET);
    policy.judge(&compressed(1_000_000, 200_000), Moment::default());
    let bandwidth = NonZeroU64::new(100_000_000);
    policy.follow(Terms { bandwidth, ..TERMS });
    assert_eq!(policy.throughput(), Some(400_000_000));
}

#[test]
fn disks_may_take_half_of_the_last_pages_after_some_rounds() {
    let mut policy = policy(BUDGET);
    // 293 ms at 1 GB/s are 71,533 pages; rounds come to leave twice what is allowed.
    judged(&mut policy, 100_000, 90_000);
    assert_eq!(policy.disk_allowance(), Some(17_883));
    // A prediction that was wrong is trusted less.
    policy.disarmed();
    assert_eq!(policy.disk_allowance(), Some(11_922));
    policy.follow(Terms {
        manner: live(153),
        ..TERMS
    });
    assert!(policy.disk_allowance() < Some(11_922));
}

#[test]
fn disks_wait_for_nothing_where_that_leads_nowhere() {
    let mut cold = policy(Manner::Cold);
    judged(&mut cold, 100_000, 0);
    assert_eq!(cold.disk_allowance(), None);
    let mut hopeless = policy(live(6));
    judged(&mut hopeless, 100_000, 90_000);
    assert_eq!(hopeless.disk_allowance(), None);
    // Once memory comes late, disks that are cheap to send are enough.
    hopeless.leave_memory();
    assert!(hopeless.disk_allowance() > Some(100));
}
