//! What pages hold: looking for zero pages, writing zeroes, digests.
//!
//! The guest may write while we look. An answer then describes a mixture of old and new; the page is dirty in the log by then, and
//! whoever asks looks again before relying on it.

use std::arch::x86_64::{
    __m128i as Block, _mm_cmpeq_epi8, _mm_movemask_epi8, _mm_or_si128, _mm_setzero_si128, _mm_storeu_si128,
};
use std::ptr;
use std::sync::{Mutex, PoisonError};

use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::mapping::{GuestMemory, MemoryError};
use super::shape::{FrameRun, PAGE_SIZE, push_run};

/// Memory is read in the widest pieces that every x86-64 processor has: a third faster than by words.
const BLOCKS: usize = PAGE_SIZE as usize / size_of::<Block>();

impl GuestMemory {
    /// Appends to `found` the maximal runs of pages inside `run` that hold nothing but zeroes, in ascending order.
    ///
    /// Reading a page that was never touched costs the host its zero page's entry; ask only about populated pages.
    ///
    /// # Errors
    ///
    /// If the run is out of bounds; `found` is then unchanged.
    pub fn zero_pages(&self, run: FrameRun, found: &mut Vec<FrameRun>) -> Result<(), MemoryError> {
        let start: *const Block = self.host_address(run)?.cast_const().cast();
        for page in 0..run.count {
            let address = start.wrapping_add(page as usize * BLOCKS);
            // SAFETY: `host_address` checked that the whole run is mapped, and pages are aligned.
            if unsafe { is_zero(address) } {
                push_run(
                    found,
                    FrameRun {
                        first: run.first + page,
                        count: 1,
                    },
                );
            }
        }
        Ok(())
    }

    /// Fills the run with zeroes, as a write of the VMM: the device bitmap sees it.
    ///
    /// # Errors
    ///
    /// If the run is out of bounds.
    pub fn write_zeroes(&self, run: FrameRun) -> Result<(), MemoryError> {
        let address = self.host_address(run)?;
        // SAFETY: `host_address` checked that the whole run is mapped and writable; no reference points into it.
        unsafe { ptr::write_bytes(address, 0, run.bytes() as usize) };
        self.mark_written(run);
        Ok(())
    }

    /// Sums up the contents of the run (XXH3, 128 bits). Pages that the host never backed count as zeroes and stay unbacked.
    ///
    /// # Errors
    ///
    /// If the run is out of bounds, or the kernel does not tell what is backed.
    pub fn digest(&self, run: FrameRun) -> Result<u128, MemoryError> {
        let backed = self.populated_in(run)?.runs;
        if backed.is_empty() {
            return Ok(digest_of_zeroes(run.count));
        }
        let mut hasher = Xxh3::new();
        let mut next = run.first;
        for backed in backed {
            (next..backed.first).for_each(|_| hasher.update(&ZEROES));
            self.hash_pages(&mut hasher, backed)?;
            next = backed.end();
        }
        (next..run.end()).for_each(|_| hasher.update(&ZEROES));
        Ok(hasher.digest128())
    }

    /// Sums up the pages of these runs, one after the other (XXH3, 128 bits). All of them are read: for pages that are backed.
    ///
    /// # Errors
    ///
    /// If a run is out of bounds.
    pub(super) fn digest_pages(&self, runs: &[FrameRun]) -> Result<u128, MemoryError> {
        let mut hasher = Xxh3::new();
        runs.iter().try_for_each(|&run| self.hash_pages(&mut hasher, run))?;
        Ok(hasher.digest128())
    }

    /// Appends the sum of each page of the run (XXH3, 64 bits). All of them are read: for pages that are backed.
    ///
    /// # Errors
    ///
    /// If the run is out of bounds; `digests` is then unchanged.
    pub fn page_digests(&self, run: FrameRun, digests: &mut Vec<u64>) -> Result<(), MemoryError> {
        self.each_page(run, |page| digests.push(xxh3_64(page)))
    }

    /// Copies the pages of these runs, one after the other, into `bytes`, which has just room for them. The guest may write a page meanwhile: what is
    /// copied is then neither the old nor the new one, and it is dirty.
    ///
    /// # Errors
    ///
    /// If a run is out of bounds, or there is other room than they need.
    pub fn read_pages(&self, runs: &[FrameRun], bytes: &mut [u8]) -> Result<(), MemoryError> {
        self.check_room(runs, bytes.len())?;
        let (pages, _) = bytes.as_chunks_mut::<{ PAGE_SIZE as usize }>();
        let mut pages = pages.iter_mut();
        for &run in runs {
            let start: *const Block = self.host_address(run)?.cast_const().cast();
            for (index, page) in (0..run.count).zip(&mut pages) {
                // SAFETY: `host_address` checked that the whole run is mapped, and pages are aligned.
                unsafe { read_page(start.wrapping_add(index as usize * BLOCKS), page) };
            }
        }
        Ok(())
    }

    /// Puts `bytes` into the pages of these runs, one after the other. Only for memory whose dirty pages nobody tracks, as what is received.
    ///
    /// # Errors
    ///
    /// If a run is out of bounds, or there are other bytes than they hold.
    pub fn write_pages(&self, runs: &[FrameRun], bytes: &[u8]) -> Result<(), MemoryError> {
        self.check_room(runs, bytes.len())?;
        let mut rest = bytes;
        for &run in runs {
            let address = self.host_address(run)?;
            let (part, after) = rest.split_at(run.bytes() as usize);
            // SAFETY: `host_address` checked that the whole run is mapped and writable; no reference points into it, so `part` is elsewhere.
            unsafe { ptr::copy_nonoverlapping(part.as_ptr(), address, part.len()) };
            rest = after;
        }
        Ok(())
    }

    fn check_room(&self, runs: &[FrameRun], bytes: usize) -> Result<(), MemoryError> {
        runs.iter().try_for_each(|&run| self.host_address(run).map(drop))?;
        let pages: u64 = runs.iter().map(|run| run.bytes()).sum();
        match pages == bytes as u64 {
            true => Ok(()),
            false => Err(MemoryError::Room {
                pages,
                bytes: bytes as u64,
            }),
        }
    }

    fn hash_pages(&self, hasher: &mut Xxh3, run: FrameRun) -> Result<(), MemoryError> {
        self.each_page(run, |page| hasher.update(page))
    }

    /// Calls `each` with a copy of each page.
    fn each_page(&self, run: FrameRun, mut each: impl FnMut(&[u8; PAGE_SIZE as usize])) -> Result<(), MemoryError> {
        let start: *const Block = self.host_address(run)?.cast_const().cast();
        let mut page = [0; PAGE_SIZE as usize];
        for index in 0..run.count {
            let address = start.wrapping_add(index as usize * BLOCKS);
            // SAFETY: `host_address` checked that the whole run is mapped, and pages are aligned.
            unsafe { read_page(address, &mut page) };
            each(&page);
        }
        Ok(())
    }
}

/// A page that nobody has written to.
const ZEROES: [u8; PAGE_SIZE as usize] = [0; PAGE_SIZE as usize];

/// The digest of so many pages of zeroes. The last answer is kept: most of a large guest is asked about in pieces of one
/// size and was never touched.
fn digest_of_zeroes(pages: u64) -> u128 {
    static LAST: Mutex<(u64, u128)> = Mutex::new((0, 0));
    let (known, digest) = *LAST.lock().unwrap_or_else(PoisonError::into_inner);
    if known == pages && pages != 0 {
        return digest;
    }
    let mut hasher = Xxh3::new();
    (0..pages).for_each(|_| hasher.update(&ZEROES));
    let digest = hasher.digest128();
    *LAST.lock().unwrap_or_else(PoisonError::into_inner) = (pages, digest);
    digest
}

/// Whether a page holds only zeroes; stops at the first 128 bytes that do not.
///
/// # Safety
///
/// `page` must be the aligned start of a mapped page.
#[target_feature(enable = "sse2")]
unsafe fn is_zero(page: *const Block) -> bool {
    const STEP: usize = 8;
    for step in 0..BLOCKS / STEP {
        let mut any = _mm_setzero_si128();
        for block in 0..STEP {
            let address = page.wrapping_add(step * STEP + block);
            // SAFETY: inside the page that the caller vouches for; volatile, for the guest may write it now.
            any = _mm_or_si128(any, unsafe { address.read_volatile() });
        }
        if _mm_movemask_epi8(_mm_cmpeq_epi8(any, _mm_setzero_si128())) != 0xffff {
            return false;
        }
    }
    true
}

/// Copies a page out of guest memory.
///
/// # Safety
///
/// `page` must be the aligned start of a mapped page.
#[target_feature(enable = "sse2")]
unsafe fn read_page(page: *const Block, into: &mut [u8; PAGE_SIZE as usize]) {
    for (index, bytes) in into.chunks_exact_mut(size_of::<Block>()).enumerate() {
        // SAFETY: inside the page that the caller vouches for; volatile, for the guest may write it now.
        let block = unsafe { page.wrapping_add(index).read_volatile() };
        // SAFETY: the chunk has the size of a block, and the store needs no alignment.
        unsafe { _mm_storeu_si128(bytes.as_mut_ptr().cast(), block) };
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::super::MemoryOptions;
    use super::*;

    fn memory() -> GuestMemory {
        GuestMemory::new(MemoryOptions {
            bytes: 4 << 20,
            hugetlb: false,
            expect_incoming: false,
        })
        .expect("memory")
    }

    #[test]
    fn single_byte_makes_its_page_nonzero() {
        let memory = memory();
        memory
            .tracked()
            .write_slice(&[7], GuestAddress(3 * PAGE_SIZE - 1))
            .expect("write");
        let mut found = Vec::new();
        memory
            .zero_pages(FrameRun { first: 0, count: 5 }, &mut found)
            .expect("in bounds");
        assert_eq!(
            found,
            [FrameRun { first: 0, count: 2 }, FrameRun { first: 3, count: 2 }]
        );
    }

    #[test]
    fn zeroing_restores_the_digest_and_marks_the_pages() {
        let memory = memory();
        let run = FrameRun { first: 8, count: 2 };
        let blank = memory.digest(run).expect("in bounds");
        memory
            .tracked()
            .write_slice(&[9; 100], GuestAddress(8 * PAGE_SIZE))
            .expect("write");
        assert_ne!(memory.digest(run).expect("in bounds"), blank);
        let _ = memory.device_dirty();
        memory.write_zeroes(run).expect("in bounds");
        assert_eq!(memory.digest(run).expect("in bounds"), blank);
        assert_eq!(memory.device_dirty().runs(), [run]);
    }

    #[test]
    fn digest_is_that_of_the_bytes() {
        let memory = memory();
        let bytes: Vec<u8> = (0..PAGE_SIZE).map(|number| (number % 251) as u8).collect();
        memory.tracked().write_slice(&bytes, GuestAddress(0)).expect("write");
        let digest = memory.digest(FrameRun { first: 0, count: 1 }).expect("in bounds");
        assert_eq!(digest, xxhash_rust::xxh3::xxh3_128(&bytes));
    }

    #[test]
    fn pages_that_are_read_are_written_elsewhere_in_their_order() {
        let (from, to) = (memory(), memory());
        let runs = [FrameRun { first: 2, count: 3 }, FrameRun { first: 700, count: 1 }];
        for (page, byte) in [(2, 5), (4, 6), (700, 7)] {
            let address = GuestAddress(page * PAGE_SIZE);
            from.tracked().write_slice(&[byte; 100], address).expect("write");
        }
        let mut bytes = vec![1; 4 * PAGE_SIZE as usize];
        from.read_pages(&runs, &mut bytes).expect("in bounds");
        assert_eq!((bytes[99], bytes[100], bytes[2 * PAGE_SIZE as usize]), (5, 0, 6));
        let _ = to.device_dirty();
        to.write_pages(&runs, &bytes).expect("in bounds");
        let whole = FrameRun { first: 0, count: 1024 };
        assert_eq!(from.digest(whole).expect("digest"), to.digest(whole).expect("digest"));
        assert!(to.device_dirty().is_empty());
        let short = from.read_pages(&runs, &mut bytes[1..]).expect_err("too little room");
        assert!(
            matches!(
                short,
                MemoryError::Room {
                    pages: 16384,
                    bytes: 16383
                }
            ),
            "{short}"
        );
        assert!(
            to.write_pages(&[FrameRun { first: 1023, count: 2 }], &bytes[..8192])
                .is_err()
        );
    }

    #[test]
    fn each_page_has_the_sum_of_its_bytes() {
        let memory = memory();
        let bytes: Vec<u8> = (0..PAGE_SIZE).map(|number| (number % 251) as u8).collect();
        memory
            .tracked()
            .write_slice(&bytes, GuestAddress(PAGE_SIZE))
            .expect("write");
        let mut digests = Vec::new();
        memory
            .page_digests(FrameRun { first: 0, count: 2 }, &mut digests)
            .expect("in bounds");
        assert_eq!(digests, [xxh3_64(&ZEROES), xxh3_64(&bytes)]);
    }

    #[test]
    fn untouched_pages_count_as_zeroes_and_stay_untouched() {
        let (sparse, zeroed) = (memory(), memory());
        let run = FrameRun { first: 0, count: 900 };
        for memory in [&sparse, &zeroed] {
            memory
                .tracked()
                .write_slice(&[5], GuestAddress(600 * PAGE_SIZE))
                .expect("write");
        }
        zeroed
            .write_zeroes(FrameRun { first: 0, count: 300 })
            .expect("in bounds");
        let empty = FrameRun { first: 0, count: 300 };
        let before = sparse.populated().expect("population");
        assert_eq!(sparse.digest(run).expect("digest"), zeroed.digest(run).expect("digest"));
        assert_eq!(
            sparse.digest(empty).expect("digest"),
            zeroed.digest(empty).expect("digest")
        );
        assert_eq!(sparse.populated().expect("population"), before);
    }

    #[test]
    fn run_outside_memory_is_refused() {
        let run = FrameRun { first: 1023, count: 2 };
        assert!(memory().digest(run).is_err());
        assert!(memory().page_digests(run, &mut Vec::new()).is_err());
        assert!(memory().zero_pages(run, &mut Vec::new()).is_err());
        assert!(memory().write_zeroes(run).is_err());
    }
}
