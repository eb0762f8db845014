//! The device's side of free page hints (VIRTIO_BALLOON_F_FREE_PAGE_HINT; virtio 1.2, 5.5.6.7).
//!
//! ```text
//!   STOP ──asked: what is in the ring goes back unheard──► id ──the driver repeats it──► hints are heard ──it says STOP──► no more
//!    ▲                                                      │                                  │                         │
//!  reset                                                  DONE ◄────────────nobody asks any more, or the guest moved─────┘
//! ```
//!
//! Whoever asks wants pages that were free *after* it asked: a page that was free before may have been used since, and nobody would tell. Ids alone
//! do not give that. Linux has one buffer for the id that it repeats, and writes the next one over it, so an old command that is still in the
//! ring would be read as the new one, and what follows it as hints for that. Therefore all that is in the ring goes back before a new id is shown: whatever is taken
//! out after that was put in after it, and a driver puts in a page only while it is free. Ids are compared all the same: a driver that finishes what it had begun
//! under an old one is not heard.

use vm_memory::{Bytes, GuestAddress};

use super::super::device::{Broken, Turn};
use super::super::queue::{Chain, DeviceQueue};
use super::hints::HintDesk;
use crate::memory::{FrameRun, GuestMemory, PAGE_SIZE, Span, total};

/// Values of `free_page_hint_cmd_id` that are no ids.
const STOP: u32 = 0;
const DONE: u32 = 1;
const FIRST_ID: u32 = 2;

/// Bytes of a command.
const COMMAND: u64 = 4;

/// What was asked of the driver, and what came of it.
#[derive(Debug, Default)]
pub(super) struct Hinting {
    pub(super) desk: HintDesk,
    /// The last id that was given; 0 if none was.
    last_id: u32,
    stage: Stage,
    /// The driver is to look at the configuration.
    is_news: bool,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Stage {
    /// This driver was not asked yet.
    #[default]
    Stopped,
    /// It was given the last id, for who asked this time; whether it said that hints follow.
    Asked { time: u64, is_heard: bool },
    /// What it kept for hints is its own again.
    Done,
}

impl Hinting {
    /// What the configuration says.
    pub(super) fn command(&self) -> u32 {
        match self.stage {
            Stage::Stopped => STOP,
            Stage::Asked { .. } => self.last_id,
            Stage::Done => DONE,
        }
    }

    /// Whether the driver is to be told of another command than before.
    pub(super) fn take_news(&mut self) -> bool {
        std::mem::take(&mut self.is_news)
    }

    /// Another driver comes. If hints are asked for, it will be asked too.
    pub(super) fn reset(&mut self) {
        self.stage = Stage::Stopped;
        self.is_news = false;
    }

    /// The last id, for the saved state.
    pub(super) fn last_id(&self) -> u32 {
        self.last_id
    }

    /// The last id was this one, on another host or in another process. Who asked there is not here.
    pub(super) fn restore(&mut self, last_id: u32) {
        self.last_id = last_id;
        self.stage = if last_id == 0 { Stage::Stopped } else { Stage::Done };
    }

    /// The guest runs on another host: if it may keep pages for hints, it is told that it need not.
    pub(super) fn arrived(&mut self) {
        self.is_news = self.last_id != 0;
    }

    /// Follows what is asked, and hears what there is.
    pub(super) fn work(&mut self, queue: &mut DeviceQueue, turn: &Turn<'_>) -> Result<(), Broken> {
        self.follow(queue, turn.memory)?;
        queue.serve(turn, |chain| {
            self.hear(chain, turn.memory)?;
            Ok(0)
        })
    }

    fn follow(&mut self, queue: &mut DeviceQueue, memory: &GuestMemory) -> Result<(), Broken> {
        match (self.desk.asked(), self.stage) {
            (Some(now), Stage::Asked { time, .. }) if now == time => {}
            (Some(time), _) => {
                give_back(queue, memory)?;
                // No id comes again before all others did, and what is in the ring under one does not outlast the next.
                self.last_id = self.last_id.checked_add(1).map_or(FIRST_ID, |id| id.max(FIRST_ID));
                self.stage = Stage::Asked { time, is_heard: false };
                self.is_news = true;
            }
            (None, Stage::Asked { .. }) => {
                self.stage = Stage::Done;
                self.is_news = true;
            }
            (None, Stage::Stopped | Stage::Done) => {}
        }
        Ok(())
    }

    /// A command, hints, or both.
    fn hear(&mut self, chain: &Chain, memory: &GuestMemory) -> Result<(), Broken> {
        let Stage::Asked { time, is_heard } = &mut self.stage else {
            return Ok(());
        };
        match total(&chain.readable) {
            0 => {}
            COMMAND => *is_heard = command(&chain.readable, memory)? == self.last_id,
            other => return Err(Broken(format!("a command about hints has {other} bytes"))),
        }
        if *is_heard {
            let runs = chain.writable.iter().map(whole_pages).filter(|run| run.count > 0);
            runs.for_each(|run| self.desk.leave(*time, run));
        }
        Ok(())
    }
}

#[cfg(any(fuzzing, test))]
impl Hinting {
    /// A driver that was asked already.
    pub(super) fn asked() -> Self {
        let desk = HintDesk::default();
        desk.ask();
        let time = desk.asked().unwrap_or_default();
        Self {
            desk,
            last_id: FIRST_ID,
            stage: Stage::Asked { time, is_heard: false },
            is_news: false,
        }
    }
}

/// Gives back what is in the ring, unheard: no more than fits, whatever the guest adds meanwhile.
fn give_back(queue: &mut DeviceQueue, memory: &GuestMemory) -> Result<(), Broken> {
    for _ in 0..queue.size() {
        let Some(chain) = queue.pop(memory)? else { break };
        queue.push(memory, chain.head, 0)?;
    }
    Ok(())
}

/// A command, which may lie in several buffers.
fn command(spans: &[Span], memory: &GuestMemory) -> Result<u32, Broken> {
    let mut bytes = Vec::with_capacity(COMMAND as usize);
    for span in spans {
        let mut part = vec![0; span.len as usize];
        let read = memory.tracked().read_slice(&mut part, GuestAddress(span.address));
        read.map_err(Broken::new)?;
        bytes.append(&mut part);
    }
    Ok(bytes.first_chunk().map_or(STOP, |bytes| u32::from_le_bytes(*bytes)))
}

/// The pages that lie wholly in a buffer.
pub(super) fn whole_pages(span: &Span) -> FrameRun {
    let first = span.address.div_ceil(PAGE_SIZE);
    let end = (span.address + u64::from(span.len)) / PAGE_SIZE;
    FrameRun {
        first,
        count: end.saturating_sub(first),
    }
}
