//! Drivers of virtio devices over MMIO (virtio 1.2, 4.2), for ring 3: they look for what is done, and ask for no interrupts.

mod block;
mod net;
mod queue;
mod transport;

pub use block::Block;
pub use net::Net;

/// What a driver has in flight, by number from 0; a number is free once it is seen to be done.
pub struct Done {
    pub slot: u16,
    /// Bytes that count: no headers.
    pub bytes: u64,
    pub outcome: Outcome,
}

/// What became of a request or frame.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Good,
    /// The device failed it.
    Failed,
    /// What was read is not what the disk should hold.
    Wrong,
    /// A frame that somebody else sent: not counted.
    Foreign,
}
