//! Guest memory in vectors, a lock for each chunk of frames.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread;
use std::time::Duration;

use super::processors::{Deed, Processors};
use ferry_migration::PageSet;
use ferry_migration::guest::{
    AbsentPages, FRAME_SIZE, FRAMES_PER_HUGE_PAGE, FrameRun, GuestError, GuestMemory, MemoryShape, Region,
};

/// Frames of the usual fake guest that hold nothing, and are absent when pages come late.
pub const NEVER_POPULATED: FrameRun = FrameRun { first: 6500, count: 8 };

#[derive(Debug)]
pub struct FakeMemory {
    store: Arc<Store>,
    send_delay_micros: AtomicU64,
    /// Frames that were made zero by order.
    pub zeroed: AtomicU64,
    /// Runs for which huge pages were asked.
    pub advised: Mutex<Vec<FrameRun>>,
    /// Frames that were backed ahead.
    pub populated: AtomicU64,
    /// How many of them there is room for.
    room: AtomicU64,
    /// Its regions but the first are disks.
    pub has_disk: bool,
    /// So many of its pages come late together.
    pub late_unit: u64,
    /// Its pages cannot come late.
    pub cannot_wait: bool,
    /// A frame that is damaged after it was received.
    pub damage: Option<u64>,
    /// How many times more that happens.
    pub damages: AtomicU64,
    digest_delay_micros: AtomicU64,
    durable_delay_micros: AtomicU64,
    sent_plainly: AtomicU64,
    /// A disk among it neither reads nor takes anything.
    fails: AtomicBool,
    /// A frame that is damaged on its way, and how many times more.
    damage_on_way: Mutex<(u64, u64)>,
}

/// The bytes, which outlive the handle of those who wait for late pages.
#[derive(Debug)]
struct Store {
    shape: MemoryShape,
    chunk_frames: u64,
    chunks: Vec<RwLock<Vec<u8>>>,
    late: Mutex<Late>,
    changed: Condvar,
    /// Nobody hears any more which pages are touched.
    is_deaf: AtomicBool,
    /// There is no room for a page that comes late.
    is_full: AtomicBool,
    /// Huge pages that were asked for after all had come.
    made_huge: AtomicU64,
    processors: Processors,
}

/// Pages that are not there yet.
#[derive(Debug, Default)]
struct Late {
    absent: Option<PageSet>,
    touched: Vec<u64>,
    /// Pages that came when they were there already.
    doubled: u64,
}

/// A piece of a run inside one chunk: chunk, first byte, bytes.
type Piece = (usize, usize, usize);

impl FakeMemory {
    pub fn new(shape: MemoryShape, chunk_frames: u64) -> Self {
        let chunks = shape.frames().div_ceil(chunk_frames);
        let chunk = || RwLock::new(vec![0; (chunk_frames * FRAME_SIZE) as usize]);
        let store = Store {
            shape,
            chunk_frames,
            chunks: (0..chunks).map(|_| chunk()).collect(),
            late: Mutex::default(),
            changed: Condvar::new(),
            is_deaf: AtomicBool::new(false),
            is_full: AtomicBool::new(false),
            made_huge: AtomicU64::new(0),
            processors: Processors::default(),
        };
        Self {
            store: Arc::new(store),
            send_delay_micros: AtomicU64::new(0),
            zeroed: AtomicU64::new(0),
            advised: Mutex::default(),
            populated: AtomicU64::new(0),
            room: AtomicU64::new(u64::MAX),
            has_disk: false,
            late_unit: 1,
            cannot_wait: false,
            damage: None,
            damages: AtomicU64::new(u64::MAX),
            digest_delay_micros: AtomicU64::new(0),
            durable_delay_micros: AtomicU64::new(0),
            sent_plainly: AtomicU64::new(0),
            fails: AtomicBool::new(false),
            damage_on_way: Mutex::default(),
        }
    }

    /// Huge pages that were asked for after all pages had come.
    pub fn made_huge(&self) -> u64 {
        self.store.made_huge.load(Ordering::Relaxed)
    }

    /// How the threads that copy it share the processors.
    pub fn processors(&self) -> &Processors {
        &self.store.processors
    }

    /// There is room for so many frames that are backed ahead, and for no more.
    pub fn has_room_for(&self, frames: u64) {
        self.room.store(frames, Ordering::Relaxed);
    }

    /// Each write to a socket takes so long from now on.
    pub fn slow_sends(&self, time: Duration) {
        self.send_delay_micros.store(time.as_micros() as u64, Ordering::Relaxed);
    }

    /// From now on nobody hears which pages are touched.
    pub fn become_deaf(&self) {
        self.store.is_deaf.store(true, Ordering::Relaxed);
    }

    /// From now on there is no room for pages that come late.
    pub fn fill_up(&self) {
        self.store.is_full.store(true, Ordering::Relaxed);
    }

    /// From now on each transfer fails, and not for the socket's sake.
    pub fn fail_transfers(&self) {
        self.fails.store(true, Ordering::Relaxed);
    }

    fn check_transfer(&self) -> io::Result<()> {
        if self.fails.load(Ordering::Relaxed) {
            let cause = io::Error::from(io::ErrorKind::StorageFull);
            return Err(GuestError::new(cause).in_transfer());
        }
        Ok(())
    }

    /// A bit of this frame is another the next so many times that it is sent. What is here stays as it is.
    pub fn damage_sends(&self, frame: u64, times: u64) {
        *self.damage_on_way.lock().unwrap() = (frame, times);
    }

    /// Where in what is sent of these runs a bit is to be another.
    fn damaged_byte(&self, runs: &[FrameRun]) -> Option<usize> {
        let mut damage = self.damage_on_way.lock().unwrap();
        let (frame, times) = &mut *damage;
        let mut frames = runs.iter().flat_map(|run| run.first..run.end());
        let at = frames.position(|sent| sent == *frame).filter(|_| *times > 0)?;
        *times -= 1;
        Some(at * FRAME_SIZE as usize + 100)
    }

    /// The next digesting of pages takes so long.
    pub fn slow_digest(&self, time: Duration) {
        self.digest_delay_micros
            .store(time.as_micros() as u64, Ordering::Relaxed);
    }

    /// To have what arrived outlast a crash takes so long the next time.
    pub fn slow_once_to_be_durable(&self, time: Duration) {
        self.durable_delay_micros
            .store(time.as_micros() as u64, Ordering::Relaxed);
    }

    /// Fills a frame with a pattern of `value`; zero makes it zero.
    pub fn fill(&self, frame: u64, value: u64) {
        self.write(frame, value, || {});
    }

    /// Fills a frame with one word again and again.
    pub fn repeat(&self, frame: u64, value: u64) {
        let (chunk, offset, length) = self.pieces(FrameRun { first: frame, count: 1 })[0];
        let mut bytes = self.store.chunks[chunk].write().unwrap();
        let words = bytes[offset..offset + length].chunks_exact_mut(8);
        words.for_each(|word| word.copy_from_slice(&value.to_le_bytes()));
    }

    /// Fills a frame as the guest does: `touch` runs before, under the same lock.
    pub fn write(&self, frame: u64, value: u64, touch: impl FnOnce()) {
        let (chunk, offset, length) = self.pieces(FrameRun { first: frame, count: 1 })[0];
        let mut bytes = self.store.chunks[chunk].write().unwrap();
        touch();
        let mut word = value;
        for bytes in bytes[offset..offset + length].chunks_exact_mut(8) {
            bytes.copy_from_slice(&word.to_le_bytes());
            word = word.wrapping_mul(6_364_136_223_846_793_005);
        }
    }

    /// Writes one word of a frame; `touch` as in [`FakeMemory::write`].
    pub fn write_word(&self, frame: u64, value: u64, touch: impl FnOnce()) {
        let (chunk, offset, length) = self.pieces(FrameRun { first: frame, count: 1 })[0];
        let mut bytes = self.store.chunks[chunk].write().unwrap();
        touch();
        let words = bytes[offset..offset + length].as_chunks_mut::<8>().0;
        words[value as usize % words.len()] = value.to_le_bytes();
    }

    pub fn equals(&self, other: &Self) -> Result<(), String> {
        let regions = self
            .store
            .shape
            .regions()
            .iter()
            .flat_map(|region| region.run().first..region.run().end());
        for frame in regions {
            let run = FrameRun { first: frame, count: 1 };
            if self.digest(run).unwrap() != other.digest(run).unwrap() {
                return Err(format!("frame {frame:#x} differs"));
            }
        }
        Ok(())
    }

    fn pieces(&self, run: FrameRun) -> Vec<Piece> {
        self.store.pieces(run)
    }

    /// Touches a frame as a guest does that runs without all of its memory: returns once it is there.
    pub fn touch(&self, frame: u64) {
        let mut late = self.store.late.lock().unwrap();
        let mut told = false;
        while late.absent.as_ref().is_some_and(|absent| absent.contains(frame)) {
            if !told {
                late.touched.push(frame);
                self.store.changed.notify_all();
                told = true;
            }
            late = self.store.changed.wait(late).unwrap();
        }
    }

    /// Tells of a touch as of a page that is absent, and does not wait.
    pub fn touch_and_go_on(&self, frame: u64) {
        self.store.late.lock().unwrap().touched.push(frame);
        self.store.changed.notify_all();
    }

    /// Whether it is not there yet.
    pub fn is_absent(&self, frame: u64) -> bool {
        let late = self.store.late.lock().unwrap();
        late.absent.as_ref().is_some_and(|absent| absent.contains(frame))
    }

    /// Pages that were sent as they are.
    pub fn sent_plainly(&self) -> u64 {
        self.sent_plainly.load(Ordering::Relaxed)
    }

    /// Pages that came late although they were there.
    pub fn doubled(&self) -> u64 {
        self.store.late.lock().unwrap().doubled
    }

    /// Damages what was just received, if it is to be.
    fn damage_in(&self, runs: &[FrameRun]) {
        let damaged = |frame: &u64| runs.iter().any(|run| (run.first..run.end()).contains(frame));
        if let Some(frame) = self.damage.filter(damaged)
            && self.damages.load(Ordering::Relaxed) > 0
        {
            self.damages.fetch_sub(1, Ordering::Relaxed);
            self.fill(frame, 0x00ba_dbad);
        }
    }

    fn all_pieces(&self, runs: &[FrameRun]) -> Vec<Piece> {
        runs.iter().flat_map(|&run| self.pieces(run)).collect()
    }
}

impl Store {
    fn pieces(&self, run: FrameRun) -> Vec<Piece> {
        assert!(self.shape.contains(run), "{run:?} is not memory");
        let (region, offset) = self.shape.locate(run.first).unwrap();
        let before: u64 = self.shape.regions()[..region].iter().map(|region| region.frames).sum();
        let (mut at, mut left) = (before + offset, run.count);
        let mut pieces = Vec::new();
        while left > 0 {
            let inside = at % self.chunk_frames;
            let count = left.min(self.chunk_frames - inside);
            let chunk = (at / self.chunk_frames) as usize;
            pieces.push((chunk, (inside * FRAME_SIZE) as usize, (count * FRAME_SIZE) as usize));
            (at, left) = (at + count, left - count);
        }
        pieces
    }

    /// Puts bytes into those pages of a run that are absent. Fails once nobody waits for pages any more, as a kernel does.
    fn put(&self, run: FrameRun, mut contents: impl FnMut(u64) -> Option<Vec<u8>>) -> Result<(), GuestError> {
        let mut late = self.late.lock().unwrap();
        for frame in run.first..run.end() {
            let page = FrameRun { first: frame, count: 1 };
            let bytes = contents(frame - run.first);
            let Some(absent) = late.absent.as_mut() else {
                return Err(GuestError::new("no page is awaited"));
            };
            if !absent.contains(frame) {
                late.doubled += 1;
                continue;
            }
            absent.remove(page);
            let (chunk, offset, length) = self.pieces(page)[0];
            let mut chunk = self.chunks[chunk].write().unwrap();
            match bytes {
                Some(bytes) => chunk[offset..offset + length].copy_from_slice(&bytes),
                None => chunk[offset..offset + length].fill(0),
            }
        }
        self.changed.notify_all();
        Ok(())
    }
}

fn write_all(socket: BorrowedFd<'_>, mut left: &mut [IoSlice<'_>]) -> io::Result<()> {
    while !left.is_empty() {
        let written = rustix::io::retry_on_intr(|| rustix::io::writev(socket, left))?;
        IoSlice::advance_slices(&mut left, written);
    }
    Ok(())
}

/// Those who wait for late pages.
struct Waiting {
    store: Arc<Store>,
    /// So many pages come together.
    unit: u64,
}

impl Waiting {
    fn check_room(&self) -> Result<(), GuestError> {
        match self.store.is_full.load(Ordering::Relaxed) {
            true => Err(GuestError::new(io::Error::from(io::ErrorKind::OutOfMemory))),
            false => Ok(()),
        }
    }

    fn check_whole(&self, run: FrameRun) {
        assert!(run.is_of_whole(self.unit), "{run:?} comes without what comes with it");
    }
}

impl AbsentPages for Waiting {
    fn touched(&self, patience: Duration, frames: &mut Vec<u64>) -> Result<(), GuestError> {
        if self.store.is_deaf.load(Ordering::Relaxed) {
            return Err(GuestError::new("the descriptor is gone"));
        }
        let mut late = self.store.late.lock().unwrap();
        if late.touched.is_empty() {
            late = self.store.changed.wait_timeout(late, patience).unwrap().0;
        }
        frames.append(&mut late.touched);
        Ok(())
    }

    fn supply(&self, runs: &[FrameRun], contents: &[u8]) -> Result<(), GuestError> {
        self.store.processors.note(Deed::Supplied, runs);
        self.check_room()?;
        runs.iter().for_each(|&run| self.check_whole(run));
        let mut pages = contents.chunks_exact(FRAME_SIZE as usize);
        runs.iter()
            .try_for_each(|&run| self.store.put(run, |_| Some(pages.next().unwrap().to_vec())))?;
        assert!(pages.next().is_none(), "more contents than pages");
        Ok(())
    }

    fn supply_zeroes(&self, run: FrameRun) -> Result<(), GuestError> {
        self.check_room()?;
        self.check_whole(run);
        self.store.put(run, |_| None)
    }

    fn make_huge(&self, block: FrameRun) -> Result<bool, GuestError> {
        assert!(self.store.late.lock().unwrap().absent.is_none(), "pages are missing");
        assert_eq!(
            (block.first % FRAMES_PER_HUGE_PAGE, block.count),
            (0, FRAMES_PER_HUGE_PAGE)
        );
        self.store.processors.note(Deed::MadeHuge, &[block]);
        self.store.made_huge.fetch_add(1, Ordering::Relaxed);
        Ok(true)
    }

    fn end(&self) -> Result<(), GuestError> {
        self.store.late.lock().unwrap().absent = None;
        self.store.changed.notify_all();
        Ok(())
    }
}

impl GuestMemory for FakeMemory {
    fn shape(&self) -> &MemoryShape {
        &self.store.shape
    }

    fn is_disk(&self, region: Region) -> bool {
        self.has_disk && region != self.store.shape.regions()[0]
    }

    fn set_turns(&self, length: Option<Duration>) -> io::Result<bool> {
        Ok(self.store.processors.set_turns(length))
    }

    fn give_way(&self) {
        self.store.processors.note(Deed::GaveWay, &[]);
        thread::yield_now();
    }

    fn send(&self, socket: BorrowedFd<'_>, prefix: &[u8], runs: &[FrameRun]) -> io::Result<()> {
        self.store.processors.note(Deed::Sent, runs);
        self.check_transfer()?;
        let delay = Duration::from_micros(self.send_delay_micros.load(Ordering::Relaxed));
        if !delay.is_zero() {
            thread::sleep(delay);
        }
        let pages: u64 = runs.iter().map(|run| run.count).sum();
        self.sent_plainly.fetch_add(pages, Ordering::Relaxed);
        if let Some(at) = self.damaged_byte(runs) {
            let mut bytes = vec![0; (pages * FRAME_SIZE) as usize];
            self.read_pages(runs, &mut bytes).map_err(io::Error::other)?;
            bytes[at] ^= 1;
            return write_all(socket, &mut [IoSlice::new(prefix), IoSlice::new(&bytes)]);
        }
        let pieces = self.all_pieces(runs);
        let mut guards: Vec<(usize, RwLockReadGuard<'_, Vec<u8>>)> = Vec::new();
        for &(chunk, ..) in &pieces {
            if guards.last().is_none_or(|(last, _)| *last != chunk) {
                guards.push((chunk, self.store.chunks[chunk].read().unwrap()));
            }
        }
        let mut slices = vec![IoSlice::new(prefix)];
        let mut guard = 0;
        for (chunk, offset, length) in pieces {
            while guards[guard].0 != chunk {
                guard += 1;
            }
            slices.push(IoSlice::new(&guards[guard].1[offset..offset + length]));
        }
        write_all(socket, &mut slices)
    }

    fn receive(&self, socket: BorrowedFd<'_>, runs: &[FrameRun]) -> io::Result<()> {
        self.store.processors.note(Deed::Received, runs);
        self.check_transfer()?;
        let pieces = self.all_pieces(runs);
        let mut guards: Vec<(usize, RwLockWriteGuard<'_, Vec<u8>>)> = Vec::new();
        for &(chunk, ..) in &pieces {
            if guards.last().is_none_or(|(last, _)| *last != chunk) {
                guards.push((chunk, self.store.chunks[chunk].write().unwrap()));
            }
        }
        let mut slices = Vec::new();
        let mut pieces = pieces.into_iter().peekable();
        for (chunk, guard) in &mut guards {
            let (mut rest, mut at) = (&mut guard[..], 0);
            while let Some((_, offset, length)) = pieces.next_if(|piece| piece.0 == *chunk) {
                let (slice, after) = rest[offset - at..].split_at_mut(length);
                slices.push(IoSliceMut::new(slice));
                (rest, at) = (after, offset + length);
            }
        }
        let mut left = &mut slices[..];
        while !left.is_empty() {
            let read = rustix::io::retry_on_intr(|| rustix::io::readv(socket, left))?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            IoSliceMut::advance_slices(&mut left, read);
        }
        drop(guards);
        self.damage_in(runs);
        Ok(())
    }

    fn read_pages(&self, runs: &[FrameRun], bytes: &mut [u8]) -> Result<(), GuestError> {
        let mut rest = bytes;
        for (chunk, offset, length) in self.all_pieces(runs) {
            let (piece, after) = rest.split_at_mut(length);
            piece.copy_from_slice(&self.store.chunks[chunk].read().unwrap()[offset..offset + length]);
            rest = after;
        }
        assert!(rest.is_empty(), "more room than pages");
        Ok(())
    }

    fn write_pages(&self, runs: &[FrameRun], bytes: &[u8]) -> Result<(), GuestError> {
        let mut rest = bytes;
        for (chunk, offset, length) in self.all_pieces(runs) {
            let (piece, after) = rest.split_at(length);
            self.store.chunks[chunk].write().unwrap()[offset..offset + length].copy_from_slice(piece);
            rest = after;
        }
        assert!(rest.is_empty(), "more bytes than pages");
        self.damage_in(runs);
        Ok(())
    }

    fn zero_pages(&self, run: FrameRun, found: &mut Vec<FrameRun>) -> Result<(), GuestError> {
        let mut frame = run.first;
        let mut last: Option<FrameRun> = None;
        for (chunk, offset, length) in self.pieces(run) {
            let bytes = self.store.chunks[chunk].read().unwrap();
            for page in bytes[offset..offset + length].chunks_exact(FRAME_SIZE as usize) {
                let zero = page[..16] == [0; 16] && page.iter().all(|&byte| byte == 0);
                match &mut last {
                    Some(last) if zero => last.count += 1,
                    _ if zero => last = Some(FrameRun { first: frame, count: 1 }),
                    _ => found.extend(last.take()),
                }
                frame += 1;
            }
        }
        found.extend(last);
        Ok(())
    }

    fn write_zeroes(&self, run: FrameRun) -> Result<(), GuestError> {
        (run.first..run.end()).for_each(|frame| self.fill(frame, 0));
        self.zeroed.fetch_add(run.count, Ordering::Relaxed);
        Ok(())
    }

    fn digest(&self, run: FrameRun) -> Result<u128, GuestError> {
        let mut hasher = xxhash_rust::xxh3::Xxh3::new();
        for (chunk, offset, length) in self.pieces(run) {
            hasher.update(&self.store.chunks[chunk].read().unwrap()[offset..offset + length]);
        }
        Ok(hasher.digest128())
    }

    fn page_digests(&self, run: FrameRun, digests: &mut Vec<u64>) -> Result<(), GuestError> {
        thread::sleep(Duration::from_micros(
            self.digest_delay_micros.swap(0, Ordering::Relaxed),
        ));
        for (chunk, offset, length) in self.pieces(run) {
            let bytes = self.store.chunks[chunk].read().unwrap();
            let pages = bytes[offset..offset + length].chunks_exact(FRAME_SIZE as usize);
            digests.extend(pages.map(xxhash_rust::xxh3::xxh3_64));
        }
        Ok(())
    }

    fn advise_huge(&self, run: FrameRun) -> Result<(), GuestError> {
        self.advised.lock().unwrap().push(run);
        Ok(())
    }

    fn populate(&self, run: FrameRun) -> Result<(), GuestError> {
        let backed = self.populated.fetch_add(run.count, Ordering::Relaxed) + run.count;
        if backed > self.room.load(Ordering::Relaxed) {
            // As MADV_POPULATE_WRITE has it, of small pages and of a pool of huge ones.
            return Err(GuestError::new(io::Error::from(rustix::io::Errno::NOMEM)));
        }
        Ok(())
    }

    fn late_unit(&self) -> u64 {
        self.late_unit
    }

    fn make_durable(&self) -> Result<(), GuestError> {
        let delay = self.durable_delay_micros.swap(0, Ordering::Relaxed);
        std::thread::sleep(Duration::from_micros(delay));
        Ok(())
    }

    fn check_late(&self) -> Result<(), GuestError> {
        match self.cannot_wait {
            true => Err(GuestError::new("userfaultfd is not permitted")),
            false => Ok(()),
        }
    }

    fn await_late(&self, missing: &PageSet) -> Result<Box<dyn AbsentPages>, GuestError> {
        // What is in them is given up, and some that were never populated are absent as well.
        missing
            .runs()
            .flat_map(|run| run.first..run.end())
            .for_each(|frame| self.fill(frame, 0x0bad));
        let mut absent = missing.clone();
        absent.insert(NEVER_POPULATED);
        self.store.late.lock().unwrap().absent = Some(absent);
        Ok(Box::new(Waiting {
            store: Arc::clone(&self.store),
            unit: self.late_unit,
        }))
    }
}
