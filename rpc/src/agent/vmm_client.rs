//! An agent's end of one VMM: orders with their answers, events, and its death.
//!
//! Two threads per VMM do the blocking work; tasks wait on channels. A VMM's identity is the socket it is reached by. Its
//! process is the one that was started, or the one that the kernel says listens there; the number that it tells itself
//! must be the same.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use ferry_proto::vmm::v1::order::Order as Command;
use ferry_proto::vmm::v1::report::Report as Body;
use ferry_proto::vmm::v1::{Hello, Order, Report, Standing};
use ferry_proto::{OLDEST_VMM_PROTOCOL, VMM_PROTOCOL};
use tokio::sync::{mpsc as tokio_mpsc, oneshot};

use super::spawn::{self, Process};
use crate::faults::{self, Moment, Site, Word};
use crate::vmm_channel;

/// Why an order did not come to pass.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VmmError {
    /// The socket is not there or cannot be connected.
    #[error("the VMM cannot be reached at {path}")]
    Connect {
        /// The socket's path.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The VMM said no, and did nothing.
    #[error("the VMM refused: {0}")]
    Refused(String),
    /// The process is dead, or closed the connection.
    #[error("the VMM is gone")]
    Gone,
    /// It lives but does not answer: stopped, or stuck.
    #[error("the VMM did not answer within {}", humantime::format_duration(*.0))]
    Silent(Duration),
    /// It is of an earlier build, and does not know the order.
    #[error(
        "the VMM is of an earlier build and speaks version {speaks} of the protocol with its agent, {order} came with version {brought}: \
         stop and start the instance, or move it, and it has a VMM of this build"
    )]
    TooOld {
        /// What was asked of it.
        order: &'static str,
        /// The version that brought that.
        brought: u32,
        /// The version that both speak.
        speaks: u32,
    },
    /// It speaks no version that this build speaks.
    #[error(
        "the VMM speaks version {0} of the protocol with its agent, this agent {OLDEST_VMM_PROTOCOL} to {VMM_PROTOCOL}"
    )]
    Foreign(u32),
    /// It answered something else than was asked.
    #[error("the VMM answered out of place")]
    OutOfPlace,
}

/// How long an order waits for its answer.
const ANSWER_TIME: Duration = Duration::from_secs(5);
/// How long building a machine may take: a large guest's memory is mapped, its kernel read.
const BUILD_TIME: Duration = Duration::from_secs(30);

/// Orders that were not answered yet, by number: what their answers are, and who waits for them.
type Waiting = Arc<Mutex<Option<HashMap<u64, (Option<Site>, oneshot::Sender<Body>)>>>>;

/// One VMM. Clones share the connection; it closes with the last of them.
#[derive(Clone)]
pub(crate) struct Vmm {
    shared: Arc<Shared>,
}

struct Shared {
    orders: mpsc::Sender<(Order, Vec<OwnedFd>)>,
    waiting: Waiting,
    number: AtomicU64,
    process: Process,
    socket: UnixStream,
    /// The version of the protocol that both speak; the oldest one until the VMM has said.
    version: AtomicU32,
    /// Whose turn it is to glance.
    glance: Arc<tokio::sync::Mutex<()>>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        // Ends the reading thread; the writing one ends with its channel.
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }
}

impl Vmm {
    /// Connects to the VMM that listens on `socket` and greets it. Its events come through the receiver. `started`: the
    /// process, if this agent has just started it.
    ///
    /// # Errors
    /// There is none, it does not answer, speaks no common version, or is another process than the one that listens.
    pub(crate) async fn connect(
        socket: &Path,
        started: Option<Process>,
    ) -> Result<(Self, Standing, tokio_mpsc::UnboundedReceiver<Body>), VmmError> {
        let failed = |source| VmmError::Connect {
            path: socket.display().to_string(),
            source,
        };
        let path = socket.to_owned();
        let connecting = tokio::task::spawn_blocking(move || {
            let stream = spawn::connect(&path)?;
            let process = match started {
                Some(process) => process,
                None => spawn::listening_process(&stream)?,
            };
            Ok((stream, process))
        });
        // A process that is stopped may have its queue of connections full.
        let connected = tokio::time::timeout(ANSWER_TIME, connecting)
            .await
            .map_err(|_| VmmError::Silent(ANSWER_TIME))?;
        let (stream, process) = connected
            .map_err(io::Error::other)
            .and_then(|result| result)
            .map_err(failed)?;
        let (vmm, events) = Self::over(stream, process).map_err(failed)?;
        let hello = Hello {
            oldest_version: OLDEST_VMM_PROTOCOL,
            newest_version: VMM_PROTOCOL,
        };
        match vmm.order(Command::Hello(hello)).await? {
            Body::Standing(standing) if i64::from(standing.pid) == i64::from(vmm.pid()) => {
                if !(OLDEST_VMM_PROTOCOL..=VMM_PROTOCOL).contains(&standing.version) {
                    return Err(VmmError::Foreign(standing.version));
                }
                if standing.version < VMM_PROTOCOL {
                    tracing::info!(
                        pid = vmm.pid(),
                        version = standing.version,
                        "a VMM of an earlier build: what is newer is not asked of it"
                    );
                }
                vmm.shared.version.store(standing.version, Ordering::Relaxed);
                Ok((vmm, standing, events))
            }
            _ => Err(VmmError::OutOfPlace),
        }
    }

    fn over(socket: UnixStream, process: Process) -> io::Result<(Self, tokio_mpsc::UnboundedReceiver<Body>)> {
        socket.set_write_timeout(Some(ANSWER_TIME))?;
        let waiting: Waiting = Arc::new(Mutex::new(Some(HashMap::new())));
        let (event_sender, events) = tokio_mpsc::unbounded_channel();

        let (reader, pending) = (socket.try_clone()?, Arc::clone(&waiting));
        thread::Builder::new().name("vmm-reports".to_owned()).spawn(move || {
            read(&reader, &pending, &event_sender);
            // Nobody is answered any more.
            pending.lock().unwrap_or_else(PoisonError::into_inner).take();
        })?;
        let (orders, order_receiver) = mpsc::channel::<(Order, Vec<OwnedFd>)>();
        let writer = socket.try_clone()?;
        thread::Builder::new().name("vmm-orders".to_owned()).spawn(move || {
            for (order, descriptors) in order_receiver {
                if write(&writer, &order, &descriptors).is_none() {
                    let _ = writer.shutdown(std::net::Shutdown::Both);
                    return;
                }
            }
        })?;
        let shared = Shared {
            orders,
            waiting,
            number: AtomicU64::new(1),
            version: AtomicU32::new(OLDEST_VMM_PROTOCOL),
            process,
            glance: Arc::default(),
            socket,
        };
        Ok((
            Self {
                shared: Arc::new(shared),
            },
            events,
        ))
    }

    /// The process id, to be shown.
    pub(crate) fn pid(&self) -> i32 {
        self.shared.process.pid
    }

    /// Finds the VMM behind `socket` again, however long it is silent; none once its process is dead.
    pub(crate) async fn find(socket: &Path) -> Option<(Self, Standing, tokio_mpsc::UnboundedReceiver<Body>)> {
        loop {
            let error = match Self::connect(socket, None).await {
                Ok(found) => return Some(found),
                Err(error) => error,
            };
            let path = socket.to_owned();
            let listening = tokio::task::spawn_blocking(move || spawn::listening(&path));
            match tokio::time::timeout(ANSWER_TIME, listening).await {
                Ok(Ok(Ok(None))) => return None,
                _ => {
                    tracing::warn!(socket = %socket.display(), %error, "a VMM is there and does not answer, asking again")
                }
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }

    /// What the VMM says of itself, if it does within `patience`. One that is silent is asked one thing at a time: questions must not fill its
    /// connection.
    pub(crate) async fn glance(&self, patience: Duration) -> Option<Standing> {
        let vmm = self.clone();
        let asking = async move {
            let turn = Arc::clone(&vmm.shared.glance).lock_owned().await;
            // Goes on when nobody waits any more, and keeps its turn.
            let asked = tokio::spawn(async move {
                let answer = vmm.order(Command::Ping(ferry_proto::vmm::v1::Ping {})).await;
                drop(turn);
                answer
            });
            asked.await.ok()?.ok()
        };
        match tokio::time::timeout(patience, asking).await {
            Ok(Some(Body::Standing(standing))) => Some(standing),
            _ => None,
        }
    }

    /// Gives an order and waits for its answer.
    ///
    /// # Errors
    /// Refused, gone or silent.
    pub(crate) async fn order(&self, command: Command) -> Result<Body, VmmError> {
        self.order_with(command, Vec::new()).await
    }

    /// Whether the VMM's build knows an order.
    ///
    /// # Errors
    /// It does not: what it does not know, and what to do.
    pub(crate) fn check_knows(&self, command: &Command) -> Result<(), VmmError> {
        let (brought, order) = vmm_channel::brought_by(command);
        let speaks = self.shared.version.load(Ordering::Relaxed);
        match brought > speaks {
            true => Err(VmmError::TooOld { order, brought, speaks }),
            false => Ok(()),
        }
    }

    /// Gives an order with descriptors and waits for its answer.
    ///
    /// # Errors
    /// Refused, gone or silent.
    pub(crate) async fn order_with(&self, command: Command, descriptors: Vec<OwnedFd>) -> Result<Body, VmmError> {
        if command.encoded_len() > vmm_channel::MAX_MESSAGE / 2 {
            return Err(VmmError::Refused("the order is too large".to_owned()));
        }
        self.check_knows(&command)?;
        let patience = match &command {
            Command::Build(_) => BUILD_TIME,
            Command::Sample(sample) => ANSWER_TIME + Duration::from_millis(sample.ms.into()),
            _ => ANSWER_TIME,
        };
        let number = self.shared.number.fetch_add(1, Ordering::Relaxed);
        let (reply, answer) = oneshot::channel();
        match self
            .shared
            .waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .as_mut()
        {
            Some(waiting) => waiting.insert(number, (faults::answer_to(&command), reply)),
            None => return Err(VmmError::Gone),
        };
        let order = Order {
            number,
            order: Some(command),
        };
        self.shared
            .orders
            .send((order, descriptors))
            .map_err(|_| VmmError::Gone)?;
        match tokio::time::timeout(patience, answer).await {
            Ok(Ok(Body::Refused(refused))) => Err(VmmError::Refused(refused.reason)),
            Ok(Ok(body)) => Ok(body),
            Ok(Err(_)) => Err(VmmError::Gone),
            Err(_) => Err(VmmError::Silent(patience)),
        }
    }

    /// Whether both are the same connection.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
    }

    /// Whether the process is dead.
    pub(crate) fn is_dead(&self) -> bool {
        self.shared.process.has_ended(Duration::ZERO)
    }

    /// How the process ended, for people. To be asked once it is dead.
    pub(crate) async fn obituary(&self) -> String {
        let shared = Arc::clone(&self.shared);
        let told = tokio::task::spawn_blocking(move || shared.process.obituary()).await;
        told.unwrap_or_else(|_| "the VMM died".to_owned())
    }

    /// Kills the process and waits until it is dead.
    ///
    /// # Errors
    /// It does not die in time: the kernel holds it.
    pub(crate) async fn kill(&self) -> io::Result<()> {
        let shared = Arc::clone(&self.shared);
        tokio::task::spawn_blocking(move || shared.process.kill())
            .await
            .map_err(io::Error::other)?
    }
}

/// Writes one order; none if the connection is of no use any more.
fn write(socket: &UnixStream, order: &Order, descriptors: &[OwnedFd]) -> Option<()> {
    let site = order.order.as_ref().and_then(faults::order);
    let times = match faults::reach_blocking(site, Moment::Before) {
        Word::Go => 1,
        Word::Lose => return None,
        Word::Double => 2,
    };
    let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    for _ in 0..times {
        vmm_channel::send(socket, order, &borrowed).ok()?;
    }
    (faults::reach_blocking(site, Moment::After) != Word::Lose).then_some(())
}

fn read(socket: &UnixStream, waiting: &Waiting, events: &tokio_mpsc::UnboundedSender<Body>) {
    loop {
        let report = match vmm_channel::receive::<Report>(socket) {
            Ok(Some((report, _))) => report,
            Ok(None) => return,
            Err(error) => {
                tracing::debug!(%error, "a VMM's connection ended");
                return;
            }
        };
        let Some(body) = report.report else { continue };
        if report.reply_to == 0 {
            let site = faults::report(&body);
            match faults::reach_blocking(site, Moment::Before) {
                Word::Go => {}
                Word::Lose => return hang_up(socket),
                Word::Double => drop(events.send(body.clone())),
            }
            // Without a listener the instance is being taken down.
            let _ = events.send(body);
            if faults::reach_blocking(site, Moment::After) == Word::Lose {
                return hang_up(socket);
            }
            continue;
        }
        let reply = waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .as_mut()
            .and_then(|waiting| waiting.remove(&report.reply_to));
        // A second answer has nobody that waits for it.
        if let Some((site, reply)) = reply {
            if faults::reach_blocking(site, Moment::Before) == Word::Lose {
                return hang_up(socket);
            }
            let _ = reply.send(body);
            if faults::reach_blocking(site, Moment::After) == Word::Lose {
                return hang_up(socket);
            }
        }
    }
}

fn hang_up(socket: &UnixStream) {
    let _ = socket.shutdown(std::net::Shutdown::Both);
}
