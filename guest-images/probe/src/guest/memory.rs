//! The machine's memory: what there is of it, mapping it, and handing it out once and for all.

use core::ptr;

use crate::machine::{MIB, PAGE_BYTES, image_end_address};

const MAX_EXTENTS: usize = 16;

const GIB: u64 = 1 << 30;
const LARGE_PAGE: u64 = 2 * MIB;
/// Present, writable, user, and already accessed and dirty: see `start.s`.
const TABLE_FLAGS: u64 = 0x67;
const LARGE_PAGE_FLAGS: u64 = 0xe7;
/// The same, not cached: for devices.
const DEVICE_FLAGS: u64 = LARGE_PAGE_FLAGS | 0x18;
/// One PDPT holds so much; memory above is left alone.
const MAPPABLE: u64 = 512 * GIB;
/// 2 MiB page with the local APIC.
const APIC_LARGE_PAGE: u64 = 0xfee0_0000;

const STACK_BYTES: u64 = 64 * 1024;

/// Guest physical addresses from `start` to before `end`, both on page boundaries.
#[derive(Clone, Copy, Default)]
pub struct Extent {
    start: u64,
    end: u64,
}

impl Extent {
    fn pages(self) -> u64 {
        (self.end - self.start) / PAGE_BYTES
    }
}

/// Pages, numbered from 0, wherever in memory they lie.
#[derive(Clone, Copy, Default)]
pub struct Pages {
    extents: [Extent; MAX_EXTENTS],
    count: u64,
}

impl Pages {
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Address of page `number`, which must be below the count.
    #[inline]
    pub fn address(&self, number: u64) -> u64 {
        let mut left = number;
        for extent in &self.extents {
            if left < extent.pages() {
                return extent.start + left * PAGE_BYTES;
            }
            left -= extent.pages();
        }
        panic!("a page number beyond its area");
    }
}

/// Memory that is not handed out yet.
#[derive(Default)]
pub struct Memory {
    extents: [Extent; MAX_EXTENTS],
    used: usize,
    total_bytes: u64,
}

impl Memory {
    /// The usual shape of a machine with so much memory: a hole from 3 GiB to 4 GiB.
    pub fn assume(mib: u64) -> Self {
        let mut memory = Self::default();
        let low = (mib * MIB).min(3 * GIB);
        // Two extents always fit.
        let _ = memory.add(0, low);
        let _ = memory.add(4 * GIB, mib * MIB - low);
        memory
    }

    /// Adds memory of the machine. What lies below the end of the image counts, but is never handed out.
    pub fn add(&mut self, start: u64, bytes: u64) -> Result<(), &'static str> {
        self.total_bytes += bytes;
        let end = start.saturating_add(bytes).min(MAPPABLE) / PAGE_BYTES * PAGE_BYTES;
        let start = start.max(image_end_address()).next_multiple_of(PAGE_BYTES);
        if start >= end {
            return Ok(());
        }
        let slot = self.extents.get_mut(self.used);
        *slot.ok_or("the memory map has too many entries")? = Extent { start, end };
        self.used += 1;
        Ok(())
    }

    pub fn total_mib(&self) -> u64 {
        self.total_bytes.div_ceil(MIB)
    }

    /// Maps all memory and the local APIC one to one, with large pages, open to ring 3.
    ///
    /// Only adds entries where there were none, so nothing need be flushed. Before this, only the first GiB may be used.
    pub fn map(&mut self) -> Result<(), &'static str> {
        for at in 0..self.used {
            let Extent { start, end } = self.extents[at];
            let mut address = start.max(GIB) / LARGE_PAGE * LARGE_PAGE;
            while address < end {
                self.map_large_page(address, LARGE_PAGE_FLAGS)?;
                address += LARGE_PAGE;
            }
        }
        self.map_large_page(APIC_LARGE_PAGE, DEVICE_FLAGS)
    }

    /// Maps the registers of a device, not cached: the large page around them, which is the device's alone.
    pub fn map_device(&mut self, address: u64) -> Result<(), &'static str> {
        let page = address / LARGE_PAGE * LARGE_PAGE;
        let is_memory = |extent: &Extent| extent.start < page + LARGE_PAGE && page < extent.end;
        if page < GIB || self.extents[..self.used].iter().any(is_memory) {
            return Err("memory lies where a device was looked for");
        }
        self.map_large_page(page, DEVICE_FLAGS)
    }

    fn map_large_page(&mut self, address: u64, flags: u64) -> Result<(), &'static str> {
        unsafe extern "C" {
            static mut boot_pdpt: [u64; 512];
        }
        let pdpt = (&raw mut boot_pdpt).cast::<u64>();
        // SAFETY: only vCPU 0 runs, addresses are below 512 GiB, and tables lie in the mapped first GiB: `take_table`.
        unsafe {
            let slot = pdpt.add((address / GIB) as usize);
            if slot.read_volatile() == 0 {
                slot.write_volatile(self.take_table()? | TABLE_FLAGS);
            }
            let table = (slot.read_volatile() & !(PAGE_BYTES - 1)) as *mut u64;
            let entry = table.add((address % GIB / LARGE_PAGE) as usize);
            entry.write_volatile(address | flags);
        }
        Ok(())
    }

    /// A zeroed page below 1 GiB.
    fn take_table(&mut self) -> Result<u64, &'static str> {
        let table = self.take(PAGE_BYTES).filter(|&table| table + PAGE_BYTES <= GIB);
        let table = table.ok_or("no memory below 1 GiB for page tables")?;
        // SAFETY: this memory is mapped, and nobody else's.
        unsafe { ptr::write_bytes(table as *mut u8, 0, PAGE_BYTES as usize) };
        Ok(table)
    }

    /// Stacks for all vCPUs but the first: the address of the first byte.
    pub fn take_stacks(&mut self, cpus: u32) -> Result<Stacks, &'static str> {
        let bytes = STACK_BYTES * u64::from(cpus - 1);
        let base = self.take(bytes).ok_or("no memory for stacks")?;
        Ok(Stacks { base })
    }

    /// Bytes in one piece, a multiple of the page size, from the first extent that has them. Not zeroed.
    pub fn take(&mut self, bytes: u64) -> Option<u64> {
        let bytes = bytes.next_multiple_of(PAGE_BYTES);
        let mut extents = self.extents[..self.used].iter_mut();
        let extent = extents.find(|extent| extent.end - extent.start >= bytes)?;
        let start = extent.start;
        extent.start += bytes;
        Some(start)
    }

    /// The same, zeroed.
    pub fn take_zeroed(&mut self, bytes: u64) -> Option<u64> {
        let start = self.take(bytes)?;
        // SAFETY: this memory is mapped, and nobody else's.
        unsafe { ptr::write_bytes(start as *mut u8, 0, bytes as usize) };
        Some(start)
    }

    /// Pages left.
    pub fn free_pages(&self) -> u64 {
        self.extents[..self.used].iter().map(|extent| extent.pages()).sum()
    }

    /// So many pages, in as many pieces as it takes; `None` if there are fewer.
    pub fn take_pages(&mut self, count: u64) -> Option<Pages> {
        if count > self.free_pages() {
            return None;
        }
        let mut pages = Pages {
            count,
            ..Pages::default()
        };
        let mut left = count;
        for (to, from) in pages.extents.iter_mut().zip(&mut self.extents[..self.used]) {
            let taken = left.min(from.pages());
            to.start = from.start;
            to.end = from.start + taken * PAGE_BYTES;
            from.start = to.end;
            left -= taken;
        }
        Some(pages)
    }
}

/// Stacks of the vCPUs that are woken.
#[derive(Clone, Copy)]
pub struct Stacks {
    base: u64,
}

impl Stacks {
    /// Top of the stack of vCPU `cpu`, which is not 0.
    pub fn top(self, cpu: u32) -> u64 {
        self.base + STACK_BYTES * u64::from(cpu)
    }
}
