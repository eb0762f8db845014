//! What all vCPUs work from: made once by vCPU 0, then only read.

use core::cell::UnsafeCell;
use core::mem::MaybeUninit;

use crate::cmdline::Options;
use crate::frequency::Frequency;
use crate::machine::{MIB, PAGE_BYTES};
use crate::memory::{Memory, Pages};

/// The areas, the clock and the options.
pub struct Plan {
    pub options: Options,
    pub frequency: Frequency,
    pub mem_mib: u64,
    pub fill: Pages,
    pub work: Pages,
    /// Address of the version of each page of the work area, a `u32` each.
    pub versions: u64,
}

struct Place(UnsafeCell<MaybeUninit<Plan>>);

// SAFETY: written by vCPU 0 before any other vCPU is woken, read-only from then on.
unsafe impl Sync for Place {}

static PLACE: Place = Place(UnsafeCell::new(MaybeUninit::uninit()));

impl Plan {
    /// Lays the areas out and publishes the plan. Called once, by vCPU 0, while it is alone.
    ///
    /// # Errors
    /// How many MiB are free, if the options ask for more.
    pub fn publish(options: Options, memory: &mut Memory, frequency: Frequency) -> Result<&'static Self, u64> {
        let pages = |mib: u64| mib * (MIB / PAGE_BYTES);
        let free_mib = memory.free_pages() / (MIB / PAGE_BYTES);
        let mem_mib = memory.total_mib();
        let work_pages = pages(options.work_size_mib());
        let versions = memory.take(work_pages * size_of::<u32>() as u64).ok_or(free_mib)?;
        let fill = memory.take_pages(pages(options.fill_mib)).ok_or(free_mib)?;
        let work = memory.take_pages(work_pages).ok_or(free_mib)?;
        // SAFETY: no other vCPU runs yet, and this is called once.
        let place = unsafe { &mut *PLACE.0.get() };
        Ok(place.write(Self {
            options,
            frequency,
            mem_mib,
            fill,
            work,
            versions,
        }))
    }

    pub fn cycles(&self, ms: u64) -> u64 {
        ms * self.frequency.khz
    }

    pub fn nanoseconds(&self, cycles: u64) -> u64 {
        cycles.saturating_mul(1_000_000) / self.frequency.khz
    }
}
