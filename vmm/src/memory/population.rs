//! Which guest pages the host has ever backed.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use super::mapping::{GuestMemory, MemoryError};
use super::shape::{FrameRun, HUGE_PAGE_SIZE, PAGE_SIZE, push_run};
use crate::host_files;

/// What the host has backed: every page that may hold something other than zeroes is in `runs`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Population {
    /// Pages that are present or swapped out and not the kernel's zero page; maximal runs, ascending.
    pub runs: Vec<FrameRun>,
    /// Those of them that huge pages back; empty where the kernel does not tell (before 6.7).
    pub huge: Vec<FrameRun>,
}

impl GuestMemory {
    /// Asks the kernel what it has backed, without touching anything.
    ///
    /// A page that gets its first write during the scan may be missing: with dirty tracking on *before* the scan it is in the log.
    ///
    /// # Errors
    ///
    /// If `/proc/self/pagemap` cannot be read.
    pub fn populated(&self) -> Result<Population, MemoryError> {
        let mut population = Population::default();
        for region in self.shape().runs() {
            self.scan(region, &mut population)?;
        }
        Ok(population)
    }

    /// [`GuestMemory::populated`] of one run.
    ///
    /// # Errors
    ///
    /// If the run is out of bounds, or `/proc/self/pagemap` cannot be read.
    pub(super) fn populated_in(&self, run: FrameRun) -> Result<Population, MemoryError> {
        let mut population = Population::default();
        self.scan(run, &mut population)?;
        Ok(population)
    }

    /// Appends what of the run is populated.
    fn scan(&self, run: FrameRun, population: &mut Population) -> Result<(), MemoryError> {
        let pagemap = host_files::pagemap().map_err(MemoryError::Population)?;
        let region = Region {
            frames: run,
            start: self.host_address(run)?.addr() as u64,
        };
        match region.scan(&pagemap, population) {
            // Kernels before 6.7 do not know the ioctl.
            Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => region.read_entries(&pagemap, population),
            other => other,
        }
        .map_err(MemoryError::Population)
    }
}

struct Region {
    frames: FrameRun,
    /// Address of its first page in this process.
    start: u64,
}

impl Region {
    /// One PAGEMAP_SCAN after the other, as many as it takes (`admin-guide/mm/pagemap.rst`).
    fn scan(&self, pagemap: &File, population: &mut Population) -> io::Result<()> {
        let end = self.start + self.frames.bytes();
        let mut found = vec![PageRegion::default(); 4096];
        let mut position = self.start;
        while position < end {
            let mut arguments = ScanArguments {
                size: size_of::<ScanArguments>() as u64,
                start: position,
                end,
                vec: found.as_mut_ptr().addr() as u64,
                vec_len: found.len() as u64,
                category_inverted: PAGE_IS_PFNZERO,
                category_mask: PAGE_IS_PFNZERO,
                category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
                return_mask: PAGE_IS_HUGE,
                ..ScanArguments::default()
            };
            // SAFETY: the arguments have the layout of `struct pm_scan_arg`, and `vec` points to `vec_len` regions of ours.
            let count = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut arguments) };
            if count < 0 {
                match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => continue,
                    error => return Err(error),
                }
            }
            for region in &found[..count as usize] {
                let run = FrameRun {
                    first: self.frames.first + (region.start - self.start) / PAGE_SIZE,
                    count: (region.end - region.start) / PAGE_SIZE,
                };
                push_run(&mut population.runs, run);
                if region.categories & PAGE_IS_HUGE != 0 {
                    push_run(&mut population.huge, run);
                }
            }
            if arguments.walk_end <= position {
                break;
            }
            position = arguments.walk_end;
        }
        Ok(())
    }

    /// The old way: eight bytes per page (`admin-guide/mm/pagemap.rst`).
    fn read_entries(&self, pagemap: &File, population: &mut Population) -> io::Result<()> {
        const CHUNK: u64 = HUGE_PAGE_SIZE / PAGE_SIZE * 16;
        let zero = zero_page_frame(pagemap)?;
        let mut entries = vec![0u8; CHUNK as usize * 8];
        let mut page = 0;
        while page < self.frames.count {
            let count = CHUNK.min(self.frames.count - page);
            let bytes = &mut entries[..count as usize * 8];
            pagemap.read_exact_at(bytes, (self.start / PAGE_SIZE + page) * 8)?;
            for (index, entry) in bytes.chunks_exact(8).enumerate() {
                let entry = u64::from_le_bytes(entry.try_into().expect("chunks of eight"));
                let present = entry & ENTRY_PRESENT != 0;
                let is_zero_page = present && zero.is_some_and(|zero| entry & ENTRY_FRAME == zero);
                if (present || entry & ENTRY_SWAPPED != 0) && !is_zero_page {
                    push_run(
                        &mut population.runs,
                        FrameRun {
                            first: self.frames.first + page + index as u64,
                            count: 1,
                        },
                    );
                }
            }
            page += count;
        }
        Ok(())
    }
}

/// The host frame of the kernel's zero page, found by reading a fresh page; `None` where the kernel hides frame numbers.
fn zero_page_frame(pagemap: &File) -> io::Result<Option<u64>> {
    let fresh = GuestMemory::new(super::MemoryOptions {
        bytes: PAGE_SIZE,
        hugetlb: false,
        expect_incoming: true,
    })
    .map_err(io::Error::other)?;
    let (address, _) = fresh
        .host_ranges()
        .next()
        .ok_or_else(|| io::Error::other("a memory without regions"))?;
    // SAFETY: the page is mapped and readable for as long as `fresh` lives.
    let _ = unsafe { address.read_volatile() };
    let mut entry = [0; 8];
    pagemap.read_exact_at(&mut entry, address.addr() as u64 / PAGE_SIZE * 8)?;
    let entry = u64::from_le_bytes(entry);
    let frame = entry & ENTRY_FRAME;
    Ok((entry & ENTRY_PRESENT != 0 && frame != 0).then_some(frame))
}

/// `struct pm_scan_arg` of `linux/fs.h`.
#[repr(C)]
#[derive(Default)]
struct ScanArguments {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

const _: () = assert!(size_of::<ScanArguments>() == 96);

/// `struct page_region` of `linux/fs.h`.
#[repr(C)]
#[derive(Default, Clone)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

const _: () = assert!(size_of::<PageRegion>() == 24);

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;

const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;
const PAGE_IS_HUGE: u64 = 1 << 6;

const ENTRY_PRESENT: u64 = 1 << 63;
const ENTRY_SWAPPED: u64 = 1 << 62;
const ENTRY_FRAME: u64 = (1 << 55) - 1;

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::super::MemoryOptions;
    use super::*;

    fn memory(expect_incoming: bool) -> GuestMemory {
        GuestMemory::new(MemoryOptions {
            bytes: 64 << 20,
            hugetlb: false,
            expect_incoming,
        })
        .expect("memory")
    }

    fn touch(memory: &GuestMemory, page: u64) {
        memory
            .tracked()
            .write_obj(1u8, GuestAddress(page * PAGE_SIZE))
            .expect("write");
    }

    #[test]
    fn untouched_memory_has_no_population() {
        assert_eq!(memory(false).populated().expect("scan"), Population::default());
    }

    #[test]
    fn small_pages_are_found_one_by_one() {
        let memory = memory(true);
        touch(&memory, 3);
        touch(&memory, 4);
        touch(&memory, 900);
        assert_eq!(
            memory.populated().expect("scan").runs,
            [FrameRun { first: 3, count: 2 }, FrameRun { first: 900, count: 1 }]
        );
    }

    #[test]
    fn page_that_was_only_read_is_not_populated() {
        let memory = memory(true);
        let _: u8 = memory.tracked().read_obj(GuestAddress(7 * PAGE_SIZE)).expect("read");
        assert_eq!(memory.populated().expect("scan").runs, []);
    }

    #[test]
    fn old_kernels_entries_say_the_same() {
        let memory = memory(true);
        touch(&memory, 0);
        touch(&memory, 10_000);
        let _: u8 = memory.tracked().read_obj(GuestAddress(7 * PAGE_SIZE)).expect("read");
        let pagemap = host_files::pagemap().expect("pagemap");
        let region = Region {
            frames: memory.shape().runs()[0],
            start: memory.host_ranges().next().expect("one region").0.addr() as u64,
        };
        let mut entries = Population::default();
        region.read_entries(&pagemap, &mut entries).expect("entries");
        let hidden = zero_page_frame(&pagemap).expect("entry").is_none();
        let scanned = memory.populated().expect("scan").runs;
        // Without the right to see frame numbers the zero page cannot be told apart; that costs time, not contents.
        assert!(entries.runs == scanned || hidden);
    }
}
