//! Which pages were written: by KVM's dirty log, or by its dirty rings.
//!
//! Log or ring is fixed when the VM is made (KVM lets only one of them exist). The log is used with manual protection, and begins full where
//! that is wanted and the kernel knows it (KVM_DIRTY_LOG_INITIALLY_SET, 5.7; `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` in the KVM API): nothing is
//! protected then before it is cleared, so that a guest has no fault for a page that is still to be sent anyway ([`Arming`]). To protect all at
//! once so would be dearer than by the flag alone: 12 GiB with 64 MiB touched, on kvm-pvm, 5.8 ms instead of 3.4.

use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_MEM_LOG_DIRTY_PAGES, kvm_enable_cap,
};
use kvm_ioctls::VmFd;

use super::host::Host;
use super::ring::{DirtyRing, Half, Harvest};
use super::uapi;
use super::vm::{KvmError, Vm};
use crate::machine::DirtyMode;
use crate::memory::{DirtyBitmap, FrameRun, GuestMemory, word_mask};

/// Which pages are found from the start on only if they are written. With a ring, or a kernel before 5.7, all of them whatever is said here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arming {
    /// All of them.
    All,
    /// Those that nothing is on. Each of the others counts as written until it is re-armed, and costs its guest no fault until then: for whoever is
    /// to read all of them once anyway, and re-arms each right before.
    Unpopulated,
}

/// Pages that are armed by one call: 64 MiB, so that no vCPU waits long for the lock that KVM holds meanwhile; 256 MiB where nothing is on any of
/// them, and so nothing is to be protected. Multiples of 64.
const ARMED_AT_ONCE: u64 = 16 << 10;
const EMPTY_AT_ONCE: u64 = 64 << 10;

/// How this VM tracks.
#[derive(Debug)]
pub(super) enum Tracking {
    Log { can_begin_full: bool },
    Ring { bytes: usize, rings: Mutex<Rings> },
}

/// All rings and what was read from them. One lock over reading *and* resetting them: a page must not be handed out as dirty
/// while a write to it would still go unnoticed.
#[derive(Debug)]
pub(super) struct Rings {
    rings: Vec<DirtyRing>,
    found: DirtyBitmap,
    /// Of each ring, how many pages it has told of so far.
    told: Vec<u64>,
}

impl Tracking {
    /// Maps the ring of a new vCPU.
    pub(super) fn add_vcpu(&self, vcpu: BorrowedFd<'_>) -> Result<(), KvmError> {
        if let Self::Ring { bytes, rings } = self {
            let ring = DirtyRing::new(vcpu, *bytes).map_err(|source| KvmError::io("map the dirty ring", source))?;
            let mut rings = lock(rings);
            rings.rings.push(ring);
            rings.told.push(0);
        }
        Ok(())
    }
}

impl Vm {
    /// Starts to track: after this returned, every write of a vCPU to a page is found until `stop_tracking`.
    pub(crate) fn start_tracking(&self, arming: Arming) -> Result<(), KvmError> {
        match &self.tracking {
            &Tracking::Log { can_begin_full } => {
                let begins_full = can_begin_full && arming == Arming::Unpopulated;
                // A log that was left from before would go on as it began, and huge mappings be protected or not by how this one does.
                self.set_memory_flags(0)?;
                self.log_begins_full(begins_full)?;
                let begun = self.set_memory_flags(KVM_MEM_LOG_DIRTY_PAGES);
                let armed = begun.and_then(|()| if begins_full { self.arm_unpopulated() } else { Ok(()) });
                if let Err(error) = armed {
                    let _ = self.set_memory_flags(0);
                    return Err(error);
                }
            }
            Tracking::Ring { rings, .. } => {
                self.set_memory_flags(KVM_MEM_LOG_DIRTY_PAGES)?;
                let mut rings = lock(rings);
                // Left from an earlier round of tracking.
                self.harvest(&mut rings)?;
                rings.found = DirtyBitmap::empty(self.memory.shape());
            }
        }
        let _ = self.memory.device_dirty();
        Ok(())
    }

    /// Whether the log is full when it begins. KVM makes it with the flag of the memory, so this is to be said before.
    fn log_begins_full(&self, full: bool) -> Result<(), KvmError> {
        let full = if full { KVM_DIRTY_LOG_INITIALLY_SET } else { 0 };
        enable(
            &self.fd,
            "enable manual protection in the dirty log",
            KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
            u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | full),
        )
    }

    /// Protects what nothing is on, of a log that is full; all of it where that cannot be told. What is populated meanwhile is found by whoever looks
    /// it up after this.
    fn arm_unpopulated(&self) -> Result<(), KvmError> {
        let mut populated = DirtyBitmap::empty(self.memory.shape());
        for run in self.memory.populated().into_iter().flat_map(|found| found.runs) {
            populated.insert(run);
        }
        for (slot, frames) in self.memory.shape().runs().iter().enumerate() {
            let words: Vec<u64> = populated.words(slot).iter().map(|word| !word).collect();
            let mut first = 0;
            while first < frames.count {
                let of =
                    |pages: u64| &words[(first / 64) as usize..(first + pages).min(frames.count).div_ceil(64) as usize];
                let is_empty = of(EMPTY_AT_ONCE).iter().all(|&word| word == u64::MAX);
                let pages = if is_empty { EMPTY_AT_ONCE } else { ARMED_AT_ONCE };
                let pages = pages.min(frames.count - first);
                if of(pages).iter().any(|&word| word != 0) {
                    self.clear(slot, first, pages, of(pages))?;
                }
                first += pages;
            }
        }
        Ok(())
    }

    /// Stops to track; pages are at full speed again.
    pub(crate) fn stop_tracking(&self) -> Result<(), KvmError> {
        self.set_memory_flags(0)
    }

    /// What was written since the start, or since it was last re-armed; see [`crate::Machine::fetch_dirty`].
    pub(crate) fn fetch_dirty(&self) -> Result<DirtyBitmap, KvmError> {
        let mut dirty = DirtyBitmap::empty(self.memory.shape());
        match &self.tracking {
            Tracking::Log { .. } => {
                for (slot, frames) in self.memory.shape().runs().iter().enumerate() {
                    uapi::dirty_log(&self.fd, slot as u32, frames.count, dirty.words_mut(slot))
                        .map_err(|error| KvmError::new("read the dirty log", error))?;
                }
            }
            Tracking::Ring { rings, .. } => {
                let mut rings = lock(rings);
                self.harvest(&mut rings)?;
                std::mem::swap(&mut rings.found, &mut dirty);
            }
        }
        self.memory.fetch_device_dirty(&mut dirty);
        Ok(dirty)
    }

    /// How many pages each vCPU has been found to have written so far, pages that it wrote again each time; none with the log, which does not
    /// tell them apart.
    pub(crate) fn written_by_vcpu(&self) -> Option<Vec<u64>> {
        match &self.tracking {
            Tracking::Log { .. } => None,
            Tracking::Ring { rings, .. } => Some(lock(rings).told.clone()),
        }
    }

    /// Makes room in the ring of a vCPU that was put out of the guest because its ring is full; call on that vCPU's thread.
    pub(crate) fn relieve_ring(&self, vcpu: u8) -> Result<(), KvmError> {
        let Tracking::Ring { rings, .. } = &self.tracking else {
            return Ok(());
        };
        let mut rings = lock(rings);
        self.harvest(&mut rings)?;
        let Rings { rings, found, .. } = &mut *rings;
        let ring = &mut rings[usize::from(vcpu)];
        // Else there is room now, or the ring is full again at once.
        if !ring.is_stuck() {
            return Ok(());
        }
        for half in [Half::First, Half::Second] {
            ring.give_up_half(half);
            self.reset_rings()?;
            if ring.regain(half) {
                break;
            }
        }
        self.start_over(found)
    }

    /// Reads all rings and has their pages protected again; returns what each had.
    fn harvest(&self, rings: &mut Rings) -> Result<Vec<Harvest>, KvmError> {
        let frames = self.memory.shape().runs();
        let Rings { rings, found, told } = rings;
        let mut harvests: Vec<Harvest> = rings
            .iter_mut()
            .map(|ring| {
                ring.harvest(|slot, page| {
                    // The upper half is the address space (system management mode has its own), which shares our slots.
                    if let Some(frames) = frames.get((slot & 0xffff) as usize) {
                        found.insert(FrameRun {
                            first: frames.first + page,
                            count: 1,
                        });
                    }
                })
            })
            .collect();
        for ((told, ring), harvest) in told.iter_mut().zip(&*rings).zip(&harvests) {
            *told += match harvest {
                Harvest::Complete(pages) => *pages as u64,
                // At least.
                Harvest::Overrun => ring.count() as u64,
            };
        }
        if harvests.iter().any(|harvest| *harvest != Harvest::Complete(0)) {
            self.reset_rings()?;
        }
        let mut settled = false;
        for (ring, harvest) in rings.iter_mut().zip(&mut harvests) {
            match harvest {
                Harvest::Complete(0) => {}
                Harvest::Complete(_) if ring.was_reset() => {}
                _ => {
                    *harvest = Harvest::Overrun;
                    settled |= ring.settle();
                }
            }
        }
        if settled {
            self.start_over(found)?;
        } else if harvests.contains(&Harvest::Overrun) {
            self.take_all_for_written(found);
        }
        Ok(harvests)
    }

    /// When a ring that was overrun is in order again: pages of the lost entries are not protected, so protects all.
    fn start_over(&self, found: &mut DirtyBitmap) -> Result<(), KvmError> {
        self.set_memory_flags(0)?;
        self.set_memory_flags(KVM_MEM_LOG_DIRTY_PAGES)?;
        self.take_all_for_written(found);
        Ok(())
    }

    /// While a ring is overrun: everything that may ever have been written counts as written.
    fn take_all_for_written(&self, found: &mut DirtyBitmap) {
        match self.memory.populated() {
            Ok(population) => population.runs.into_iter().for_each(|run| found.insert(run)),
            Err(_) => self.memory.shape().runs().into_iter().for_each(|run| found.insert(run)),
        }
    }

    fn reset_rings(&self) -> Result<(), KvmError> {
        uapi::reset_dirty_rings(&self.fd).map_err(|error| KvmError::new("reset the dirty rings", error))
    }

    fn clear(&self, slot: usize, first_page: u64, pages: u64, words: &[u64]) -> Result<(), KvmError> {
        let pages = u32::try_from(pages).map_err(|_| KvmError::limit("clear the dirty log", words.len()))?;
        uapi::clear_dirty_log(&self.fd, slot as u32, first_page, pages, words)
            .map_err(|error| KvmError::new("clear the dirty log", error))
    }
}

/// Re-arms tracking range by range. A handle: clone it into every thread that sends.
#[derive(Debug, Clone)]
pub struct DirtyClearer {
    vm: Arc<Vm>,
}

impl DirtyClearer {
    pub(crate) fn new(vm: Arc<Vm>) -> Self {
        Self { vm }
    }

    /// Makes the pages that are marked in `dirty` and lie in `range` be found again when they are next written.
    ///
    /// Call it *before* reading those pages: a write in between is then read, a later one found. With the ring this does nothing,
    /// for fetching has re-armed already.
    ///
    /// # Errors
    ///
    /// If tracking is off or the host fails.
    pub fn rearm(&self, range: FrameRun, dirty: &DirtyBitmap) -> Result<(), KvmError> {
        if !matches!(self.vm.tracking, Tracking::Log { .. }) {
            return Ok(());
        }
        for (slot, frames) in self.vm.memory.shape().runs().into_iter().enumerate() {
            let Some(part) = frames.intersection(range) else {
                continue;
            };
            let start = part.first - frames.first;
            let end = start + part.count;
            // KVM takes whole words; pages at the edges that are not in the range are left out by their bits.
            let first_word = start / 64;
            let mut words = dirty.words(slot)[first_word as usize..end.div_ceil(64) as usize].to_vec();
            for (index, word) in words.iter_mut().enumerate() {
                *word &= word_mask(first_word + index as u64, start, end);
            }
            let pages = end.next_multiple_of(64).min(frames.count) - first_word * 64;
            self.vm.clear(slot, first_word * 64, pages, &words)?;
        }
        Ok(())
    }

    /// As [`rearm`](Self::rearm), with the bits of the run alone: bit `i % 64` of word `i / 64` is frame `run.first + i`.
    ///
    /// # Errors
    ///
    /// As there, and if the run is not whole words of one region or has too few words.
    pub fn rearm_words(&self, run: FrameRun, words: &[u64]) -> Result<(), KvmError> {
        let shape = self.vm.memory.shape();
        let aligned = shape.locate(run).filter(|(region, page)| {
            let end = page + run.count;
            let whole = run.count.is_multiple_of(64) || end == shape.regions[*region].run().count;
            page.is_multiple_of(64) && whole && words.len() as u64 >= run.count.div_ceil(64)
        });
        let Some((slot, page)) = aligned else {
            return Err(KvmError::limit("clear the dirty log of an odd range", words.len()));
        };
        match self.vm.tracking {
            Tracking::Log { .. } => self.vm.clear(slot, page, run.count, words),
            Tracking::Ring { .. } => Ok(()),
        }
    }
}

/// Chooses log or ring for a VM that has no vCPU yet.
pub(super) fn enable_tracking(
    fd: &VmFd,
    host: &Host,
    memory: &GuestMemory,
    dirty: DirtyMode,
) -> Result<Tracking, KvmError> {
    match dirty {
        // The log's manner is said each time that it begins.
        DirtyMode::Log => Ok(Tracking::Log {
            can_begin_full: host.dirty_log_begins_full,
        }),
        DirtyMode::Ring => {
            let cap = if host.dirty_ring_acquire_release {
                KVM_CAP_DIRTY_LOG_RING_ACQ_REL
            } else {
                KVM_CAP_DIRTY_LOG_RING
            };
            let bytes = host.dirty_ring_bytes;
            enable(
                fd,
                "enable the dirty ring, which this host must have",
                cap,
                bytes as u64,
            )?;
            Ok(Tracking::Ring {
                bytes,
                rings: Mutex::new(Rings {
                    rings: Vec::new(),
                    told: Vec::new(),
                    found: DirtyBitmap::empty(memory.shape()),
                }),
            })
        }
    }
}

fn enable(fd: &VmFd, what: &'static str, cap: u32, argument: u64) -> Result<(), KvmError> {
    fd.enable_cap(&kvm_enable_cap {
        cap,
        args: [argument, 0, 0, 0],
        ..Default::default()
    })
    .map_err(|error| KvmError::new(what, error))
}

/// A panic in another thread leaves the rings as they are between two entries: usable.
fn lock(rings: &Mutex<Rings>) -> MutexGuard<'_, Rings> {
    rings.lock().unwrap_or_else(PoisonError::into_inner)
}
