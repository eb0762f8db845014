//! What a kind of virtio device is, whatever the transport.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use vmm_sys_util::eventfd::EventFd;

use super::super::DeviceStateError;
use super::interrupt::{Interrupt, USED_BUFFERS};
use super::queue::DeviceQueue;
use crate::memory::{GuestMemory, Ring};

/// The guest broke a rule of a queue or a request: the device stops until it is reset. In words, for the log.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Broken(pub(crate) String);

impl Broken {
    pub(crate) fn new(what: impl std::fmt::Display) -> Self {
        Self(what.to_string())
    }
}

/// What the worker is to look at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wake {
    /// The guest put something into this queue, or perhaps did.
    Queue(usize),
    /// The backend has something to say, or took what it had no room for.
    Backend,
    /// It is as late as the device said ([`Device::due`]).
    Timer,
}

/// What a device has for one turn of work.
pub(crate) struct Turn<'a> {
    pub(crate) memory: &'a GuestMemory,
    pub(super) rest: &'a AtomicBool,
    pub(super) interrupt: &'a Interrupt,
    pub(super) doorbells: &'a Doorbells,
}

impl Turn<'_> {
    /// Whether the machine is to stand still: no further chain is begun.
    pub(crate) fn is_to_end(&self) -> bool {
        self.rest.load(Ordering::Relaxed)
    }

    /// Interrupts the guest for what was pushed, if it wants that. At the end of a turn this is done anyway: it is for a turn that
    /// goes on.
    ///
    /// # Errors
    /// A ring is not in guest memory.
    pub(crate) fn tell(&self, queue: &mut DeviceQueue) -> Result<(), Broken> {
        if queue.wants_interrupt(self.memory)? {
            self.interrupt.raise(USED_BUFFERS);
        }
        Ok(())
    }

    /// Waits until something has landed in the ring, or, where a queue is named, until the guest rings for it: look into it then, for
    /// that ring was heard here. May return early.
    pub(crate) fn wait<T>(&self, transfers: &Ring<T>, queue: Option<usize>) {
        let bell = queue.and_then(|queue| self.doorbells.0.get(queue));
        transfers.wait(bell);
        if let Some(bell) = bell {
            let _ = bell.read();
        }
    }
}

/// What the device wants from its backend's descriptor until the next wake.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Interest {
    pub(crate) readable: bool,
    pub(crate) writable: bool,
}

/// One kind of device with its backend. The worker calls [`wake`](Self::wake); everything else is called with the worker at rest
/// or before it looks.
pub(crate) trait Device: Send {
    /// Device type (virtio 1.2, 5): 1 is a network card, 2 a block device, 4 an entropy source.
    fn kind(&self) -> u32;

    /// Feature bits of the device type that are offered; those of queues and transport are added by the transport.
    fn features(&self) -> u64;

    /// The largest size of each queue.
    fn queue_sizes(&self) -> &'static [u16];

    /// How many queues are saved whether they are set up or not: as many as the first version of its state had.
    fn fewest_queues(&self) -> usize {
        self.queue_sizes().len()
    }

    /// The configuration space.
    fn config(&self) -> Vec<u8>;

    /// The driver writes to the configuration space; where it must not, nothing happens.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// The driver is ready, having acknowledged these features.
    fn activate(&mut self, features: u64);

    /// The device is as after power-on.
    fn reset(&mut self);

    /// Works on what there is until nothing is left, the backend has no room, or the turn is to end, and fills used rings; whether to interrupt is asked of each
    /// queue afterwards, and where the turn goes on for long, in between ([`Turn::tell`]). When it returns nothing is in flight: a request is done, or still in the available ring.
    ///
    /// # Errors
    /// The guest broke a rule.
    fn wake(&mut self, wake: Wake, queues: &mut [DeviceQueue], turn: &Turn<'_>) -> Result<(), Broken>;

    /// The backend's descriptor, where it can wake the device.
    fn backend(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// What the backend is waited for.
    fn interest(&self) -> Interest {
        Interest::default()
    }

    /// When the device wants to be woken although nothing happens: at this instant or soon after. A time that has passed must not be
    /// given again and again: the worker would not rest between.
    fn due(&self) -> Option<Instant> {
        None
    }

    /// Whether the configuration has changed since the last call, which the driver is then told.
    fn take_config_change(&mut self) -> bool {
        false
    }

    /// The guest runs on another host now; the driver is ready.
    fn arrived(&mut self) {}

    /// What of the device is saved besides its transport: an encoded message of its schema.
    fn save(&self) -> Vec<u8>;

    /// Takes over what was saved.
    ///
    /// # Errors
    /// Names what is not possible, or does not fit the backend; the device is then as it was.
    fn restore(&mut self, saved: &[u8]) -> Result<(), DeviceStateError>;
}

/// One event descriptor for each queue, which KVM signals when the guest writes its number to QueueNotify.
#[derive(Debug)]
pub(crate) struct Doorbells(pub(crate) Vec<EventFd>);

impl Doorbells {
    /// # Errors
    /// The process has no descriptors left.
    pub(crate) fn new(queues: usize) -> io::Result<Self> {
        let bell = |_| EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        Ok(Self((0..queues).map(bell).collect::<Result<_, _>>()?))
    }
}
