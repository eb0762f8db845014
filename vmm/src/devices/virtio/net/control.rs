//! The control queue (virtio 1.2, 5.1.6.5): of its commands only the acknowledgement of an announcement is known.

use vm_memory::{Bytes, GuestAddress};

use super::super::device::{Broken, Turn};
use super::super::queue::DeviceQueue;
use crate::memory::Span;

/// What came of the commands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    /// Nothing that changes anything.
    Nothing,
    /// The guest has announced itself.
    Announced,
}

/// Class and command of VIRTIO_NET_CTRL_ANNOUNCE_ACK.
const ANNOUNCE_ACK: [u8; 2] = [3, 0];

const OK: u8 = 0;
const ERROR: u8 = 1;

/// Carries the commands out.
///
/// # Errors
/// The guest broke a rule of the queue.
pub(super) fn commands(queue: &mut DeviceQueue, turn: &Turn<'_>, announcing: bool) -> Result<Answer, Broken> {
    let mut answer = Answer::Nothing;
    let memory = turn.memory.tracked();
    queue.serve(turn, |chain| {
        let Some(status) = last_byte(&chain.writable) else {
            return Err(Broken("a control command has no room for its status".to_owned()));
        };
        let mut command = [0; 2];
        let bytes = chain
            .readable
            .iter()
            .flat_map(|span| (0..u64::from(span.len)).map(|offset| span.address + offset));
        for (byte, address) in command.iter_mut().zip(bytes) {
            *byte = memory.read_obj(GuestAddress(address)).map_err(Broken::new)?;
        }
        let known = command == ANNOUNCE_ACK && announcing;
        if known {
            answer = Answer::Announced;
        }
        let code = if known { OK } else { ERROR };
        memory.write_obj(code, GuestAddress(status)).map_err(Broken::new)?;
        Ok(1)
    })?;
    Ok(answer)
}

fn last_byte(spans: &[Span]) -> Option<u64> {
    let last = spans.last()?;
    Some(last.address + u64::from(last.len) - 1)
}
