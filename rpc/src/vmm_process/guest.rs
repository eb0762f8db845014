//! The machine as this process holds it: what it boots, and what its vCPUs said.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use ferry_migration::handover::Epoch;
use ferry_proto::vmm::v1::MachineSpec;
use ferry_vmm::{
    Arming, BlankMachine, BootPayload, ConsoleInput, CpuModel, DirtyMode, EventSink, Machine, MachineConfig,
    MachineError, MachineEvent, RunState, ThreadHook, ThreadKind, WrittenBlocks,
};

use super::announce::Announcer;
use super::backends::HostSide;
use super::console::ConsoleLog;
use super::copied::CopiedDisk;
use super::disks::Disks;
use super::events::Event;
use super::jail;
use super::memory::SharedMemory;

/// What the guest's vCPUs said and nobody has looked at yet.
///
/// A vCPU thread puts its event in here before it stops, so once every vCPU stands still, whatever ended the guest is in here.
#[derive(Clone)]
pub(super) struct Inbox {
    waiting: Arc<Mutex<VecDeque<MachineEvent>>>,
    bell: Sender<Event>,
}

impl Inbox {
    pub(super) fn new(bell: Sender<Event>) -> Self {
        Self {
            waiting: Arc::default(),
            bell,
        }
    }

    /// Puts an event in and wakes the machine's owner. Called on a vCPU thread.
    pub(super) fn put(&self, event: MachineEvent) {
        self.waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push_back(event);
        // Without an owner the process is ending.
        let _ = self.bell.send(Event::Guest);
    }

    /// Puts back what was taken out and cannot be carried out yet: it stays the oldest. Nobody is woken.
    pub(super) fn put_back(&self, event: MachineEvent) {
        self.waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push_front(event);
    }

    /// Forgets what asks for a reset: one was carried out, and the guest that asked again before it is no more.
    fn forget_resets(&self) {
        self.waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|event| !matches!(event, MachineEvent::ResetRequested));
    }

    /// Whether nothing waits.
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    /// Takes the oldest event out.
    pub(super) fn take(&self) -> Option<MachineEvent> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }
}

/// Where a guest's kernel is, so that it can boot again on every host.
#[derive(Clone, Debug)]
pub(super) struct Payload {
    kernel: PathBuf,
    initrd: Option<PathBuf>,
    cmdline: String,
}

impl Payload {
    fn open(&self) -> anyhow::Result<BootPayload> {
        let open = |path: &Path| File::open(path).with_context(|| format!("failed to open {}", path.display()));
        Ok(BootPayload {
            kernel: open(&self.kernel)?,
            initrd: self.initrd.as_deref().map(open).transpose()?,
            cmdline: self.cmdline.clone(),
        })
    }
}

/// A machine that waits for a guest to move in.
pub(super) struct BlankGuest {
    pub(super) machine: BlankMachine,
    pub(super) inbox: Inbox,
    pub(super) payload: Payload,
    /// Not locked: the guest has them where it is.
    pub(super) disks: Disks,
    pub(super) announcer: Announcer,
    /// The epoch under which the guest runs where it is; 0 until that is known.
    pub(super) epoch: Epoch,
    /// Disks whose contents come with the guest.
    pub(super) copied: Vec<CopiedDisk>,
}

/// A machine with a guest in it, running or paused.
pub(super) struct LocalGuest {
    pub(super) machine: Machine,
    pub(super) inbox: Inbox,
    pub(super) payload: Payload,
    pub(super) disks: Disks,
    pub(super) announcer: Announcer,
    /// Disks whose contents move with the guest, while it is being sent.
    pub(super) copied: Vec<(CopiedDisk, WrittenBlocks)>,
    /// Which of its pages were armed as its writes began to be tracked.
    pub(super) arming: Arming,
}

/// What a guest counts its disks in.
const SECTOR: u64 = 512;

/// How long one try to reset a guest waits for its devices. The owner of the machine obeys no order meanwhile.
const RESET_TRY: Duration = Duration::from_secs(1);

/// What came of a reset.
pub(super) enum Reset {
    /// The guest boots again.
    Done,
    /// A device has not finished what it has in flight, or a vCPU does not answer: nothing was changed, the guest runs
    /// on. A disk that hangs is no crash, so it is to be tried again.
    NotYet(MachineError),
}

/// A guest that moved in and waits for its permit.
pub(super) struct RestoredMachine(pub(super) LocalGuest);

impl LocalGuest {
    /// Back to power-on, with the kernel loaded again; running if it ran, stopped if it was stopped.
    ///
    /// # Errors
    /// The kernel cannot be read or loaded any more: the guest has crashed.
    pub(super) fn reset(&mut self) -> anyhow::Result<Reset> {
        let was = self.machine.run_state();
        if let Err(error) = self.machine.pause_until(Instant::now() + RESET_TRY) {
            return match error {
                MachineError::DeviceBusy(_) | MachineError::VcpuSilent(_) => Ok(Reset::NotYet(error)),
                error => Err(error).context("failed to stop the guest for a reset"),
            };
        }
        self.machine
            .reset(self.payload.open()?)
            .context("failed to reset the machine")?;
        self.inbox.forget_resets();
        if was == RunState::Running {
            self.machine.run().context("failed to run the guest again")?;
        }
        Ok(Reset::Done)
    }

    /// Carries out the reset that the guest asked for, now or later: while it cannot be, it stays in the inbox.
    ///
    /// # Errors
    /// The kernel cannot be read or loaded any more: the guest has crashed.
    pub(super) fn reset_asked(&mut self) -> anyhow::Result<Reset> {
        let reset = self.reset()?;
        if let Reset::NotYet(why) = &reset {
            tracing::info!(%why, "the guest is reset later");
            self.inbox.put_back(MachineEvent::ResetRequested);
        }
        Ok(reset)
    }

    /// Chooses the disks whose contents move with the guest from now on.
    ///
    /// # Errors
    /// There is no such disk, its size cannot be told, or a disk holds less by now than the guest's.
    pub(super) fn copy_disks(&mut self, numbers: &[u32]) -> anyhow::Result<()> {
        let written = |number: &u32| {
            let written = self.machine.written_blocks(*number as usize);
            written.with_context(|| format!("there is no disk {number} to copy"))
        };
        let written = numbers.iter().map(written).collect::<anyhow::Result<Vec<_>>>()?;
        let sectors = self.machine.profile().disk_sectors;
        // Somebody may have made one smaller since the destination made room for it, which would refuse it without knowing why.
        if let Some(shrunk) = self.disks.too_small_among(numbers, &sectors).pop() {
            bail!(shrunk);
        }
        // A block device may be larger than the disk that the guest knows, and is not the same at both ends.
        let bytes: Vec<u64> = numbers
            .iter()
            .map(|&number| match self.disks.is_device(number) {
                true => sectors.get(number as usize).map_or(0, |sectors| sectors * SECTOR),
                false => 0,
            })
            .collect();
        let disks = self.disks.to_copy(numbers, &bytes)?;
        self.copied = disks.into_iter().zip(written).collect();
        Ok(())
    }

    /// All that moves page by page.
    pub(super) fn moving(&self) -> SharedMemory {
        let (disks, written) = self.copied.iter().cloned().unzip();
        SharedMemory::new(self.machine.memory().clone(), disks).written(written)
    }

    /// The handle for keyboard input, which outlives moves of the machine between threads.
    pub(super) fn console_input(&self) -> ConsoleInput {
        self.machine.console_input()
    }
}

/// What a machine is built for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// To boot a kernel.
    Boot,
    /// To be filled by a migration or from a snapshot.
    Incoming,
}

/// A machine as an agent's order describes it.
pub(super) struct Blueprint {
    config: MachineConfig,
    payload: Payload,
    host: HostSide,
}

impl Blueprint {
    /// Checks the order and the descriptors that came with it.
    ///
    /// # Errors
    /// Names what cannot be built.
    pub(super) fn new(
        folder: &Path,
        spec: &MachineSpec,
        purpose: Purpose,
        descriptors: Vec<OwnedFd>,
    ) -> anyhow::Result<Self> {
        let cpu = match spec.cpu.as_str() {
            "host" => CpuModel::Host,
            "x86-64-v2" => CpuModel::X86_64V2,
            "x86-64-v3" => CpuModel::X86_64V3,
            other => bail!("unknown CPU model {other:?}: host, x86-64-v2 and x86-64-v3 are known"),
        };
        let dirty = match spec.dirty.as_str() {
            "log" => DirtyMode::Log,
            "ring" => DirtyMode::Ring,
            other => bail!("unknown dirty tracking {other:?}: log and ring are known"),
        };
        let vcpus = u8::try_from(spec.vcpus).context("too many vCPUs")?;
        let config = MachineConfig {
            memory_bytes: spec.memory_bytes,
            vcpus,
            cpu,
            dirty,
            hugepages: spec.hugepages,
            expect_incoming: purpose == Purpose::Incoming,
        };
        let inside = |name: &str| -> anyhow::Result<PathBuf> {
            // An agent names files of the instance's own folder, nothing else.
            if name.is_empty() || name.contains('/') || name.starts_with('.') {
                bail!("{name:?} is not a file of the instance's folder");
            }
            Ok(folder.join(name))
        };
        let payload = Payload {
            kernel: inside(&spec.kernel)?,
            initrd: if spec.initrd.is_empty() {
                None
            } else {
                Some(inside(&spec.initrd)?)
            },
            cmdline: spec.cmdline.clone(),
        };
        Ok(Self {
            config,
            payload,
            host: HostSide::new(spec, descriptors)?,
        })
    }

    /// Builds the machine without a guest.
    ///
    /// # Errors
    /// The host cannot have it: no KVM, not enough memory, too many vCPUs.
    pub(super) fn blank(self, console: ConsoleLog, bell: Sender<Event>) -> anyhow::Result<BlankGuest> {
        let inbox = Inbox::new(bell);
        let to_inbox = inbox.clone();
        let events = EventSink::new(move |event| to_inbox.put(event));
        let HostSide {
            backends,
            disks,
            announcer,
        } = self.host;
        let machine = BlankMachine::new(&self.config, backends, Box::new(console), events, &own_filters())?;
        Ok(BlankGuest {
            machine,
            inbox,
            payload: self.payload,
            disks,
            announcer,
            epoch: Epoch(0),
            copied: Vec::new(),
        })
    }
}

/// Each thread of a machine gives up what its kind does not need.
fn own_filters() -> ThreadHook {
    ThreadHook::new(|kind| {
        jail::narrow(match kind {
            ThreadKind::Vcpu => jail::Kind::Vcpu,
            ThreadKind::Device => jail::Kind::Device,
        });
    })
}

impl BlankGuest {
    /// Loads the kernel: the guest is ready to start, paused.
    ///
    /// # Errors
    /// The kernel cannot be read or is not one that Ferry boots.
    pub(super) fn boot(self) -> anyhow::Result<LocalGuest> {
        let payload = self.payload.open()?;
        let machine = self.machine.boot(payload)?;
        Ok(LocalGuest {
            machine,
            inbox: self.inbox,
            payload: self.payload,
            disks: self.disks,
            announcer: self.announcer,
            copied: Vec::new(),
            arming: Arming::All,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn a_reset_that_waits_stays_the_oldest_and_is_carried_out_once() {
        let (bell, _rung) = channel();
        let inbox = Inbox::new(bell);
        inbox.put(MachineEvent::ResetRequested);
        inbox.put(MachineEvent::PoweredOff);
        let reset = inbox.take().unwrap();
        inbox.put_back(reset);
        inbox.put(MachineEvent::ResetRequested);
        assert!(matches!(inbox.take(), Some(MachineEvent::ResetRequested)));
        inbox.forget_resets();
        assert!(matches!(inbox.take(), Some(MachineEvent::PoweredOff)));
        assert!(inbox.is_empty());
    }
}
