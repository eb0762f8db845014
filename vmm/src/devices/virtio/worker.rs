//! The thread of a virtio device: waits for the guest's doorbells and for the backend, lets the device work, interrupts the guest; and rests
//! while the machine stands still.
//!
//! ```text
//!   resting ──go on──► waiting ──event, or late enough──► busy ──nothing left──► waiting
//!      ▲                  │                                    │
//!      └──────rest────────┴──────────once it ends──────────────┘
//! ```
//!
//! Who asks for rest waits until the device is not busy: then nothing is in flight, and queues and device stay as they are.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::device::{Broken, Device, Doorbells, Interest, Turn, Wake};
use super::failures::Failures;
use super::interrupt::{CONFIG_CHANGED, Interrupt, USED_BUFFERS};
use super::queue::DeviceQueue;
use crate::memory::GuestMemory;
use crate::threads::{ThreadHook, ThreadKind};

/// What the worker and the registers share.
pub(super) struct Shared {
    pub(super) name: String,
    pub(super) memory: GuestMemory,
    pub(super) interrupt: Interrupt,
    pub(super) doorbells: Doorbells,
    /// The guest broke a rule and has not reset the device since.
    pub(super) broken: AtomicBool,
    /// How often it did, for the log.
    pub(super) breaks: Failures,
    /// The configuration space as the guest reads it, and its generation.
    pub(super) config: Mutex<(Vec<u8>, u32)>,
    work: Mutex<Work>,
    /// What `gate.resting` says, for a device in the middle of its work.
    rest: AtomicBool,
    gate: Mutex<Gate>,
    gate_changed: Condvar,
    control: EventFd,
}

/// What the worker works with.
pub(super) struct Work {
    pub(super) device: Box<dyn Device>,
    /// None until the driver is ready.
    pub(super) queues: Vec<DeviceQueue>,
}

#[derive(Debug, Default)]
struct Gate {
    resting: bool,
    busy: bool,
    finish: bool,
    /// Doorbells may have been rung where nobody heard them: look into every queue.
    look: bool,
}

impl Shared {
    pub(super) fn new(
        name: String,
        device: Box<dyn Device>,
        interrupt: Interrupt,
        memory: GuestMemory,
    ) -> io::Result<Self> {
        let doorbells = Doorbells::new(device.queue_sizes().len())?;
        let config = (device.config(), 0);
        let queues = Vec::new();
        let gate = Gate {
            resting: true,
            ..Gate::default()
        };
        Ok(Self {
            name,
            memory,
            interrupt,
            doorbells,
            broken: AtomicBool::new(false),
            breaks: Failures::default(),
            config: Mutex::new(config),
            work: Mutex::new(Work { device, queues }),
            rest: AtomicBool::new(true),
            gate: Mutex::new(gate),
            gate_changed: Condvar::new(),
            control: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
        })
    }

    /// Queues and device. Waits for what the worker is doing.
    pub(super) fn work(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the worker begin nothing more; [`rest`](Self::rest) waits for what it has begun.
    pub(super) fn ask_to_rest(&self) {
        self.gate().resting = true;
        self.rest.store(true, Ordering::Relaxed);
    }

    /// Has the worker rest, and waits until nothing is in flight. False if that takes longer than until the deadline: it rests then as
    /// soon as it can.
    pub(super) fn rest(&self, deadline: Instant) -> bool {
        self.ask_to_rest();
        let mut gate = self.gate();
        while gate.busy {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.gate_changed.wait_timeout(gate, left);
            gate = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Lets the worker go on, beginning with a look into every queue.
    pub(super) fn go_on(&self) {
        let mut gate = self.gate();
        gate.resting = false;
        self.rest.store(false, Ordering::Relaxed);
        drop(gate);
        self.look();
    }

    /// Has the worker look into every queue once it may.
    pub(super) fn look(&self) {
        self.gate().look = true;
        self.gate_changed.notify_all();
        self.wake();
    }

    fn finish(&self) {
        self.gate().finish = true;
        self.gate_changed.notify_all();
        self.wake();
    }

    fn wake(&self) {
        if let Err(error) = self.control.write(1)
            && error.kind() != io::ErrorKind::WouldBlock
        {
            tracing::error!(device = self.name, %error, "a device's thread could not be woken");
        }
    }

    /// Waits until work is allowed and makes the worker busy; whether to look everywhere. `None` to end.
    fn begin(&self) -> Option<bool> {
        let mut gate = self.gate();
        while gate.resting && !gate.finish {
            gate = self.gate_changed.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
        if gate.finish {
            return None;
        }
        gate.busy = true;
        Some(std::mem::take(&mut gate.look))
    }

    fn end(&self) {
        self.gate().busy = false;
        self.gate_changed.notify_all();
    }

    fn gate(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the guest of a new configuration.
    pub(super) fn publish_config(&self, work: &Work) {
        let mut config = self.config.lock().unwrap_or_else(PoisonError::into_inner);
        *config = (work.device.config(), config.1.wrapping_add(1));
        drop(config);
        self.interrupt.raise(CONFIG_CHANGED);
    }

    /// Lets the device work, and tells the guest what came of it.
    fn turn(&self, wakes: &[Wake]) -> Next {
        let mut work = self.work();
        if work.queues.is_empty() {
            return Next::default();
        }
        let Work { device, queues } = &mut *work;
        queues.iter_mut().for_each(DeviceQueue::begin_turn);
        let turn = Turn {
            memory: &self.memory,
            rest: &self.rest,
            interrupt: &self.interrupt,
            doorbells: &self.doorbells,
        };
        let mut done = wakes.iter().try_for_each(|&wake| device.wake(wake, queues, &turn));
        let mut interrupt = false;
        if queues.iter().any(DeviceQueue::is_exhausted) {
            self.look();
        }
        for queue in queues {
            match queue.wants_interrupt(&self.memory) {
                Ok(wanted) => interrupt |= wanted,
                Err(broken) => done = done.and(Err(broken)),
            }
        }
        if interrupt {
            self.interrupt.raise(USED_BUFFERS);
        }
        if let Err(Broken(reason)) = done {
            if let Some(untold) = self.breaks.add(Instant::now()) {
                tracing::info!(
                    device = self.name,
                    reason,
                    untold,
                    "the guest broke a device's rules: it must reset the device"
                );
            }
            self.broken.store(true, Ordering::Release);
            work.queues.clear();
            self.interrupt.raise(CONFIG_CHANGED);
            return Next::default();
        }
        if work.device.take_config_change() {
            self.publish_config(&work);
        }
        Next {
            interest: work.device.interest(),
            due: work.device.due(),
        }
    }
}

/// What the worker waits for after a turn, besides doorbells.
#[derive(Debug, Clone, Copy, Default)]
struct Next {
    interest: Interest,
    due: Option<Instant>,
}

/// The thread. Dropping it ends it.
pub(super) struct Worker {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// How long a device's thread may take to end: no backend call takes longer unless its disk hangs.
const PATIENCE: Duration = Duration::from_secs(5);

/// Events that carry this are the control descriptor's, and this one's the backend's; others are a doorbell's number.
const CONTROL: u64 = u64::MAX;
const BACKEND: u64 = u64::MAX - 1;

impl Worker {
    /// Starts the thread, at rest.
    ///
    /// # Errors
    /// The process has no descriptors or no threads left.
    pub(super) fn start(shared: Arc<Shared>, threads: &ThreadHook) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let listen = |fd: &EventFd, data| {
            let event = EpollEvent::new(EventSet::IN, data);
            epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), event)
        };
        listen(&shared.control, CONTROL)?;
        for (index, bell) in shared.doorbells.0.iter().enumerate() {
            listen(bell, index as u64)?;
        }
        let (own, threads) = (Arc::clone(&shared), threads.clone());
        let thread = Builder::new().name(shared.name.clone()).spawn(move || {
            threads.begin(ThreadKind::Device);
            if let Err(error) = serve(&own, &epoll) {
                tracing::error!(device = own.name, %error, "a device's thread ended");
            }
        })?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.shared.finish();
        let Some(thread) = self.thread.take() else { return };
        let deadline = Instant::now() + PATIENCE;
        while !thread.is_finished() {
            if Instant::now() > deadline {
                tracing::error!(
                    device = self.shared.name,
                    "a device's thread does not end; it is left behind"
                );
                return;
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        let _ = thread.join();
    }
}

fn serve(shared: &Shared, epoll: &Epoll) -> io::Result<()> {
    let mut events = [EpollEvent::default(); 16];
    let mut wakes = Vec::new();
    let mut waiting_for = Interest::default();
    let mut due = None;
    loop {
        let count = match epoll.wait(milliseconds_until(due), &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        wakes.clear();
        for event in &events[..count] {
            match event.data() {
                CONTROL => drop(shared.control.read()),
                BACKEND => wakes.push(Wake::Backend),
                number => {
                    let queue = number as usize;
                    // Taken before the queue is looked at, so that a later ring is not lost.
                    let _ = shared.doorbells.0[queue].read();
                    wakes.push(Wake::Queue(queue));
                }
            }
        }
        if due.is_some_and(|due| due <= Instant::now()) {
            wakes.push(Wake::Timer);
        }
        let Some(look) = shared.begin() else { return Ok(()) };
        if look {
            wakes = (0..shared.doorbells.0.len()).map(Wake::Queue).collect();
            wakes.push(Wake::Backend);
        }
        let next = shared.turn(&wakes);
        shared.end();
        due = next.due;
        let interest = next.interest;
        if interest != waiting_for {
            wait_for(shared, epoll, waiting_for, interest)?;
            waiting_for = interest;
        }
    }
}

/// How long to wait, as `epoll_wait` takes it; rounded up, or the last part of a millisecond would be waited for by looking.
fn milliseconds_until(due: Option<Instant>) -> i32 {
    let Some(due) = due else { return -1 };
    let left = due.saturating_duration_since(Instant::now());
    i32::try_from(left.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX)
}

/// Changes what the backend's descriptor is waited for.
fn wait_for(shared: &Shared, epoll: &Epoll, before: Interest, now: Interest) -> io::Result<()> {
    let work = shared.work();
    let Some(backend) = work.device.backend() else {
        return Ok(());
    };
    let mut set = EventSet::empty();
    set.set(EventSet::IN, now.readable);
    set.set(EventSet::OUT, now.writable);
    // A descriptor that nothing is wanted from would still tell of its errors, for ever.
    let operation = match (before == Interest::default(), now == Interest::default()) {
        (_, true) => ControlOperation::Delete,
        (true, false) => ControlOperation::Add,
        (false, false) => ControlOperation::Modify,
    };
    epoll.ctl(operation, backend.as_raw_fd(), EpollEvent::new(set, BACKEND))
}
