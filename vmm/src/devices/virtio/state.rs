//! The saved form of a virtio device's transport, and the schemas of the devices: version 1 of each, and of the balloon version 2, which has more
//! queues.
//!
//! Of queues that a device did not have in version 1, those at the end that were not set up are left out. So a guest that does not use them is saved
//! as before, and an older build takes it.

use ferry_proto::state::v1 as saved;
use virtio_queue::QueueState;

use super::super::DeviceStateError;
use super::registers::{Registers, VERSION_1, status};
use super::{balloon, net};

const NET: &str = "ferry.virtio-net";
const BALLOON: &str = "ferry.virtio-balloon";

/// The schema of a unit by its name: `disk0`, `nic0`, `rng0`, `balloon0`. `None` if no virtio device has such a name.
pub(crate) fn schema_of(name: &str) -> Option<&'static str> {
    let kind = name.trim_end_matches(|character: char| character.is_ascii_digit());
    match kind {
        "disk" => Some("ferry.virtio-blk"),
        "nic" => Some(NET),
        "rng" => Some("ferry.virtio-rng"),
        "balloon" => Some(BALLOON),
        _ => None,
    }
}

/// The newest version of a schema that is known here; older ones are read too.
pub(crate) fn newest_version(schema: &str) -> u32 {
    if schema == BALLOON { 2 } else { 1 }
}

/// The version of a saved device.
pub(crate) fn version_of_saved(device: &saved::VirtioDevice) -> u32 {
    let transport = device.transport.as_ref();
    transport.map_or(1, |transport| {
        version_of(device.kind, transport.driver_features, transport.queues.len())
    })
}

/// The version in which a device of this kind is saved whose driver took these features, and which has so many queues to save.
pub(super) fn version_of(kind: u32, driver_features: u64, queues: usize) -> u32 {
    let has_hints = driver_features & balloon::feature::FREE_PAGE_HINT != 0 || queues > balloon::QUEUES_BEFORE_HINTS;
    if kind == balloon::KIND && has_hints { 2 } else { 1 }
}

/// How many of the queues are saved: up to the last one that was set up, but no less than the fewest.
pub(super) fn queues_to_save(registers: &Registers, fewest: usize) -> usize {
    // Whether it has events follows from the features, of queues that are not set up too.
    let plain = |queue: &QueueState| QueueState {
        event_idx_enabled: false,
        ..*queue
    };
    let is_set_up = |queue: &QueueState| plain(queue) != untouched(queue.max_size);
    let last = registers.queues.iter().rposition(is_set_up);
    last.map_or(0, |last| last + 1).max(fewest)
}

/// Gives the network cards among saved devices these addresses, in the order of the slots.
pub(crate) fn set_macs(
    devices: &mut [(String, saved::VirtioDevice)],
    macs: &[[u8; 6]],
) -> Result<(), DeviceStateError> {
    let mut cards: Vec<_> = devices
        .iter_mut()
        .filter(|(name, _)| schema_of(name) == Some(NET))
        .map(|(_, device)| device)
        .collect();
    if cards.len() != macs.len() {
        return Err(DeviceStateError::differs(
            "number of network cards",
            cards.len(),
            macs.len(),
        ));
    }
    for (card, mac) in cards.iter_mut().zip(macs) {
        card.device = net::with_mac(&card.device, *mac)?;
    }
    Ok(())
}

pub(super) fn to_saved(registers: &Registers, interrupt_status: u32, fewest_queues: usize) -> saved::VirtioTransport {
    let saved_queues = queues_to_save(registers, fewest_queues);
    let Registers {
        status,
        device_features_select,
        driver_features,
        driver_features_select,
        queue_select,
        config_generation,
        queues,
    } = registers;
    saved::VirtioTransport {
        status: *status,
        device_features_select: *device_features_select,
        driver_features: *driver_features,
        driver_features_select: *driver_features_select,
        queue_select: *queue_select,
        config_generation: *config_generation,
        interrupt_status,
        queues: queues.iter().take(saved_queues).map(queue_to_saved).collect(),
    }
}

/// Registers and interrupt status of a device with these queues, of which the last may not have been saved, and offered features.
pub(super) fn from_saved(
    saved: Option<&saved::VirtioTransport>,
    sizes: &[u16],
    fewest_queues: usize,
    offered: u64,
) -> Result<(Registers, u32), DeviceStateError> {
    let Some(saved::VirtioTransport {
        status,
        device_features_select,
        driver_features,
        driver_features_select,
        queue_select,
        config_generation,
        interrupt_status,
        queues,
    }) = saved
    else {
        return Err(DeviceStateError::Undecodable("the transport"));
    };
    if *status > status::ALL {
        return Err(DeviceStateError::above("device status", *status, status::ALL));
    }
    if *interrupt_status > 3 {
        return Err(DeviceStateError::above("interrupt status", *interrupt_status, 3u32));
    }
    let agreed = status & status::FEATURES_OK != 0;
    if agreed && (driver_features & !offered != 0 || driver_features & VERSION_1 == 0) {
        return Err(DeviceStateError::differs(
            "set of features",
            format!("{driver_features:#x}"),
            format!("{offered:#x}"),
        ));
    }
    if !(fewest_queues..=sizes.len()).contains(&queues.len()) {
        return Err(DeviceStateError::differs(
            "number of queues",
            queues.len() as u64,
            sizes.len() as u64,
        ));
    }
    let not_saved = sizes[queues.len()..].iter().map(|&size| Ok(untouched(size)));
    let queues = queues
        .iter()
        .zip(sizes)
        .map(|(queue, &size)| queue_from_saved(queue, size))
        .chain(not_saved)
        .collect::<Result<_, _>>()?;
    let registers = Registers {
        status: *status,
        device_features_select: *device_features_select,
        driver_features: *driver_features,
        driver_features_select: *driver_features_select,
        queue_select: *queue_select,
        config_generation: *config_generation,
        queues,
    };
    Ok((registers, *interrupt_status))
}

/// A queue as after power-on.
fn untouched(max_size: u16) -> QueueState {
    QueueState {
        max_size,
        size: max_size,
        ..QueueState::default()
    }
}

fn queue_to_saved(queue: &QueueState) -> saved::VirtioQueue {
    let QueueState {
        // The device's own, and no state.
        max_size: _,
        next_avail,
        next_used,
        // Follows from the features.
        event_idx_enabled: _,
        size,
        ready,
        desc_table,
        avail_ring,
        used_ring,
    } = queue;
    saved::VirtioQueue {
        size: u32::from(*size),
        ready: *ready,
        descriptors: *desc_table,
        driver: *avail_ring,
        device: *used_ring,
        next_available: u32::from(*next_avail),
        next_used: u32::from(*next_used),
    }
}

fn queue_from_saved(queue: &saved::VirtioQueue, max_size: u16) -> Result<QueueState, DeviceStateError> {
    let saved::VirtioQueue {
        size,
        ready,
        descriptors,
        driver,
        device,
        next_available,
        next_used,
    } = queue;
    let short = |field, value: u32| {
        u16::try_from(value).map_err(|_| DeviceStateError::above(field, value, u32::from(u16::MAX)))
    };
    Ok(QueueState {
        max_size,
        next_avail: short("next available index", *next_available)?,
        next_used: short("next used index", *next_used)?,
        event_idx_enabled: false,
        size: short("queue size", *size)?,
        ready: *ready,
        desc_table: *descriptors,
        avail_ring: *driver,
        used_ring: *device,
    })
}
