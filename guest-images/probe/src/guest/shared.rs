//! What each vCPU tells vCPU 0, which does all the talking.

use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use crate::cmdline::MAX_CPUS;
use crate::pattern::{Area, Damage};

/// FAULT lines printed for each vCPU; the heartbeats count the rest.
const FAULT_SLOTS: usize = 8;

/// One vCPU's account. The vCPU writes, vCPU 0 reads; only `gap` is taken back by the reader.
pub struct Account {
    /// The vCPU is in ring 3.
    pub arrived: AtomicBool,
    /// Its share of memory is filled.
    pub filled: AtomicBool,
    pub writes: AtomicU64,
    pub checked: AtomicU64,
    pub faults: AtomicU64,
    pub tsc_back: AtomicU64,
    gap: AtomicU64,
    slots: [FaultSlot; FAULT_SLOTS],
}

struct FaultSlot {
    page: AtomicU64,
    holds: AtomicU64,
    want: AtomicU32,
    got: AtomicU32,
    /// Index into [`KINDS`].
    kind: AtomicU32,
    in_work: AtomicBool,
}

/// A fault as its vCPU noted it.
pub struct Noted {
    pub area: Area,
    pub page: u64,
    pub want: u32,
    pub got: u32,
    pub holds: u64,
    pub kind: &'static str,
}

/// The accounts of all vCPUs that can be.
pub static ACCOUNTS: [Account; MAX_CPUS as usize] = [const { Account::new() }; MAX_CPUS as usize];

/// Set by vCPU 0 when all are filled: the workload may start.
pub static STARTED: AtomicBool = AtomicBool::new(false);

const KINDS: [&str; 5] = ["stale", "foreign", "zero", "torn", "body"];

impl Account {
    const fn new() -> Self {
        Self {
            arrived: AtomicBool::new(false),
            filled: AtomicBool::new(false),
            writes: AtomicU64::new(0),
            checked: AtomicU64::new(0),
            faults: AtomicU64::new(0),
            tsc_back: AtomicU64::new(0),
            gap: AtomicU64::new(0),
            slots: [const { FaultSlot::new() }; FAULT_SLOTS],
        }
    }

    /// Notes a gap of so many cycles. A reader may take the old one in between: the larger is then told a
    /// heartbeat later, never lost.
    #[inline]
    pub fn note_gap(&self, cycles: u64) {
        if cycles > self.gap.load(Ordering::Relaxed) {
            self.gap.store(cycles, Ordering::Relaxed);
        }
    }

    /// The largest gap since the last call.
    pub fn take_gap(&self) -> u64 {
        self.gap.swap(0, Ordering::Relaxed)
    }

    #[cold]
    pub fn note_fault(&self, area: Area, page: u64, want: u32, damage: Damage) {
        let number = self.faults.load(Ordering::Relaxed);
        if let Some(slot) = self.slots.get(number as usize) {
            let (holds, got) = match damage {
                Damage::Stale { got } => (page, got),
                Damage::Foreign { page, got } => (page, got),
                Damage::Zero | Damage::Torn => (page, 0),
                Damage::Body => (page, want),
            };
            let kind = KINDS.iter().position(|&kind| kind == damage.name());
            slot.page.store(page, Ordering::Relaxed);
            slot.holds.store(holds, Ordering::Relaxed);
            slot.want.store(want, Ordering::Relaxed);
            slot.got.store(got, Ordering::Relaxed);
            slot.kind.store(kind.unwrap_or_default() as u32, Ordering::Relaxed);
            slot.in_work.store(area == Area::Work, Ordering::Relaxed);
        }
        self.faults.store(number + 1, Ordering::Release);
    }

    /// Fault `number` of this vCPU, if it happened and was among the first.
    pub fn fault(&self, number: u64) -> Option<Noted> {
        if number >= self.faults.load(Ordering::Acquire) {
            return None;
        }
        let slot = self.slots.get(number as usize)?;
        Some(Noted {
            area: match slot.in_work.load(Ordering::Relaxed) {
                true => Area::Work,
                false => Area::Fill,
            },
            page: slot.page.load(Ordering::Relaxed),
            want: slot.want.load(Ordering::Relaxed),
            got: slot.got.load(Ordering::Relaxed),
            holds: slot.holds.load(Ordering::Relaxed),
            kind: KINDS[slot.kind.load(Ordering::Relaxed) as usize],
        })
    }
}

impl FaultSlot {
    const fn new() -> Self {
        Self {
            page: AtomicU64::new(0),
            holds: AtomicU64::new(0),
            want: AtomicU32::new(0),
            got: AtomicU32::new(0),
            kind: AtomicU32::new(0),
            in_work: AtomicBool::new(false),
        }
    }
}
