//! Guests that arrive: whatever they do meanwhile, both memories are equal when GO was sent.

mod fake;

use std::num::NonZeroU64;
use std::sync::atomic::Ordering;
use std::time::Duration;

use fake::memory::FakeMemory;
use fake::scene::{EPOCH, FRAMES, Scene, attempt, guest, live, memory, migrate, run, shape};
use fake::{FakeSource, StopFault, Tracking, Workload};
use ferry_migration::guest::{GuestWas, SourceGuest};
use ferry_migration::handover::{Epoch, Permit};
use ferry_migration::source::{SourceOutcome, SourceReport};
use uuid::Uuid;

const SPAN: u64 = 4000;

#[track_caller]
fn arrives(tracking: Tracking, workload: Workload, streams: usize) {
    let ends = migrate(Scene {
        streams,
        ..Scene::new(guest(tracking, workload))
    });
    let (summary, loaded) = ends.arrived();
    assert_eq!(summary.bytes_sent, loaded.summary.totals.bytes);
    assert_eq!(summary.zero_pages, loaded.summary.totals.zero_pages);
    assert_eq!(
        summary.rounds.iter().map(|round| round.bytes).sum::<u64>(),
        summary.bytes_sent
    );
    let verified = summary.verified.unwrap();
    assert!(verified.pages >= 3000, "{verified:?}");
    assert_eq!(verified.ranges_sent_again, 0);
}

#[test]
fn an_idle_guest_arrives_over_one_stream() {
    arrives(Tracking::Log, Workload::Idle, 1);
}

#[test]
fn an_idle_guest_arrives_over_four_streams() {
    arrives(Tracking::Log, Workload::Idle, 4);
}

#[test]
fn uniform_writes_arrive() {
    arrives(
        Tracking::Log,
        Workload::Uniform {
            frames: SPAN,
            rate: 20_000,
        },
        2,
    );
}

#[test]
fn uniform_writes_arrive_with_harvested_tracking() {
    arrives(
        Tracking::Harvest,
        Workload::Uniform {
            frames: SPAN,
            rate: 20_000,
        },
        2,
    );
}

#[test]
fn a_sweep_arrives() {
    arrives(
        Tracking::Log,
        Workload::Sweep {
            frames: SPAN,
            rate: 50_000,
        },
        3,
    );
}

#[test]
fn hot_and_cold_pages_arrive() {
    arrives(
        Tracking::Harvest,
        Workload::HotCold {
            frames: SPAN,
            rate: 30_000,
        },
        1,
    );
}

#[test]
fn pages_that_become_zero_arrive() {
    arrives(
        Tracking::Log,
        Workload::ZeroFlip {
            frames: SPAN,
            rate: 30_000,
        },
        2,
    );
}

#[test]
fn pages_that_become_zero_arrive_with_harvested_tracking() {
    arrives(
        Tracking::Harvest,
        Workload::ZeroFlip {
            frames: SPAN,
            rate: 30_000,
        },
        2,
    );
}

#[test]
fn a_guest_arrives_without_digests() {
    let mut scene = Scene::new(guest(
        Tracking::Log,
        Workload::Uniform {
            frames: SPAN,
            rate: 20_000,
        },
    ));
    scene.parameters.digests = false;
    scene.parameters.verify = false;
    let ends = migrate(scene);
    let (summary, _) = ends.arrived();
    let blackout = summary.blackout.unwrap();
    assert_eq!(blackout.verify, Duration::ZERO);
    assert_eq!(summary.verified, None);
    assert!(blackout.go_sent - blackout.pause_began <= Duration::from_millis(300));
}

#[test]
fn pages_never_touched_are_neither_sent_nor_told() {
    let ends = migrate(Scene::new(FakeSource::new(
        memory(),
        Tracking::Log,
        &[run(100, 10)],
        Workload::Idle,
    )));
    let (summary, _) = ends.arrived();
    assert_eq!(summary.rounds[0].pages, 10);
    assert_eq!(summary.zero_pages, 0);
    assert!(summary.bytes_sent < 11 * 4096 + 1000, "{} bytes", summary.bytes_sent);
}

#[test]
fn zero_pages_are_told_and_not_sent_and_nothing_is_written_for_them() {
    let source = FakeSource::new(memory(), Tracking::Log, &[], Workload::Idle);
    source.populate_zero(run(0, 5000));
    let ends = migrate(Scene::new(source));
    let (summary, loaded) = ends.arrived();
    assert_eq!(summary.zero_pages, 5000);
    assert!(summary.bytes_sent < 5000, "{} bytes", summary.bytes_sent);
    assert_eq!(loaded.restored.memory.zeroed.load(Ordering::Relaxed), 0);
}

#[test]
fn a_guest_without_contents_arrives() {
    let ends = migrate(Scene::new(FakeSource::new(
        memory(),
        Tracking::Log,
        &[],
        Workload::Idle,
    )));
    let (summary, _) = ends.arrived();
    assert_eq!(summary.bytes_sent, 0);
}

#[test]
fn huge_pages_are_asked_for_where_they_are_wanted_and_backed() {
    let mut source = FakeSource::new(memory(), Tracking::Log, &[run(0, 1000), run(2048, 100)], Workload::Idle);
    source.huge = vec![run(4096, 512)];
    let ends = migrate(Scene::new(source));
    let (_, loaded) = ends.arrived();
    assert_eq!(
        *loaded.restored.memory.advised.lock().unwrap(),
        [run(0, 1024), run(4096, 512)]
    );
    // Of the block at 4096 the source holds nothing: no data comes for it.
    assert_eq!(loaded.restored.memory.populated.load(Ordering::Relaxed), 1024);
}

#[test]
fn a_guest_paused_by_its_user_arrives_paused() {
    let mut source = guest(
        Tracking::Log,
        Workload::Uniform {
            frames: SPAN,
            rate: 1000,
        },
    );
    source.pause();
    let mut scene = Scene::new(source);
    scene.parameters.guest_was = GuestWas::PausedByUser;
    let ends = migrate(scene);
    assert_eq!(ends.arrived().1.guest_was, GuestWas::PausedByUser);
}

#[test]
fn a_bandwidth_cap_holds_while_the_guest_runs() {
    let mut scene = Scene::new(guest(Tracking::Log, Workload::Idle));
    scene.parameters.bandwidth = NonZeroU64::new(64 << 20);
    let ends = migrate(scene);
    let (summary, _) = ends.arrived();
    let first = summary.rounds[0];
    let rate = first.bytes as f64 / first.elapsed.as_secs_f64();
    // Two frames of 2 MiB are in credit when the round ends.
    assert!(rate < 1.3 * 64e6 * 1.05, "{rate} bytes a second");
}

/// Switches over with this fault at the first attempt; the second one succeeds.
#[track_caller]
fn arrives_at_the_second_attempt(tracking: Tracking, fault: StopFault) -> Vec<SourceReport> {
    let mut source = guest(
        tracking,
        Workload::Uniform {
            frames: SPAN,
            rate: 20_000,
        },
    );
    source.stop_faults.push_back(fault);
    let mut scene = Scene::new(source);
    scene.parameters.manner = live(Duration::from_millis(60));
    let ends = migrate(scene);
    let (_, loaded) = ends.arrived();
    assert!(loaded.attempt.attempt > 1);
    let disarmed = |report: &&SourceReport| matches!(report, SourceReport::Disarmed { .. });
    assert!(ends.reports.iter().any(|report| disarmed(&report)));
    ends.reports
}

#[test]
fn a_slow_stop_is_called_off_and_tried_again() {
    arrives_at_the_second_attempt(Tracking::Log, StopFault::Slow(Duration::from_millis(80)));
}

#[test]
fn last_pages_over_the_budget_are_called_off_and_none_is_lost() {
    arrives_at_the_second_attempt(Tracking::Log, StopFault::SlowSends(Duration::from_millis(100)));
}

#[test]
fn last_pages_over_the_budget_lose_none_with_harvested_tracking() {
    arrives_at_the_second_attempt(Tracking::Harvest, StopFault::SlowSends(Duration::from_millis(100)));
}

#[test]
fn devices_that_do_not_drain_call_the_switchover_off() {
    arrives_at_the_second_attempt(Tracking::Log, StopFault::Fails);
}

#[test]
fn a_parked_guest_comes_back_only_under_a_higher_epoch() {
    let ends = migrate(Scene::new(guest(Tracking::Log, Workload::Idle)));
    let SourceOutcome::GoSent(parked) = ends.outcome else {
        panic!("GO was not sent")
    };
    let permit = Permit {
        instance: attempt(1).instance,
        epoch: EPOCH,
        paused: false,
    };
    let (parked, _) = parked.resume(permit).err().unwrap();
    let (parked, _) = parked
        .resume(Permit {
            instance: Uuid::nil(),
            epoch: Epoch(99),
            ..permit
        })
        .err()
        .unwrap();
    let guest = parked
        .resume(Permit {
            epoch: EPOCH.next(),
            ..permit
        })
        .ok()
        .unwrap();
    assert!(guest.is_stopped());
    assert_eq!(
        guest.memory().equals(&FakeMemory::new(shape(), 16)),
        Err("frame 0x3 differs".to_owned())
    );
}

#[test]
fn rounds_are_reported_with_their_decisions() {
    let ends = migrate(Scene::new(guest(
        Tracking::Log,
        Workload::Uniform {
            frames: FRAMES / 4,
            rate: 5000,
        },
    )));
    let rounds = ends.reports.iter().filter_map(|report| match report {
        SourceReport::Round { round, decided, .. } => Some((round.number, !decided.words.is_empty())),
        _ => None,
    });
    assert_eq!(rounds.take(1).collect::<Vec<_>>(), [(1, true)]);
}
