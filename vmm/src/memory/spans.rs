//! Copies between descriptors and any bytes of guest memory: what devices do for the guest's requests.

use std::cell::Cell;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::mapping::GuestMemory;
use super::shape::{FrameRun, PAGE_SIZE};
use super::transfer::{MAX_BUFFERS, invalid, transfer};

/// Bytes of guest memory at any address, as a device's request names them. Checked where they are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    /// Guest physical address of the first byte.
    pub(crate) address: u64,
    /// Length in bytes.
    pub(crate) len: u32,
}

/// The length of all spans together.
pub(crate) fn total(spans: &[Span]) -> u64 {
    spans.iter().map(|span| u64::from(span.len)).sum()
}

impl GuestMemory {
    /// Reads from `file` at `offset` into `spans`, in this order, until they are full; what was read is marked as written by the VMM.
    ///
    /// # Errors
    ///
    /// `InvalidInput` if a span is not wholly inside one region of guest memory: nothing was read then. `UnexpectedEof` if the file ends
    /// before, else what the file says: an unknown part was read.
    pub(crate) fn read_file_at(&self, file: BorrowedFd<'_>, offset: u64, spans: &[Span]) -> io::Result<()> {
        let mut buffers = self.span_buffers(spans)?;
        let position = Cell::new(offset);
        let done = transfer(&mut buffers, |part| {
            // SAFETY: each buffer is checked guest memory, which lives as long as `self` and to which no reference points.
            let moved = unsafe {
                libc::preadv(
                    file.as_raw_fd(),
                    part.as_ptr(),
                    part.len() as libc::c_int,
                    position.get().cast_signed(),
                )
            };
            position.set(position.get() + moved.max(0) as u64);
            moved
        });
        self.mark_spans(spans);
        done
    }

    /// Writes `spans`, in this order, to `file` at `offset`.
    ///
    /// # Errors
    ///
    /// `InvalidInput` if a span is not wholly inside one region of guest memory: nothing was written then. Else what the file says: an
    /// unknown part was written.
    pub(crate) fn write_file_at(&self, file: BorrowedFd<'_>, offset: u64, spans: &[Span]) -> io::Result<()> {
        let mut buffers = self.span_buffers(spans)?;
        let position = Cell::new(offset);
        transfer(&mut buffers, |part| {
            // SAFETY: each buffer is checked guest memory, which lives as long as `self`; pwritev only reads it.
            let moved = unsafe {
                libc::pwritev(
                    file.as_raw_fd(),
                    part.as_ptr(),
                    part.len() as libc::c_int,
                    position.get().cast_signed(),
                )
            };
            position.set(position.get() + moved.max(0) as u64);
            moved
        })
    }

    /// Reads one packet from a descriptor that keeps packets apart into `spans`; returns its length. What was read is marked as written
    /// by the VMM.
    ///
    /// # Errors
    ///
    /// `InvalidInput` if a span is not wholly inside one region of guest memory or there are too many: the packet stays where it is.
    /// Else what the descriptor says; `WouldBlock` if there is no packet.
    pub(crate) fn read_packet(&self, fd: BorrowedFd<'_>, spans: &[Span]) -> io::Result<usize> {
        let buffers = self.span_buffers(spans)?;
        packet(&buffers, |part| {
            // SAFETY: each buffer is checked guest memory, which lives as long as `self` and to which no reference points.
            unsafe { libc::readv(fd.as_raw_fd(), part.as_ptr(), part.len() as libc::c_int) }
        })
        .inspect(|&len| {
            let mut left = len as u64;
            for span in spans {
                if left == 0 {
                    break;
                }
                self.mark_spans(&[*span]);
                left = left.saturating_sub(span.len.into());
            }
        })
    }

    /// Writes `spans` as one packet.
    ///
    /// # Errors
    ///
    /// `InvalidInput` if a span is not wholly inside one region of guest memory or there are too many: nothing was written then. Else
    /// what the descriptor says; `WouldBlock` if it has no room for a packet.
    pub(crate) fn write_packet(&self, fd: BorrowedFd<'_>, spans: &[Span]) -> io::Result<usize> {
        let buffers = self.span_buffers(spans)?;
        packet(&buffers, |part| {
            // SAFETY: each buffer is checked guest memory, which lives as long as `self`; writev only reads it.
            unsafe { libc::writev(fd.as_raw_fd(), part.as_ptr(), part.len() as libc::c_int) }
        })
    }

    /// Whether the span is not empty and lies wholly inside one region.
    pub(crate) fn holds(&self, span: Span) -> bool {
        frames_of(span).is_some_and(|run| self.shape().contains(run))
    }

    /// Where the spans lie in this process.
    ///
    /// # Errors
    ///
    /// `InvalidInput` if a span is not wholly inside one region of guest memory.
    pub(super) fn span_buffers(&self, spans: &[Span]) -> io::Result<Vec<libc::iovec>> {
        let buffer = |span: &Span| {
            let run = frames_of(*span).ok_or(io::ErrorKind::InvalidInput)?;
            let start = self.host_address(run).map_err(invalid)?;
            Ok(libc::iovec {
                iov_base: start.wrapping_byte_add((span.address % PAGE_SIZE) as usize).cast(),
                iov_len: span.len as usize,
            })
        };
        spans.iter().map(buffer).collect()
    }

    /// Marks what spans touch as written by the VMM.
    pub(super) fn mark_spans(&self, spans: &[Span]) {
        spans
            .iter()
            .filter_map(|span| frames_of(*span))
            .for_each(|run| self.mark_written(run));
    }
}

/// The frames that a span touches; none if it is empty or ends beyond all addresses.
fn frames_of(span: Span) -> Option<FrameRun> {
    let end = span.address.checked_add(span.len.into())?;
    let first = span.address / PAGE_SIZE;
    (span.len > 0).then(|| FrameRun {
        first,
        count: end.div_ceil(PAGE_SIZE) - first,
    })
}

/// One packet in one call, repeated only where a signal came between.
fn packet(buffers: &[libc::iovec], step: impl Fn(&[libc::iovec]) -> isize) -> io::Result<usize> {
    if buffers.len() > MAX_BUFFERS {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    loop {
        let moved = step(buffers);
        if moved >= 0 {
            return Ok(moved as usize);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;

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

    fn file(content: &[u8]) -> File {
        let mut file = tempfile::tempfile().expect("file");
        file.write_all(content).expect("content");
        file
    }

    #[test]
    fn what_a_file_gave_is_dirty_and_where_it_belongs() {
        let memory = memory();
        let spans = [
            Span {
                address: 0x1ffe,
                len: 4,
            },
            Span { address: 0x10, len: 2 },
        ];
        memory.read_file_at(file(b"..abcdef").as_fd(), 2, &spans).expect("read");
        let mut found = [0; 4];
        memory
            .tracked()
            .read_slice(&mut found, GuestAddress(0x1ffe))
            .expect("memory");
        assert_eq!(&found, b"abcd");
        let dirty = memory.device_dirty().runs();
        assert_eq!(dirty, [FrameRun { first: 0, count: 3 }]);
    }

    #[test]
    fn file_that_ends_early_is_an_error() {
        let spans = [Span { address: 0, len: 9 }];
        let error = memory()
            .read_file_at(file(b"short").as_fd(), 0, &spans)
            .expect_err("too short");
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn written_spans_are_in_the_file() {
        let memory = memory();
        memory.tracked().write_slice(b"xyz", GuestAddress(5)).expect("memory");
        let mut file = file(b"0123456789");
        let spans = [Span { address: 7, len: 1 }, Span { address: 5, len: 2 }];
        memory.write_file_at(file.as_fd(), 3, &spans).expect("write");
        let mut found = String::new();
        std::io::Seek::rewind(&mut file).expect("rewind");
        file.read_to_string(&mut found).expect("content");
        assert_eq!(found, "012zxy6789");
    }

    #[test]
    fn spans_outside_memory_are_refused_before_anything_moves() {
        let memory = memory();
        for wrong in [
            Span {
                address: 4 << 20,
                len: 1,
            },
            Span {
                address: (4 << 20) - 1,
                len: 2,
            },
            Span {
                address: u64::MAX,
                len: 2,
            },
            Span { address: 0, len: 0 },
        ] {
            assert!(!memory.holds(wrong), "{wrong:?}");
            let spans = [Span { address: 0, len: 1 }, wrong];
            let error = memory
                .read_file_at(file(b"abc").as_fd(), 0, &spans)
                .expect_err("outside");
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        }
        assert!(memory.device_dirty().is_empty());
    }
}
