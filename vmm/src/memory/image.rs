//! Guest memory as a file: written of a guest that stands still, read into a machine that is to become it.
//!
//! Each page lies in the file at its guest physical address. Pages of zeroes are not written, so the file is sparse; which pages it holds, the
//! [`PieceTable`] says, so that nothing depends on how a file system tells holes, or on whether a copy kept them. Pieces are written and read
//! by a few threads: one core copies slower than memory, and much slower than it can be had from the page cache.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use thiserror::Error;

use super::mapping::{GuestMemory, MemoryError};
use super::pieces::{Piece, PieceTable, pieces_of};
use super::shape::{FrameRun, HUGE_PAGE_SIZE, MemoryShape, PAGE_SIZE, push_run};
use super::spans::Span;

/// The most threads. More of them than this only take turns at the page cache.
const MOST_THREADS: usize = 8;

/// A memory image could not be written or read.
#[derive(Debug, Error)]
pub enum ImageError {
    /// It has another length than the guest's memory.
    #[error("read guest memory: the image has {found} bytes, of this guest it has {expected}")]
    Length {
        /// How long it is.
        found: u64,
        /// How long it must be.
        expected: u64,
    },
    /// What it holds is not what was written.
    #[error("read guest memory: the image is damaged in the {bytes} bytes at offset {offset}")]
    Damaged {
        /// Where the piece begins in the file.
        offset: u64,
        /// How long the piece is.
        bytes: u64,
    },
    /// The table is of another guest.
    #[error("read guest memory: the table has {found} pieces, of this guest it has {expected}")]
    Table {
        /// How many it has.
        found: usize,
        /// How many it must have.
        expected: usize,
    },
    /// The file failed.
    #[error("{what} guest memory at offset {offset} of the image")]
    File {
        /// What was tried.
        what: &'static str,
        /// Where.
        offset: u64,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// Guest memory failed.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

impl GuestMemory {
    /// Writes an image of the memory into an empty file and returns its table. Whoever may write the memory stands still meanwhile, or the
    /// table does not fit the image. The file is not synced.
    ///
    /// # Errors
    ///
    /// The file does not take it (it is full), or the kernel does not tell what is populated.
    pub fn save_image(&self, file: &File) -> Result<PieceTable, ImageError> {
        let failed = |source| ImageError::File {
            what: "make room for",
            offset: 0,
            source,
        };
        file.set_len(image_len(self.shape())).map_err(failed)?;
        let populated = self.populated()?.runs;
        let frames = pieces_of(self.shape());
        let pieces = in_parallel(frames.len(), |index| self.save_piece(file, frames[index], &populated))?;
        Ok(PieceTable { pieces })
    }

    /// Fills fresh memory from an image. Nobody tracks dirty pages yet; nothing of it counts as written.
    ///
    /// # Errors
    ///
    /// The image or the table is of another guest, is damaged, or cannot be read. What is in memory then is of no use.
    pub fn load_image(&self, file: &File, table: &PieceTable) -> Result<(), ImageError> {
        let frames = pieces_of(self.shape());
        if table.pieces.len() != frames.len() {
            return Err(ImageError::Table {
                found: table.pieces.len(),
                expected: frames.len(),
            });
        }
        let failed = |source| ImageError::File {
            what: "find the length of",
            offset: 0,
            source,
        };
        let (found, expected) = (file.metadata().map_err(failed)?.len(), image_len(self.shape()));
        if found != expected {
            return Err(ImageError::Length { found, expected });
        }
        for run in huge_runs(&frames, table) {
            self.advise_huge(run)?;
        }
        in_parallel(frames.len(), |index| {
            self.load_piece(file, frames[index], &table.pieces[index])
        })?;
        // What was read through the devices' way into memory counts as written by a device.
        let _ = self.device_dirty();
        Ok(())
    }

    fn save_piece(&self, file: &File, frames: FrameRun, populated: &[FrameRun]) -> Result<Piece, ImageError> {
        let mut piece = Piece::default();
        let from = populated.partition_point(|run| run.end() <= frames.first);
        for run in populated[from..].iter().map_while(|&run| frames.intersection(run)) {
            let mut zeroes = Vec::new();
            self.zero_pages(run, &mut zeroes)?;
            for run in without(run, &zeroes) {
                self.write_file_at(file.as_fd(), run.first * PAGE_SIZE, &[span(run)])
                    .map_err(|source| ImageError::File {
                        what: "write",
                        offset: run.first * PAGE_SIZE,
                        source,
                    })?;
                piece.insert(frames, run);
            }
        }
        piece.digest = self.digest_pages(&piece.runs(frames))?;
        Ok(piece)
    }

    fn load_piece(&self, file: &File, frames: FrameRun, piece: &Piece) -> Result<(), ImageError> {
        let runs = piece.runs(frames);
        for &run in &runs {
            self.read_file_at(file.as_fd(), run.first * PAGE_SIZE, &[span(run)])
                .map_err(|source| ImageError::File {
                    what: "read",
                    offset: run.first * PAGE_SIZE,
                    source,
                })?;
        }
        // Of what is in memory now: a page that went wrong on the way is found too.
        if self.digest_pages(&runs)? != piece.digest {
            return Err(ImageError::Damaged {
                offset: frames.first * PAGE_SIZE,
                bytes: frames.bytes(),
            });
        }
        Ok(())
    }
}

/// How long the image of a guest with this memory is: to the end of the last region.
fn image_len(shape: &MemoryShape) -> u64 {
    shape.regions.last().map_or(0, |region| region.start + region.len)
}

fn span(run: FrameRun) -> Span {
    Span {
        address: run.first * PAGE_SIZE,
        // Inside a piece, so it fits.
        len: run.bytes() as u32,
    }
}

/// What is left of `run` without `holes`, ascending runs inside it.
fn without(run: FrameRun, holes: &[FrameRun]) -> Vec<FrameRun> {
    let mut left = Vec::new();
    let mut next = run.first;
    for end in holes
        .iter()
        .map(|hole| (hole.first, hole.end()))
        .chain([(run.end(), 0)])
    {
        let (until, after) = end;
        if next < until {
            left.push(FrameRun {
                first: next,
                count: until - next,
            });
        }
        next = after;
    }
    left
}

/// The blocks of which the image holds at least half: huge pages are worth it there, and only there.
fn huge_runs(frames: &[FrameRun], table: &PieceTable) -> Vec<FrameRun> {
    const BLOCK: u64 = HUGE_PAGE_SIZE / PAGE_SIZE;
    let mut runs = Vec::new();
    let both: Vec<_> = frames.iter().zip(&table.pieces).collect();
    for block in both.chunk_by(|(one, _), (next, _)| one.first / BLOCK == next.first / BLOCK) {
        let pages: u64 = block.iter().map(|(_, piece)| piece.pages()).sum();
        let count: u64 = block.iter().map(|(frames, _)| frames.count).sum();
        if count == BLOCK && pages >= BLOCK / 2 {
            let first = block[0].0.first;
            push_run(&mut runs, FrameRun { first, count });
        }
    }
    runs
}

/// Does the work for each index below `count` on a few threads; the results are in order. After a failure no more is begun.
fn in_parallel<T: Send>(
    count: usize,
    work: impl Fn(usize) -> Result<T, ImageError> + Sync,
) -> Result<Vec<T>, ImageError> {
    let next = AtomicUsize::new(0);
    let worker = || -> Result<Vec<(usize, T)>, ImageError> {
        let mut done = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= count {
                return Ok(done);
            }
            let result = work(index).inspect_err(|_| next.store(count, Ordering::Relaxed))?;
            done.push((index, result));
        }
    };
    let threads = thread::available_parallelism().map_or(1, usize::from).min(MOST_THREADS);
    let mut done = thread::scope(|scope| {
        // This thread is one of them, so that those that cannot be had are not missed.
        let others: Vec<_> = (1..threads)
            .filter_map(|_| {
                let thread = thread::Builder::new().name("image".to_owned());
                thread.spawn_scoped(scope, worker).ok()
            })
            .collect();
        let mut done = worker();
        for other in others {
            let theirs = other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            done = done.and_then(|mut done| {
                done.extend(theirs?);
                Ok(done)
            });
        }
        done
    })?;
    done.sort_unstable_by_key(|&(index, _)| index);
    Ok(done.into_iter().map(|(_, result)| result).collect())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};

    use vm_memory::{Bytes, GuestAddress};

    use super::super::MemoryOptions;
    use super::super::pieces::PIECE_SIZE;
    use super::*;

    const MIB: u64 = 5;

    fn memory() -> GuestMemory {
        GuestMemory::new(MemoryOptions {
            bytes: (MIB << 20) + PAGE_SIZE,
            hugetlb: false,
            expect_incoming: true,
        })
        .expect("memory")
    }

    /// Two scattered pages, a full block of 2 MiB, pages of zeroes that are populated, and the very last page.
    fn filled() -> GuestMemory {
        let memory = memory();
        let write = |address: u64, byte: u8| {
            memory.tracked().write_obj(byte, GuestAddress(address)).expect("inside");
        };
        write(5 * PAGE_SIZE + 9, 1);
        write(7 * PAGE_SIZE, 2);
        (512..1024).for_each(|page| write(page * PAGE_SIZE + page, 3));
        (1024..1100).for_each(|page| write(page * PAGE_SIZE, 0));
        write(MIB << 20, 4);
        memory
    }

    fn whole(memory: &GuestMemory) -> u128 {
        memory.digest(memory.shape().runs()[0]).expect("digest")
    }

    #[test]
    fn memory_comes_back_from_its_image() {
        let (source, file) = (filled(), tempfile::tempfile().expect("file"));
        let table = source.save_image(&file).expect("saved");
        assert_eq!(table.pages(), 2 + 512 + 1);
        let restored = memory();
        restored.load_image(&file, &table).expect("loaded");
        assert_eq!(whole(&restored), whole(&source));
        assert!(restored.device_dirty().is_empty());
        let populated: u64 = restored
            .populated()
            .expect("known")
            .runs
            .iter()
            .map(|run| run.count)
            .sum();
        assert_eq!(populated, 2 + 512 + 1, "what is zero is not populated");
    }

    #[test]
    fn the_image_is_sparse_and_has_pages_at_their_addresses() {
        let (source, file) = (filled(), tempfile::tempfile().expect("file"));
        source.save_image(&file).expect("saved");
        let metadata = file.metadata().expect("metadata");
        assert_eq!(metadata.len(), (MIB << 20) + PAGE_SIZE);
        assert!(metadata.blocks() * 512 < 3 << 20, "{} blocks", metadata.blocks());
        let mut byte = [0];
        file.read_exact_at(&mut byte, 5 * PAGE_SIZE + 9).expect("read");
        assert_eq!(byte, [1]);
    }

    #[test]
    fn memory_above_the_hole_for_devices_is_at_its_own_addresses() {
        let large = || {
            GuestMemory::new(MemoryOptions {
                bytes: (3 << 30) + 2 * PIECE_SIZE,
                hugetlb: false,
                expect_incoming: true,
            })
            .expect("memory")
        };
        let (source, restored, file) = (large(), large(), tempfile::tempfile().expect("file"));
        let above = (4 << 30) + PIECE_SIZE + PAGE_SIZE;
        source.tracked().write_obj(9u8, GuestAddress(above)).expect("inside");
        let table = source.save_image(&file).expect("saved");
        assert_eq!(file.metadata().expect("metadata").len(), (4 << 30) + 2 * PIECE_SIZE);
        restored.load_image(&file, &table).expect("loaded");
        assert_eq!(
            restored.tracked().read_obj::<u8>(GuestAddress(above)).expect("inside"),
            9
        );
        assert_eq!(table.pages(), 1);
    }

    #[test]
    fn a_copy_that_lost_its_holes_loads_the_same() {
        let (source, file, copy) = (
            filled(),
            tempfile::tempfile().expect("file"),
            tempfile::tempfile().expect("file"),
        );
        let table = source.save_image(&file).expect("saved");
        let mut bytes = vec![0; ((MIB << 20) + PAGE_SIZE) as usize];
        file.read_exact_at(&mut bytes, 0).expect("read");
        copy.write_all_at(&bytes, 0).expect("written");
        let restored = memory();
        restored.load_image(&copy, &table).expect("loaded");
        assert_eq!(whole(&restored), whole(&source));
    }

    #[test]
    fn a_damaged_piece_is_named_by_its_offset() {
        let (source, file) = (filled(), tempfile::tempfile().expect("file"));
        let table = source.save_image(&file).expect("saved");
        file.write_all_at(&[0xff], 600 * PAGE_SIZE).expect("written");
        let error = memory().load_image(&file, &table).expect_err("damaged");
        let at = PIECE_SIZE * 2;
        assert!(
            matches!(error, ImageError::Damaged { offset, bytes: PIECE_SIZE } if offset == at),
            "{error}"
        );
    }

    #[test]
    fn an_image_or_table_of_another_size_is_refused() {
        let (source, file) = (filled(), tempfile::tempfile().expect("file"));
        let mut table = source.save_image(&file).expect("saved");
        file.set_len(MIB << 20).expect("truncated");
        assert!(matches!(
            memory().load_image(&file, &table),
            Err(ImageError::Length { .. })
        ));
        table.pieces.pop();
        assert!(matches!(
            memory().load_image(&file, &table),
            Err(ImageError::Table { .. })
        ));
    }

    #[test]
    fn a_full_file_is_an_error() {
        let file = File::options().write(true).open("/dev/full").expect("/dev/full");
        let source = memory();
        source
            .tracked()
            .write_obj(1u8, GuestAddress(PAGE_SIZE))
            .expect("inside");
        let piece = source.shape().runs()[0];
        let populated = source.populated().expect("known").runs;
        let error = source.save_piece(&file, FrameRun { count: 256, ..piece }, &populated);
        assert!(
            matches!(&error, Err(ImageError::File { source, .. }) if source.kind() == io::ErrorKind::StorageFull),
            "{error:?}"
        );
    }
}
