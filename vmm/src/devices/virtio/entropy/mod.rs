//! The entropy source (virtio 1.2, 5.4): the host's random bytes, in one queue.

mod device;

pub(crate) use self::device::Entropy;

/// The most bytes for one request: a guest that wants more asks again.
const MOST_BYTES: u64 = 64 << 10;
