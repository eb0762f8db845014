//! A queue as a device sees it: chains of spans that were checked, and used buffers.

use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};

use super::device::{Broken, Turn};
use crate::memory::{GuestMemory, Span};

/// A descriptor chain that the guest gave: first what the device reads, then what it writes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Chain {
    pub(crate) head: u16,
    pub(crate) readable: Vec<Span>,
    pub(crate) writable: Vec<Span>,
}

/// A queue that the driver has set up.
#[derive(Debug)]
pub(crate) struct DeviceQueue {
    queue: Queue,
    /// Used buffers were added since the driver was last considered for an interrupt.
    used: bool,
    /// Chains that may still be taken in this turn.
    budget: u32,
    /// There may be more than the turn allowed.
    exhausted: bool,
}

/// How many times its own size a queue may give in one turn. A sound guest that fills its queue while it is emptied comes to as much; one
/// that has laid its rings over each other would never come to an end.
const ROUNDS_PER_TURN: u32 = 4;

impl DeviceQueue {
    /// A queue in this state.
    ///
    /// # Errors
    /// Sizes or addresses that cannot be.
    pub(super) fn new(state: QueueState) -> Result<Self, Broken> {
        let queue = Queue::try_from(state).map_err(Broken::new)?;
        Ok(Self {
            queue,
            used: false,
            budget: 0,
            exhausted: false,
        })
    }

    /// Whether the driver set it up.
    pub(crate) fn is_ready(&self) -> bool {
        self.queue.ready()
    }

    /// How many descriptors it has.
    pub(crate) fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Begins a turn of work.
    pub(super) fn begin_turn(&mut self) {
        self.budget = u32::from(self.queue.size()) * ROUNDS_PER_TURN;
        self.exhausted = false;
    }

    /// Whether the turn ended before the queue did: another one is due.
    pub(super) fn is_exhausted(&self) -> bool {
        self.exhausted
    }

    /// Takes the next chain, as long as the turn goes. Every span of it lies in guest memory.
    ///
    /// # Errors
    /// The guest broke a rule: an index out of range, a chain without end, a span outside memory, one to read after one to write.
    pub(crate) fn pop(&mut self, memory: &GuestMemory) -> Result<Option<Chain>, Broken> {
        if !self.queue.ready() {
            return Ok(None);
        }
        if self.budget == 0 {
            self.exhausted = true;
            return Ok(None);
        }
        let mut available = self.queue.iter(memory.tracked()).map_err(Broken::new)?;
        let Some(descriptors) = available.next() else {
            return Ok(None);
        };
        self.budget -= 1;
        let mut chain = Chain {
            head: descriptors.head_index(),
            readable: Vec::new(),
            writable: Vec::new(),
        };
        let mut ends = false;
        for descriptor in descriptors {
            let span = Span {
                address: descriptor.addr().0,
                len: descriptor.len(),
            };
            if !memory.holds(span) {
                return Err(Broken(format!(
                    "a buffer of {} bytes at {:#x} is not in guest memory",
                    span.len, span.address
                )));
            }
            if descriptor.is_write_only() {
                chain.writable.push(span);
            } else if chain.writable.is_empty() {
                chain.readable.push(span);
            } else {
                return Err(Broken("a buffer to read follows one to write".to_owned()));
            }
            ends = !descriptor.has_next();
        }
        // The iterator ends early where a chain goes in circles, leaves its table or is longer than 4 GiB.
        if !ends {
            return Err(Broken(format!("the chain at {} has no end", chain.head)));
        }
        Ok(Some(chain))
    }

    /// Works on every chain that there is, or as many as the turn allows: `work` carries one out and says how many bytes it wrote.
    ///
    /// # Errors
    /// The guest broke a rule, of the queue or as `work` finds.
    pub(crate) fn serve(
        &mut self,
        turn: &Turn<'_>,
        mut work: impl FnMut(&Chain) -> Result<u32, Broken>,
    ) -> Result<(), Broken> {
        loop {
            self.ignore(turn.memory)?;
            while !turn.is_to_end() {
                let Some(chain) = self.pop(turn.memory)? else { break };
                let written = work(&chain)?;
                self.push(turn.memory, chain.head, written)?;
            }
            // What comes in between the last look and the request to ring is seen here.
            if !self.listen(turn.memory)? || turn.is_to_end() {
                return Ok(());
            }
        }
    }

    /// Whether another chain seems to be there. What it is [`pop`](Self::pop) tells.
    ///
    /// # Errors
    /// The available ring is not in guest memory.
    pub(crate) fn has_more(&self, memory: &GuestMemory) -> Result<bool, Broken> {
        let available = self.queue.avail_idx(memory.tracked(), Ordering::Acquire);
        Ok(available.map_err(Broken::new)?.0 != self.queue.next_avail())
    }

    /// Puts the last popped chain back: it is in the available ring again.
    pub(crate) fn undo_pop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Gives a chain back with so many bytes written to it.
    ///
    /// # Errors
    /// The used ring is not in guest memory.
    pub(crate) fn push(&mut self, memory: &GuestMemory, head: u16, written: u32) -> Result<(), Broken> {
        self.queue
            .add_used(memory.tracked(), head, written)
            .map_err(Broken::new)?;
        self.used = true;
        Ok(())
    }

    /// Asks the driver to ring for what it adds from now on. True if something is there already.
    ///
    /// # Errors
    /// A ring is not in guest memory.
    pub(crate) fn listen(&mut self, memory: &GuestMemory) -> Result<bool, Broken> {
        if !self.queue.ready() || self.exhausted {
            return Ok(false);
        }
        self.queue.enable_notification(memory.tracked()).map_err(Broken::new)
    }

    /// Asks the driver not to ring: what it adds is seen anyway.
    ///
    /// # Errors
    /// A ring is not in guest memory.
    pub(crate) fn ignore(&mut self, memory: &GuestMemory) -> Result<(), Broken> {
        if !self.queue.ready() {
            return Ok(());
        }
        self.queue.disable_notification(memory.tracked()).map_err(Broken::new)
    }

    /// Whether the driver wants an interrupt for what was pushed since this was last asked.
    ///
    /// # Errors
    /// A ring is not in guest memory.
    pub(super) fn wants_interrupt(&mut self, memory: &GuestMemory) -> Result<bool, Broken> {
        if !std::mem::take(&mut self.used) {
            return Ok(false);
        }
        self.queue.needs_notification(memory.tracked()).map_err(Broken::new)
    }

    /// Whether the rings lie in guest memory, as far as the queue is ready at all.
    pub(super) fn is_sound(&self, memory: &GuestMemory) -> bool {
        !self.queue.ready() || self.queue.is_valid(memory.tracked())
    }

    pub(super) fn state(&self) -> QueueState {
        self.queue.state()
    }
}
