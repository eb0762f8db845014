//! Guests of which pages may come late.

use proptest::prelude::*;

use super::*;

/// A policy for a guest of which pages may come late.
fn late(lateness: Lateness, most_throttle: u32) -> Policy {
    let terms = Terms {
        manner: BUDGET,
        ..TERMS
    };
    Policy::new(terms, OVERHEAD, most_throttle).with_late_pages(lateness)
}

/// What it is about; pages and dirty pages of its rounds; the verdicts on them; what the last one's words have.
type Course<'a> = (&'a str, &'a [(u64, u64)], &'a [Verdict], &'a str);

#[test]
fn what_rounds_do_not_bring_comes_late_where_it_may_and_why_is_said() {
    let table: &[Course] = &[
        (
            "an idle guest is handed over whole",
            &[(400_000, 10)],
            &[Switch],
            "the last pages are cheap",
        ),
        (
            "rounds that halve are waited for",
            &[(400_000, 200_000), (200_000, 100_000), (100_000, 400)],
            &[Continue, Continue, Switch],
            "the last pages are cheap",
        ),
        (
            "each round leaves what it sent",
            &[(400_000, 200_000), (200_000, 200_000)],
            &[Continue, Postcopy],
            "the round left as much as it sent: the rest comes late, 200000 dirty pages",
        ),
        (
            "it shrinks too slowly",
            &[(500_000, 400_000), (400_000, 320_000), (320_000, 256_000)],
            &[Continue, Continue, Postcopy],
            "rounds do not bring it within the budget (256000 dirty pages, 320000 after the round before)",
        ),
    ];
    for (name, rounds, expected, grounds) in table {
        let decisions = decisions(&mut late(Lateness::WhenItPays, 0), rounds);
        let verdicts: Vec<_> = decisions.iter().map(|decision| decision.verdict).collect();
        assert_eq!(verdicts, *expected, "{name}");
        let words = &decisions.last().unwrap().words;
        assert!(words.contains(grounds), "{name}: {words}");
    }
}

#[test]
fn a_guest_that_would_not_be_there_in_time_comes_late() {
    let terms = Terms {
        timeout: Duration::from_secs(3),
        ..TERMS
    };
    let mut policy = Policy::new(terms, OVERHEAD, 0).with_late_pages(Lateness::WhenItPays);
    let decision = decisions(&mut policy, &[(400_000, 300_000)]).pop().unwrap();
    assert_eq!(decision.verdict, Postcopy);
    assert!(decision.words.contains("of 3.0 s allowed"), "{}", decision.words);
}

#[test]
fn throttling_comes_before_pages_come_late() {
    let stalled = [
        (400_000, 200_000),
        (200_000, 200_000),
        (200_000, 200_000),
        (200_000, 200_000),
    ];
    let mut policy = late(Lateness::WhenItPays, 60);
    assert_eq!(
        verdicts(&mut policy, &stalled),
        [Continue, Throttle, Throttle, Postcopy]
    );
    assert_eq!(policy.throttle(), 0);
}

#[test]
fn where_pages_come_late_when_it_must_end_rounds_go_on_until_then() {
    let mut policy = late(Lateness::WhenItMustEnd, 0);
    let stalled = [(400_000, 200_000), (200_000, 200_000), (200_000, 200_000)];
    assert_eq!(verdicts(&mut policy, &stalled), [Continue, Infeasible, Infeasible]);
    policy.force(Some(Force::TimeUp));
    let decision = judged(&mut policy, 200_000, 200_000);
    assert_eq!(decision.verdict, Postcopy);
    assert!(decision.words.contains("its time is up"), "{}", decision.words);
    assert!(decision.predicted < Duration::from_millis(20), "{decision:?}");
}

#[test]
fn what_must_end_within_the_budget_is_handed_over_whole() {
    let mut policy = late(Lateness::WhenItMustEnd, 0);
    policy.force(Some(Force::TimeUp));
    assert_eq!(judged(&mut policy, 100_000, 40_000).verdict, Switch);
}

#[test]
fn once_memory_comes_late_disks_are_waited_for_and_a_budget_that_nothing_meets_is_not() {
    let tight = Terms {
        manner: live(1),
        ..TERMS
    };
    let mut policy = Policy::new(tight, OVERHEAD, 0).with_late_pages(Lateness::WhenItPays);
    assert_eq!(judged(&mut policy, 100_000, 100).verdict, Postcopy);
    policy.leave_memory();
    assert_eq!(judged(&mut policy, 100_000, 50_000).verdict, Infeasible);
    assert_eq!(judged(&mut policy, 50_000, 10).verdict, Switch);
    let mut policy = late(Lateness::AtOnce, 0);
    assert_eq!(
        verdicts(&mut policy, &[(400_000, 200_000), (200_000, 200_000), (200_000, 10)]),
        [Continue, Infeasible, Switch]
    );
}

proptest! {
    /// Pages come late only where they may, and never those of a guest that could be handed over whole.
    #[test]
    fn pages_come_late_only_where_they_may(rounds in prop::collection::vec((1u64..500_000, 0u64..500_000), 1..12)) {
        for lateness in [Lateness::Never, Lateness::WhenItMustEnd, Lateness::WhenItPays] {
            let mut policy = late(lateness, 0);
            for &(pages, dirty_pages) in &rounds {
                let mut whole = policy.clone().with_late_pages(Lateness::Never);
                let whole = judged(&mut whole, pages, dirty_pages);
                let decision = judged(&mut policy, pages, dirty_pages);
                if decision.verdict == Postcopy {
                    prop_assert!(lateness == Lateness::WhenItPays && !whole.within_budget);
                    break;
                }
                prop_assert_eq!(decision, whole);
            }
        }
    }
}
