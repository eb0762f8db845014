//! The thread of one vCPU, and the handle by which the machine commands it.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use thiserror::Error;

use super::kick::{KickTarget, Kicker};
use super::throttle::{Rests, Throttle, Throttled};
use crate::arch::x86_64::boot::{EntryPoint, enter};
use crate::arch::x86_64::cpuid::CpuidEntry;
use crate::arch::x86_64::vcpu_state::{SavePlan, TscTarget, VcpuState};
use crate::devices::{Devices, PowerRequest};
use crate::kvm::{Exit, KvmError, Vcpu, Vm};
use crate::machine::{EventSink, MachineEvent};
use crate::threads::{ThreadHook, ThreadKind};

/// What a vCPU's thread needs.
pub(crate) struct VcpuSetup {
    pub(crate) vcpu: Vcpu,
    /// What it sees as its processor; given to KVM before its first run.
    pub(crate) cpuid: Vec<CpuidEntry>,
    pub(crate) plan: Arc<SavePlan>,
    pub(crate) vm: Arc<Vm>,
    pub(crate) devices: Arc<Devices>,
    pub(crate) events: EventSink,
    pub(crate) threads: ThreadHook,
}

/// Why a command to a vCPU failed.
#[derive(Debug, Error)]
pub(crate) enum VcpuError {
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Its thread did not answer in time.
    #[error("vCPU {0} did not answer")]
    Silent(u8),
    /// It runs, and the command is for one that stands still.
    #[error("the vCPU runs")]
    Running,
}

type Reply<T> = Sender<Result<T, VcpuError>>;

/// An answer that is on its way; several vCPUs work at the same time when all are commanded before the first is waited for.
#[derive(Debug)]
pub(crate) struct Pending<T> {
    index: u8,
    answer: Receiver<Result<T, VcpuError>>,
}

enum Command {
    Run(Reply<()>),
    Pause(Reply<()>),
    Enter(EntryPoint, Reply<()>),
    Save(Reply<VcpuState>),
    Restore(Box<VcpuState>, TscTarget, Reply<Vec<(u32, u64)>>),
    Finish,
}

/// The machine's end of a vCPU. Dropping it ends the thread.
pub(crate) struct VcpuHandle {
    index: u8,
    commands: Sender<Command>,
    kicker: Kicker,
    rests: Arc<Rests>,
    thread: Option<JoinHandle<()>>,
    /// Closed when the thread has ended.
    ended: Receiver<()>,
}

/// A vCPU that takes longer than this to obey is broken: KVM_RUN returns within microseconds, devices do not block.
pub(crate) const ANSWER_DEADLINE: Duration = Duration::from_secs(10);

impl VcpuHandle {
    /// Starts the thread; the vCPU stands still until it is told to run.
    ///
    /// # Errors
    ///
    /// If the thread cannot be started.
    pub(crate) fn start(setup: VcpuSetup) -> io::Result<Self> {
        let index = setup.vcpu.index();
        let (commands, inbox) = channel();
        let (ending, ended) = channel();
        let (registered, registration) = channel();
        let rests = Arc::<Rests>::default();
        let own_rests = Arc::clone(&rests);
        let thread = Builder::new().name(format!("vcpu{index}")).spawn(move || {
            let ending: Sender<()> = ending;
            let mut setup = setup;
            setup.threads.begin(ThreadKind::Vcpu);
            match KickTarget::register(&mut setup.vcpu) {
                Ok(kick) => {
                    let _ = registered.send(Ok(kick.kicker()));
                    let thread = VcpuThread {
                        kick,
                        inbox,
                        setup,
                        rests: own_rests,
                    };
                    thread.live();
                }
                Err(error) => {
                    let _ = registered.send(Err(error));
                }
            }
            drop(ending);
        })?;
        let kicker = registration.recv().map_err(io::Error::other)??;
        Ok(Self {
            index,
            commands,
            kicker,
            rests,
            thread: Some(thread),
            ended,
        })
    }

    /// A throttle for these vCPUs, which leaves them alone until it is set.
    ///
    /// # Errors
    ///
    /// If its thread cannot be started.
    pub(crate) fn throttle(vcpus: &[Self]) -> io::Result<Throttle> {
        let throttled = |vcpu: &Self| Throttled {
            kicker: vcpu.kicker,
            rests: Arc::clone(&vcpu.rests),
        };
        Throttle::start(vcpus.iter().map(throttled).collect())
    }

    /// Lets it run. Answered when it is about to enter the guest.
    pub(crate) fn run(&self) -> Pending<()> {
        self.command(Command::Run)
    }

    /// Stops it. Answered when it stands still and its pending exit is finished.
    pub(crate) fn pause(&self) -> Pending<()> {
        let pending = self.command(Command::Pause);
        // After the command is in the queue: see `kick`.
        self.kicker.kick();
        pending
    }

    /// Puts it in front of a kernel.
    pub(crate) fn enter(&self, entry: EntryPoint) -> Pending<()> {
        self.command(|reply| Command::Enter(entry, reply))
    }

    /// Reads its state.
    pub(crate) fn save(&self) -> Pending<VcpuState> {
        self.command(Command::Save)
    }

    /// Gives it a state; answers with the MSRs that the host did not take.
    pub(crate) fn restore(&self, state: VcpuState, tsc: TscTarget) -> Pending<Vec<(u32, u64)>> {
        self.command(|reply| Command::Restore(Box::new(state), tsc, reply))
    }

    fn command<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Pending<T> {
        let (reply, answer) = channel();
        // A thread that ended drops the reply with the command: the waiting side then hears that it is silent.
        let _ = self.commands.send(command(reply));
        Pending {
            index: self.index,
            answer,
        }
    }
}

impl std::fmt::Debug for VcpuHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VcpuHandle")
            .field("index", &self.index)
            .finish_non_exhaustive()
    }
}

impl<T> Pending<T> {
    /// Waits for the answer.
    ///
    /// # Errors
    ///
    /// What the vCPU says, or that it says nothing.
    pub(crate) fn wait(self) -> Result<T, VcpuError> {
        self.wait_until(Instant::now() + ANSWER_DEADLINE)
    }

    /// Waits for the answer until the deadline.
    ///
    /// # Errors
    ///
    /// What the vCPU says, or that it says nothing.
    pub(crate) fn wait_until(self, deadline: Instant) -> Result<T, VcpuError> {
        self.answer
            .recv_timeout(deadline.saturating_duration_since(Instant::now()))
            .unwrap_or(Err(VcpuError::Silent(self.index)))
    }
}

impl Drop for VcpuHandle {
    fn drop(&mut self) {
        let _ = self.commands.send(Command::Finish);
        let deadline = Instant::now() + ANSWER_DEADLINE;
        // One kick is enough for a thread in the guest; more do no harm to one that is stuck elsewhere.
        while Instant::now() < deadline {
            self.kicker.kick();
            match self.ended.recv_timeout(Duration::from_millis(100)) {
                Err(RecvTimeoutError::Timeout) => {}
                Ok(()) | Err(RecvTimeoutError::Disconnected) => {
                    let _ = self.thread.take().map(JoinHandle::join);
                    return;
                }
            }
        }
        tracing::error!(vcpu = self.index, "vCPU thread did not end; it is left behind");
    }
}

/// What the thread does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Paused,
    Running,
    Finished,
}

/// How the guest was left, once the exit is dealt with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum After {
    /// Enter again.
    Again,
    /// Nothing is pending; look at the queue.
    Interrupted,
    /// The guest must not go on until its owner says so.
    Stopped,
}

struct VcpuThread {
    // Before `setup`: it points into the vCPU and goes first.
    kick: KickTarget,
    inbox: Receiver<Command>,
    setup: VcpuSetup,
    rests: Arc<Rests>,
}

impl VcpuThread {
    fn live(mut self) {
        let mut phase = Phase::Paused;
        loop {
            phase = match phase {
                Phase::Paused => match self.inbox.recv() {
                    Ok(command) => self.obey_paused(command),
                    // The handle is gone without a word: its owner panicked.
                    Err(_) => Phase::Finished,
                },
                Phase::Running => self.run(),
                Phase::Finished => return,
            };
        }
    }

    fn run(&mut self) -> Phase {
        loop {
            self.kick.clear();
            while let Ok(command) = self.inbox.try_recv() {
                match self.obey_running(command) {
                    Phase::Running => {}
                    other => return other,
                }
            }
            if let Some(command) = self.rest() {
                match self.obey_running(command) {
                    Phase::Running => continue,
                    other => return other,
                }
            }
            match self.enter_guest() {
                After::Again | After::Interrupted => {}
                After::Stopped => return Phase::Paused,
            }
        }
    }

    /// Stands still for as long as the throttle has it, or until there is something else to do.
    fn rest(&mut self) -> Option<Command> {
        let time = self.rests.take()?;
        self.inbox.recv_timeout(time).ok()
    }

    fn obey_running(&mut self, command: Command) -> Phase {
        match command {
            Command::Run(reply) => {
                let _ = reply.send(Ok(()));
            }
            Command::Pause(reply) => {
                self.finish_pending_exit();
                let _ = reply.send(Ok(()));
                return Phase::Paused;
            }
            Command::Enter(_, reply) => {
                let _ = reply.send(Err(VcpuError::Running));
            }
            Command::Save(reply) => {
                let _ = reply.send(Err(VcpuError::Running));
            }
            Command::Restore(_, _, reply) => {
                let _ = reply.send(Err(VcpuError::Running));
            }
            Command::Finish => return Phase::Finished,
        }
        Phase::Running
    }

    fn obey_paused(&mut self, command: Command) -> Phase {
        let VcpuSetup { vcpu, cpuid, plan, .. } = &mut self.setup;
        match command {
            Command::Run(reply) => {
                vcpu.announce_pause();
                let _ = reply.send(Ok(()));
                return Phase::Running;
            }
            // It stopped by itself: an access that made it stop may still be pending.
            Command::Pause(reply) => {
                self.finish_pending_exit();
                let _ = reply.send(Ok(()));
            }
            Command::Enter(entry, reply) => {
                let _ = reply.send(enter(vcpu, entry).map_err(Into::into));
            }
            Command::Save(reply) => {
                let _ = reply.send(VcpuState::save(vcpu, plan, cpuid).map_err(Into::into));
            }
            Command::Restore(state, tsc, reply) => {
                let _ = reply.send(state.restore(vcpu, tsc, cpuid).map_err(Into::into));
            }
            Command::Finish => return Phase::Finished,
        }
        Phase::Paused
    }

    /// KVM completes an access that it handed to us only when it is entered again; until then registers are those before it.
    fn finish_pending_exit(&mut self) {
        loop {
            self.kick.mark();
            match self.enter_guest() {
                After::Again => {}
                After::Interrupted | After::Stopped => break,
            }
        }
    }

    fn enter_guest(&mut self) -> After {
        let VcpuSetup {
            vcpu,
            vm,
            devices,
            events,
            ..
        } = &mut self.setup;
        let index = vcpu.index();
        let exit = vcpu.run();
        let event = match exit {
            Ok(Exit::Interrupted) => return After::Interrupted,
            Ok(Exit::PortIn { port, size, data }) => {
                devices.read_port(port, size, data);
                return After::Again;
            }
            Ok(Exit::PortOut { port, size, data }) => match devices.write_port(port, size, data) {
                None => return After::Again,
                Some(PowerRequest::Reset) => MachineEvent::ResetRequested,
                Some(PowerRequest::PowerOff) => MachineEvent::PoweredOff,
                Some(PowerRequest::Panicked) => MachineEvent::Panicked,
            },
            Ok(Exit::MmioRead { address, data }) => {
                devices.read_address(address, data);
                return After::Again;
            }
            Ok(Exit::MmioWrite { address, data }) => {
                devices.write_address(address, data);
                return After::Again;
            }
            Ok(Exit::DirtyRingFull) => match vm.relieve_ring(index) {
                Ok(()) => return After::Again,
                Err(error) => failed(index, &error),
            },
            Ok(Exit::Shutdown) => MachineEvent::TripleFault,
            Ok(Exit::Failed(reason)) => MachineEvent::Failed { vcpu: index, reason },
            Err(error) => failed(index, &error),
        };
        let goes_on = event == MachineEvent::Panicked;
        events.tell(event);
        if goes_on { After::Again } else { After::Stopped }
    }
}

fn failed(vcpu: u8, error: &KvmError) -> MachineEvent {
    let cause = std::error::Error::source(error).map_or_else(String::new, |cause| format!(": {cause}"));
    MachineEvent::Failed {
        vcpu,
        reason: format!("{error}{cause}"),
    }
}
