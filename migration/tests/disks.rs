//! A guest's disks around the switchover: settled before it, let go right before GO, and kept on every other way out.

mod fake;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use fake::scene::{Controls, HIGH, Scene, arming, arming_and, attempt, guest, memory, migrate, run};
use fake::{FakeDestination, FakeSource, StopFault, Tracking, Workload};
use ferry_migration::source::{SourceOutcome, SourceReport};

#[test]
fn disks_are_let_go_between_the_trade_and_go() {
    let mut scene = Scene::new(guest(Tracking::Log, Workload::Idle));
    let (grants, traded) = (Arc::clone(&scene.grants), Arc::new(AtomicBool::new(false)));
    let seen = Arc::clone(&traded);
    scene.source.on_release = Some(Box::new(move || {
        seen.store(grants.go_sent() == Some(attempt(1)), Ordering::Relaxed);
        // Long enough that GO would be there if it had been written before.
        std::thread::sleep(Duration::from_millis(50));
    }));

    let ends = migrate(scene);

    let (_, loaded) = ends.arrived();
    let SourceOutcome::GoSent(parked) = &ends.outcome else {
        panic!("not sent")
    };
    let released = parked.guest().notes.released.lock().unwrap().clone();
    assert!(traded.load(Ordering::Relaxed), "let go before the trade");
    assert_eq!(released.len(), 1);
    assert!(loaded.timings.go_received >= released[0], "let go after GO");
}

#[test]
fn disks_of_a_guest_that_stays_are_kept() {
    let agent = arming_and(
        |report| matches!(report, SourceReport::Switching { .. }),
        Controls::abort,
    );
    let mut source = guest(Tracking::Log, Workload::Idle);
    source
        .stop_faults
        .push_back(StopFault::Slow(Duration::from_millis(100)));

    let ends = migrate(Scene {
        agent,
        ..Scene::new(source)
    });

    ends.cancelled();
    let SourceOutcome::Cancelled { guest, .. } = &ends.outcome else {
        panic!("not cancelled")
    };
    assert!(guest.notes.released.lock().unwrap().is_empty());
}

#[test]
fn disks_are_kept_while_a_switchover_is_called_off() {
    let mut source = guest(Tracking::Log, Workload::Idle);
    source.stop_faults.push_back(StopFault::Fails);
    let notes = Arc::clone(&source.notes);

    let ends = migrate(Scene::new(source));

    assert_eq!(ends.arrived().1.attempt, attempt(2));
    assert_eq!(notes.released.lock().unwrap().len(), 1);
}

#[test]
fn a_switchover_is_asked_for_when_the_disks_are_settled() {
    let settling = 20;
    let mut source = guest(Tracking::Log, Workload::Idle);
    source.settles_after.push_back(settling);
    let (began, asked) = (Instant::now(), Arc::new(Mutex::new(None)));
    let seen = Arc::clone(&asked);
    let mut arm = arming();
    let agent = Box::new(move |report: &SourceReport, controls: &Controls| {
        if matches!(report, SourceReport::Converged { .. }) {
            *seen.lock().unwrap() = Some(began.elapsed());
        }
        arm(report, controls);
    });

    let ends = migrate(Scene {
        agent,
        ..Scene::new(source)
    });

    ends.arrived();
    // They are looked at once a round, and a small round is 5 ms apart from the next.
    assert!(*asked.lock().unwrap() >= Some(settling * Duration::from_millis(5)));
}

/// A guest whose second region is a disk that is copied.
fn with_a_copied_disk() -> Scene {
    let with_disk = || {
        let mut memory = memory();
        memory.has_disk = true;
        memory
    };
    let populated = [run(3, 6000), run(HIGH + 500, 300)];
    let workload = Workload::Uniform {
        frames: 4000,
        rate: 20_000,
    };
    Scene {
        destination: FakeDestination::new(with_disk()),
        ..Scene::new(FakeSource::new(with_disk(), Tracking::Log, &populated, workload))
    }
}

#[test]
fn writes_to_copied_disks_are_held_back_from_the_first_round_on() {
    let scene = with_a_copied_disk();
    let notes = Arc::clone(&scene.source.notes);

    let ends = migrate(scene);

    ends.arrived();
    let SourceOutcome::GoSent(parked) = &ends.outcome else {
        panic!("not sent")
    };
    let rounds = parked.summary().rounds.len();
    let held_back = notes.held_back.lock().unwrap();
    assert!(held_back.iter().all(Option::is_some), "{held_back:?}");
    // Once after each round but the last one; rounds without a page are not told.
    assert!(held_back.len() + 1 >= rounds && !held_back.is_empty(), "{held_back:?}");
}

#[test]
fn nothing_is_held_back_while_a_link_is_lost() {
    let mut scene = with_a_copied_disk();
    let notes = Arc::clone(&scene.source.notes);
    scene.parameters.resume_window = Duration::from_secs(20);
    scene.destination_parameters.resume_window = Duration::from_secs(20);
    // The switchover is not asked for before the link was cut.
    scene.source.settles_after = [100].into();
    let (mut arm, mut is_cut) = (arming(), false);
    let told = Arc::new(Mutex::new(None));
    let (seen, at_loss) = (Arc::clone(&notes), Arc::clone(&told));
    scene.agent = Box::new(move |report, controls| {
        match report {
            SourceReport::Round { .. } if !std::mem::replace(&mut is_cut, true) => controls.cut(),
            SourceReport::LinkLost { .. } => {
                *at_loss.lock().unwrap() = seen.held_back.lock().unwrap().last().copied();
                controls.reconnect();
            }
            _ => {}
        }
        arm(report, controls);
    });

    let ends = migrate(scene);

    ends.arrived();
    assert_eq!(*told.lock().unwrap(), Some(None), "writes wait for what is not sent");
    let last = notes.held_back.lock().unwrap().last().copied();
    assert!(matches!(last, Some(Some(_))), "they are not held back again: {last:?}");
}

#[test]
fn memory_alone_holds_nothing_back() {
    let scene = Scene::new(guest(Tracking::Log, Workload::Idle));
    let notes = Arc::clone(&scene.source.notes);

    migrate(scene).arrived();

    assert!(notes.held_back.lock().unwrap().iter().all(Option::is_none));
}
