//! Sessions of late pages that are lost, capped, or given up.

use super::*;

#[test]
fn a_session_that_is_lost_is_taken_up_by_the_next_one() {
    let ends = migrate(late(Lateness::AtOnce, Workload::Idle));
    let late = Late::slowly(ends, Duration::from_millis(20));
    late.touch([5000].into_iter());
    // Both ends have it anew, whatever was under way.
    for _ in 0..2 {
        late.attach();
        late.touch([300 + late.pages.missing() % 1000].into_iter());
    }
    late.source.slow_sends(Duration::ZERO);
    let reports: Vec<_> = late.served.try_iter().collect();
    let outcome = late.comes();
    assert_eq!(outcome.pages, 6300, "{reports:?}");
}

#[test]
fn a_connection_for_late_pages_that_was_lost_before_is_noticed_before_the_guest_is_asked_for() {
    let mut scene = late(Lateness::WhenItPays, BUSY);
    // The first round takes a second.
    scene.parameters.bandwidth = NonZeroU64::new(24 << 20);
    scene.agent = arming_and(
        |report| matches!(report, SourceReport::Copying { .. }),
        |controls| controls.cut_late_stream(3),
    );
    let ends = migrate(scene);
    assert!(
        matches!(ends.cancelled(), SourceError::LateLinkLost(_)),
        "{}",
        ends.cancelled()
    );
    let asked = |report: &SourceReport| matches!(report, SourceReport::Converged { .. });
    assert!(!ends.reports.iter().any(asked), "{:?}", ends.reports);
}

#[test]
fn a_connection_for_late_pages_that_is_lost_at_the_last_moment_keeps_the_guest_here() {
    let mut scene = late(Lateness::AtOnce, Workload::Idle);
    scene.agent = Box::new(|report, controls| {
        if let SourceReport::Converged { attempt, .. } = report {
            controls.cut_late_stream(0);
            controls.grant(*attempt);
        }
    });
    let ends = migrate(scene);
    assert!(
        matches!(ends.cancelled(), SourceError::LateLinkLost(_)),
        "{}",
        ends.cancelled()
    );
    let SourceOutcome::Cancelled { guest, .. } = &ends.outcome else {
        panic!("GO was sent")
    };
    assert!(!guest.is_stopped());
}

/// A guest of which pages may come late, and of whose late connections one is cut while it is copied. It hardly writes, and goes whole.
fn goes_whole_with_one_cut(window: Duration) -> Ends {
    let mut scene = late(Lateness::WhenItPays, Workload::Idle);
    // The first round takes a second: the cut comes before anybody is asked.
    scene.parameters.bandwidth = NonZeroU64::new(24 << 20);
    scene.parameters.resume_window = window;
    scene.destination_parameters.resume_window = window;
    let mut arm = arming_and(
        |report| matches!(report, SourceReport::Copying { .. }),
        |controls| controls.cut_late_stream(3),
    );
    scene.agent = Box::new(move |report, controls| {
        if matches!(report, SourceReport::LinkLost { .. }) {
            controls.reconnect();
        }
        arm(report, controls);
    });
    let ends = migrate(scene);
    ends.arrived();
    ends
}

fn times_lost(ends: &Ends) -> usize {
    let lost = |report: &&SourceReport| matches!(report, SourceReport::LinkLost { .. });
    ends.reports.iter().filter(lost).count()
}

#[test]
fn a_connection_for_late_pages_that_is_lost_keeps_no_guest_here_that_goes_whole() {
    assert_eq!(times_lost(&goes_whole_with_one_cut(Duration::ZERO)), 0);
}

#[test]
fn a_connection_for_late_pages_that_is_lost_is_made_again_before_the_switchover_is_asked_for() {
    let ends = goes_whole_with_one_cut(PATIENCE);
    assert_eq!(times_lost(&ends), 1);
    let first = |wanted: fn(&SourceReport) -> bool| ends.reports.iter().position(wanted);
    let lost = first(|report| matches!(report, SourceReport::LinkLost { .. }));
    let asked = first(|report| matches!(report, SourceReport::Converged { .. }));
    assert!(lost < asked, "{:?}", ends.reports);
}

#[test]
fn a_cap_is_lifted_while_pages_come_late() {
    let late = Late::of(migrate(hardly_any_bandwidth()));
    late.orders.send(ServeOrder::Bandwidth(None)).unwrap();
    late.comes();
}

#[test]
fn a_cap_that_was_lifted_is_gone_over_the_next_link_too() {
    let late = Late::of(migrate(hardly_any_bandwidth()));
    // Whatever goes on over the first link until then is too slow to come to an end.
    late.source.slow_sends(Duration::from_millis(20));
    late.orders.send(ServeOrder::Bandwidth(None)).unwrap();
    late.attach();
    late.source.slow_sends(Duration::ZERO);
    late.comes();
}

#[test]
fn a_cap_is_lifted_while_there_is_no_link() {
    let late = Late::of(migrate(hardly_any_bandwidth()));
    let ((near, _), (_, far)) = (links(LATE_STREAMS), links(LATE_STREAMS));
    late.orders.send(ServeOrder::Link(near)).unwrap();
    late.pages.attach(far);
    late.loses_its_link();
    late.orders.send(ServeOrder::Bandwidth(None)).unwrap();
    late.attach();
    late.comes();
}

#[test]
fn whoever_hears_of_touched_pages_may_fail_while_there_is_no_link_and_that_is_told() {
    let late = Late::of(migrate(hardly_any_bandwidth()));
    let ((near, _), (_, far)) = (links(LATE_STREAMS), links(LATE_STREAMS));
    late.orders.send(ServeOrder::Link(near)).unwrap();
    late.pages.attach(far);
    let told = || {
        late.ends
            .late_reports
            .recv_timeout(PATIENCE)
            .expect("nobody says anything")
    };
    while !matches!(told(), DestinationReport::Late(LateReport::LinkLost { .. })) {}

    late.destination.become_deaf();

    let reason = late.fails();
    assert!(reason.contains("the descriptor is gone"), "{reason}");
}

#[test]
fn a_cut_link_is_told_at_both_ends_and_who_waits_waits_on() {
    let ends = migrate(late(Lateness::AtOnce, Workload::Idle));
    let late = Late::slowly(ends, Duration::from_millis(20));
    let waits = thread::spawn({
        let destination = late.destination.clone();
        move || destination.touch(4321)
    });
    // A link that is dead from the beginning takes the place of the one that lives.
    let ((near, _), (_, far)) = (links(LATE_STREAMS), links(LATE_STREAMS));
    late.orders.send(ServeOrder::Link(near)).unwrap();
    late.pages.attach(far);
    late.loses_its_link();
    late.attach();
    late.source.slow_sends(Duration::ZERO);
    waits.join().unwrap();
    late.comes();
}

#[test]
fn a_session_ends_though_more_of_its_streams_break_than_are_heard() {
    let ends = migrate(late(Lateness::AtOnce, Workload::Idle));
    let late = Late::slowly(ends, Duration::from_millis(20));
    let ((near, _), (_, far)) = (links(20), links(20));
    late.orders.send(ServeOrder::Link(near)).unwrap();
    late.pages.attach(far);
    late.loses_its_link();
    late.attach();
    late.source.slow_sends(Duration::ZERO);
    late.comes();
}

#[test]
fn a_source_that_nobody_wants_stops_serving() {
    let Late {
        orders, serving, pages, ..
    } = Late::of(migrate(hardly_any_bandwidth()));
    drop(orders);
    assert_eq!(serving.join().unwrap(), Served::Stopped);
    assert!(pages.missing() > 0);
}

#[test]
fn a_destination_that_has_no_memory_left_for_late_pages_says_so_and_the_source_keeps_them() {
    let late = Late::of(migrate(hardly_any_bandwidth()));
    late.destination.fill_up();
    late.destination.touch_and_go_on(5900);
    let reason = late.fails();
    assert!(reason.contains("out of memory"), "{reason}");
    assert!(late.destination.is_absent(5900) && late.pages.outcome().is_none());
    // It is the agents' to say what comes of the guest; until then its pages are where they were, and so is who serves them.
    late.loses_its_link();
    assert!(!late.serving.is_finished());
    drop(late.orders);
    assert_eq!(late.serving.join().unwrap(), Served::Stopped);
}
