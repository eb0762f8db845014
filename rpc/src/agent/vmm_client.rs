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
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use ferry_proto::vmm::v1::order::Order as Command;
use ferry_proto::vmm::v1::report::Report as Body;
use ferry_proto::vmm::v1::{Hello, Order, Report, Standing};
use ferry_proto::{OLDEST_VMM_PROTOCOL, VMM_PROTOCOL};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::sync::{mpsc as tokio_mpsc, oneshot};

use super::spawn::Process;
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
    /// It answered something else than was asked.
    #[error("the VMM answered out of place")]
    OutOfPlace,
}

/// How long an order waits for its answer.
const ANSWER_TIME: Duration = Duration::from_secs(5);
/// How long building a machine may take: a large guest's memory is mapped, its kernel read.
const BUILD_TIME: Duration = Duration::from_secs(30);

type Waiting = Arc<Mutex<Option<HashMap<u64, oneshot::Sender<Body>>>>>;

/// One VMM. Clones share the connection; it closes with the last of them.
#[derive(Clone)]
pub(crate) struct Vmm {
    shared: Arc<Shared>,
}

struct Shared {
    orders: mpsc::Sender<(Order, Vec<OwnedFd>)>,
    waiting: Waiting,
    number: AtomicU64,
    process: OwnedFd,
    pid: i32,
    socket: UnixStream,
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
        let stream = super::spawn::connect(socket).map_err(failed)?;
        let process = match started {
            Some(process) => process,
            None => listening_process(&stream).map_err(failed)?,
        };
        let (vmm, events) = Self::over(stream, process).map_err(failed)?;
        let hello = Hello {
            oldest_version: OLDEST_VMM_PROTOCOL,
            newest_version: VMM_PROTOCOL,
        };
        match vmm.order(Command::Hello(hello)).await? {
            Body::Standing(standing) if i64::from(standing.pid) == i64::from(vmm.pid()) => Ok((vmm, standing, events)),
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
                let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
                if vmm_channel::send(&writer, &order, &borrowed).is_err() {
                    let _ = writer.shutdown(std::net::Shutdown::Both);
                    return;
                }
            }
        })?;
        let Process { pid, pidfd } = process;
        let shared = Shared {
            orders,
            waiting,
            number: AtomicU64::new(1),
            process: pidfd,
            pid,
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
        self.shared.pid
    }

    /// Gives an order and waits for its answer.
    ///
    /// # Errors
    /// Refused, gone or silent.
    pub(crate) async fn order(&self, command: Command) -> Result<Body, VmmError> {
        self.order_with(command, Vec::new()).await
    }

    /// Gives an order with descriptors and waits for its answer.
    ///
    /// # Errors
    /// Refused, gone or silent.
    pub(crate) async fn order_with(&self, command: Command, descriptors: Vec<OwnedFd>) -> Result<Body, VmmError> {
        let patience = if matches!(command, Command::Build(_)) {
            BUILD_TIME
        } else {
            ANSWER_TIME
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
            Some(waiting) => waiting.insert(number, reply),
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
        has_ended(&self.shared.process, Duration::ZERO)
    }

    /// Kills the process and waits until it is dead.
    ///
    /// # Errors
    /// It does not die in time: the kernel holds it.
    pub(crate) async fn kill(&self) -> io::Result<()> {
        let shared = Arc::clone(&self.shared);
        let kill = move || {
            match pidfd_send_signal(&shared.process, Signal::KILL) {
                Ok(()) | Err(rustix::io::Errno::SRCH) => {}
                Err(error) => return Err(error.into()),
            }
            if has_ended(&shared.process, Duration::from_secs(10)) {
                Ok(())
            } else {
                Err(io::Error::other(format!("process {} does not die", shared.pid)))
            }
        };
        tokio::task::spawn_blocking(kill).await.map_err(io::Error::other)?
    }
}

/// The process that called `listen` last on the socket behind this connection: every VMM does when it starts.
fn listening_process(stream: &UnixStream) -> io::Result<Process> {
    let credentials = rustix::net::sockopt::socket_peercred(stream)?;
    let pidfd = pidfd_open(credentials.pid, PidfdFlags::empty())?;
    Ok(Process {
        pid: credentials.pid.as_raw_nonzero().get(),
        pidfd,
    })
}

/// Whether the process behind a pidfd is dead, waiting for it `patience` at most.
fn has_ended(process: &OwnedFd, patience: Duration) -> bool {
    let deadline = Instant::now() + patience;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = rustix::time::Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        match poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&timeout)) {
            Ok(0) => return false,
            Ok(_) => return true,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return false,
        }
    }
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
            // Without a listener the instance is being taken down.
            let _ = events.send(body);
            continue;
        }
        let reply = waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .as_mut()
            .and_then(|waiting| waiting.remove(&report.reply_to));
        if let Some(reply) = reply {
            let _ = reply.send(body);
        }
    }
}
