//! From the tap into the guest's buffers.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::time::Instant;

use vm_memory::{Bytes, GuestAddress};

use super::super::device::{Broken, Turn};
use super::super::queue::{Chain, DeviceQueue};
use super::limit::Bucket;
use super::traffic::CardTraffic;
use super::{BUFFER_COUNT, HEADER_BYTES, LONGEST_FRAME, feature};
use crate::memory::{GuestMemory, Span, total};

/// Whether the guest can take more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Room {
    /// It has.
    Left,
    /// It has too few for a frame: it rings when there are more.
    None,
    /// The card may not receive faster.
    Limited,
}

/// What a driver must have room for where it takes no large frames (virtio 1.2, 5.1.6.3.1).
const USUAL_FRAME: u64 = 1514 + HEADER_BYTES;

/// So many frames, and then it is somebody else's turn: the tap tells again that there is more.
const MOST_FRAMES: u32 = 256;

/// Who looks at what is received: the card's address, and when frames for it came.
pub(super) struct Addressee<'a> {
    pub(super) mac: [u8; 6],
    pub(super) traffic: &'a CardTraffic,
}

/// Receives what the tap has, frame by frame.
///
/// # Errors
/// The guest broke a rule of the queue.
pub(super) fn frames(
    tap: BorrowedFd<'_>,
    queue: &mut DeviceQueue,
    features: u64,
    limit: &mut Option<Bucket>,
    addressee: &Addressee<'_>,
    turn: &Turn<'_>,
) -> Result<Room, Broken> {
    let mergeable = features & feature::MRG_RXBUF != 0;
    let offloads = features & (feature::GUEST_TSO4 | feature::GUEST_TSO6) != 0;
    let needed = if offloads { LONGEST_FRAME } else { USUAL_FRAME };
    let mut taken = VecDeque::new();
    let mut room = Room::Left;
    queue.ignore(turn.memory)?;
    for _ in 0..MOST_FRAMES {
        if turn.is_to_end() {
            break;
        }
        if limit.as_mut().is_some_and(|limit| !limit.is_open(Instant::now())) {
            room = Room::Limited;
            break;
        }
        while !gather(queue, &mut taken, needed, mergeable, turn.memory)? {
            // Asked to ring, and looked once more, as long as something comes in between.
            if !queue.listen(turn.memory)? {
                room = Room::None;
                break;
            }
        }
        if room == Room::None {
            break;
        }
        let spans: Vec<Span> = if mergeable {
            taken
                .iter()
                .flat_map(|chain: &Chain| &chain.writable)
                .copied()
                .collect()
        } else {
            taken.front().map(|chain| chain.writable.clone()).unwrap_or_default()
        };
        match turn.memory.read_packet(tap, &spans) {
            Ok(len) if (len as u64) < HEADER_BYTES => {}
            Ok(len) => {
                if let Some(limit) = limit {
                    limit.take(len as u64);
                }
                addressee.traffic.note_received(addressee.mac, &spans, turn.memory);
                deliver(len as u64, queue, &mut taken, turn.memory)?;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => {
                tracing::debug!(%error, "the tap gives no frame");
                // Looked at again when the guest has more buffers.
                queue.listen(turn.memory)?;
                room = Room::None;
                break;
            }
        }
    }
    // Not used: they stay the guest's offer.
    taken.iter().for_each(|_| queue.undo_pop());
    Ok(room)
}

/// Takes chains until a frame of `needed` bytes fits. False if there are not so many.
fn gather(
    queue: &mut DeviceQueue,
    taken: &mut VecDeque<Chain>,
    needed: u64,
    mergeable: bool,
    memory: &GuestMemory,
) -> Result<bool, Broken> {
    let room = |taken: &VecDeque<Chain>| match mergeable {
        true => taken.iter().map(|chain| total(&chain.writable)).sum(),
        false => taken.front().map_or(0, |chain| total(&chain.writable)),
    };
    while room(taken) < needed {
        if !mergeable && !taken.is_empty() {
            return Err(Broken(format!(
                "a buffer to receive into has {} bytes, {needed} are needed",
                room(taken)
            )));
        }
        let Some(chain) = queue.pop(memory)? else {
            return Ok(false);
        };
        if total(&chain.writable) < HEADER_BYTES {
            return Err(Broken("a buffer to receive into has no room for the header".to_owned()));
        }
        taken.push_back(chain);
    }
    Ok(true)
}

/// Gives the chains that a frame of `len` bytes filled to the guest.
fn deliver(len: u64, queue: &mut DeviceQueue, taken: &mut VecDeque<Chain>, memory: &GuestMemory) -> Result<(), Broken> {
    let mut filled = Vec::new();
    let mut left = len;
    while left > 0 {
        let Some(chain) = taken.pop_front() else { break };
        let part = left.min(total(&chain.writable));
        left -= part;
        filled.push((chain, part as u32));
    }
    let Some((first, _)) = filled.first() else {
        return Ok(());
    };
    let count = byte_at(&first.writable, BUFFER_COUNT).zip(byte_at(&first.writable, BUFFER_COUNT + 1));
    if let Some((low, high)) = count {
        for (address, byte) in [low, high].into_iter().zip((filled.len() as u16).to_le_bytes()) {
            let told = memory.tracked().write_obj(byte, GuestAddress(address));
            told.map_err(Broken::new)?;
        }
    }
    filled
        .iter()
        .try_for_each(|(chain, part)| queue.push(memory, chain.head, *part))
}

/// The guest physical address of the byte at this offset of the spans.
pub(super) fn byte_at(spans: &[Span], offset: u64) -> Option<u64> {
    let mut left = offset;
    for span in spans {
        match left.checked_sub(span.len.into()) {
            Some(rest) => left = rest,
            None => return Some(span.address + left),
        }
    }
    None
}
