//! The work on a device: keeps it busy for a time, and says what came of it.

use crate::cmdline::{Options, Work};
use crate::device_work::{Direction, MAX_DEPTH};
use crate::histogram::Histogram;
use crate::machine::clock;
use crate::memory::Memory;
use crate::plan::Plan;
use crate::report::Transfers;
use crate::virtio::{Block, Done, Net, Outcome};

/// Work on a device that is ready. Only vCPU 0 has it.
pub struct Job {
    device: Device,
    depth: u16,
    stage: Stage,
    counted: Transfers,
    latencies: Histogram,
    /// When each request or frame was offered.
    offered_at: [u64; MAX_DEPTH as usize],
}

enum Device {
    Block(Block),
    Net(Net, Direction),
}

enum Stage {
    Begin,
    /// Buffers are offered, no frame has come.
    Waiting,
    Measuring {
        since: u64,
    },
    /// The time is over; the device has so many yet.
    Draining {
        left: u16,
    },
    Over,
}

impl Job {
    /// Makes the device ready that the options ask for.
    pub fn prepare(options: &Options, memory: &mut Memory) -> Result<Option<Self>, &'static str> {
        let device = match options.work {
            Work::Block => Device::Block(Block::start(options, memory)?),
            Work::Net => Device::Net(Net::start(options, memory)?, options.devices.direction),
            Work::Idle | Work::Uniform | Work::HotCold | Work::Sweep => return Ok(None),
        };
        Ok(Some(Self {
            device,
            depth: options.devices.depth,
            stage: Stage::Begin,
            counted: Transfers::default(),
            latencies: Histogram::default(),
            offered_at: [0; MAX_DEPTH as usize],
        }))
    }

    /// Takes what is done and offers anew. What came of it all, once, when the time is over.
    #[inline]
    pub fn step(&mut self, now: u64, plan: &Plan) -> Option<Transfers> {
        match self.stage {
            Stage::Begin => {
                (0..self.depth).for_each(|slot| self.offer(slot, now));
                self.device.publish();
                self.stage = match self.device.receives() {
                    true => Stage::Waiting,
                    false => Stage::Measuring { since: now },
                };
            }
            Stage::Waiting => {
                // The first frame starts the clock and is not counted.
                if let Some(done) = self.device.take_done() {
                    self.stage = match done.outcome {
                        Outcome::Foreign => Stage::Waiting,
                        _ => Stage::Measuring { since: clock() },
                    };
                    self.offer(done.slot, now);
                    self.device.publish();
                }
            }
            Stage::Measuring { since } => self.measure(now, since, plan),
            Stage::Draining { left } => {
                let mut left = left;
                while self.device.take_done().is_some() {
                    left = left.saturating_sub(1);
                }
                self.stage = Stage::Draining { left };
                // Buffers that no frame comes for stay with the device.
                if left == 0 || self.device.receives() {
                    self.stage = Stage::Over;
                    return Some(self.result(plan));
                }
            }
            Stage::Over => {}
        }
        None
    }

    #[inline]
    fn measure(&mut self, now: u64, since: u64, plan: &Plan) {
        let passed = now.saturating_sub(since);
        if passed >= plan.cycles(1000 * plan.options.devices.seconds) {
            self.counted.nanoseconds = plan.nanoseconds(passed);
            self.stage = Stage::Draining { left: self.depth };
            return;
        }
        while let Some(done) = self.device.take_done() {
            let now = clock();
            self.count(&done, now);
            self.offer(done.slot, now);
        }
        self.device.publish();
    }

    fn count(&mut self, done: &Done, now: u64) {
        match done.outcome {
            Outcome::Good => {}
            Outcome::Failed => self.counted.failed += 1,
            Outcome::Wrong => self.counted.wrong += 1,
            Outcome::Foreign => return,
        }
        self.counted.operations += 1;
        self.counted.bytes += done.bytes;
        let taken = now.saturating_sub(self.offered_at[usize::from(done.slot)]);
        self.latencies.add(taken);
    }

    fn offer(&mut self, slot: u16, now: u64) {
        self.offered_at[usize::from(slot)] = now;
        match &mut self.device {
            Device::Block(block) => block.offer(slot),
            Device::Net(net, _) => net.offer(slot),
        }
    }

    fn result(&self, plan: &Plan) -> Transfers {
        let rank = |permille| self.latencies.permille(permille).map(|cycles| plan.nanoseconds(cycles));
        let latency_ns = rank(500).zip(rank(990)).filter(|_| !self.device.receives());
        Transfers {
            latency_ns,
            ..self.counted
        }
    }
}

impl Device {
    fn receives(&self) -> bool {
        matches!(self, Self::Net(_, Direction::Receive))
    }

    fn publish(&mut self) {
        match self {
            Self::Block(block) => block.publish(),
            Self::Net(net, _) => net.publish(),
        }
    }

    fn take_done(&mut self) -> Option<Done> {
        match self {
            Self::Block(block) => block.take_done(),
            Self::Net(net, _) => net.take_done(),
        }
    }
}
