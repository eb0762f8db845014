//! Guest memory in vectors, a lock for each chunk of frames.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread;
use std::time::Duration;

use ferry_migration::guest::{FRAME_SIZE, FrameRun, GuestError, GuestMemory, MemoryShape};

#[derive(Debug)]
pub struct FakeMemory {
    shape: MemoryShape,
    chunk_frames: u64,
    chunks: Vec<RwLock<Vec<u8>>>,
    send_delay_micros: AtomicU64,
    /// Frames that were made zero by order.
    pub zeroed: AtomicU64,
    /// Runs for which huge pages were asked.
    pub advised: Mutex<Vec<FrameRun>>,
    /// Frames that were backed ahead.
    pub populated: AtomicU64,
    /// A frame whose first byte is damaged after it was received.
    pub damage: Option<u64>,
}

/// A piece of a run inside one chunk: chunk, first byte, bytes.
type Piece = (usize, usize, usize);

impl FakeMemory {
    pub fn new(shape: MemoryShape, chunk_frames: u64) -> Self {
        let chunks = shape.frames().div_ceil(chunk_frames);
        let chunk = || RwLock::new(vec![0; (chunk_frames * FRAME_SIZE) as usize]);
        Self {
            shape,
            chunk_frames,
            chunks: (0..chunks).map(|_| chunk()).collect(),
            send_delay_micros: AtomicU64::new(0),
            zeroed: AtomicU64::new(0),
            advised: Mutex::default(),
            populated: AtomicU64::new(0),
            damage: None,
        }
    }

    /// Each write to a socket takes so long from now on.
    pub fn slow_sends(&self, time: Duration) {
        self.send_delay_micros.store(time.as_micros() as u64, Ordering::Relaxed);
    }

    /// Fills a frame with a pattern of `value`; zero makes it zero.
    pub fn fill(&self, frame: u64, value: u64) {
        self.write(frame, value, || {});
    }

    /// Fills a frame as the guest does: `touch` runs before, under the same lock.
    pub fn write(&self, frame: u64, value: u64, touch: impl FnOnce()) {
        let (chunk, offset, length) = self.pieces(FrameRun { first: frame, count: 1 })[0];
        let mut bytes = self.chunks[chunk].write().unwrap();
        touch();
        let mut word = value;
        for bytes in bytes[offset..offset + length].chunks_exact_mut(8) {
            bytes.copy_from_slice(&word.to_le_bytes());
            word = word.wrapping_mul(6_364_136_223_846_793_005);
        }
    }

    pub fn equals(&self, other: &Self) -> Result<(), String> {
        let regions = self
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

    fn all_pieces(&self, runs: &[FrameRun]) -> Vec<Piece> {
        runs.iter().flat_map(|&run| self.pieces(run)).collect()
    }
}

impl GuestMemory for FakeMemory {
    fn shape(&self) -> &MemoryShape {
        &self.shape
    }

    fn send(&self, socket: BorrowedFd<'_>, prefix: &[u8], runs: &[FrameRun]) -> io::Result<()> {
        let delay = Duration::from_micros(self.send_delay_micros.load(Ordering::Relaxed));
        if !delay.is_zero() {
            thread::sleep(delay);
        }
        let pieces = self.all_pieces(runs);
        let mut guards: Vec<(usize, RwLockReadGuard<'_, Vec<u8>>)> = Vec::new();
        for &(chunk, ..) in &pieces {
            if guards.last().is_none_or(|(last, _)| *last != chunk) {
                guards.push((chunk, self.chunks[chunk].read().unwrap()));
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
        let mut left = &mut slices[..];
        while !left.is_empty() {
            let written = rustix::io::retry_on_intr(|| rustix::io::writev(socket, left))?;
            IoSlice::advance_slices(&mut left, written);
        }
        Ok(())
    }

    fn receive(&self, socket: BorrowedFd<'_>, runs: &[FrameRun]) -> io::Result<()> {
        let pieces = self.all_pieces(runs);
        let mut guards: Vec<(usize, RwLockWriteGuard<'_, Vec<u8>>)> = Vec::new();
        for &(chunk, ..) in &pieces {
            if guards.last().is_none_or(|(last, _)| *last != chunk) {
                guards.push((chunk, self.chunks[chunk].write().unwrap()));
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
        let damaged = |frame: &u64| runs.iter().any(|run| (run.first..run.end()).contains(frame));
        if let Some(frame) = self.damage.filter(damaged) {
            self.fill(frame, 0x00ba_dbad);
        }
        Ok(())
    }

    fn zero_pages(&self, run: FrameRun, found: &mut Vec<FrameRun>) -> Result<(), GuestError> {
        let mut frame = run.first;
        let mut last: Option<FrameRun> = None;
        for (chunk, offset, length) in self.pieces(run) {
            let bytes = self.chunks[chunk].read().unwrap();
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
            hasher.update(&self.chunks[chunk].read().unwrap()[offset..offset + length]);
        }
        Ok(hasher.digest128())
    }

    fn advise_huge(&self, run: FrameRun) -> Result<(), GuestError> {
        self.advised.lock().unwrap().push(run);
        Ok(())
    }

    fn populate(&self, run: FrameRun) -> Result<(), GuestError> {
        self.populated.fetch_add(run.count, Ordering::Relaxed);
        Ok(())
    }
}
