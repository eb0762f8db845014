//! A machine of the VMM, as the engine wants to see a guest that moves.

use std::sync::Arc;
use std::time::Instant;

use ferry_migration::PageSet;
use ferry_migration::guest::{
    DestinationGuest, DirtyClearer, DiskCondition, DiskWaits, FrameRun, FreePages, GuestCondition, GuestEnd,
    GuestError, GuestWas, Population, RestoredGuest, SourceGuest, StopTimes, Throttled,
};
use ferry_vmm::{
    Arming, FreePageHints, MachineEvent, MachineProfile, MachineState, RunState, ThrottledVcpus, WriteWaits,
};

use super::copied::CopiedDisk;
use super::guest::{BlankGuest, LocalGuest, Reset, RestoredMachine};
use super::memory::{SharedMemory, to_vmm};

/// Re-arms KVM's dirty tracking.
#[derive(Clone)]
pub(super) struct Clearer(ferry_vmm::DirtyClearer);

impl DirtyClearer for Clearer {
    fn rearm(&self, run: FrameRun, dirty: &[u64]) -> Result<(), GuestError> {
        if CopiedDisk::is_disk(run) {
            // Fetching has re-armed it.
            return Ok(());
        }
        self.0.rearm_words(to_vmm(run), dirty).map_err(GuestError::new)
    }
}

/// What the balloon's driver says of free pages.
struct Hints(FreePageHints);

impl FreePages for Hints {
    fn take(&self, found: &mut Vec<FrameRun>) {
        let mut said = Vec::new();
        self.0.take(&mut said);
        found.extend(said.into_iter().map(|run| FrameRun {
            first: run.first,
            count: run.count,
        }));
    }
}

impl SourceGuest for LocalGuest {
    type Memory = SharedMemory;
    type Clearer = Clearer;

    fn memory(&self) -> Arc<SharedMemory> {
        Arc::new(self.moving())
    }

    fn profile(&self) -> Vec<u8> {
        self.machine.profile().to_bytes()
    }

    fn start_tracking(&mut self) -> Result<(), GuestError> {
        self.copied.iter().for_each(|(_, written)| written.start());
        // A page that the guest says is free is left out, and not re-armed: it has to be found if it is used after that, and only then.
        self.arming = match self.machine.run_state() == RunState::Running && self.machine.balloon().has_driver() {
            true => Arming::All,
            false => Arming::Unpopulated,
        };
        self.machine.start_dirty_tracking(self.arming).map_err(GuestError::new)
    }

    fn ask_for_free_pages(&mut self) -> Option<Arc<dyn FreePages>> {
        // One that its user has paused cannot answer.
        let runs = self.machine.run_state() == RunState::Running;
        (runs && self.arming == Arming::All)
            .then(|| Arc::new(Hints(self.machine.ask_for_free_pages())) as Arc<dyn FreePages>)
    }

    fn end_free_pages(&mut self) {
        self.machine.end_free_page_hints();
    }

    fn populated(&self) -> Result<Population, GuestError> {
        self.moving().populated()
    }

    fn fetch_dirty(&mut self, dirty: &mut PageSet) -> Result<(), GuestError> {
        // Whoever made a disk smaller meanwhile took something of the guest's away. Not asked while the guest stands still: a network file
        // system may take its time.
        if self.machine.run_state() == RunState::Running
            && let Some(shrunk) = self.disks.too_small_for(&self.machine.disk_sectors()).pop()
        {
            return Err(GuestError::new(shrunk));
        }
        let fetched = self.machine.fetch_dirty().map_err(GuestError::new)?;
        let memory_regions = dirty.regions() - self.copied.len();
        for index in 0..memory_regions {
            dirty.insert_words(index, fetched.words(index));
        }
        for (index, (_, written)) in (memory_regions..).zip(&self.copied) {
            dirty.insert_words(index, &written.take());
        }
        Ok(())
    }

    fn written_by_vcpu(&self) -> Option<Vec<u64>> {
        self.machine.written_by_vcpu()
    }

    fn hold_back_disk_writes(&mut self, blocks: Option<u64>) {
        // Each disk has its part, so that none waits for what the guest writes to another one.
        let each = blocks.map(|blocks| (blocks / self.copied.len().max(1) as u64).max(1));
        self.copied.iter().for_each(|(_, written)| written.hold_back(each));
    }

    fn disk_waits(&self) -> DiskWaits {
        let waits = self.copied.iter().map(|(_, written)| written.waits());
        let WriteWaits { count, longest, total } = waits.fold(WriteWaits::default(), WriteWaits::plus);
        DiskWaits { count, longest, total }
    }

    fn clearer(&self) -> Clearer {
        Clearer(self.machine.dirty_clearer())
    }

    fn throttle(&mut self, percent: u32) -> Result<Throttled, GuestError> {
        // A vCPU that its user has paused writes nothing.
        if self.machine.run_state() == RunState::Paused {
            return Ok(Throttled::None);
        }
        let throttled = self.machine.throttle(percent).map_err(GuestError::new)?;
        Ok(match throttled {
            ThrottledVcpus::None => Throttled::None,
            ThrottledVcpus::All => Throttled::All,
            ThrottledVcpus::Writers(count) => Throttled::Writers(count),
        })
    }

    fn stop_tracking(&mut self) {
        self.machine.end_throttle();
        self.copied.drain(..).for_each(|(_, written)| written.stop());
        if let Err(error) = self.machine.stop_dirty_tracking() {
            tracing::warn!(%error, "failed to stop dirty tracking: the guest runs on, more slowly");
        }
    }

    fn poll(&mut self) -> GuestCondition {
        while let Some(event) = self.inbox.take() {
            match event {
                MachineEvent::ResetRequested => match self.reset_asked() {
                    Ok(Reset::Done) => {}
                    // The next look tries again.
                    Ok(Reset::NotYet(_)) => return GuestCondition::Alive,
                    Err(error) => return GuestCondition::Ended(GuestEnd::Crashed(format!("{error:#}"))),
                },
                ended => return GuestCondition::Ended(end_of(ended)),
            }
        }
        GuestCondition::Alive
    }

    fn settle_disks(&mut self) -> DiskCondition {
        self.disks.settle()
    }

    fn stop(&mut self, deadline: Instant) -> Result<StopTimes, GuestError> {
        let times = self.machine.pause_until(deadline).map_err(GuestError::new)?;
        let began = Instant::now();
        let not_written = |error| GuestError::new(format!("a disk does not take what the guest wrote: {error}"));
        self.disks.write_back_by(deadline).map_err(not_written)?;
        Ok(StopTimes {
            pause: times.vcpus,
            drain: times.drain + began.elapsed(),
        })
    }

    fn export(&mut self) -> Result<Vec<u8>, GuestError> {
        Ok(self.machine.export().map_err(GuestError::new)?.to_bytes())
    }

    fn state_digest(&self, state: &[u8]) -> Result<u128, GuestError> {
        Ok(MachineState::from_bytes(state).map_err(GuestError::new)?.digest())
    }

    fn release_disks(&mut self) {
        self.disks.unlock();
    }

    fn resume(&mut self, was: GuestWas) -> Result<(), GuestError> {
        match was {
            GuestWas::Running => self.machine.run().map_err(GuestError::new),
            GuestWas::PausedByUser => Ok(()),
        }
    }
}

/// How the guest ended, in the engine's terms. A reset is no end.
pub(super) fn end_of(event: MachineEvent) -> GuestEnd {
    match event {
        MachineEvent::PoweredOff => GuestEnd::PoweredOff,
        MachineEvent::Panicked => GuestEnd::Panicked,
        MachineEvent::TripleFault => GuestEnd::Crashed("triple fault".to_owned()),
        MachineEvent::Failed { vcpu, reason } => GuestEnd::Crashed(format!("vCPU {vcpu}: {reason}")),
        MachineEvent::ResetRequested => GuestEnd::Crashed("reset".to_owned()),
    }
}

impl DestinationGuest for BlankGuest {
    type Memory = SharedMemory;
    type Restored = RestoredMachine;

    fn memory(&self) -> Arc<SharedMemory> {
        Arc::new(SharedMemory::new(self.machine.memory().clone(), self.copied.clone()))
    }

    fn check(&self, profile: &[u8]) -> Vec<String> {
        match MachineProfile::from_bytes(profile) {
            Ok(profile) => {
                let lacks = self.machine.host().check(&profile);
                let lacks = lacks.iter().map(ToString::to_string);
                lacks.chain(self.disks.too_small_for(&profile.disk_sectors)).collect()
            }
            Err(error) => vec![format!("the source's machine profile does not parse: {error}")],
        }
    }

    fn restore(mut self, state: &[u8]) -> Result<RestoredMachine, GuestError> {
        let state = MachineState::from_bytes(state).map_err(GuestError::new)?;
        // GO's manifest was checked, and the source let go of them before it sent GO. From here on they are this host's.
        self.disks.lock(self.epoch).map_err(GuestError::new)?;
        self.disks.end_copy();
        self.disks.forget_cached();
        let machine = self.machine.restore(&state).map_err(GuestError::new)?;
        Ok(RestoredMachine(LocalGuest {
            machine,
            inbox: self.inbox,
            payload: self.payload,
            disks: self.disks,
            announcer: self.announcer,
            copied: Vec::new(),
            arming: Arming::All,
        }))
    }
}

impl RestoredGuest for RestoredMachine {
    fn state_digest(&self) -> Result<u128, GuestError> {
        Ok(self.0.machine.export().map_err(GuestError::new)?.digest())
    }
}
