//! Everything that goes wrong before GO leaves the guest running at the source, and says why on both sides.

mod fake;
#[path = "setbacks/hostile.rs"]
mod hostile;
#[path = "setbacks/no_memory.rs"]
mod no_memory;

use std::net::TcpStream;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use fake::scene::{
    Agent, Controls, Ends, Scene, arming, arming_and, attempt, destination_parameters, guest, links, live, memory,
    migrate, parameters,
};
use fake::{FakeDestination, FakeSource, LoadFault, StopFault, Tracking, Workload};
use ferry_migration::Compression;
use ferry_migration::destination::{self, DestinationError, DestinationOrder};
use ferry_migration::guest::{GuestEnd, MemoryShape, Region};
use ferry_migration::handover::{GrantRefused, Grants, Traded};
use ferry_migration::source::{self, OnTimeout, SourceError, SourceOutcome, SourceReport};
use ferry_migration::{Link, Liveness};
use ferry_proto::stream::v1::{self, from_destination::Message as Reply, from_source::Message as Said};

/// Less than what a silent peer or a timeout would take, and much more than any of it does.
const AT_ONCE: Duration = Duration::from_secs(4);

/// More writes than the link takes: never converges.
const WILD: Workload = Workload::Uniform {
    frames: 6000,
    rate: 400_000,
};
const BUSY: Workload = Workload::Uniform {
    frames: 4000,
    rate: 20_000,
};

fn never_converging(agent: Agent) -> Scene {
    let mut scene = Scene {
        agent,
        ..Scene::new(guest(Tracking::Log, WILD))
    };
    scene.parameters.manner = live(Duration::from_millis(8));
    scene.parameters.bandwidth = std::num::NonZeroU64::new(40 << 20);
    scene
}

fn is_aborted(ends: &Ends) -> bool {
    let by_user = matches!(ends.cancelled(), SourceError::Aborted(reason) if reason == "by its user");
    by_user
        && matches!(&ends.loaded, Err(DestinationError::AbortedBySource(reason)) if reason == "aborted: by its user")
}

fn abort_at(when: fn(&SourceReport) -> bool) -> Agent {
    arming_and(when, Controls::abort)
}

#[test]
fn an_abort_during_the_first_pass_leaves_the_guest_running() {
    let ends = migrate(never_converging(abort_at(|report| {
        matches!(report, SourceReport::Copying { .. })
    })));
    assert!(is_aborted(&ends));
    assert!(ends.took < AT_ONCE, "{:?}", ends.took);
}

#[test]
fn an_abort_between_rounds_leaves_the_guest_running() {
    let ends = migrate(never_converging(abort_at(|report| {
        matches!(report, SourceReport::Round { .. })
    })));
    assert!(is_aborted(&ends));
}

#[test]
fn an_abort_while_the_grant_is_awaited_leaves_the_guest_running() {
    let agent = abort_at(|report| matches!(report, SourceReport::Converged { .. }));
    let ends = migrate(Scene {
        agent,
        ..Scene::new(guest(Tracking::Log, BUSY))
    });
    assert!(is_aborted(&ends));
}

#[test]
fn an_abort_in_the_blackout_leaves_the_guest_running() {
    let agent = abort_at(|report| matches!(report, SourceReport::Switching { .. }));
    let mut source = guest(Tracking::Log, BUSY);
    source
        .stop_faults
        .push_back(StopFault::Slow(Duration::from_millis(100)));
    let ends = migrate(Scene {
        agent,
        ..Scene::new(source)
    });
    assert!(is_aborted(&ends));
}

#[test]
fn the_attempt_of_an_ended_migration_is_refused_for_ever() {
    let (grants, (orders_in, orders), (reports, _listener)) = (Grants::new(), mpsc::channel(), mpsc::channel());
    let (near, far) = links(1);
    drop(far);
    let outcome = source::run(
        guest(Tracking::Log, BUSY),
        near,
        &parameters(),
        &grants,
        &orders,
        &reports,
    );
    drop(orders_in);
    assert!(matches!(outcome, SourceOutcome::Cancelled { attempt: 1, .. }));
    assert_eq!(grants.offer(attempt(1)), Err(GrantRefused::Stale(attempt(1))));
}

#[test]
fn a_grant_taken_back_calls_the_switchover_off_and_the_next_attempt_succeeds() {
    let mut source = guest(Tracking::Log, BUSY);
    source.stop_faults.push_back(StopFault::Slow(Duration::from_millis(50)));
    let take_back = |controls: &Controls| {
        assert_eq!(controls.grants.trade_for_cancelled(attempt(1)), Traded::Cancelled);
    };
    let agent = arming_and(|report| matches!(report, SourceReport::Switching { .. }), take_back);
    let ends = migrate(Scene {
        agent,
        ..Scene::new(source)
    });
    assert_eq!(ends.arrived().1.attempt, attempt(2));
}

#[test]
fn a_grant_of_another_migration_ends_this_one() {
    let foreign = ferry_migration::handover::Attempt {
        migration: uuid::Uuid::nil(),
        ..attempt(1)
    };
    let agent: Agent = Box::new(move |report, controls| {
        if matches!(report, SourceReport::Converged { .. }) {
            controls.grants.offer(foreign).unwrap();
        }
    });
    let ends = migrate(Scene {
        agent,
        ..Scene::new(guest(Tracking::Log, BUSY))
    });
    assert!(matches!(ends.cancelled(), SourceError::ForeignGrant(found) if *found == foreign));
}

#[test]
fn a_guest_that_never_converges_is_given_up_in_time() {
    let mut scene = never_converging(arming());
    scene.parameters.timeout = Duration::from_millis(1500);
    let ends = migrate(scene);
    let error = ends.cancelled();
    assert!(matches!(error, SourceError::TimedOut { .. }));
    // Whoever reads no report is told why too.
    let words = error.to_string();
    assert!(
        words.starts_with("not done within 1.5s: after round ") && words.contains("the link carries"),
        "{words}"
    );
}

#[test]
fn a_guest_that_never_converges_is_completed_when_its_time_is_up() {
    let mut scene = never_converging(arming());
    scene.parameters.timeout = Duration::from_millis(900);
    scene.parameters.on_timeout = OnTimeout::Pause;
    // Its disks never settle: nothing is waited for that has no end.
    scene.source.settles_after = [u32::MAX].into();
    let ends = migrate(scene);
    let (summary, _) = ends.arrived();
    assert!(ends.took >= Duration::from_millis(900), "{:?}", ends.took);
    let deeds: Vec<_> = summary.decisions.iter().map(|decided| decided.deed).collect();
    assert_eq!(deeds.iter().filter(|&&deed| deed == "pause").count(), 1, "{deeds:?}");
    let last = summary.decisions.last().unwrap();
    assert!(
        last.deed == "switch" && last.words.contains("its time is up"),
        "{last:?}"
    );
}

#[test]
fn a_guest_that_never_converges_is_throttled_until_it_does() {
    for (tracking, whom) in [
        (Tracking::Log, "all vCPUs"),
        (Tracking::Harvest, "the vCPU that writes"),
    ] {
        let mut scene = never_converging(arming());
        scene.source = guest(tracking, WILD);
        scene.parameters.manner = live(Duration::from_millis(100));
        scene.parameters.most_throttle = std::num::NonZeroU32::new(99);
        let ends = migrate(scene);
        let (summary, _) = ends.arrived();
        let throttling = summary
            .decisions
            .iter()
            .find(|decided| decided.deed == "throttle")
            .unwrap();
        assert!(throttling.words.contains(whom), "{throttling:?}");
        assert!(summary.throttle > 0 && summary.throttle <= 99);
    }
}

#[test]
fn a_guest_that_cannot_be_throttled_is_not_said_to_be() {
    let is_told =
        |report: &SourceReport| matches!(report, SourceReport::Round { decided, .. } if decided.deed == "infeasible");
    let mut scene = never_converging(arming_and(is_told, Controls::abort));
    scene.source.is_unbridled = true;
    scene.parameters.manner = live(Duration::from_millis(20));
    scene.parameters.most_throttle = std::num::NonZeroU32::new(99);
    let ends = migrate(scene);
    assert!(is_aborted(&ends));
    let decisions = ends.reports.iter().filter_map(|report| match report {
        SourceReport::Round { decided, .. } => Some(decided),
        _ => None,
    });
    let decided: Vec<_> = decisions.collect();
    let first = decided.iter().find(|decided| decided.deed == "throttle").unwrap();
    assert!(
        first.words.ends_with("none, for they cannot be: no thread can be had"),
        "{first:?}"
    );
    assert!(decided.iter().all(|decided| decided.throttle == 0), "{decided:?}");
}

#[test]
fn an_abort_leaves_nothing_throttled() {
    let is_throttled =
        |report: &SourceReport| matches!(report, SourceReport::Round { decided, .. } if decided.throttle > 0);
    let mut scene = never_converging(arming_and(is_throttled, Controls::abort));
    scene.parameters.manner = live(Duration::from_millis(20));
    scene.parameters.most_throttle = std::num::NonZeroU32::new(50);
    let notes = scene.source.notes.clone();
    assert!(is_aborted(&migrate(scene)));
    assert_eq!(notes.throttle.load(std::sync::atomic::Ordering::Relaxed), 0);
}

#[test]
fn an_abort_after_the_time_is_up_leaves_the_guest_running() {
    let is_paused = |report: &SourceReport| matches!(report, SourceReport::Decided(decided) if decided.deed == "pause");
    let mut scene = never_converging(arming_and(is_paused, Controls::abort));
    scene.parameters.timeout = Duration::from_millis(900);
    scene.parameters.on_timeout = OnTimeout::Pause;
    assert!(is_aborted(&migrate(scene)));
}

#[test]
fn a_guest_that_powers_off_ends_the_migration() {
    let source = guest(Tracking::Log, BUSY);
    let notes = source.notes.clone();
    let power_off = move |_: &Controls| *notes.end.lock().unwrap() = Some(GuestEnd::PoweredOff);
    let agent = arming_and(|report| matches!(report, SourceReport::Converged { .. }), power_off);
    let ends = migrate(Scene {
        agent,
        ..Scene::new(source)
    });
    assert!(matches!(
        ends.outcome,
        SourceOutcome::GuestEnded {
            end: GuestEnd::PoweredOff,
            ..
        }
    ));
    assert!(matches!(&ends.loaded, Err(DestinationError::AbortedBySource(reason)) if reason == "guest stopped"));
}

#[test]
fn a_guest_that_powers_off_while_being_stopped_is_not_handed_over() {
    let mut source = guest(Tracking::Log, BUSY);
    source.stop_faults.push_back(StopFault::PowersOff);
    let ends = migrate(Scene::new(source));
    assert!(matches!(
        ends.outcome,
        SourceOutcome::GuestEnded {
            end: GuestEnd::PoweredOff,
            attempt: 1,
            ..
        }
    ));
    assert!(ends.loaded.is_err());
}

#[track_caller]
fn survives_cut(when: fn(&SourceReport) -> bool, cut: fn(&Controls), source_fault: StopFault) {
    let mut source = guest(Tracking::Log, BUSY);
    source.stop_faults.push_back(source_fault);
    let mut scene = Scene {
        agent: arming_and(when, cut),
        ..Scene::new(source)
    };
    scene.parameters.bandwidth = std::num::NonZeroU64::new(200 << 20);
    // Sends are what is slow, of pages as they are.
    scene.parameters.compression = Compression::Off;
    let ends = migrate(scene);
    let error = ends.cancelled();
    assert!(
        matches!(
            error,
            SourceError::StreamLost { .. } | SourceError::ControlLost(_) | SourceError::Refused(_)
        ),
        "{error}"
    );
    assert!(ends.took < AT_ONCE, "{:?}", ends.took);
}

#[test]
fn a_page_stream_lost_in_the_first_pass_leaves_the_guest_running() {
    let when = |report: &SourceReport| matches!(report, SourceReport::Copying { .. });
    survives_cut(when, |controls| controls.cut_page_stream(1), StopFault::None);
}

#[test]
fn the_control_stream_lost_in_the_first_pass_leaves_the_guest_running() {
    survives_cut(
        |report| matches!(report, SourceReport::Copying { .. }),
        Controls::cut_control,
        StopFault::None,
    );
}

#[test]
fn a_page_stream_lost_between_rounds_leaves_the_guest_running() {
    let when = |report: &SourceReport| matches!(report, SourceReport::Round { .. });
    survives_cut(when, |controls| controls.cut_page_stream(0), StopFault::None);
}

#[test]
fn page_streams_lost_in_the_blackout_leave_the_guest_running() {
    let when = |report: &SourceReport| matches!(report, SourceReport::Switching { .. });
    let cut = |controls: &Controls| {
        controls.cut_page_stream(0);
        controls.cut_page_stream(1);
    };
    survives_cut(when, cut, StopFault::SlowSends(Duration::from_millis(50)));
}

#[test]
fn the_control_stream_lost_in_the_blackout_leaves_the_guest_running() {
    let when = |report: &SourceReport| matches!(report, SourceReport::Switching { .. });
    survives_cut(when, Controls::cut_control, StopFault::Slow(Duration::from_millis(50)));
}

#[test]
fn an_abort_at_the_destination_is_told_to_the_source() {
    let give_up = |controls: &Controls| {
        controls
            .destination_orders
            .send(DestinationOrder::Abort {
                reason: "host is shutting down".into(),
            })
            .unwrap();
    };
    let agent = arming_and(|report| matches!(report, SourceReport::Round { .. }), give_up);
    let ends = migrate(never_converging(agent));
    assert!(
        matches!(ends.cancelled(), SourceError::Refused(reasons) if reasons == &["aborted: host is shutting down"])
    );
    assert!(matches!(&ends.loaded, Err(DestinationError::Aborted(_))));
}

#[test]
fn a_missing_cpu_feature_is_refused_by_name_before_any_page() {
    let mut source = guest(Tracking::Log, BUSY);
    source.profile = "cpu: sse2, avx2".to_owned();
    let ends = migrate(Scene::new(source));
    assert!(
        matches!(ends.cancelled(), SourceError::Incompatible(reasons) if reasons == &["cpu feature avx2 is missing"])
    );
    assert!(matches!(ends.loaded, Err(DestinationError::Incompatible(_))));
}

#[test]
fn another_memory_shape_is_refused_by_name() {
    let shape = MemoryShape::new(vec![Region {
        start_frame: 0,
        frames: 64,
    }])
    .unwrap();
    let destination = FakeDestination::new(fake::memory::FakeMemory::new(shape, 16));
    let ends = migrate(Scene {
        destination,
        ..Scene::new(guest(Tracking::Log, BUSY))
    });
    let SourceError::Incompatible(reasons) = ends.cancelled() else {
        panic!("accepted")
    };
    assert!(reasons[0].starts_with("memory shape: "), "{reasons:?}");
}

#[test]
fn a_state_that_does_not_load_is_refused_after_go() {
    let mut scene = Scene::new(guest(Tracking::Log, BUSY));
    scene.destination.fault = LoadFault::Restore;
    let ends = migrate(scene);
    assert!(matches!(ends.outcome, SourceOutcome::GoSent(_)));
    assert!(matches!(ends.loaded, Err(DestinationError::Restore(_))));
}

#[test]
fn a_machine_that_loads_as_another_one_is_refused_by_its_digest() {
    let mut scene = Scene::new(guest(Tracking::Log, BUSY));
    scene.destination.fault = LoadFault::OtherState;
    let ends = migrate(scene);
    assert!(
        matches!(&ends.loaded, Err(DestinationError::ManifestRefused(reasons)) if reasons[0].starts_with("the state digests"))
    );
}

#[test]
fn a_damaged_page_is_refused_by_the_digest_of_memory() {
    let mut scene = Scene::new(guest(Tracking::Log, Workload::Idle));
    let mut memory = memory();
    memory.damage = Some(5000);
    scene.destination = FakeDestination::new(memory);
    scene.parameters.verify = false;
    let ends = migrate(scene);
    assert!(matches!(ends.outcome, SourceOutcome::GoSent(_)));
    assert!(
        matches!(&ends.loaded, Err(DestinationError::ManifestRefused(reasons)) if reasons[0].starts_with("memory digests"))
    );
}

fn impatient() -> Liveness {
    Liveness {
        heartbeat: Duration::from_millis(50),
        silence: Duration::from_millis(250),
    }
}

/// Long enough that who says something now and then is not found silent on a busy host.
const LONG_SILENCE: Duration = Duration::from_secs(1);

fn patient() -> Liveness {
    Liveness {
        silence: LONG_SILENCE,
        ..impatient()
    }
}

/// A busy guest is sent over this link, by an agent that orders nothing.
fn sent_with(near: Link, liveness: Liveness) -> SourceOutcome<FakeSource> {
    let (grants, (_orders_in, orders), (reports, _listener)) = (Grants::new(), mpsc::channel(), mpsc::channel());
    let parameters = source::SourceParameters {
        liveness,
        ..parameters()
    };
    source::run(
        guest(Tracking::Log, BUSY),
        near,
        &parameters,
        &grants,
        &orders,
        &reports,
    )
}

#[test]
fn a_silent_destination_is_noticed_and_the_guest_runs_on() {
    let (near, far) = links(2);
    let outcome = sent_with(near, impatient());
    assert!(matches!(
        outcome,
        SourceOutcome::Cancelled {
            error: SourceError::Silent(_),
            ..
        }
    ));
    drop(far);
}

#[test]
fn a_page_stream_that_takes_nothing_is_given_up_while_the_others_are_heard() {
    let (near, far) = links(2);
    let liveness = patient();
    let outcome = thread::scope(|scope| {
        scope.spawn(|| {
            answer_up_to_pages(&far.control);
            // Lives as far as the control stream shows.
            while let Some(said) = fake::raw::hear::<v1::FromSource>(&far.control) {
                if let Some(Said::Ping(ping)) = said.message {
                    let pong = Reply::Pong(v1::Pong { token: ping.token });
                    let _ = fake::raw::try_to_say(&far.control, &v1::FromDestination { message: Some(pong) });
                }
            }
        });
        let healthy = &far.pages[1];
        scope.spawn(|| std::io::copy(&mut &*healthy, &mut std::io::sink()));
        sent_with(near, liveness)
    });
    let SourceOutcome::Cancelled { error, .. } = outcome else {
        panic!("it was not given up");
    };
    let is_timed_out = |cause: &std::io::Error| cause.kind() == std::io::ErrorKind::TimedOut;
    assert!(
        matches!(&error, SourceError::StreamLost { stream: 0, cause } if is_timed_out(cause)),
        "{error:?}"
    );
}

#[test]
fn a_silent_source_is_noticed() {
    let (near, far) = links(2);
    let ((_orders_in, orders), (reports, _listener)) = (mpsc::channel(), mpsc::channel());
    let parameters = destination::DestinationParameters {
        liveness: impatient(),
        ..destination_parameters()
    };
    let loaded = destination::run(FakeDestination::new(memory()), far, &parameters, &orders, &reports);
    assert!(matches!(loaded, Err(DestinationError::Silent(_))));
    drop(near);
}

#[test]
fn heartbeats_keep_a_migration_alive_that_has_nothing_to_say() {
    let agent = arming_and(
        |report| matches!(report, SourceReport::Converged { .. }),
        |controls| {
            thread::sleep(2 * LONG_SILENCE);
            controls.grant(1);
        },
    );
    let mut scene = Scene {
        agent,
        ..Scene::new(guest(Tracking::Log, Workload::Idle))
    };
    scene.parameters.liveness = patient();
    scene.destination_parameters.liveness = patient();
    migrate(scene).arrived();
}

#[test]
fn an_abort_takes_effect_while_the_destination_reads_nothing() {
    let (near, far) = links(2);
    let (grants, (orders_in, orders), (reports, listener)) = (Grants::new(), mpsc::channel(), mpsc::channel());
    let stuck = thread::spawn(move || {
        answer_up_to_pages(&far.control);
        listener
            .iter()
            .find(|report| matches!(report, SourceReport::Copying { .. }))
            .unwrap();
        thread::sleep(Duration::from_millis(300));
        let ordered = Instant::now();
        orders_in
            .send(source::SourceOrder::Abort {
                reason: "by its user".into(),
            })
            .unwrap();
        (ordered, far)
    });
    let outcome = source::run(
        guest(Tracking::Log, WILD),
        near,
        &parameters(),
        &grants,
        &orders,
        &reports,
    );
    let ended = Instant::now();
    let (ordered, _far) = stuck.join().unwrap();
    assert!(matches!(
        outcome,
        SourceOutcome::Cancelled {
            error: SourceError::Aborted(_),
            ..
        }
    ));
    assert!(ended - ordered < AT_ONCE, "{:?}", ended - ordered);
}

/// Plays the destination up to the first page.
fn answer_up_to_pages(control: &TcpStream) {
    let reply = |message| fake::raw::say(control, &v1::FromDestination { message: Some(message) });
    loop {
        match fake::raw::hear::<v1::FromSource>(control).unwrap().message {
            Some(Said::Hello(_)) => reply(Reply::HelloReply(v1::HelloReply {
                protocol: ferry_migration::PROTOCOL,
                refusals: Vec::new(),
                ..v1::HelloReply::default()
            })),
            Some(Said::Population(part)) if part.last => {
                return reply(Reply::PopulationReady(v1::PopulationReady {}));
            }
            _ => {}
        }
    }
}
