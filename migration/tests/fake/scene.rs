//! Both ends of a migration over loopback, and an agent that watches the source.

use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use ferry_migration::destination::{
    self, DestinationError, DestinationOrder, DestinationParameters, DestinationReport, Loaded,
};
use ferry_migration::guest::{FrameRun, GuestWas, MemoryShape, Region, SourceGuest};
use ferry_migration::handover::{Attempt, Epoch, Grants};
use ferry_migration::postcopy::{Lateness, URGENT_STREAMS};
use ferry_migration::source::{
    self, Manner, OnTimeout, Overhead, SourceError, SourceOrder, SourceOutcome, SourceParameters, SourceReport,
    SourceSummary,
};
use ferry_migration::{Compression, Link, Liveness};
use uuid::Uuid;

use super::cutting::Cutter;
use super::memory::FakeMemory;
use super::{FakeDestination, FakeRestored, FakeSource, Tracking, Workload};

pub const EPOCH: Epoch = Epoch(7);
/// Frames of the usual fake guest: 32 MiB in two regions.
pub const FRAMES: u64 = 8192;
/// The first frame of its second region.
pub const HIGH: u64 = 1 << 20;

pub const fn run(first: u64, count: u64) -> FrameRun {
    FrameRun { first, count }
}

pub fn shape() -> MemoryShape {
    let regions = vec![
        Region {
            start_frame: 0,
            frames: FRAMES - 1000,
        },
        Region {
            start_frame: HIGH,
            frames: 1000,
        },
    ];
    MemoryShape::new(regions).unwrap()
}

pub fn memory() -> FakeMemory {
    FakeMemory::new(shape(), 16)
}

pub fn attempt(number: u32) -> Attempt {
    Attempt {
        instance: Uuid::from_u128(1),
        migration: Uuid::from_u128(2),
        attempt: number,
        epoch: EPOCH,
    }
}

/// A guest with 24 MiB of contents, some of them high.
pub fn guest(tracking: Tracking, workload: Workload) -> FakeSource {
    FakeSource::new(memory(), tracking, &[run(3, 6000), run(HIGH + 500, 300)], workload)
}

/// The guest runs while it is copied, and stands still for so long at most.
pub fn live(max_downtime: Duration) -> Manner {
    Manner::Live { max_downtime }
}

pub fn parameters() -> SourceParameters {
    let Attempt {
        instance,
        migration,
        epoch,
        ..
    } = attempt(1);
    SourceParameters {
        instance,
        migration,
        epoch,
        manner: live(Duration::from_millis(300)),
        lateness: Lateness::Never,
        timeout: Duration::from_secs(20),
        on_timeout: OnTimeout::Abort,
        most_throttle: None,
        bandwidth: None,
        guest_was: GuestWas::Running,
        digests: true,
        verify: true,
        compression: Compression::Auto,
        one_host: false,
        overhead: Overhead::default(),
        liveness: Liveness::default(),
        resume_window: Duration::ZERO,
    }
}

pub fn destination_parameters() -> DestinationParameters {
    let Attempt {
        instance,
        migration,
        epoch,
        ..
    } = attempt(1);
    DestinationParameters {
        instance,
        migration,
        epoch,
        liveness: Liveness::default(),
        resume_window: Duration::ZERO,
    }
}

/// Two ends of connected sockets.
pub fn links(streams: usize) -> (Link, Link) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let pair = || {
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (near, listener.accept().unwrap().0)
    };
    let (near_control, far_control) = pair();
    let (near, far) = (0..streams).map(|_| pair()).unzip();
    (
        Link {
            control: near_control,
            pages: near,
            late: None,
        },
        Link {
            control: far_control,
            pages: far,
            late: None,
        },
    )
}

/// As [`links`], with connections for pages that come late.
pub fn links_with_late(streams: usize) -> (Link, Link) {
    let ((mut near, mut far), (near_late, far_late)) = (links(streams), links(LATE_STREAMS));
    (near.late, far.late) = (Some(Box::new(near_late)), Some(Box::new(far_late)));
    (near, far)
}

/// Streams of a session of late pages: those for whoever waits, and two more.
pub const LATE_STREAMS: usize = URGENT_STREAMS + 2;

/// What an agent can do to a migration.
pub struct Controls {
    pub grants: Arc<Grants>,
    pub source_orders: Sender<SourceOrder>,
    pub destination_orders: Sender<DestinationOrder>,
    wire: Wire,
    streams: usize,
    has_late: bool,
    /// Of the newest link.
    near: Mutex<Vec<TcpStream>>,
    /// Its connections for late pages.
    late: Mutex<Vec<TcpStream>>,
}

impl Controls {
    pub fn grant(&self, number: u32) {
        self.grants.offer(attempt(number)).unwrap();
    }

    pub fn abort(&self) {
        self.source_orders
            .send(SourceOrder::Abort {
                reason: "by its user".into(),
            })
            .unwrap();
    }

    pub fn cut_control(&self) {
        self.near.lock().unwrap()[0].shutdown(Shutdown::Both).unwrap();
    }

    pub fn cut_page_stream(&self, index: usize) {
        self.near.lock().unwrap()[index + 1].shutdown(Shutdown::Both).unwrap();
    }

    /// Cuts a connection for late pages, on which nothing is said yet.
    pub fn cut_late_stream(&self, index: usize) {
        self.late.lock().unwrap()[index + 1].shutdown(Shutdown::Both).unwrap();
    }

    /// Cuts every connection of the newest link.
    pub fn cut(&self) {
        for socket in &*self.near.lock().unwrap() {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    /// Gives both ends another link, as agents do.
    pub fn reconnect(&self) {
        let (near, far) = self.wire.links(self.streams, self.has_late);
        *self.near.lock().unwrap() = sockets_of(&near);
        *self.late.lock().unwrap() = late_sockets_of(&near);
        // An end that is over takes none.
        let _ = self.destination_orders.send(DestinationOrder::Reconnect(Box::new(far)));
        let _ = self.source_orders.send(SourceOrder::Reconnect(Box::new(near)));
    }
}

fn sockets_of(link: &Link) -> Vec<TcpStream> {
    let sockets = [&link.control].into_iter().chain(&link.pages);
    sockets.map(|socket| socket.try_clone().unwrap()).collect()
}

fn late_sockets_of(link: &Link) -> Vec<TcpStream> {
    link.late.as_deref().map(sockets_of).unwrap_or_default()
}

/// How the two ends are connected.
#[derive(Clone, Default)]
pub struct Wire {
    /// Looks at what is said, and may cut the link.
    pub cutter: Option<Arc<Cutter>>,
}

impl Wire {
    fn links(&self, streams: usize, has_late: bool) -> (Link, Link) {
        let (near, far) = match has_late {
            true => links_with_late(streams),
            false => links(streams),
        };
        match &self.cutter {
            Some(cutter) => cutter.between(near, far),
            None => (near, far),
        }
    }
}

/// The agent's reaction to what the source reports.
pub type Agent = Box<dyn FnMut(&SourceReport, &Controls) + Send>;

/// An agent that arms whenever it is asked to.
pub fn arming() -> Agent {
    Box::new(|report, controls| {
        if let SourceReport::Converged { attempt, .. } = report {
            controls.grant(*attempt);
        }
    })
}

/// An agent that arms, and does something once at the first report that `when` accepts.
pub fn arming_and(
    when: impl Fn(&SourceReport) -> bool + Send + 'static,
    act: impl FnOnce(&Controls) + Send + 'static,
) -> Agent {
    let (mut arm, mut act) = (arming(), Some(act));
    Box::new(move |report, controls| {
        if when(report)
            && let Some(act) = act.take()
        {
            act(controls);
            return;
        }
        arm(report, controls);
    })
}

/// One migration to be run.
pub struct Scene {
    /// The source VMM's register.
    pub grants: Arc<Grants>,
    pub source: FakeSource,
    pub destination: FakeDestination,
    pub streams: usize,
    pub parameters: SourceParameters,
    pub destination_parameters: DestinationParameters,
    pub agent: Agent,
    pub wire: Wire,
}

impl Scene {
    pub fn new(source: FakeSource) -> Self {
        Self {
            grants: Arc::default(),
            source,
            destination: FakeDestination::new(memory()),
            streams: 2,
            parameters: parameters(),
            destination_parameters: destination_parameters(),
            agent: arming(),
            wire: Wire::default(),
        }
    }
}

/// What became of both ends.
pub struct Ends {
    pub outcome: SourceOutcome<FakeSource>,
    pub loaded: Result<Loaded<FakeRestored>, DestinationError>,
    pub reports: Vec<SourceReport>,
    pub destination_reports: Vec<DestinationReport>,
    /// What the destination tells after it was loaded.
    pub late_reports: Receiver<DestinationReport>,
    pub took: Duration,
}

/// Runs both ends until both are done.
pub fn migrate(scene: Scene) -> Ends {
    let Scene {
        grants,
        source,
        destination,
        streams,
        parameters,
        destination_parameters,
        mut agent,
        wire,
    } = scene;
    let has_late = parameters.lateness != Lateness::Never;
    let (near, far) = wire.links(streams, has_late);
    let (source_orders, source_orders_out) = mpsc::channel();
    let (destination_orders, destination_orders_out) = mpsc::channel();
    let (reports_in, reports_out) = mpsc::channel();
    let (destination_reports_in, destination_reports) = mpsc::channel();
    let controls = Controls {
        grants: grants.clone(),
        source_orders,
        destination_orders,
        wire,
        streams,
        has_late,
        near: Mutex::new(sockets_of(&near)),
        late: Mutex::new(late_sockets_of(&near)),
    };
    let began = Instant::now();
    thread::scope(|scope| {
        let watcher = scope.spawn(move || {
            let mut reports = Vec::new();
            while let Ok(report) = reports_out.recv() {
                agent(&report, &controls);
                reports.push(report);
            }
            reports
        });
        let receiving = scope.spawn(move || {
            destination::run(
                destination,
                far,
                &destination_parameters,
                &destination_orders_out,
                &destination_reports_in,
            )
        });
        let outcome = source::run(source, near, &parameters, &grants, &source_orders_out, &reports_in);
        drop(reports_in);
        Ends {
            outcome,
            loaded: receiving.join().unwrap(),
            reports: watcher.join().unwrap(),
            destination_reports: destination_reports.try_iter().collect(),
            late_reports: destination_reports,
            took: began.elapsed(),
        }
    })
}

impl Ends {
    /// The migration arrived: both memories are equal.
    #[track_caller]
    pub fn arrived(&self) -> (&SourceSummary, &Loaded<FakeRestored>) {
        let SourceOutcome::GoSent(parked) = &self.outcome else {
            panic!("not sent: {}; {:?}", self.source_error(), self.loaded.as_ref().err())
        };
        let loaded = self.loaded.as_ref().unwrap();
        assert_eq!(parked.attempt(), loaded.attempt);
        assert!(parked.guest().is_stopped(), "the guest runs twice");
        parked.guest().memory().equals(&loaded.restored.memory).unwrap();
        (parked.summary(), loaded)
    }

    /// The migration was called off and the guest runs on.
    #[track_caller]
    pub fn cancelled(&self) -> &SourceError {
        let SourceOutcome::Cancelled { guest, error, .. } = &self.outcome else {
            panic!("not cancelled: {:?}", self.reports.last())
        };
        assert!(self.loaded.is_err(), "the guest is here and there");
        assert!(guest.comes_to_run(), "the guest does not run");
        assert!(guest.notes.tracking_stopped.load(std::sync::atomic::Ordering::Relaxed));
        error
    }

    fn source_error(&self) -> String {
        match &self.outcome {
            SourceOutcome::GoSent(_) => "GO was sent".to_owned(),
            SourceOutcome::Cancelled { error, .. } => error.to_string(),
            SourceOutcome::GuestEnded { end, .. } => format!("{end:?}"),
        }
    }
}
