//! Pages that are not there yet: whoever touches one waits until it is supplied (userfaultfd).
//!
//! ```text
//!   watch ──► a vCPU, a device's thread or the kernel on its behalf touches an absent page, and waits
//!                 │ touched(): which page                                    ▲
//!                 └──► its contents are looked for elsewhere ──► supply ─────┘ it goes on
//!   stop watching: absent pages are zero again, as in any memory
//! ```
//!
//! The kernel lets only the privileged watch what it touches itself, which is how KVM and system calls reach guest memory. So the
//! descriptor is opened before a process gives its rights up ([`keep_host_files`](crate::keep_host_files)), and does nothing until then.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::null_mut;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, UserfaultfdFlags, madvise, mmap_anonymous, munmap, userfaultfd};
use zerocopy::{FromBytes, IntoBytes};

use super::mapping::{GuestMemory, MemoryError};
use super::shape::{FrameRun, HUGE_PAGE_SIZE, PAGE_SIZE};
use crate::host_files;

/// Gives descriptors to those who may open it, since Linux 6.1: a matter of its permissions, not of capabilities.
const DEVICE: &str = "/dev/userfaultfd";

/// Faults that are read at once at most.
const MOST_FAULTS: usize = 64;

// `linux/userfaultfd.h`.
const API: u64 = 0xaa;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_UNREGISTER: libc::c_ulong = 0x8010_aa01;
const UFFDIO_WAKE: libc::c_ulong = 0x8010_aa02;
const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
const UFFDIO_ZEROPAGE: libc::c_ulong = 0xc020_aa04;
const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xaa00;
const REGISTER_MODE_MISSING: u64 = 1;
/// WAKE, COPY and ZEROPAGE, as bits of their numbers.
const NEEDED: u64 = NEEDED_OF_POOL | 1 << 4;
/// The pool of huge pages has no page of zeroes.
const NEEDED_OF_POOL: u64 = 1 << 2 | 1 << 3;
const EVENT_PAGEFAULT: u8 = 0x12;

#[repr(C)]
struct ApiOrder {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct RangeOrder {
    start: u64,
    len: u64,
}

#[repr(C)]
struct RegisterOrder {
    range: RangeOrder,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct CopyOrder {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    /// Bytes that were copied, or an error number below zero.
    copied: i64,
}

#[repr(C)]
struct ZeroOrder {
    range: RangeOrder,
    mode: u64,
    zeroed: i64,
}

/// A `uffd_msg`.
#[derive(Clone, Copy, FromBytes, IntoBytes)]
#[repr(C)]
struct Message {
    event: u8,
    reserved: [u8; 7],
    flags: u64,
    address: u64,
    rest: u64,
}

const _: () = assert!(size_of::<ApiOrder>() == 24 && size_of::<RegisterOrder>() == 32);
const _: () = assert!(size_of::<CopyOrder>() == 40 && size_of::<ZeroOrder>() == 32 && size_of::<Message>() == 32);

/// Opens what faults are read from, and settles the kernel's interface: nothing is watched yet.
///
/// # Errors
/// This process may not have it, or the kernel has none.
pub(crate) fn open_watcher() -> Result<OwnedFd, Errno> {
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    // SAFETY: a new descriptor watches no memory.
    let opened = match unsafe { userfaultfd(flags) } {
        Err(denied @ (Errno::PERM | Errno::NOSYS)) => from_device().map_err(|_| denied)?,
        opened => opened?,
    };
    let mut order = ApiOrder {
        api: API,
        features: 0,
        ioctls: 0,
    };
    // SAFETY: the order is of the layout that this request takes.
    unsafe { request(opened.as_fd(), UFFDIO_API, &mut order) }?;
    Ok(opened)
}

fn from_device() -> Result<OwnedFd, Errno> {
    let device = open(DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: this request takes flags in the place of a pointer.
    let made = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) };
    if made < 0 {
        return Err(last_error());
    }
    // SAFETY: the kernel just made this descriptor for us.
    Ok(unsafe { std::os::fd::FromRawFd::from_raw_fd(made) })
}

/// Makes a request of a watcher.
///
/// # Safety
/// `order` is of the layout that `number` takes, and what it says of memory is memory whose pages may be supplied.
unsafe fn request<T>(watcher: BorrowedFd<'_>, number: libc::c_ulong, order: &mut T) -> Result<(), Errno> {
    // SAFETY: the caller's promise; the order is alive for the call.
    let done = unsafe { libc::ioctl(watcher.as_raw_fd(), number, std::ptr::from_mut(order)) };
    if done < 0 { Err(last_error()) } else { Ok(()) }
}

fn last_error() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::INVAL)
}

/// Whether this process could watch absent pages of guest memory, for those who want to know beforehand.
///
/// # Errors
///
/// Why not.
pub fn probe_watching() -> Result<(), MemoryError> {
    open_watcher().map(drop).map_err(denied)
}

/// Guest memory that is being watched. Dropping it ends nothing: who waits for a page waits on, until the process ends.
#[derive(Debug)]
pub struct AbsentPages {
    memory: GuestMemory,
    watcher: OwnedFd,
}

impl GuestMemory {
    /// Whether absent pages of this memory could be watched.
    ///
    /// # Errors
    ///
    /// Why not: the process may not, or the kernel cannot.
    pub fn check_watchable(&self) -> Result<(), MemoryError> {
        host_files::watcher().map(drop).map_err(denied)?;
        if self.is_hugetlb() { give_up_of_pool() } else { Ok(()) }
    }

    /// How many frames are absent, and are supplied, together: those of a page of the host's.
    #[must_use]
    pub fn frames_together(&self) -> u64 {
        self.page_bytes() / PAGE_SIZE
    }

    fn page_bytes(&self) -> u64 {
        if self.is_hugetlb() { HUGE_PAGE_SIZE } else { PAGE_SIZE }
    }

    /// From now on whoever touches a page that is not backed waits until it is supplied. The pages of `absent` are given up first,
    /// whatever is in them: they are whole pages of the host's ([`frames_together`](Self::frames_together)).
    ///
    /// The memory must be nobody's else meanwhile: no guest runs in it, and no thread fills it.
    ///
    /// # Errors
    ///
    /// If a run is out of bounds, or as in [`check_watchable`](Self::check_watchable).
    pub fn watch(&self, absent: impl Iterator<Item = FrameRun>) -> Result<AbsentPages, MemoryError> {
        self.check_watchable()?;
        let watcher = host_files::watcher().map_err(denied)?;
        for (start, len) in self.host_ranges() {
            let mut order = RegisterOrder {
                range: RangeOrder {
                    start: start.addr() as u64,
                    len: len as u64,
                },
                mode: REGISTER_MODE_MISSING,
                ioctls: 0,
            };
            // SAFETY: the layout is this request's, the range our own mapping.
            unsafe { request(watcher.as_fd(), UFFDIO_REGISTER, &mut order) }.map_err(failed)?;
            let needed = if self.is_hugetlb() { NEEDED_OF_POOL } else { NEEDED };
            if order.ioctls & needed != needed {
                return Err(failed(Errno::OPNOTSUPP));
            }
        }
        // After that: the kernel makes no huge page of watched ones that are absent.
        for run in absent {
            let address = self.host_address(run)?;
            // SAFETY: the range was checked to lie in our own mapping, to which no reference points; its contents are given up.
            unsafe { madvise(address.cast(), run.bytes() as usize, Advice::LinuxDontNeed) }.map_err(|errno| {
                MemoryError::Advise {
                    what: "give up",
                    run,
                    source: errno.into(),
                }
            })?;
        }
        Ok(AbsentPages {
            memory: self.clone(),
            watcher,
        })
    }
}

impl AbsentPages {
    /// Waits until pages are touched, `patience` at most, and adds their frames to `frames`. A page that several wait for may come
    /// several times.
    ///
    /// # Errors
    ///
    /// If the kernel does not tell.
    pub fn touched(&self, patience: Duration, frames: &mut Vec<u64>) -> Result<(), MemoryError> {
        let limit = Timespec {
            tv_sec: patience.as_secs().cast_signed(),
            tv_nsec: patience.subsec_nanos().into(),
        };
        match poll(&mut [PollFd::new(&self.watcher, PollFlags::IN)], Some(&limit)) {
            Ok(0) | Err(Errno::INTR) => return Ok(()),
            Ok(_) => {}
            Err(error) => return Err(failed(error)),
        }
        let mut bytes = [0; MOST_FAULTS * size_of::<Message>()];
        let count = match rustix::io::read(&self.watcher, &mut bytes) {
            Ok(count) => count,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
            Err(error) => return Err(failed(error)),
        };
        for message in bytes[..count].chunks_exact(size_of::<Message>()) {
            let Ok(message) = Message::read_from_bytes(message) else {
                continue;
            };
            if message.event == EVENT_PAGEFAULT {
                frames.extend(self.frame_at(message.address));
            }
        }
        Ok(())
    }

    /// Supplies the pages of `runs` with `contents`, in this order; those that are not absent are left as they are.
    ///
    /// # Errors
    ///
    /// If a run is out of bounds, `contents` is not of their size, or the host has no memory left: some may have been supplied.
    pub fn supply(&self, runs: &[FrameRun], contents: &[u8]) -> Result<(), MemoryError> {
        let mut rest = contents;
        for &run in runs {
            let target = self.memory.host_address(run)?;
            let split = rest.split_at_checked(run.bytes() as usize);
            let (pages, after) = split.ok_or(MemoryError::OutOfBounds { run })?;
            rest = after;
            let put = self.put(target.addr() as u64, run.bytes(), |dst, done, len| {
                let mut order = CopyOrder {
                    dst,
                    src: pages[done as usize..].as_ptr().expose_provenance() as u64,
                    len,
                    mode: 0,
                    copied: 0,
                };
                // SAFETY: the layout is this request's; it reads `pages` and writes absent pages of our own mapping.
                let done = unsafe { request(self.watcher.as_fd(), UFFDIO_COPY, &mut order) };
                (done, order.copied)
            });
            put.map_err(MemoryError::Watch)?;
        }
        Ok(())
    }

    /// Supplies the absent pages of `run` as zeroes; the others are left as they are.
    ///
    /// # Errors
    ///
    /// If the run is out of bounds, or the host has no memory left.
    pub fn supply_zeroes(&self, run: FrameRun) -> Result<(), MemoryError> {
        let target = self.memory.host_address(run)?;
        if self.memory.is_hugetlb() {
            let zeroes = vec![0; HUGE_PAGE_SIZE as usize];
            let pages = (run.first..run.end()).step_by((HUGE_PAGE_SIZE / PAGE_SIZE) as usize);
            let page = |first| FrameRun {
                first,
                count: HUGE_PAGE_SIZE / PAGE_SIZE,
            };
            return pages.map(page).try_for_each(|page| self.supply(&[page], &zeroes));
        }
        let put = self.put(target.addr() as u64, run.bytes(), |start, _, len| {
            let mut order = ZeroOrder {
                range: RangeOrder { start, len },
                mode: 0,
                zeroed: 0,
            };
            // SAFETY: the layout is this request's; it fills absent pages of our own mapping.
            let done = unsafe { request(self.watcher.as_fd(), UFFDIO_ZEROPAGE, &mut order) };
            (done, order.zeroed)
        });
        put.map_err(MemoryError::Watch)
    }

    /// Stops watching: what is absent then is zero, for those who wait for it, too.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub fn stop_watching(&self) -> Result<(), MemoryError> {
        for (start, len) in self.memory.host_ranges() {
            let mut order = RangeOrder {
                start: start.addr() as u64,
                len: len as u64,
            };
            // SAFETY: the layout is this request's, the range our own mapping.
            unsafe { request(self.watcher.as_fd(), UFFDIO_UNREGISTER, &mut order) }.map_err(failed)?;
        }
        Ok(())
    }

    /// Has a huge page put below these pages, which must be one's: the kernel copies them, whatever the host's settings for huge pages
    /// (MADV_COLLAPSE, Linux 6.1). Whoever uses them meanwhile waits. False where the host has no huge page now, a page is held by
    /// somebody (a device's transfer under way) or backed otherwise, the guest has given most of them back, or the kernel does not know the
    /// request. After [`stop_watching`](Self::stop_watching): among watched pages none may be absent.
    ///
    /// # Errors
    ///
    /// If the run is out of bounds, or the kernel says what it should not.
    pub fn make_huge(&self, run: FrameRun) -> Result<bool, MemoryError> {
        let address = self.memory.host_address(run)?;
        // The kernel would fill what is not there, however much that is: what a balloon gave back among it.
        let there = self.memory.populated_in(run)?;
        if 2 * there.runs.iter().map(|run| run.count).sum::<u64>() < run.count {
            return Ok(false);
        }
        // Memory that waits for a guest is kept from huge pages, and so it would be here.
        self.memory.advise_huge(run)?;
        // SAFETY: the range was checked to lie in our own mapping; its contents stay what they are.
        let done = unsafe { libc::madvise(address.cast(), run.bytes() as usize, libc::MADV_COLLAPSE) };
        if done == 0 {
            return Ok(true);
        }
        match last_error() {
            // As madvise(2) has them: no page, no memory of its group, or pages that cannot be taken now. EINVAL is said of a range that is not
            // as it must be (mm/khugepaged.c, madvise_collapse_errno: pages of zeroes only, none at all), too, and not of the request alone.
            Errno::NOMEM | Errno::BUSY | Errno::AGAIN | Errno::INVAL => Ok(false),
            error => Err(MemoryError::Advise {
                what: "put a huge page below",
                run,
                source: error.into(),
            }),
        }
    }

    /// Supplies `len` bytes from `start` on: `step` is given where it is, how many are done and how many are left, and tells what the
    /// kernel said. Pages that are there are passed over.
    ///
    /// Where huge pages are wanted below a part of memory only, the kernel keeps the parts apart, and supplies nothing that lies in two of
    /// them: ENOENT. From there on it goes page by page.
    fn put(
        &self,
        start: u64,
        len: u64,
        mut step: impl FnMut(u64, u64, u64) -> (Result<(), Errno>, i64),
    ) -> io::Result<()> {
        let (mut done, mut most, page) = (0, len, self.memory.page_bytes());
        while done < len {
            let (at, next) = (start + done, most.min(len - done));
            match step(at, done, next) {
                (Ok(()), _) => done += next,
                (Err(_), moved) if moved > 0 => done += moved.unsigned_abs(),
                (Err(Errno::EXIST), _) => {
                    // Whoever was about to wait for it when it came need not.
                    self.wake(at, page)?;
                    done += page;
                }
                (Err(Errno::AGAIN), _) => {}
                (Err(Errno::NOENT), _) if next > page => most = page,
                (Err(error), _) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn wake(&self, start: u64, len: u64) -> io::Result<()> {
        let mut order = RangeOrder { start, len };
        // SAFETY: the layout is this request's, the page of our own mapping.
        Ok(unsafe { request(self.watcher.as_fd(), UFFDIO_WAKE, &mut order) }?)
    }

    fn frame_at(&self, address: u64) -> Option<u64> {
        let regions = self.memory.shape().regions.iter().zip(self.memory.host_ranges());
        regions.into_iter().find_map(|(region, (start, len))| {
            let offset = address.checked_sub(start.addr() as u64)?;
            (offset < len as u64).then(|| (region.start + offset) / PAGE_SIZE)
        })
    }
}

/// Whether this kernel takes pages of the pool back from a mapping that stays (Linux 5.18). The pool need not have one for this.
fn give_up_of_pool() -> Result<(), MemoryError> {
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::HUGETLB | MapFlags::HUGE_2MB;
    let len = HUGE_PAGE_SIZE as usize;
    // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
    let page = unsafe { mmap_anonymous(null_mut(), len, ProtFlags::READ, flags) }.map_err(failed)?;
    // SAFETY: the mapping was just made, and nobody else knows of it.
    let given_up = unsafe { madvise(page, len, Advice::LinuxDontNeed) };
    // SAFETY: as above; nothing points into it.
    unsafe { munmap(page, len) }.map_err(failed)?;
    given_up.map_err(|_| MemoryError::WatchPool)
}

fn denied(error: Errno) -> MemoryError {
    match error {
        Errno::PERM | Errno::ACCESS => MemoryError::WatchDenied,
        error => failed(error),
    }
}

fn failed(error: Errno) -> MemoryError {
    MemoryError::Watch(error.into())
}

#[cfg(test)]
mod tests;
