//! What a machine consists of, as far as its guest must be told.

/// How many of what can be more than one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Board {
    /// The local APIC of each has its number.
    pub(crate) vcpus: u8,
    /// They answer at the first [`virtio_slot`](super::layout::virtio_slot)s.
    pub(crate) virtio_devices: usize,
}
