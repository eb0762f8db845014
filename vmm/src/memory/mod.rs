//! Guest memory: what it looks like, where it lives, and the fast ways in and out of it.
//!
//! The guest writes this memory while we look at it, so no Rust reference ever points into it: contents are read and written through
//! raw pointers and system calls only. Every run of frames that comes from outside is checked against the shape before it is used.
//!
//! | file | provides |
//! | --- | --- |
//! | `shape` | regions and runs of frames, plain numbers |
//! | `dirty` | a bitmap over the shape, plain numbers |
//! | `mapping` | the mapping itself, advice, and writes that the device bitmap sees |
//! | `population` | what the host has ever backed (PAGEMAP_SCAN, or pagemap) |
//! | `absent` | pages that come when they are touched (userfaultfd) |
//! | `transfer` | vectored copies between descriptors and guest memory |
//! | `spans` | the same for any bytes, as a device's request names them |
//! | `ring` | the same with many of them under way at once (io_uring) |
//! | `contents` | zero pages, zeroing, digests |
//! | `buffer` | memory of this process's own, for what disks read and write |
//! | `pieces`, `image` | all of it as a file, with a table that says what is in it |

#![expect(
    unsafe_code,
    reason = "guest memory is reached through raw pointers, mmap, madvise, readv, writev, userfaultfd and io_uring"
)]

mod absent;
mod buffer;
mod contents;
mod dirty;
mod image;
mod mapping;
mod pieces;
mod population;
mod ring;
mod shape;
mod spans;
mod transfer;

pub(crate) use absent::open_watcher;
pub use absent::{AbsentPages, probe_watching};
pub use buffer::DiskBuffer;
pub use dirty::DirtyBitmap;
pub(crate) use dirty::word_mask;
pub use image::ImageError;
pub(crate) use mapping::MemoryOptions;
pub use mapping::{GuestMemory, MemoryError};
pub use pieces::{PieceTable, TableError};
pub use population::Population;
pub use ring::probe_rings;
pub(crate) use ring::{Ring, keep_rings};
pub use shape::{FrameRun, HUGE_PAGE_SIZE, MemoryRegion, MemoryShape, PAGE_SIZE};
pub(crate) use spans::{Span, total};
pub(crate) use transfer::MAX_BUFFERS;
