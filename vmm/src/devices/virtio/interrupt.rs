//! A device's interrupt: why it is raised, and the descriptor that raises it.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};

use vmm_sys_util::eventfd::EventFd;

/// A descriptor that KVM turns into an edge of an interrupt line (KVM_IRQFD).
pub(crate) type InterruptFd = EventFd;

/// Used buffers are there (InterruptStatus, bit 0).
pub(super) const USED_BUFFERS: u32 = 1;
/// The configuration changed (InterruptStatus, bit 1).
pub(super) const CONFIG_CHANGED: u32 = 2;

/// InterruptStatus of one device, shared by its registers and its worker.
#[derive(Debug)]
pub(super) struct Interrupt {
    status: AtomicU32,
    fd: InterruptFd,
}

impl Interrupt {
    pub(super) fn new(fd: InterruptFd) -> Self {
        Self {
            status: AtomicU32::new(0),
            fd,
        }
    }

    /// Adds a reason and raises the line.
    pub(super) fn raise(&self, reason: u32) {
        self.status.fetch_or(reason, Ordering::AcqRel);
        self.pulse();
    }

    /// Raises the line again for what the guest has not acknowledged. KVM delivers what an irqfd asks for on a thread of its own, so an
    /// interrupt that was raised right before the machine stood still may be in no saved controller: the guest gets it once more, which
    /// drivers take for a spurious one at worst.
    pub(super) fn repeat(&self) {
        if self.status() != 0 {
            self.pulse();
        }
    }

    pub(super) fn acknowledge(&self, reasons: u32) {
        self.status.fetch_and(!reasons, Ordering::AcqRel);
    }

    pub(super) fn status(&self) -> u32 {
        self.status.load(Ordering::Acquire)
    }

    pub(super) fn set(&self, status: u32) {
        self.status.store(status, Ordering::Release);
    }

    fn pulse(&self) {
        match self.fd.write(1) {
            Ok(()) => {}
            // So many edges are pending already that one more says nothing new.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => tracing::error!(%error, "interrupt lost"),
        }
    }
}
