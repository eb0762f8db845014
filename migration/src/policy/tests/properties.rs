//! What holds of any rounds.

use proptest::prelude::*;

use super::*;

/// Any round, also those that no link and no guest could make.
fn any_round() -> impl Strategy<Value = RoundSummary> {
    let any = 0u64..1 << 40;
    let figures = (any.clone(), any.clone(), any.clone(), any.clone(), any);
    figures.prop_map(|(pages, bytes, saved, nanoseconds, dirty_pages)| RoundSummary {
        pages,
        bytes,
        saved,
        elapsed: Duration::from_nanos(nanoseconds),
        dirty_pages,
        ..RoundSummary::default()
    })
}

proptest! {
    #[test]
    fn a_guest_that_stands_still_is_handed_over_whatever_is_left(round in any_round(), stopped in 0u64..1 << 40) {
        let mut policy = policy(Manner::Cold);
        policy.stopped(Duration::from_nanos(stopped));
        let decision = policy.judge(&round, Moment::default());
        prop_assert_eq!(decision.verdict, Switch);
        prop_assert!(decision.within_budget);
    }

    #[test]
    fn switching_is_never_predicted_over_the_budget(
        rounds in prop::collection::vec(any_round(), 1..30),
        budget in 0u64..10_000,
        round_trip in 0u64..1_000,
    ) {
        let mut policy = policy(live(budget));
        let budget = Duration::from_millis(budget);
        for round in rounds {
            let round_trip = Some(Duration::from_millis(round_trip));
            let decision = policy.judge(&round, Moment { round_trip, ..Moment::default() });
            prop_assert_eq!(decision.within_budget, decision.predicted <= budget);
            prop_assert!(decision.verdict != Switch || decision.within_budget);
            // What is expected fits the budget too, but for a page that is rounded.
            if let Some(blackout) = decision.forecast.blackout {
                prop_assert!(blackout <= budget + Duration::from_micros(100), "{blackout:?} of {budget:?}");
            }
        }
    }

    #[test]
    fn a_round_over_the_budget_that_leaves_what_it_sent_is_never_passed_over_in_silence(
        before in prop::collection::vec(any_round(), 0..10),
        pages in 1u64..1 << 40,
        more in 0u64..1 << 20,
        budget in 0u64..10_000,
    ) {
        let mut policy = policy(live(budget));
        for round in before {
            policy.judge(&round, Moment::default());
        }
        let decision = judged(&mut policy, pages, pages + more);
        prop_assert_eq!(decision.verdict == Infeasible, !decision.within_budget);
        prop_assert_eq!(decision.words.contains("infeasible"), decision.verdict == Infeasible);
    }

    /// The same guest and link for ever: each round leaves a share of what it sent.
    #[test]
    fn every_steady_guest_is_switched_or_called_infeasible(
        pages in 1u64..1 << 30,
        share in 0.0f64..1.5,
        budget in 1u64..5_000,
        most_throttle in 0u32..100,
    ) {
        let terms = Terms { manner: live(budget), timeout: Duration::MAX, bandwidth: None };
        let mut policy = Policy::new(terms, OVERHEAD, most_throttle);
        let mut sent = pages;
        let ended = (0..2_000).any(|_| {
            let dirty = (sent as f64 * share) as u64;
            let decision = judged(&mut policy, sent, dirty);
            sent = dirty.max(1);
            matches!(decision.verdict, Switch | Infeasible)
        });
        prop_assert!(ended);
    }

    #[test]
    fn the_throttle_only_grows_and_never_beyond_what_is_allowed(
        rounds in prop::collection::vec(any_round(), 1..40),
        budget in 0u64..10_000,
        most in 0u32..100,
    ) {
        let terms = Terms { manner: live(budget), ..TERMS };
        let mut policy = Policy::new(terms, OVERHEAD, most);
        let mut before = 0;
        for round in rounds {
            let decision = policy.judge(&round, Moment::default());
            prop_assert!((before..=most).contains(&decision.throttle));
            prop_assert_eq!(decision.verdict == Throttle, decision.throttle > before);
            before = decision.throttle;
        }
    }

    #[test]
    fn more_pages_never_cost_less(left in 0u64..1 << 40, right in 0u64..1 << 40) {
        let policy = policy(BUDGET);
        prop_assert!(policy.after_stop(left.min(right)) <= policy.after_stop(left.max(right)));
    }
}
