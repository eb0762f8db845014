//! Pages that come late: the guest runs at the destination without them, waits for those that it touches, and gets them all.

#[path = "late/checked.rs"]
mod checked;
mod fake;
#[path = "late/lost.rs"]
mod lost;
#[path = "late/yielding.rs"]
mod yielding;

use std::num::{NonZeroU32, NonZeroU64};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use fake::memory::{FakeMemory, NEVER_POPULATED};
use fake::scene::{Ends, HIGH, LATE_STREAMS, Scene, arming_and, attempt, guest, links, live, memory, migrate, run};
use fake::{FakeDestination, FakeSource, LoadFault, Tracking, Workload};
use ferry_migration::destination::{DestinationError, DestinationReport};
use ferry_migration::guest::{FrameRun, GuestMemory as _, SourceGuest};
use ferry_migration::postcopy::{LateOutcome, LatePages, LateReport, Lateness, ServeOrder, ServeReport, Served, serve};
use ferry_migration::source::{NewTerms, OnTimeout, SourceError, SourceOrder, SourceOutcome, SourceReport};

const PATIENCE: Duration = Duration::from_secs(20);

const BUSY: Workload = Workload::Uniform {
    frames: 4000,
    rate: 200_000,
};

fn late(lateness: Lateness, workload: Workload) -> Scene {
    let mut scene = Scene::new(guest(Tracking::Log, workload));
    if !matches!(workload, Workload::Idle) {
        // A round lasts long enough for the guest to write something in it, however busy the host is.
        scene.source.memory().slow_sends(Duration::from_millis(5));
    }
    scene.parameters.lateness = lateness;
    scene.parameters.digests = false;
    scene.parameters.verify = false;
    scene
}

/// A guest whose late pages are checked.
fn verified(lateness: Lateness, workload: Workload) -> Scene {
    let mut scene = late(lateness, workload);
    scene.parameters.verify = true;
    scene
}

/// A page in a minute: what is sent so would come to an end next week.
fn hardly_any_bandwidth() -> Scene {
    let mut scene = late(Lateness::AtOnce, Workload::Idle);
    scene.parameters.bandwidth = NonZeroU64::new(68);
    scene
}

/// Waits until something is so.
#[track_caller]
fn soon(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "not so yet: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Both ends after GO: a source that serves, and a destination that waits for pages.
struct Late {
    source: Arc<FakeMemory>,
    destination: Arc<FakeMemory>,
    pages: LatePages,
    serving: JoinHandle<Served>,
    orders: Sender<ServeOrder>,
    served: Receiver<ServeReport>,
    ends: Ends,
}

impl Late {
    /// Serves what is missing once GO was sent.
    #[track_caller]
    fn of(mut ends: Ends) -> Self {
        let SourceOutcome::GoSent(parked) = &mut ends.outcome else {
            panic!("GO was not sent: {:?}", ends.loaded.as_ref().err())
        };
        assert!(parked.guest().is_stopped(), "the guest runs twice");
        let to_serve = parked.take_late().expect("pages are missing");
        let (source, loaded) = (parked.guest().memory(), ends.loaded.as_mut().unwrap());
        let pages = loaded.late.take().expect("pages are awaited");
        assert_eq!(pages.missing(), to_serve.missing.count());
        let (orders, orders_out) = mpsc::channel();
        let (reports, served) = mpsc::channel();
        let serving = thread::spawn({
            let source = source.clone();
            move || serve(&*source, to_serve, &orders_out, &reports)
        });
        Self {
            source,
            destination: loaded.restored.memory.clone(),
            pages,
            serving,
            orders,
            served,
            ends,
        }
    }

    /// The same, and each frame takes its time: a test that does something while pages are missing is not to be late for it.
    #[track_caller]
    fn slowly(ends: Ends, time: Duration) -> Self {
        let SourceOutcome::GoSent(parked) = &ends.outcome else {
            panic!("GO was not sent: {:?}", ends.loaded.as_ref().err())
        };
        parked.guest().memory().slow_sends(time);
        Self::of(ends)
    }

    /// Every page comes, and both memories are the same then.
    #[track_caller]
    fn comes(self) -> LateOutcome {
        self.comes_in_bytes().0
    }

    /// The same, and what was sent for it.
    #[track_caller]
    fn comes_in_bytes(self) -> (LateOutcome, u64) {
        let deadline = Instant::now() + PATIENCE;
        while self.pages.outcome().is_none() {
            assert!(Instant::now() < deadline, "{} pages are missing", self.pages.missing());
            thread::sleep(Duration::from_millis(1));
        }
        let Served::All { bytes_sent } = self.serving.join().unwrap() else {
            panic!("it was not served to the end")
        };
        self.source.equals(&self.destination).unwrap();
        (self.pages.outcome().unwrap(), bytes_sent)
    }

    /// The destination says that no page can be taken in any more; why.
    #[track_caller]
    fn fails(&self) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            assert!(Instant::now() < deadline, "nobody says that it fails");
            match self.ends.late_reports.recv_timeout(PATIENCE) {
                Ok(DestinationReport::Late(LateReport::Failed { reason })) => return reason,
                Ok(_) => {}
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// The source says that its session is lost.
    #[track_caller]
    fn loses_its_link(&self) {
        let mut heard = std::iter::from_fn(|| self.served.recv_timeout(PATIENCE).ok());
        let is_lost = |report| matches!(report, ServeReport::LinkLost { .. });
        assert!(heard.any(is_lost), "nobody says that the link is lost");
    }

    /// Both ends have another link.
    fn attach(&self) {
        let (near, far) = links(LATE_STREAMS);
        self.orders.send(ServeOrder::Link(near)).unwrap();
        self.pages.attach(far);
    }

    fn touch(&self, frames: impl Iterator<Item = u64>) {
        let memory = &*self.destination;
        thread::scope(|scope| frames.for_each(|frame| drop(scope.spawn(move || memory.touch(frame)))));
    }
}

#[test]
fn a_guest_is_handed_over_at_once_and_all_of_it_comes_late() {
    let ends = migrate(late(Lateness::AtOnce, Workload::Idle));
    let SourceOutcome::GoSent(parked) = &ends.outcome else {
        panic!("not sent")
    };
    assert_eq!((parked.summary().late_pages, parked.summary().bytes_sent), (6300, 0));
    let late = Late::of(ends);
    let destination = Arc::clone(&late.destination);
    let outcome = late.comes();
    assert_eq!((outcome.pages, outcome.latency.count()), (6300, 0));
    let deadline = Instant::now() + PATIENCE;
    while destination.made_huge() < 12 {
        assert!(Instant::now() < deadline, "{} huge pages", destination.made_huge());
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn who_touches_a_page_gets_it_before_the_others() {
    let late = Late::of(migrate(hardly_any_bandwidth()));
    late.touch((0..40).map(|index| 5990 - 149 * index));
    late.touch([NEVER_POPULATED.first, NEVER_POPULATED.first + 3].into_iter());
    // One frame that nobody waits for goes before the cap is felt; the others are still to come.
    let missing = late.pages.missing();
    assert!(missing >= 6300 - 256 - 40 * 16, "{missing} are missing");
    late.orders.send(ServeOrder::Bandwidth(None)).unwrap();
    let outcome = late.comes();
    assert!((1..=40).contains(&outcome.latency.count()), "{outcome:?}");
}

#[test]
fn whoever_touches_a_page_gets_its_neighbours_too_and_nothing_beyond_them() {
    let late = Late::of(migrate(hardly_any_bandwidth()));
    // One frame goes before the cap is felt.
    soon("a first frame is here", || late.pages.missing() < 6300);
    late.touch([5900].into_iter());
    let is_here = |frame: u64| !late.destination.is_absent(frame);
    // Those of the same 64 KiB.
    soon("its neighbours are here", || (5888..5904).all(is_here));
    assert!(!is_here(5887) && !is_here(5904));
    late.orders.send(ServeOrder::Bandwidth(None)).unwrap();
    late.comes();
}

#[test]
fn a_guest_that_was_throttled_in_vain_is_handed_over_unthrottled() {
    let wild = Workload::Uniform {
        frames: 6000,
        rate: 400_000,
    };
    let mut scene = late(Lateness::WhenItPays, wild);
    scene.parameters.manner = live(Duration::from_millis(4));
    // However slowly it writes on a busy host, it is more than this carries.
    scene.parameters.bandwidth = NonZeroU64::new(50_000_000);
    scene.parameters.most_throttle = NonZeroU32::new(20);
    let notes = scene.source.notes.clone();
    let late = Late::of(migrate(scene));
    let SourceOutcome::GoSent(parked) = &late.ends.outcome else {
        panic!("not sent")
    };
    let decisions = &parked.summary().decisions;
    let deeds: Vec<_> = decisions.iter().map(|decided| decided.deed.to_string()).collect();
    assert!(deeds.iter().any(|deed| deed == "throttle"), "{deeds:?}");
    assert_eq!(notes.throttle.load(Ordering::Relaxed), 0);
    late.comes();
}

#[test]
fn what_rounds_do_not_bring_comes_late() {
    let mut scene = late(Lateness::WhenItPays, BUSY);
    scene.parameters.manner = live(Duration::from_micros(500));
    let late = Late::of(migrate(scene));
    let missing = late.pages.missing();
    assert!((1..6300).contains(&missing), "{missing}");
    let decided = |report: &SourceReport| matches!(report, SourceReport::Round { decided, .. } if decided.deed == "postcopy" && decided.words.contains("comes late"));
    assert!(late.ends.reports.iter().any(decided));
    late.comes();
}

#[test]
fn a_guest_that_rounds_bring_within_its_budget_arrives_whole() {
    let ends = migrate(late(Lateness::WhenItPays, Workload::Idle));
    let (summary, loaded) = ends.arrived();
    assert_eq!(summary.late_pages, 0);
    assert!(loaded.late.is_none());
}

#[test]
fn who_wants_it_completed_need_not_wait_for_rounds_to_tell() {
    let mut scene = late(Lateness::WhenItPays, BUSY);
    scene.parameters.manner = live(Duration::from_micros(500));
    scene.agent = arming_and(
        |report| matches!(report, SourceReport::Copying { .. }),
        |controls| controls.source_orders.send(SourceOrder::ForceComplete).unwrap(),
    );
    let late = Late::of(migrate(scene));
    assert_eq!(
        late.ends
            .reports
            .iter()
            .filter(|report| matches!(report, SourceReport::Round { .. }))
            .count(),
        1
    );
    late.comes();
}

#[test]
fn what_is_left_when_the_time_is_up_comes_late() {
    let mut scene = late(Lateness::WhenItMustEnd, BUSY);
    scene.parameters.manner = live(Duration::from_micros(500));
    scene.parameters.timeout = Duration::from_millis(600);
    scene.parameters.on_timeout = OnTimeout::Pause;
    // Its disks never settle: nothing is waited for that has no end.
    scene.source.settles_after = [u32::MAX].into();
    let late = Late::of(migrate(scene));
    assert!(late.ends.took >= Duration::from_millis(600), "{:?}", late.ends.took);
    let deeds: Vec<_> = late
        .ends
        .reports
        .iter()
        .filter_map(|report| match report {
            SourceReport::Round { decided, .. } | SourceReport::Decided(decided) => Some(decided.deed),
            _ => None,
        })
        .collect();
    assert_eq!(deeds.iter().filter(|&&deed| deed == "time-up").count(), 1, "{deeds:?}");
    assert_eq!(deeds.last(), Some(&"postcopy"), "{deeds:?}");
    assert!(deeds.contains(&"infeasible"), "{deeds:?}");
    late.comes();
}

/// A guest whose second region is a disk.
fn with_a_disk(lateness: Lateness, workload: Workload) -> Scene {
    let with_disk = || {
        let mut memory = memory();
        memory.has_disk = true;
        memory
    };
    let source = FakeSource::new(with_disk(), Tracking::Log, &[run(3, 6000), DISK], workload);
    Scene {
        source,
        destination: FakeDestination::new(with_disk()),
        ..late(lateness, workload)
    }
}

const DISK: FrameRun = run(HIGH + 500, 300);

/// Its pages of memory that hold something: it may write three more.
const MEMORY: std::ops::RangeInclusive<u64> = 6000..=6003;

/// What was sent before GO, in pages of each round.
fn sent(late: &Late) -> Vec<u64> {
    let SourceOutcome::GoSent(parked) = &late.ends.outcome else {
        panic!("not sent")
    };
    parked.summary().rounds.iter().map(|round| round.pages).collect()
}

#[test]
fn disks_come_before_the_guest_and_all_of_its_memory_after() {
    let late = Late::of(migrate(with_a_disk(Lateness::AtOnce, BUSY)));
    let missing = late.pages.missing();
    assert!(MEMORY.contains(&missing), "{missing}");
    assert_eq!(sent(&late).iter().sum::<u64>(), DISK.count);
    assert_eq!(
        late.destination.digest(DISK).unwrap(),
        late.source.digest(DISK).unwrap()
    );
    assert_eq!(late.comes().pages, missing);
}

#[test]
fn disks_come_before_the_guest_where_rounds_do_not_bring_its_memory() {
    let mut scene = with_a_disk(Lateness::WhenItPays, BUSY);
    scene.parameters.manner = live(Duration::from_micros(500));
    let late = Late::of(migrate(scene));
    let missing = late.pages.missing();
    assert!((1..*MEMORY.end()).contains(&missing), "{missing}");
    let first = sent(&late)[0] - DISK.count;
    assert!(MEMORY.contains(&first), "{first}");
    assert_eq!(
        late.destination.digest(DISK).unwrap(),
        late.source.digest(DISK).unwrap()
    );
    late.comes();
}

#[test]
fn disks_are_sent_again_after_a_switchover_that_was_called_off() {
    let mut scene = with_a_disk(Lateness::AtOnce, BUSY);
    // Its last round is on its way when the budget is used up.
    scene.parameters.manner = live(Duration::from_millis(60));
    scene.source.stop_faults = [fake::StopFault::SlowSends(Duration::from_millis(100))].into();
    scene.source.written_by_disks = DISK.first + 10..DISK.first + 20;
    let late = Late::of(migrate(scene));
    let is_disarmed = |report: &SourceReport| matches!(report, SourceReport::Disarmed { .. });
    assert!(late.ends.reports.iter().any(is_disarmed));
    assert_eq!(
        late.destination.digest(DISK).unwrap(),
        late.source.digest(DISK).unwrap()
    );
    let pages = late.comes().pages;
    assert!(MEMORY.contains(&pages), "{pages}");
}

#[test]
fn a_switchover_that_is_called_off_leaves_nothing_late_behind() {
    let mut scene = late(Lateness::AtOnce, BUSY);
    scene.source.stop_faults = [fake::StopFault::Fails].into();
    let ends = migrate(scene);
    let SourceOutcome::GoSent(parked) = &ends.outcome else {
        panic!("not sent")
    };
    assert_eq!(parked.attempt(), attempt(2));
    assert_eq!(
        parked.guest().notes.resumed.load(std::sync::atomic::Ordering::Relaxed),
        1
    );
}

#[test]
fn a_destination_whose_memory_cannot_wait_is_refused_before_anything_is_sent() {
    let mut scene = late(Lateness::AtOnce, Workload::Idle);
    let mut cannot = memory();
    cannot.cannot_wait = true;
    scene.destination = FakeDestination::new(cannot);
    let ends = migrate(scene);
    assert!(matches!(ends.cancelled(), SourceError::Incompatible(reasons) if reasons[0].contains("userfaultfd")));
}

#[test]
fn a_machine_that_does_not_load_ends_the_wait_for_its_pages() {
    let mut scene = late(Lateness::AtOnce, Workload::Idle);
    scene.destination.fault = LoadFault::Restore;
    let ends = migrate(scene);
    assert!(matches!(ends.loaded, Err(DestinationError::Restore(_))));
}

#[test]
fn pages_that_nobody_waits_for_travel_compressed_where_the_migration_does() {
    let mut scene = verified(Lateness::AtOnce, Workload::Idle);
    scene.parameters.compression = "lz4".parse().unwrap();
    for frame in 3..6003 {
        scene.source.memory().repeat(frame, frame);
    }
    let late = Late::slowly(migrate(scene), Duration::from_millis(20));
    late.touch([4000].into_iter());
    late.source.slow_sends(Duration::ZERO);
    let source = Arc::clone(&late.source);
    let (_, bytes) = late.comes_in_bytes();
    assert!(bytes < 1500 << 12, "{bytes} bytes for 6300 pages");
    // Who touched a page did not wait for a compressor; and some pages do not get any smaller.
    let plain = source.sent_plainly();
    assert!((1..1000).contains(&plain), "{plain} of 6300 pages");
}

/// Four pages come together, as those of a huge page do.
fn by_fours(lateness: Lateness, workload: Workload) -> Scene {
    let memory_by_fours = || {
        let mut memory = memory();
        memory.late_unit = 4;
        memory
    };
    let populated = [run(3, 6000), run(HIGH + 500, 300)];
    let source = FakeSource::new(memory_by_fours(), Tracking::Log, &populated, workload);
    Scene {
        source,
        destination: FakeDestination::new(memory_by_fours()),
        ..verified(lateness, workload)
    }
}

#[test]
fn pages_that_only_come_together_come_together() {
    let ends = migrate(by_fours(Lateness::AtOnce, Workload::Idle));
    let late = Late::slowly(ends, Duration::from_millis(20));
    late.source.damage_sends(5001, 2);
    late.touch([5001, 4003, NEVER_POPULATED.first + 5].into_iter());
    late.source.slow_sends(Duration::ZERO);
    let outcome = late.comes();
    // What was not populated of the first four comes along.
    assert_eq!((outcome.pages, outcome.verified), (6304, Some(6304)));
    assert!(
        outcome.sent_again >= 8 && outcome.sent_again.is_multiple_of(4),
        "{outcome:?}"
    );
    assert!((1..=2).contains(&outcome.latency.count()), "{outcome:?}");
}

#[test]
fn what_rounds_do_not_bring_of_such_memory_comes_late_together() {
    let mut scene = by_fours(Lateness::WhenItPays, BUSY);
    scene.parameters.manner = live(Duration::from_micros(500));
    let late = Late::of(migrate(scene));
    let missing = late.pages.missing();
    assert!((1..6304).contains(&missing) && missing.is_multiple_of(4), "{missing}");
    assert_eq!(late.comes().pages, missing);
}

#[test]
fn a_limit_that_was_changed_while_it_copied_holds_for_what_comes_late() {
    let cap = std::num::NonZeroU64::new(123 << 20);
    let mut scene = late(Lateness::WhenItPays, BUSY);
    scene.parameters.manner = live(Duration::from_micros(500));
    let is_round = |report: &SourceReport| matches!(report, SourceReport::Round { .. });
    scene.agent = arming_and(is_round, move |controls| {
        let bandwidth = Some(cap);
        let new = NewTerms {
            bandwidth,
            ..NewTerms::default()
        };
        controls.source_orders.send(SourceOrder::Retune(new)).unwrap();
    });
    let mut ends = migrate(scene);
    let SourceOutcome::GoSent(parked) = &mut ends.outcome else {
        panic!("not sent")
    };
    assert_eq!(parked.take_late().unwrap().parameters.bandwidth, cap);
}

#[test]
fn what_was_rounded_out_for_a_switchover_that_was_called_off_is_compared_all_the_same() {
    let mut scene = by_fours(Lateness::WhenItPays, BUSY);
    scene.parameters.manner = live(Duration::from_micros(500));
    // The first try is too long, and called off after the table of missing pages was told.
    let slow = fake::StopFault::Slow(Duration::from_millis(20));
    scene.source.stop_faults = [slow].into();
    let late = Late::of(migrate(scene));
    let SourceOutcome::GoSent(parked) = &late.ends.outcome else {
        panic!("not sent")
    };
    assert!(parked.attempt().attempt > 1, "{}", parked.attempt());
    let (compared, missing) = (parked.summary().verified.unwrap(), late.pages.missing());
    // Each page that holds something is compared or comes late; some of those that come late hold nothing.
    assert!(compared.pages + missing >= 6300, "{compared:?}, {missing} missing");
    assert_eq!(late.comes().verified, Some(missing));
}
