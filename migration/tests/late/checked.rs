//! Late pages that are checked when they come, and what was rounds' before GO.

use super::*;

#[test]
fn what_comes_late_is_checked_when_it_comes() {
    let outcome = Late::of(migrate(verified(Lateness::AtOnce, Workload::Idle))).comes();
    assert_eq!((outcome.verified, outcome.sent_again), (Some(6300), 0));
}

#[test]
fn without_verify_nothing_is_checked() {
    let outcome = Late::of(migrate(late(Lateness::AtOnce, Workload::Idle))).comes();
    assert_eq!((outcome.verified, outcome.sent_again), (None, 0));
}

#[test]
fn what_rounds_brought_is_compared_before_go_and_the_rest_when_it_comes() {
    let mut scene = verified(Lateness::WhenItPays, BUSY);
    scene.parameters.manner = live(Duration::from_micros(500));
    let late = Late::of(migrate(scene));
    let SourceOutcome::GoSent(parked) = &late.ends.outcome else {
        panic!("not sent")
    };
    let (compared, missing) = (parked.summary().verified.unwrap(), late.pages.missing());
    assert_eq!(compared.ranges_sent_again, 0);
    // What the guest wrote again was sent before, and is left out of the comparison all the same. Three pages are only its own writing's.
    let all = compared.pages + missing;
    assert!((6300..=6303).contains(&all), "{compared:?}, {missing} missing");
    assert_eq!(late.comes().verified, Some(missing));
}

#[test]
fn a_page_that_was_damaged_in_rounds_is_sent_again_though_others_come_late() {
    // The guest writes other pages of the same range.
    let work = Workload::Uniform {
        frames: 4900,
        rate: 200_000,
    };
    let mut scene = verified(Lateness::WhenItPays, work);
    scene.parameters.manner = live(Duration::from_millis(20));
    scene.parameters.bandwidth = NonZeroU64::new(64 << 20);
    scene.source.memory().damage_sends(5000, 1);
    let late = Late::of(migrate(scene));
    let SourceOutcome::GoSent(parked) = &late.ends.outcome else {
        panic!("not sent")
    };
    assert_eq!(parked.summary().verified.unwrap().ranges_sent_again, 1);
    late.comes();
}

#[test]
fn a_late_page_that_is_damaged_on_its_way_is_asked_for_again() {
    let ends = migrate(verified(Lateness::AtOnce, Workload::Idle));
    let late = Late::slowly(ends, Duration::from_millis(2));
    late.source.damage_sends(5900, 3);
    let outcome = late.comes();
    assert_eq!(outcome.verified, Some(6300));
    assert!((3..=3 * 256).contains(&outcome.sent_again), "{outcome:?}");
}

#[test]
fn who_waits_for_a_page_that_is_damaged_on_its_way_sees_it_as_it_was_sent() {
    let ends = migrate(verified(Lateness::AtOnce, Workload::Idle));
    let late = Late::slowly(ends, Duration::from_millis(20));
    late.source.damage_sends(5900, 2);
    late.touch([5900].into_iter());
    let page = run(5900, 1);
    assert_eq!(
        late.destination.digest(page).unwrap(),
        late.source.digest(page).unwrap()
    );
    late.source.slow_sends(Duration::ZERO);
    let outcome = late.comes();
    assert!(outcome.sent_again >= 2 && outcome.latency.count() == 1, "{outcome:?}");
}

#[test]
fn a_page_that_is_damaged_each_time_is_never_seen_and_ends_the_wait_for_it() {
    let ends = migrate(verified(Lateness::AtOnce, Workload::Idle));
    let late = Late::slowly(ends, Duration::from_millis(20));
    late.source.damage_sends(5900, u64::MAX);
    late.source.slow_sends(Duration::ZERO);
    let reason = late.fails();
    assert!(reason.contains("damaged on its way 8 times"), "{reason}");
    assert!(late.pages.missing() > 0 && late.pages.outcome().is_none());
    assert!(late.destination.is_absent(5900));
    drop(late.orders);
    assert_eq!(late.serving.join().unwrap(), Served::Stopped);
}
