//! Disks that move with their guest: their blocks of 4 KiB are frames behind those of memory.
//!
//! So the engine copies them as it copies memory, in the same rounds, over the same streams, to the same instant: what the host has of a
//! disk is its extents, what the guest wrote is in the machine's bitmap, and a hole is a zero page that is told and not sent. Offsets and
//! buffers are aligned as direct I/O wants them.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::sync::Arc;

use ferry_migration::guest::{FRAME_SIZE, FrameRun, GuestError, Region};
use ferry_vmm::DiskBuffer;
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;
use xxhash_rust::xxh3::xxh3_64;

/// The first frame of the first disk: no guest has so much memory.
const FIRST_FRAME: u64 = 1 << 40;

/// From one disk's first frame to the next one's: 64 TiB.
const DISK_FRAMES: u64 = 1 << 34;

/// Frames that are read or written at once: a huge page.
const PIECE_FRAMES: u64 = ferry_vmm::HUGE_PAGE_SIZE / FRAME_SIZE;

/// What a disk that is copied did not do. Both sides of a migration tell it from what a connection does not do.
#[derive(Debug, thiserror::Error)]
#[error("failed to {doing} disk {path}")]
struct DiskError {
    doing: &'static str,
    path: String,
    #[source]
    source: io::Error,
}

/// A disk that is copied.
#[derive(Debug, Clone)]
pub(super) struct CopiedDisk {
    image: Arc<File>,
    /// Its name, for messages.
    path: String,
    bytes: u64,
    /// It has no holes, and something on it from before.
    is_device: bool,
    region: Region,
}

impl CopiedDisk {
    /// The disk that is the copied one of this number among its guest's; of so many bytes, if that is told.
    ///
    /// # Errors
    /// Its size cannot be told, or it is less, or larger than the numbers go.
    pub(super) fn new(image: Arc<File>, path: &str, number: usize, bytes: Option<u64>) -> io::Result<Self> {
        let here = seek(&image, SeekFrom::End(0))?;
        let bytes = bytes.unwrap_or(here);
        if here < bytes {
            return Err(io::Error::other(format!(
                "it has {here} bytes, and the guest's disk {bytes}"
            )));
        }
        let is_device = image.metadata()?.file_type().is_block_device();
        let frames = bytes.div_ceil(FRAME_SIZE);
        if frames == 0 || frames > DISK_FRAMES {
            return Err(io::Error::other(format!("a disk of {bytes} bytes cannot be copied")));
        }
        let start_frame = FIRST_FRAME + number as u64 * DISK_FRAMES;
        let region = Region { start_frame, frames };
        let path = path.to_owned();
        Ok(Self {
            image,
            path,
            bytes,
            is_device,
            region,
        })
    }

    /// Its frames.
    pub(super) fn region(&self) -> Region {
        self.region
    }

    /// Whether this run, which lies inside one region, is of a disk and not of memory.
    pub(super) fn is_disk(run: FrameRun) -> bool {
        run.first >= FIRST_FRAME
    }

    /// Whether this run is of this disk.
    pub(super) fn holds(&self, run: FrameRun) -> bool {
        run.first >= self.region.start_frame && run.end() <= self.region.run().end()
    }

    /// Whether nothing was on it before the first byte that came.
    pub(super) fn is_blank(&self) -> bool {
        !self.is_device
    }

    /// Appends the longest runs of blocks inside `run` that are zero, ascending; of a file its holes, of a block device what is found by reading.
    pub(super) fn zero_runs(&self, run: FrameRun, found: &mut Vec<FrameRun>) -> io::Result<()> {
        if self.is_device {
            return self.zeroes_read(run, found);
        }
        let mut next = run.first;
        for extent in self.extents(run)? {
            push_run(found, next, extent.first);
            next = extent.end();
        }
        push_run(found, next, run.end());
        Ok(())
    }

    fn zeroes_read(&self, run: FrameRun, found: &mut Vec<FrameRun>) -> io::Result<()> {
        let (mut frame, mut zero_since) = (run.first, None);
        self.each_piece(run, |offset, len, frames| {
            self.load(offset, &mut frames[..len])?;
            frames[len..].fill(0);
            for block in frames.chunks_exact(FRAME_SIZE as usize) {
                if block.iter().all(|&byte| byte == 0) {
                    zero_since.get_or_insert(frame);
                } else if let Some(first) = zero_since.take() {
                    push_run(found, first, frame);
                }
                frame += 1;
            }
            Ok(())
        })?;
        push_run(found, zero_since.unwrap_or(run.end()), run.end());
        Ok(())
    }

    /// Where the image has data, in whole frames, ascending; everything where its file system does not tell.
    pub(super) fn extents(&self, run: FrameRun) -> io::Result<Vec<FrameRun>> {
        let extents = self.find_extents(run).and_then(|extents| {
            // What was cut off would look like a hole, and be told to be zero.
            match seek(&self.image, SeekFrom::End(0))? < self.bytes {
                true => Err(io::ErrorKind::UnexpectedEof.into()),
                false => Ok(extents),
            }
        });
        extents.map_err(self.failed("look for data on"))
    }

    fn find_extents(&self, run: FrameRun) -> io::Result<Vec<FrameRun>> {
        let (start, end) = (self.offset(run.first), self.offset(run.end()).min(self.bytes));
        let mut found: Vec<FrameRun> = Vec::new();
        let mut at = start;
        while at < end {
            let data = match seek(&self.image, SeekFrom::Data(at)) {
                Ok(data) => data,
                // Nothing but a hole up to the end.
                Err(Errno::NXIO) => break,
                Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(vec![run]),
                Err(error) => return Err(error.into()),
            };
            let hole = seek(&self.image, SeekFrom::Hole(data))?;
            if data >= end {
                break;
            }
            let first = run.first.max(self.region.start_frame + data / FRAME_SIZE);
            let last = self.region.start_frame + hole.min(end).div_ceil(FRAME_SIZE);
            at = hole;
            // The guest may have discarded it between the two questions.
            if hole <= data || last <= first {
                at = at.max(data + 1);
                continue;
            }
            let extent = FrameRun {
                first,
                count: last - first,
            };
            match found.last_mut() {
                Some(before) if before.end() >= first => before.count = last.max(before.end()) - before.first,
                _ => found.push(extent),
            }
        }
        Ok(found)
    }

    /// Writes the run's bytes to the socket, the last frame filled up with zeroes.
    pub(super) fn send(&self, socket: BorrowedFd<'_>, run: FrameRun) -> io::Result<()> {
        self.each_piece(run, |offset, len, frames| {
            self.load(offset, &mut frames[..len])?;
            frames[len..].fill(0);
            write_all(socket, frames)
        })
    }

    /// Reads the run's bytes from the socket into the image.
    pub(super) fn receive(&self, socket: BorrowedFd<'_>, run: FrameRun) -> io::Result<()> {
        self.each_piece(run, |offset, len, frames| {
            read_all(socket, frames)?;
            self.store(offset, &frames[..len])
        })
    }

    /// Reads the run's bytes, the last frame filled up with zeroes.
    pub(super) fn read(&self, run: FrameRun, bytes: &mut [u8]) -> io::Result<()> {
        check_room(run, bytes.len())?;
        let mut pieces = bytes.chunks_mut((PIECE_FRAMES * FRAME_SIZE) as usize);
        self.each_piece(run, |offset, len, frames| {
            self.load(offset, &mut frames[..len])?;
            frames[len..].fill(0);
            let piece = pieces.next().ok_or(io::ErrorKind::InvalidInput)?;
            piece.copy_from_slice(frames);
            Ok(())
        })
    }

    /// Writes the run's bytes into the image.
    pub(super) fn write(&self, run: FrameRun, bytes: &[u8]) -> io::Result<()> {
        check_room(run, bytes.len())?;
        let mut pieces = bytes.chunks((PIECE_FRAMES * FRAME_SIZE) as usize);
        self.each_piece(run, |offset, len, frames| {
            frames.copy_from_slice(pieces.next().ok_or(io::ErrorKind::InvalidInput)?);
            self.store(offset, &frames[..len])
        })
    }

    /// Makes the run read as zeroes, as a hole where the file system has them.
    pub(super) fn write_zeroes(&self, run: FrameRun) -> io::Result<()> {
        let (offset, end) = (self.offset(run.first), self.offset(run.end()).min(self.bytes));
        let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(&self.image, how, offset, end - offset) {
            Err(Errno::OPNOTSUPP) => self.each_piece(run, |offset, len, frames| {
                frames.fill(0);
                self.store(offset, &frames[..len])
            }),
            done => done.map_err(|error| self.failed("make zeroes on")(error.into())),
        }
    }

    /// A digest of the run's bytes.
    pub(super) fn digest(&self, run: FrameRun) -> io::Result<u128> {
        let mut hasher = blake3::Hasher::new();
        self.each_piece(run, |offset, len, frames| {
            self.load(offset, &mut frames[..len])?;
            hasher.update(&frames[..len]);
            Ok(())
        })?;
        let digest = hasher.finalize();
        let half = digest.as_bytes()[..16].try_into().expect("sixteen bytes");
        Ok(u128::from_le_bytes(half))
    }

    /// Appends the XXH3 of each of the run's blocks, the last one filled up with zeroes. They are read from the disk again.
    pub(super) fn block_digests(&self, run: FrameRun, digests: &mut Vec<u64>) -> io::Result<()> {
        self.each_piece(run, |offset, len, frames| {
            self.load(offset, &mut frames[..len])?;
            frames[len..].fill(0);
            digests.extend(frames.chunks_exact(FRAME_SIZE as usize).map(xxh3_64));
            Ok(())
        })
    }

    /// Waits until all that was received is on the disk.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.image.sync_data().map_err(self.failed("write back"))
    }

    fn load(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let read = self.image.read_exact_at(bytes, offset);
        read.map_err(self.failed("read"))
    }

    fn store(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let written = self.image.write_all_at(bytes, offset);
        written.map_err(self.failed("write"))
    }

    /// What it means that the disk failed, whatever the kind of its error: that must not be taken for a connection's.
    fn failed(&self, doing: &'static str) -> impl FnOnce(io::Error) -> io::Error {
        let path = self.path.clone();
        move |source| {
            let source = match source.kind() {
                io::ErrorKind::UnexpectedEof => io::Error::other("it has become smaller"),
                _ => source,
            };
            GuestError::new(DiskError { doing, path, source }).in_transfer()
        }
    }

    fn offset(&self, frame: u64) -> u64 {
        (frame - self.region.start_frame) * FRAME_SIZE
    }

    /// Calls `step` with the offset of each piece of the run, its length on the disk, and room for its frames.
    fn each_piece(
        &self,
        run: FrameRun,
        mut step: impl FnMut(u64, usize, &mut [u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        thread_local! {
            static BUFFER: RefCell<Option<DiskBuffer>> = const { RefCell::new(None) };
        }
        BUFFER.with_borrow_mut(|kept| {
            let buffer = match kept {
                Some(buffer) => buffer,
                None => kept.insert(DiskBuffer::new((PIECE_FRAMES * FRAME_SIZE) as usize)?),
            };
            let buffer = buffer.as_mut_slice();
            let mut frame = run.first;
            while frame < run.end() {
                let count = PIECE_FRAMES.min(run.end() - frame);
                let offset = self.offset(frame);
                let len = (count * FRAME_SIZE).min(self.bytes - offset) as usize;
                step(offset, len, &mut buffer[..(count * FRAME_SIZE) as usize])?;
                frame += count;
            }
            Ok(())
        })
    }
}

/// Adds the frames from `first` up to `end`, if there are any.
fn push_run(runs: &mut Vec<FrameRun>, first: u64, end: u64) {
    if first < end {
        let count = end - first;
        runs.push(FrameRun { first, count });
    }
}

fn write_all(socket: BorrowedFd<'_>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::write(socket.as_fd(), bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn read_all(socket: BorrowedFd<'_>, mut bytes: &mut [u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::read(socket.as_fd(), &mut *bytes) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => bytes = &mut bytes[count..],
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Fails unless there are just as many bytes as the run has.
fn check_room(run: FrameRun, bytes: usize) -> io::Result<()> {
    match run.count.checked_mul(FRAME_SIZE) == Some(bytes as u64) {
        true => Ok(()),
        false => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{bytes} bytes are not those of {} blocks", run.count),
        )),
    }
}

#[cfg(test)]
mod tests;
