//! The threads of a machine, as the owner of its process sees them.

use std::fmt;
use std::sync::Arc;

/// What a machine's thread does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ThreadKind {
    /// Runs a vCPU: KVM's ioctls of that vCPU, device registers, console output, doorbells.
    Vcpu,
    /// Works a virtio device's queues on its backend.
    Device,
}

/// What each thread of a machine calls first, so that the owner of the process can take from it what it will not need. It is
/// called on that thread.
#[derive(Clone)]
pub struct ThreadHook(Arc<dyn Fn(ThreadKind) + Send + Sync>);

impl ThreadHook {
    /// A hook that calls `begin`.
    pub fn new(begin: impl Fn(ThreadKind) + Send + Sync + 'static) -> Self {
        Self(Arc::new(begin))
    }

    /// The calling thread begins.
    pub(crate) fn begin(&self, kind: ThreadKind) {
        (self.0)(kind);
    }
}

impl Default for ThreadHook {
    /// Leaves threads as they are.
    fn default() -> Self {
        Self::new(|_| ())
    }
}

impl fmt::Debug for ThreadHook {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("ThreadHook")
    }
}
