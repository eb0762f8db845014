//! Transfers between a file and guest memory of which many are under way at once (io_uring).
//!
//! ```text
//!   read, write, sync ──► begun ──submit──► with the kernel, in any order ──land──► the work that it was for, and its outcome
//!                           ▲                          │
//!                           └──── rest of a short one ─┘
//! ```
//!
//! What the kernel is asked for here no filter on system calls sees. So a ring is restricted before it is first used
//! (IORING_REGISTER_RESTRICTIONS, `io_uring_register(2)`): it takes three operations, none of them with flags, and no further
//! registration; the kernel never lifts that. A process that is confined makes its rings before ([`keep_rings`]), and none later.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode, squeue, types};
use vmm_sys_util::eventfd::EventFd;

use super::mapping::GuestMemory;
use super::spans::{Span, total};
use super::transfer::{MAX_BUFFERS, advance};

/// Transfers that are under way at once at most: as many as keep a fast disk busy. The kernel holds 64 bytes for each.
const DEPTH: usize = 64;

/// A further transfer is begun while those under way have fewer buffers than this altogether: what a guest can have the host hold for it.
const MOST_BUFFERS: usize = DEPTH * 128;

/// The same for bytes: what a machine that is to stand still may have to wait for. Much more than a fast disk needs to be kept busy.
const MOST_BYTES: u64 = 8 << 20;

/// A ring on one file. `T` is what a transfer is for; it comes back with the outcome.
///
/// Each transfer holds the memory that it is about: that stays mapped until the kernel is done with it, whatever becomes of the ring.
pub(crate) struct Ring<T> {
    /// There until the ring is dropped.
    ring: Option<IoUring>,
    file: Arc<File>,
    /// By the number that the kernel knows them by.
    flights: Vec<Option<Flight<T>>>,
    free: Vec<usize>,
    buffers: usize,
    bytes: u64,
    /// Begun and not with the kernel yet, oldest first.
    begun: VecDeque<usize>,
    /// The kernel takes nothing more.
    is_dead: bool,
}

struct Flight<T> {
    work: T,
    kind: Kind,
    memory: GuestMemory,
    /// Of all its buffers.
    bytes: u64,
    offset: u64,
    buffers: Buffers,
    /// Buffers before this one are done.
    next: usize,
}

enum Kind {
    /// Into these spans.
    Read(Vec<Span>),
    Write,
    Sync,
}

/// Buffers in guest memory, for the kernel only.
struct Buffers(Vec<libc::iovec>);

// SAFETY: the addresses are never followed by this process; the kernel may be given them by any of its threads.
unsafe impl Send for Buffers {}

impl<T> Ring<T> {
    /// A ring for this file.
    ///
    /// # Errors
    /// The kernel has no rings, does not restrict them, or does not allow them; or this process has made what it will need and all are in use.
    pub(crate) fn new(file: Arc<File>) -> io::Result<Self> {
        Ok(Self {
            ring: Some(spare().take()?),
            file,
            flights: (0..DEPTH).map(|_| None).collect(),
            free: (0..DEPTH).rev().collect(),
            buffers: 0,
            bytes: 0,
            begun: VecDeque::with_capacity(DEPTH),
            is_dead: false,
        })
    }

    /// How many transfers are under way.
    pub(crate) fn in_flight(&self) -> usize {
        DEPTH - self.free.len()
    }

    /// Whether so many more can be begun.
    pub(crate) fn has_room_for(&self, further: usize) -> bool {
        self.free.len() >= further && self.buffers < MOST_BUFFERS && self.bytes < MOST_BYTES && !self.is_dead
    }

    /// Whether the kernel takes nothing more: once nothing is in flight, the ring is of no more use.
    pub(crate) fn is_dead(&self) -> bool {
        self.is_dead
    }

    /// Begins to read from `offset` on into `spans`. There must be room.
    ///
    /// # Errors
    /// `InvalidInput` if a span is not wholly inside one region of guest memory; the work comes back.
    pub(crate) fn read(
        &mut self,
        work: T,
        memory: &GuestMemory,
        offset: u64,
        spans: &[Span],
    ) -> Result<(), (T, io::Error)> {
        self.begin(work, Kind::Read(spans.to_vec()), memory, offset, spans)
    }

    /// Begins to write `spans` from `offset` on. There must be room.
    ///
    /// # Errors
    /// `InvalidInput` if a span is not wholly inside one region of guest memory; the work comes back.
    pub(crate) fn write(
        &mut self,
        work: T,
        memory: &GuestMemory,
        offset: u64,
        spans: &[Span],
    ) -> Result<(), (T, io::Error)> {
        self.begin(work, Kind::Write, memory, offset, spans)
    }

    /// Begins to make durable what has been written by transfers that landed (`fdatasync`). There must be room.
    ///
    /// # Errors
    /// None that is possible; the work comes back.
    pub(crate) fn sync(&mut self, work: T, memory: &GuestMemory) -> Result<(), (T, io::Error)> {
        self.begin(work, Kind::Sync, memory, 0, &[])
    }

    fn begin(
        &mut self,
        work: T,
        kind: Kind,
        memory: &GuestMemory,
        offset: u64,
        spans: &[Span],
    ) -> Result<(), (T, io::Error)> {
        let buffers = match memory.span_buffers(spans) {
            Ok(buffers) => Buffers(buffers),
            Err(error) => return Err((work, error)),
        };
        let Some(number) = self.free.pop() else {
            return Err((work, io::ErrorKind::WouldBlock.into()));
        };
        self.buffers += spans.len();
        self.bytes += total(spans);
        self.flights[number] = Some(Flight {
            work,
            kind,
            memory: memory.clone(),
            bytes: total(spans),
            offset,
            buffers,
            next: 0,
        });
        self.hand_over(number);
        Ok(())
    }

    /// Puts what is left of a transfer where the kernel finds it.
    fn hand_over(&mut self, number: usize) {
        let (Some(flight), Some(ring)) = (&self.flights[number], &mut self.ring) else {
            return;
        };
        let entry = flight.entry(self.file.as_fd()).user_data(number as u64);
        // SAFETY: the buffers lie in guest memory, to which no reference points and of which the flight has a handle, and their list is on
        // the heap and not touched; both stay until the kernel has told the outcome, or for ever (`drop`).
        let pushed = unsafe { ring.submission().push(&entry) };
        // There is an entry for each flight, and the kernel frees it as it takes it.
        pushed.expect("the kernel's queue is as long as there are flights");
        self.begun.push_back(number);
    }

    /// Gives the kernel what was begun. What it does not take now is given again with the next call, or lands with `WouldBlock` if it
    /// never will be.
    pub(crate) fn submit(&mut self) {
        let Some(ring) = &self.ring else { return };
        while !self.begun.is_empty() && !self.is_dead {
            match ring.submit() {
                Ok(taken) if taken > 0 => drop(self.begun.drain(..taken.min(self.begun.len()))),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // It has no memory now; what lands gives some back.
                Err(error)
                    if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY))
                        && self.begun.len() < self.flights.len() - self.free.len() =>
                {
                    return;
                }
                told => {
                    tracing::error!(?told, "the kernel takes no more requests to a disk by io_uring");
                    self.is_dead = true;
                }
            }
        }
    }

    /// The next transfer that is over. The rest of one that fell short is given to the kernel.
    pub(crate) fn land(&mut self) -> Option<(T, io::Result<()>)> {
        loop {
            let (number, result) = self.completion()?;
            let Some(Some(flight)) = self.flights.get_mut(number) else {
                tracing::error!(number, "io_uring tells of a request that was not made");
                continue;
            };
            let Some(outcome) = flight.moved(result) else {
                self.hand_over(number);
                self.submit();
                continue;
            };
            let flight = self.flights[number].take()?;
            self.free.push(number);
            self.buffers -= flight.buffers.0.len();
            self.bytes -= flight.bytes;
            if let Kind::Read(spans) = &flight.kind {
                // Also of one that failed: part of it may be there.
                flight.memory.mark_spans(spans);
            }
            return Some((flight.work, outcome));
        }
    }

    /// Waits until something has landed, or the other descriptor is readable. May return early.
    pub(crate) fn wait(&self, other: Option<&EventFd>) {
        let Some(ring) = &self.ring else { return };
        let readable = |fd: RawFd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        };
        // The kernel passes over what is negative.
        let mut fds = [ring.as_raw_fd(), other.map_or(-1, AsRawFd::as_raw_fd)].map(readable);
        // An error is a signal, or no memory for a moment: whoever waits looks and comes again.
        // SAFETY: the array has as many elements as is said, and is this function's own.
        let _ = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, -1) };
    }

    fn completion(&mut self) -> Option<(usize, i32)> {
        if let Some(entry) = self.ring.as_mut()?.completion().next() {
            return Some((entry.user_data() as usize, entry.result()));
        }
        // Nobody gives these to the kernel any more: it will not look at the ring again.
        let refused = self.is_dead.then(|| self.begun.pop_front()).flatten();
        refused.map(|number| (number, -libc::EAGAIN))
    }
}

impl<T> Drop for Ring<T> {
    /// Whoever has a ring lets everything land first. Where that went wrong, a disk may hang, so it is not waited for: memory that
    /// the kernel may still write to is never given back.
    fn drop(&mut self) {
        if self.in_flight() > 0 {
            tracing::error!(
                count = self.in_flight(),
                "requests to a disk are left in flight; their memory stays"
            );
            std::mem::forget(std::mem::take(&mut self.flights));
            return;
        }
        if let Some(ring) = self.ring.take().filter(|_| !self.is_dead) {
            spare().rings.push(ring);
        }
    }
}

impl<T> Flight<T> {
    fn entry(&self, file: BorrowedFd<'_>) -> squeue::Entry {
        let file = types::Fd(file.as_raw_fd());
        let rest = &self.buffers.0[self.next..];
        let count = rest.len().min(MAX_BUFFERS) as u32;
        match self.kind {
            Kind::Read(_) => opcode::Readv::new(file, rest.as_ptr(), count)
                .offset(self.offset)
                .build(),
            Kind::Write => opcode::Writev::new(file, rest.as_ptr(), count)
                .offset(self.offset)
                .build(),
            Kind::Sync => opcode::Fsync::new(file).flags(types::FsyncFlags::DATASYNC).build(),
        }
    }

    /// Takes note of what the kernel did. None if there is more to do.
    fn moved(&mut self, result: i32) -> Option<io::Result<()>> {
        if result < 0 {
            return Some(Err(io::Error::from_raw_os_error(-result)));
        }
        if matches!(self.kind, Kind::Sync) {
            return Some(Ok(()));
        }
        if result == 0 {
            return Some(Err(io::ErrorKind::UnexpectedEof.into()));
        }
        self.offset += u64::from(result.unsigned_abs());
        let left = advance(&mut self.buffers.0[self.next..], result.unsigned_abs() as usize).len();
        self.next = self.buffers.0.len() - left;
        (left == 0).then_some(Ok(()))
    }
}

/// Makes the rings that this process will ever have, for so many files. To be called before it gives up the calls that make one.
pub(crate) fn keep_rings(count: usize) {
    let mut spare = spare();
    spare.is_all = true;
    while spare.rings.len() < count {
        match restricted() {
            Ok(ring) => spare.rings.push(ring),
            Err(error) => {
                spare.refused = Some(error.to_string());
                return;
            }
        }
    }
}

/// Whether this kernel gives this process a ring, with the restrictions that it must have.
///
/// # Errors
/// Why not.
pub fn probe_rings() -> io::Result<()> {
    restricted().map(drop)
}

/// Rings that nobody uses now. They outlive the machine that had them.
struct Spare {
    rings: Vec<IoUring>,
    /// There will be no others.
    is_all: bool,
    /// Why there are not more.
    refused: Option<String>,
}

static SPARE: Mutex<Spare> = Mutex::new(Spare {
    rings: Vec::new(),
    is_all: false,
    refused: None,
});

fn spare() -> MutexGuard<'static, Spare> {
    SPARE.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Spare {
    fn take(&mut self) -> io::Result<IoUring> {
        match self.rings.pop() {
            Some(ring) => Ok(ring),
            None if self.is_all => {
                let reason = self
                    .refused
                    .as_deref()
                    .unwrap_or("all rings of this process are in use");
                Err(io::Error::other(reason.to_owned()))
            }
            None => restricted(),
        }
    }
}

/// A ring that can do what disks need and nothing else, for good.
fn restricted() -> io::Result<IoUring> {
    let ring = IoUring::builder().setup_r_disabled().build(DEPTH as u32)?;
    let operations = [opcode::Readv::CODE, opcode::Writev::CODE, opcode::Fsync::CODE];
    let mut restrictions = operations.map(Restriction::sqe_op);
    ring.submitter().register_restrictions(&mut restrictions)?;
    ring.submitter().register_enable_rings()?;
    Ok(ring)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::OwnedFd;
    use std::os::unix::fs::FileExt;
    use std::os::unix::net::UnixStream;

    use io_uring::squeue::Flags;
    use vm_memory::{Bytes, GuestAddress};

    use super::super::MemoryOptions;
    use super::*;

    const PAGE: u64 = 4096;

    fn memory() -> GuestMemory {
        GuestMemory::new(MemoryOptions {
            bytes: 16 << 20,
            hugetlb: false,
            expect_incoming: false,
        })
        .expect("memory")
    }

    /// Without io_uring there is nothing to be tested here, and that is not to be passed over.
    fn ring(file: impl Into<OwnedFd>) -> Ring<u64> {
        Ring::new(Arc::new(File::from(file.into()))).expect("a host with io_uring (kernel.io_uring_disabled=0)")
    }

    fn land(ring: &mut Ring<u64>) -> (u64, io::Result<()>) {
        loop {
            ring.submit();
            match ring.land() {
                Some(landed) => return landed,
                None => ring.wait(None),
            }
        }
    }

    fn span(address: u64, len: u32) -> Span {
        Span { address, len }
    }

    #[test]
    fn as_many_as_there_is_room_for_are_under_way_and_each_lands_once() {
        let (memory, file) = (memory(), tempfile::tempfile().expect("file"));
        for number in 0..DEPTH as u64 {
            file.write_all_at(&[number as u8; 4096], number * PAGE).expect("file");
        }
        let mut ring = ring(file);
        for number in 0..DEPTH as u64 {
            assert!(ring.has_room_for(1));
            let spans = [span(number * 2 * PAGE, 4096)];
            ring.read(number, &memory, number * PAGE, &spans).expect("begun");
        }
        assert!(!ring.has_room_for(1));
        let mut landed: Vec<u64> = (0..DEPTH)
            .map(|_| land(&mut ring))
            .map(|(number, done)| {
                done.expect("read");
                number
            })
            .collect();
        landed.sort_unstable();
        assert_eq!(landed, (0..DEPTH as u64).collect::<Vec<_>>());
        assert!(ring.in_flight() == 0 && ring.land().is_none());
        for number in 0..DEPTH as u64 {
            let mut found = [0xff; 4096];
            memory
                .tracked()
                .read_slice(&mut found, GuestAddress(number * 2 * PAGE))
                .expect("memory");
            assert_eq!(found, [number as u8; 4096]);
        }
        let dirty: u64 = memory.device_dirty().runs().iter().map(|run| run.count).sum();
        assert_eq!(dirty, DEPTH as u64);
    }

    #[test]
    fn what_falls_short_is_continued() {
        let (memory, (mine, mut theirs)) = (memory(), io::pipe().expect("pipe"));
        let mut ring = ring(mine);
        ring.read(7, &memory, 0, &[span(10, 4), span(100, 4)]).expect("begun");
        ring.submit();
        theirs.write_all(b"abcde").expect("some");
        ring.wait(None);
        assert!(ring.land().is_none());
        theirs.write_all(b"fgh").expect("the rest");
        let (number, done) = land(&mut ring);
        done.expect("read");
        let mut found = [0; 8];
        memory
            .tracked()
            .read_slice(&mut found[..4], GuestAddress(10))
            .expect("memory");
        memory
            .tracked()
            .read_slice(&mut found[4..], GuestAddress(100))
            .expect("memory");
        assert_eq!((number, &found), (7, b"abcdefgh"));
    }

    #[test]
    fn more_buffers_than_one_call_takes_are_written_and_durable() {
        let (memory, mut file) = (memory(), tempfile::tempfile().expect("file"));
        let spans: Vec<Span> = (0..MAX_BUFFERS as u64 + 500)
            .map(|number| span(number * 8, 4))
            .collect();
        for span in &spans {
            memory
                .tracked()
                .write_obj(span.address as u32, GuestAddress(span.address))
                .expect("memory");
        }
        let mut ring = ring(file.try_clone().expect("descriptor"));
        ring.write(0, &memory, 0, &spans).expect("begun");
        land(&mut ring).1.expect("written");
        ring.sync(1, &memory).expect("begun");
        assert_eq!(land(&mut ring).0, 1);
        let mut found = Vec::new();
        file.read_to_end(&mut found).expect("file");
        let expected: Vec<u8> = spans
            .iter()
            .flat_map(|span| (span.address as u32).to_le_bytes())
            .collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn file_that_ends_early_is_an_error() {
        let (memory, file) = (memory(), tempfile::tempfile().expect("file"));
        file.write_all_at(b"short", 0).expect("file");
        let mut ring = ring(file);
        ring.read(0, &memory, 0, &[span(0, 9)]).expect("begun");
        assert_eq!(
            land(&mut ring).1.expect_err("too short").kind(),
            io::ErrorKind::UnexpectedEof
        );
    }

    #[test]
    fn spans_outside_memory_are_refused_before_anything_moves() {
        let mut ring = ring(tempfile::tempfile().expect("file"));
        let (work, error) = ring.read(3, &memory(), 0, &[span(16 << 20, 1)]).expect_err("outside");
        assert_eq!(
            (work, error.kind(), ring.in_flight()),
            (3, io::ErrorKind::InvalidInput, 0)
        );
    }

    #[test]
    fn memory_of_a_ring_that_is_left_in_flight_stays() {
        let (memory, (mine, _theirs)) = (memory(), UnixStream::pair().expect("pair"));
        let start = memory.host_ranges().next().expect("memory").0.addr();
        let mut ring = ring(mine);
        ring.read(0, &memory, 0, &[span(0, 4)]).expect("begun");
        ring.submit();
        drop((ring, memory));
        let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
        let holds = |line: &str| {
            let (from, to) = line.split_once(' ')?.0.split_once('-')?;
            let (from, to) = (
                usize::from_str_radix(from, 16).ok()?,
                usize::from_str_radix(to, 16).ok()?,
            );
            Some((from..to).contains(&start))
        };
        assert!(maps.lines().filter_map(holds).any(|holds| holds));
    }

    /// What a process that was taken over could ask of a ring: nothing that its filters do not allow anyway.
    #[test]
    fn restricted_ring_does_nothing_but_what_disks_need() {
        let mut ring = restricted().expect("a host with io_uring");
        let path = c"/etc/hostname";
        let file = types::Fd(tempfile::tempfile().map(OwnedFd::from).expect("file").as_raw_fd());
        let forbidden = [
            opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), path.as_ptr()).build(),
            opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build(),
            opcode::Close::new(file).build(),
            opcode::Nop::new().build(),
            opcode::Fsync::new(file).build().flags(Flags::ASYNC),
        ];
        for entry in forbidden {
            // SAFETY: the path lives as long as the process; nothing else is pointed to.
            unsafe { ring.submission().push(&entry) }.expect("room");
            ring.submit_and_wait(1).expect("an answer");
            let result = ring.completion().next().map(|told| told.result());
            assert_eq!(result, Some(-libc::EACCES), "{entry:?}");
        }
        let registered = ring.submitter().register_files(&[0]).expect_err("restricted");
        assert_eq!(registered.raw_os_error(), Some(libc::EACCES));
        let lifted = ring
            .submitter()
            .register_restrictions(&mut [Restriction::sqe_op(opcode::OpenAt::CODE)]);
        assert!(lifted.is_err());
    }
}
