//! The mapping of guest memory into this process, advice about it, and the bitmap of what the VMM itself wrote.

use std::io;
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
use thiserror::Error;
use vm_memory::bitmap::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use super::dirty::{DirtyBitmap, word_mask};
use super::shape::{FrameRun, HUGE_PAGE_SIZE, MemoryShape, PAGE_SIZE};
use crate::host_files;

/// Something about guest memory failed.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// The size cannot be a guest's memory.
    #[error("make {bytes} bytes of guest memory: the size must be a multiple of {unit} bytes and not zero")]
    Size {
        /// What was asked for.
        bytes: u64,
        /// What it must be a multiple of.
        unit: u64,
    },
    /// The host has less memory than the guest was to get.
    #[error(
        "make {} MiB of guest memory: the host has {} MiB",
        asked >> 20,
        host >> 20
    )]
    LargerThanHost {
        /// What was asked for, in bytes.
        asked: u64,
        /// Memory of the host in bytes.
        host: u64,
    },
    /// The kernel did not give the memory.
    #[error("map {} MiB of guest memory{}", bytes >> 20, if *hugetlb { " from the pool of huge pages" } else { "" })]
    Map {
        /// Size of the mapping in bytes.
        bytes: u64,
        /// Whether it was to come from hugetlbfs.
        hugetlb: bool,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The run is empty or not wholly inside guest memory.
    #[error("reach guest frames {} to {}: not in guest memory", run.first, run.end())]
    OutOfBounds {
        /// The run as it was given.
        run: FrameRun,
    },
    /// Pages and the bytes for them do not fit together.
    #[error("copy pages of {pages} bytes from or to {bytes} bytes")]
    Room {
        /// What the pages hold.
        pages: u64,
        /// What there is.
        bytes: u64,
    },
    /// The kernel did not take advice about the memory.
    #[error("{what} guest frames {} to {}", run.first, run.end())]
    Advise {
        /// What was to be done.
        what: &'static str,
        /// The frames.
        run: FrameRun,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What the host has backed could not be read.
    #[error("read which guest pages the host has backed")]
    Population(#[source] io::Error),
    /// This process may not watch for absent pages.
    #[error(
        "watch for absent pages: this process may not; the system administrator may set the sysctl vm.unprivileged_userfaultfd to 1, give \
         it access to /dev/userfaultfd, or run it as root"
    )]
    WatchDenied,
    /// The kernel takes no page of the pool of huge pages back from a mapping that stays.
    #[error(
        "watch for absent pages: this kernel does not give up pages of the pool of huge pages (hugetlbfs), as Linux 5.18 does"
    )]
    WatchPool,
    /// Watching for absent pages, or supplying one, failed.
    #[error("watch for absent pages")]
    Watch(#[source] io::Error),
    /// A write of the VMM itself into guest memory failed.
    #[error("write {len} bytes to guest physical address {address:#x}")]
    Write {
        /// Guest physical address.
        address: u64,
        /// Length in bytes.
        len: u64,
        /// Why.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
}

/// How guest memory is to be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MemoryOptions {
    /// Size in bytes.
    pub(crate) bytes: u64,
    /// From the pool of huge pages (hugetlbfs) instead of anonymous memory with advice.
    pub(crate) hugetlb: bool,
    /// A migration will fill it and says block by block where huge pages are worth it.
    pub(crate) expect_incoming: bool,
}

/// A guest's memory, mapped. Clones are handles of the same memory, which lives until the last one is gone.
///
/// The guest and other threads may change any page at any moment; what that means is told on each method.
#[derive(Debug, Clone)]
pub struct GuestMemory {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    shape: MemoryShape,
    // Before `mappings`: it points into them and goes first.
    memory: TrackedMemory,
    mappings: Vec<Mapping>,
    hugetlb: bool,
}

/// Guest memory in the form that devices and loaders use; writes through it are seen by `fetch_device_dirty`.
pub(crate) type TrackedMemory = GuestMemoryMmap<DeviceBitmap>;

impl GuestMemory {
    /// Maps memory of the given size; nothing is touched yet.
    ///
    /// # Errors
    ///
    /// If the size is impossible, exceeds the host's memory, or the kernel refuses.
    pub(crate) fn new(options: MemoryOptions) -> Result<Self, MemoryError> {
        let MemoryOptions {
            bytes,
            hugetlb,
            expect_incoming,
        } = options;
        let unit = if hugetlb { HUGE_PAGE_SIZE } else { PAGE_SIZE };
        if bytes == 0 || bytes % unit != 0 {
            return Err(MemoryError::Size { bytes, unit });
        }
        let host = host_files::memory().map_err(MemoryError::Population)?;
        if bytes > host {
            return Err(MemoryError::LargerThanHost { asked: bytes, host });
        }

        let shape = MemoryShape::from_size(bytes);
        let mut mappings = Vec::new();
        let mut regions = Vec::new();
        for region in &shape.regions {
            let mapping = Mapping::new(region.len as usize, hugetlb).map_err(|source| MemoryError::Map {
                bytes: region.len,
                hugetlb,
                source,
            })?;
            mapping.advise_whole(hugetlb, expect_incoming);
            regions.push(mapping.tracked(GuestAddress(region.start)));
            mappings.push(mapping);
        }
        let memory = TrackedMemory::from_regions(regions).expect("regions of a shape ascend and do not overlap");
        Ok(Self {
            inner: Arc::new(Inner {
                shape,
                memory,
                mappings,
                hugetlb,
            }),
        })
    }

    /// Where the memory lies.
    #[must_use]
    pub fn shape(&self) -> &MemoryShape {
        &self.inner.shape
    }

    /// Asks for huge pages in this run from now on; nothing is touched.
    ///
    /// # Errors
    ///
    /// If the run is out of bounds. A kernel without transparent huge pages is no error: memory is then slower, not wrong.
    pub fn advise_huge(&self, run: FrameRun) -> Result<(), MemoryError> {
        match self.advise(run, Advice::LinuxHugepage, "ask for huge pages in") {
            Err(MemoryError::Advise { .. }) => Ok(()),
            other => other,
        }
    }

    /// Backs the run with memory now, as if each page were written, without changing contents; any number of threads may do so.
    ///
    /// # Errors
    ///
    /// If the run is out of bounds or the host has no memory left.
    pub fn populate(&self, run: FrameRun) -> Result<(), MemoryError> {
        self.advise(run, Advice::LinuxPopulateWrite, "populate")
    }

    /// Gives the run's memory back to the host: it reads as zeroes from now on and is backed again when it is touched. A write of the VMM:
    /// the device bitmap sees it.
    ///
    /// # Errors
    ///
    /// If the run is out of bounds, or the kernel refuses.
    pub(crate) fn release(&self, run: FrameRun) -> Result<(), MemoryError> {
        let address = self.host_address(run)?;
        if self.inner.hugetlb {
            // What was reserved would be anybody's, and a guest that touches it again would die of it.
            return Ok(());
        }
        // SAFETY: the range was checked to lie in our own mapping, to which no reference points; its contents are given up.
        let released = unsafe { madvise(address.cast(), run.bytes() as usize, Advice::LinuxDontNeed) };
        // After it, so that whoever takes the mark finds the zeroes.
        self.mark_written(run);
        released.map_err(|errno| MemoryError::Advise {
            what: "give back",
            run,
            source: errno.into(),
        })
    }

    /// Takes what devices and loaders of this process wrote since the last call: fetch and clear.
    ///
    /// [`Machine::fetch_dirty`](crate::Machine::fetch_dirty) has it in already; who calls this takes it away from there.
    #[must_use]
    pub fn device_dirty(&self) -> DirtyBitmap {
        let mut bitmap = DirtyBitmap::empty(self.shape());
        self.fetch_device_dirty(&mut bitmap);
        bitmap
    }

    /// Moves what devices and loaders wrote since the last call into `into`, a bitmap of this memory's shape.
    pub(crate) fn fetch_device_dirty(&self, into: &mut DirtyBitmap) {
        for (index, region) in self.inner.memory.iter().enumerate() {
            region.bitmap().take(into.words_mut(index));
        }
    }

    /// The memory as devices and loaders reach it.
    pub(crate) fn tracked(&self) -> &TrackedMemory {
        &self.inner.memory
    }

    /// Host address and length of each region, in the order of the shape.
    pub(crate) fn host_ranges(&self) -> impl Iterator<Item = (*mut u8, usize)> {
        self.inner
            .mappings
            .iter()
            .map(|mapping| (mapping.start.as_ptr(), mapping.len))
    }

    /// Whether it is from the pool of huge pages.
    pub(super) fn is_hugetlb(&self) -> bool {
        self.inner.hugetlb
    }

    /// Host address of a run after checking that all of it is guest memory.
    pub(super) fn host_address(&self, run: FrameRun) -> Result<*mut u8, MemoryError> {
        let (region, page) = self.inner.shape.locate(run).ok_or(MemoryError::OutOfBounds { run })?;
        let start = self.inner.mappings[region].start.as_ptr();
        // SAFETY: `locate` found the run inside region `region`, whose mapping has the region's length.
        Ok(unsafe { start.add((page * PAGE_SIZE) as usize) })
    }

    /// Marks a run, found inside guest memory, as written by the VMM.
    pub(super) fn mark_written(&self, run: FrameRun) {
        let Some((region, page)) = self.inner.shape.locate(run) else {
            return;
        };
        if let Some(region) = self.inner.memory.iter().nth(region) {
            region
                .bitmap()
                .mark_dirty((page * PAGE_SIZE) as usize, run.bytes() as usize);
        }
    }

    fn advise(&self, run: FrameRun, advice: Advice, what: &'static str) -> Result<(), MemoryError> {
        let address = self.host_address(run)?;
        loop {
            // SAFETY: the range was checked to lie in our own mapping; neither advice changes contents.
            match unsafe { madvise(address.cast(), run.bytes() as usize, advice) } {
                Ok(()) => return Ok(()),
                Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
                Err(errno) => {
                    return Err(MemoryError::Advise {
                        what,
                        run,
                        source: errno.into(),
                    });
                }
            }
        }
    }
}

/// One region's mapping, unmapped when it goes.
#[derive(Debug)]
pub(super) struct Mapping {
    pub(super) start: NonNull<u8>,
    pub(super) len: usize,
}

// SAFETY: the address is only ever used for raw accesses, which any thread may make; the mapping lives as long as this value.
unsafe impl Send for Mapping {}
// SAFETY: as above; nothing in here changes after construction.
unsafe impl Sync for Mapping {}

impl Mapping {
    pub(super) fn new(len: usize, hugetlb: bool) -> io::Result<Self> {
        let mut flags = MapFlags::PRIVATE;
        let align = HUGE_PAGE_SIZE as usize;
        // Kernels before 6.7 do not align large anonymous mappings, and an unaligned one gets no huge pages at its edges.
        let slack = if hugetlb { 0 } else { align };
        flags |= if hugetlb {
            // Reserved now: a guest that touches a page for which the pool has none left would die of it.
            MapFlags::HUGETLB | MapFlags::HUGE_2MB
        } else {
            MapFlags::NORESERVE
        };
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let address = unsafe { mmap_anonymous(null_mut(), len + slack, ProtFlags::READ | ProtFlags::WRITE, flags) }?;
        let head = address.addr().next_multiple_of(align) - address.addr();
        let tail = slack.saturating_sub(head);
        if head > 0 && !hugetlb {
            // SAFETY: the first `head` bytes belong to the mapping just made; nobody else knows of it.
            unsafe { munmap(address, head) }?;
        }
        if tail > 0 {
            let end = address.wrapping_byte_add(head + len);
            // SAFETY: the last `tail` bytes belong to the mapping just made; nobody else knows of it.
            unsafe { munmap(end, tail) }?;
        }
        let start = NonNull::new(address.wrapping_byte_add(head).cast()).expect("mmap gave an address");
        Ok(Self { start, len })
    }

    /// Advice for the whole region. What the kernel does not know is left: memory is then slower or dumped, not wrong.
    pub(super) fn advise_whole(&self, hugetlb: bool, expect_incoming: bool) {
        let huge = match (hugetlb, expect_incoming) {
            (true, _) => None,
            (false, true) => Some(Advice::LinuxNoHugepage),
            (false, false) => Some(Advice::LinuxHugepage),
        };
        for advice in [Some(Advice::LinuxDontDump), Some(Advice::LinuxDontFork), huge]
            .into_iter()
            .flatten()
        {
            // SAFETY: the range is this mapping; none of the three changes contents in this process.
            let _ = unsafe { madvise(self.start.as_ptr().cast(), self.len, advice) };
        }
    }

    fn tracked(&self, start: GuestAddress) -> GuestRegionMmap<DeviceBitmap> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: the mapping is ours, of this length, and outlives the region (see the order of fields in `Inner`).
        let region = unsafe { MmapRegion::build_raw(self.start.as_ptr(), self.len, protection, flags) }
            .expect("the mapping is aligned to pages");
        GuestRegionMmap::new(region, start).expect("a region ends below the end of the address space")
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours alone, and whatever pointed into it went before.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// What the VMM itself wrote: one bit per page. Unlike vm-memory's own bitmap, taking it costs next to nothing while nothing is marked.
#[derive(Debug, Default)]
pub(crate) struct DeviceBitmap {
    words: Vec<AtomicU64>,
    /// Set after a word was changed, cleared before the words are taken: a mark is never missed, at worst looked for in vain.
    marked: AtomicBool,
}

impl DeviceBitmap {
    fn take(&self, into: &mut [u64]) {
        if !self.marked.swap(false, Ordering::AcqRel) {
            return;
        }
        for (word, into) in self.words.iter().zip(into) {
            if word.load(Ordering::Acquire) != 0 {
                *into |= word.swap(0, Ordering::AcqRel);
            }
        }
    }
}

impl NewBitmap for DeviceBitmap {
    fn with_len(len: usize) -> Self {
        let words = (len as u64).div_ceil(PAGE_SIZE).div_ceil(64);
        Self {
            words: (0..words).map(|_| AtomicU64::new(0)).collect(),
            marked: AtomicBool::new(false),
        }
    }
}

impl<'a> WithBitmapSlice<'a> for DeviceBitmap {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for DeviceBitmap {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if len == 0 {
            return;
        }
        let start = offset as u64 / PAGE_SIZE;
        let end = (offset as u64).saturating_add(len as u64).div_ceil(PAGE_SIZE);
        for index in start / 64..end.div_ceil(64) {
            if let Some(word) = self.words.get(index as usize) {
                word.fetch_or(word_mask(index, start, end), Ordering::AcqRel);
            }
        }
        self.marked.store(true, Ordering::Release);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = offset as u64 / PAGE_SIZE;
        self.words
            .get((page / 64) as usize)
            .is_some_and(|word| word.load(Ordering::Acquire) >> (page % 64) & 1 == 1)
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    fn memory(mib: u64) -> GuestMemory {
        GuestMemory::new(MemoryOptions {
            bytes: mib << 20,
            hugetlb: false,
            expect_incoming: false,
        })
        .expect("memory")
    }

    #[test]
    fn memory_larger_than_the_host_is_refused_by_name() {
        let error = GuestMemory::new(MemoryOptions {
            bytes: 1 << 50,
            hugetlb: false,
            expect_incoming: false,
        })
        .expect_err("a petabyte");
        assert!(matches!(error, MemoryError::LargerThanHost { asked, .. } if asked == 1 << 50));
    }

    #[test]
    fn odd_size_is_refused() {
        let options = MemoryOptions {
            bytes: 4097,
            hugetlb: false,
            expect_incoming: false,
        };
        assert!(matches!(GuestMemory::new(options), Err(MemoryError::Size { .. })));
    }

    #[test]
    fn written_bytes_mark_their_pages_once() {
        let memory = memory(4);
        memory
            .tracked()
            .write_slice(&[1; 10], GuestAddress(5 * PAGE_SIZE - 2))
            .expect("write");
        assert_eq!(memory.device_dirty().runs(), [FrameRun { first: 4, count: 2 }]);
        assert!(memory.device_dirty().is_empty());
    }

    #[test]
    fn advice_and_population_outside_memory_are_refused() {
        let memory = memory(4);
        let run = FrameRun {
            first: 1000,
            count: 100,
        };
        assert!(matches!(memory.populate(run), Err(MemoryError::OutOfBounds { .. })));
        assert!(matches!(memory.advise_huge(run), Err(MemoryError::OutOfBounds { .. })));
    }
}
