//! From the guest's buffers into the tap.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Instant;

use super::super::device::{Broken, Turn};
use super::super::queue::DeviceQueue;
use super::HEADER_BYTES;
use super::limit::Bucket;
use super::traffic::CardTraffic;
use crate::memory::total;

/// How far it went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sent {
    /// Everything that the guest gave is sent, or the turn ended.
    Everything,
    /// The tap has no room: it tells when it has.
    TapIsFull,
    /// The card may not send faster.
    Limited,
}

/// Sends what the guest gives, frame by frame.
///
/// # Errors
/// The guest broke a rule of the queue.
pub(super) fn frames(
    tap: BorrowedFd<'_>,
    queue: &mut DeviceQueue,
    limit: &mut Option<Bucket>,
    traffic: &CardTraffic,
    turn: &Turn<'_>,
) -> Result<Sent, Broken> {
    loop {
        queue.ignore(turn.memory)?;
        while !turn.is_to_end() {
            if limit.as_mut().is_some_and(|limit| !limit.is_open(Instant::now())) {
                return Ok(Sent::Limited);
            }
            let Some(chain) = queue.pop(turn.memory)? else { break };
            if total(&chain.readable) < HEADER_BYTES {
                return Err(Broken("a frame to send has no header".to_owned()));
            }
            match turn.memory.write_packet(tap, &chain.readable) {
                Ok(_) => traffic.note_sent(&chain.readable, turn.memory),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    queue.undo_pop();
                    return Ok(Sent::TapIsFull);
                }
                // As a wire would: a frame that nobody can take is lost.
                Err(error) => tracing::debug!(%error, "a frame was dropped"),
            }
            if let Some(limit) = limit {
                limit.take(total(&chain.readable));
            }
            queue.push(turn.memory, chain.head, 0)?;
        }
        if !queue.listen(turn.memory)? || turn.is_to_end() {
            return Ok(Sent::Everything);
        }
    }
}
