//! What the balloon does with pages.

use vm_memory::{Bytes, GuestAddress};

use super::super::super::DeviceStateError;
use super::super::device::{Broken, Device, Turn, Wake};
use super::super::queue::{Chain, DeviceQueue};
use super::hinting::{Hinting, whole_pages};
use super::{BalloonLevel, DEFLATE, HintDesk, INFLATE, KIND, MOST_PAGES, QUEUES_BEFORE_HINTS, feature, state};
use crate::memory::{FrameRun, GuestMemory, total};

/// A balloon.
#[derive(Debug, Default)]
pub(crate) struct Balloon {
    level: BalloonLevel,
    hinting: Hinting,
    /// What the driver acknowledged.
    features: u64,
}

/// What a queue is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Hints,
    Reports,
}

impl Balloon {
    /// How full it is, now and later.
    pub(crate) fn level(&self) -> BalloonLevel {
        self.level.clone()
    }

    /// Where hints are asked for.
    pub(crate) fn hints(&self) -> HintDesk {
        self.hinting.desk.clone()
    }

    /// One whose driver was asked for hints already.
    #[cfg(any(fuzzing, test))]
    pub(in super::super) fn asked() -> Self {
        Self {
            hinting: Hinting::asked(),
            ..Self::default()
        }
    }

    /// What this queue is for, if the driver set it up and took its feature.
    ///
    /// By the specification each feature's queue has its own number: 2 for statistics, 3 for hints, 4 for reports. Linux numbers those queues
    /// that it uses one after the other, without gaps, as far as virtio-mmio goes. Their order is the same, and nobody sets up a queue that it
    /// does not use: so the first one behind inflating and deflating is that of the first feature that was taken.
    fn role(&self, index: usize, queues: &[DeviceQueue]) -> Option<Role> {
        match index {
            INFLATE => return Some(Role::Inflate),
            DEFLATE => return Some(Role::Deflate),
            _ => {}
        }
        let before = queues.get(DEFLATE + 1..index)?.iter().filter(|queue| queue.is_ready());
        let by_feature = [
            (feature::FREE_PAGE_HINT, Role::Hints),
            (feature::REPORTING, Role::Reports),
        ];
        let mut roles = by_feature.iter().filter(|(feature, _)| self.features & feature != 0);
        let &(_, role) = roles.nth(before.count())?;
        queues.get(index)?.is_ready().then_some(role)
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
        let runs = chain.writable.iter().map(whole_pages).filter(|run| run.count > 0);
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
        KIND
    }

    fn features(&self) -> u64 {
        feature::DEFLATE_ON_OOM | feature::FREE_PAGE_HINT | feature::REPORTING
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[128, 128, 64, 64, 64]
    }

    fn fewest_queues(&self) -> usize {
        QUEUES_BEFORE_HINTS
    }

    /// `struct virtio_balloon_config` (virtio 1.2, 5.5.4) as far as the features go.
    fn config(&self) -> Vec<u8> {
        [
            self.level.wanted_pages().to_le_bytes(),
            self.level.actual_pages().to_le_bytes(),
            self.hinting.command().to_le_bytes(),
        ]
        .concat()
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        const ACTUAL: u64 = 4;
        if let (ACTUAL, Ok(value)) = (offset, <[u8; 4]>::try_from(data)) {
            self.level.set_actual(u32::from_le_bytes(value));
        }
    }

    fn activate(&mut self, features: u64) {
        self.features = features;
        self.level.set_driver(true);
    }

    /// What is wanted stays: the next driver, after a reboot too, finds it.
    fn reset(&mut self) {
        self.level.set_driver(false);
        self.level.set_actual(0);
        self.hinting.reset();
        self.features = 0;
    }

    fn take_config_change(&mut self) -> bool {
        self.hinting.take_news()
    }

    fn arrived(&mut self) {
        self.hinting.arrived();
    }

    fn wake(&mut self, wake: Wake, queues: &mut [DeviceQueue], turn: &Turn<'_>) -> Result<(), Broken> {
        let Wake::Queue(index) = wake else { return Ok(()) };
        let role = self.role(index, queues);
        let queue = &mut queues[index];
        if role == Some(Role::Hints) {
            return self.hinting.work(queue, turn);
        }
        queue.serve(turn, |chain| {
            match role {
                Some(Role::Inflate) => Self::inflate(chain, turn.memory)?,
                Some(Role::Reports) => Self::report(chain, turn.memory)?,
                // What comes back (deflating) is backed again when it is touched.
                Some(Role::Deflate | Role::Hints) | None => {}
            }
            Ok(0)
        })
    }

    fn save(&self) -> Vec<u8> {
        state::to_saved(
            self.level.wanted_pages(),
            self.level.actual_pages(),
            self.hinting.last_id(),
        )
    }

    fn restore(&mut self, saved: &[u8]) -> Result<(), DeviceStateError> {
        let (wanted, actual, last_hint_id) = state::from_saved(saved)?;
        self.level.set_wanted(wanted);
        self.level.set_actual(actual);
        self.hinting.restore(last_hint_id);
        Ok(())
    }
}
