//! The digest of all guest memory, for comparing both sides before the guest is handed over.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use xxhash_rust::xxh3::Xxh3;

use crate::guest::{FrameRun, GuestError, GuestMemory, MemoryShape};

/// Frames that are digested at once: 8 MiB. Part of the digest's definition: both sides cut memory alike.
const PIECE_FRAMES: u64 = 2048;

/// Digests all memory on as many threads as the host has processors. Nobody may write to it meanwhile.
///
/// # Errors
/// If some of it cannot be read.
pub(crate) fn memory(memory: &impl GuestMemory) -> Result<u128, GuestError> {
    let pieces = pieces(memory.shape());
    let next = AtomicUsize::new(0);
    let work = || {
        let mut digests = Vec::new();
        while let Some(&piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
            digests.push((piece.first, memory.digest(piece)?));
        }
        Ok(digests)
    };
    let helpers = thread::available_parallelism().map_or(1, NonZeroUsize::get) - 1;
    let mut digests: Vec<(u64, u128)> = thread::scope(|scope| {
        // Where a thread cannot be had, the others do its work.
        let helper = |_| {
            thread::Builder::new()
                .name("ferry-digest".into())
                .spawn_scoped(scope, work)
                .ok()
        };
        let helpers: Vec<_> = (0..helpers).filter_map(helper).collect();
        let mut digests = work()?;
        for helper in helpers {
            digests.extend(
                helper
                    .join()
                    .map_err(|_| GuestError::new("a digesting thread panicked"))??,
            );
        }
        Ok::<_, GuestError>(digests)
    })?;
    digests.sort_unstable();
    let mut hasher = Xxh3::new();
    for (first, digest) in digests {
        hasher.update(&first.to_le_bytes());
        hasher.update(&digest.to_le_bytes());
    }
    Ok(hasher.digest128())
}

/// The checksum of the saved state's bytes.
pub(crate) fn bytes(bytes: &[u8]) -> u128 {
    xxhash_rust::xxh3::xxh3_128(bytes)
}

fn pieces(shape: &MemoryShape) -> Vec<FrameRun> {
    let pieces_of = |region: &crate::guest::Region| {
        let (first, end) = (region.start_frame, region.run().end());
        let count = region.frames.div_ceil(PIECE_FRAMES);
        (0..count).map(move |index| {
            let first = first + index * PIECE_FRAMES;
            FrameRun {
                first,
                count: PIECE_FRAMES.min(end - first),
            }
        })
    };
    shape.regions().iter().flat_map(pieces_of).collect()
}
