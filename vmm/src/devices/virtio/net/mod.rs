//! The network card (virtio 1.2, 5.1): a tap interface of the host, one pair of queues and the control queue.

mod control;
mod device;
mod limit;
mod receive;
mod state;
#[cfg(test)]
mod tests;
mod traffic;
mod transmit;

pub(crate) use self::device::Net;
pub(super) use self::state::with_mac;
pub use self::traffic::CardTraffic;

/// The queues, in the order of the specification.
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const CONTROL: usize = 2;

/// Bytes before each frame, on the tap as in the queues: `struct virtio_net_hdr_v1`.
const HEADER_BYTES: u64 = 12;

/// Where the header says over how many buffers a frame is spread.
const BUFFER_COUNT: u64 = 10;

/// What a driver must have room for where the guest takes large frames, header included (virtio 1.2, 5.1.6.3.1).
const LONGEST_FRAME: u64 = 65_550 + HEADER_BYTES;

/// Feature bits (virtio 1.2, 5.1.3).
mod feature {
    pub(super) const CSUM: u64 = 1;
    pub(super) const GUEST_CSUM: u64 = 1 << 1;
    pub(super) const MAC: u64 = 1 << 5;
    pub(super) const GUEST_TSO4: u64 = 1 << 7;
    pub(super) const GUEST_TSO6: u64 = 1 << 8;
    pub(super) const GUEST_ECN: u64 = 1 << 9;
    pub(super) const HOST_TSO4: u64 = 1 << 11;
    pub(super) const HOST_TSO6: u64 = 1 << 12;
    pub(super) const HOST_ECN: u64 = 1 << 13;
    pub(super) const MRG_RXBUF: u64 = 1 << 15;
    pub(super) const STATUS: u64 = 1 << 16;
    pub(super) const CTRL_VQ: u64 = 1 << 17;
    pub(super) const GUEST_ANNOUNCE: u64 = 1 << 21;
}
