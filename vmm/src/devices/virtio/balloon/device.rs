//! What the balloon does with pages.

use vm_memory::{Bytes, GuestAddress};

use super::super::super::DeviceStateError;
use super::super::device::{Broken, Device, Turn, Wake};
use super::super::queue::{Chain, DeviceQueue};
use super::{BalloonLevel, INFLATE, MOST_PAGES, REPORTING, feature, state};
use crate::memory::{FrameRun, GuestMemory, PAGE_SIZE, Span, total};

/// A balloon.
#[derive(Debug, Default)]
pub(crate) struct Balloon {
    level: BalloonLevel,
}

impl Balloon {
    /// How full it is, now and later.
    pub(crate) fn level(&self) -> BalloonLevel {
        self.level.clone()
    }

    /// The guest gives these pages up: page numbers of 32 bits, in any order.
    fn inflate(chain: &Chain, memory: &GuestMemory) -> Result<(), Broken> {
        if total(&chain.readable) > MOST_PAGES * 4 {
            return Err(Broken("more pages are given up at once than anyone does".to_owned()));
        }
        let mut run: Option<FrameRun> = None;
        for span in &chain.readable {
            for at in (0..u64::from(span.len / 4)).map(|index| span.address + index * 4) {
                let frame: u32 = memory.tracked().read_obj(GuestAddress(at)).map_err(Broken::new)?;
                match &mut run {
                    Some(run) if run.end() == u64::from(frame) => run.count += 1,
                    other => {
                        let before = other.replace(FrameRun {
                            first: frame.into(),
                            count: 1,
                        });
                        before.map_or(Ok(()), |run| release(run, memory))?;
                    }
                }
            }
        }
        run.map_or(Ok(()), |run| release(run, memory))
    }

    /// The guest says that these pages are free; they are its own again as soon as the chain is back.
    fn report(chain: &Chain, memory: &GuestMemory) -> Result<(), Broken> {
        let whole = |span: &Span| {
            let first = span.address.div_ceil(PAGE_SIZE);
            let end = (span.address + u64::from(span.len)) / PAGE_SIZE;
            FrameRun {
                first,
                count: end.saturating_sub(first),
            }
        };
        let runs = chain.writable.iter().map(whole).filter(|run| run.count > 0);
        for run in runs {
            release(run, memory)?;
        }
        Ok(())
    }
}

/// Gives pages back to the host. Where that is not possible (a part of a page from hugetlbfs) they stay, which costs memory and nothing else.
fn release(run: FrameRun, memory: &GuestMemory) -> Result<(), Broken> {
    if !memory.shape().contains(run) {
        return Err(Broken(format!("frames from {:#x} on are no memory", run.first)));
    }
    if let Err(error) = memory.release(run) {
        tracing::debug!(%error, "pages that the guest gave up stay");
    }
    Ok(())
}

impl Device for Balloon {
    fn kind(&self) -> u32 {
        5
    }

    fn features(&self) -> u64 {
        feature::DEFLATE_ON_OOM | feature::REPORTING
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[128, 128, 64]
    }

    /// `struct virtio_balloon_config` (virtio 1.2, 5.5.4) as far as the features go.
    fn config(&self) -> Vec<u8> {
        [
            self.level.wanted_pages().to_le_bytes(),
            self.level.actual_pages().to_le_bytes(),
        ]
        .concat()
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        const ACTUAL: u64 = 4;
        if let (ACTUAL, Ok(value)) = (offset, <[u8; 4]>::try_from(data)) {
            self.level.set_actual(u32::from_le_bytes(value));
        }
    }

    fn activate(&mut self, _features: u64) {
        self.level.set_driver(true);
    }

    /// What is wanted stays: the next driver, after a reboot too, finds it.
    fn reset(&mut self) {
        self.level.set_driver(false);
        self.level.set_actual(0);
    }

    fn wake(&mut self, wake: Wake, queues: &mut [DeviceQueue], turn: &Turn<'_>) -> Result<(), Broken> {
        let Wake::Queue(index) = wake else { return Ok(()) };
        queues[index].serve(turn, |chain| {
            match index {
                INFLATE => Self::inflate(chain, turn.memory)?,
                REPORTING => Self::report(chain, turn.memory)?,
                // What comes back (DEFLATE) is backed again when it is touched.
                _ => {}
            }
            Ok(0)
        })
    }

    fn save(&self) -> Vec<u8> {
        state::to_saved(self.level.wanted_pages(), self.level.actual_pages())
    }

    fn restore(&mut self, saved: &[u8]) -> Result<(), DeviceStateError> {
        let (wanted, actual) = state::from_saved(saved)?;
        self.level.set_wanted(wanted);
        self.level.set_actual(actual);
        Ok(())
    }
}
