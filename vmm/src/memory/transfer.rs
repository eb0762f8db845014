//! Vectored copies between a descriptor and guest memory, without a buffer in between.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::mapping::{GuestMemory, MemoryError};
use super::shape::FrameRun;

/// The kernel takes at most this many buffers per call (IOV_MAX, `limits.h`).
pub(crate) const MAX_BUFFERS: usize = 1024;

impl GuestMemory {
    /// Writes `prefix` and then the pages of `runs`, in this order, straight out of guest memory; returns when all of it is written.
    ///
    /// The guest may write a page while it is being sent: what arrives is then neither the old nor the new page, and the page is dirty.
    ///
    /// # Errors
    ///
    /// `InvalidInput` if a run is out of bounds: nothing was written then. Otherwise what the descriptor says (also `WouldBlock` when a
    /// send timeout of the socket runs out): an unknown part was written, so the stream is of no more use.
    pub fn send(&self, fd: BorrowedFd<'_>, prefix: &[u8], runs: &[FrameRun]) -> io::Result<()> {
        let mut buffers = Vec::with_capacity(runs.len() + 1);
        if !prefix.is_empty() {
            buffers.push(libc::iovec {
                iov_base: prefix.as_ptr().cast_mut().cast(),
                iov_len: prefix.len(),
            });
        }
        self.buffers(runs, &mut buffers)?;
        transfer(&mut buffers, |part| {
            // SAFETY: each buffer is `prefix` or checked guest memory, both alive for the call; writev only reads them.
            unsafe { libc::writev(fd.as_raw_fd(), part.as_ptr(), part.len() as libc::c_int) }
        })
    }

    /// Reads the pages of `runs`, in this order, straight into guest memory; returns when all of it has arrived.
    ///
    /// Only for memory whose dirty pages nobody tracks: what arrives is not marked.
    ///
    /// # Errors
    ///
    /// `InvalidInput` if a run is out of bounds: nothing was read then. `UnexpectedEof` if the other side closed. Otherwise what the
    /// descriptor says; an unknown part has arrived, so the stream is of no more use.
    pub fn receive(&self, fd: BorrowedFd<'_>, runs: &[FrameRun]) -> io::Result<()> {
        let mut buffers = Vec::with_capacity(runs.len());
        self.buffers(runs, &mut buffers)?;
        transfer(&mut buffers, |part| {
            // SAFETY: each buffer is checked guest memory, which lives as long as `self` and to which no reference points.
            unsafe { libc::readv(fd.as_raw_fd(), part.as_ptr(), part.len() as libc::c_int) }
        })
    }

    fn buffers(&self, runs: &[FrameRun], buffers: &mut Vec<libc::iovec>) -> io::Result<()> {
        for run in runs {
            let address = self.host_address(*run).map_err(invalid)?;
            buffers.push(libc::iovec {
                iov_base: address.cast(),
                iov_len: run.bytes() as usize,
            });
        }
        Ok(())
    }
}

pub(super) fn invalid(error: MemoryError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, error)
}

/// Calls `step` with what is left until nothing is.
pub(super) fn transfer(buffers: &mut [libc::iovec], step: impl Fn(&[libc::iovec]) -> isize) -> io::Result<()> {
    let mut rest = buffers;
    while !rest.is_empty() {
        let part = &rest[..rest.len().min(MAX_BUFFERS)];
        let moved = match step(part) {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            moved if moved > 0 => moved as usize,
            _ => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => continue,
                error => return Err(error),
            },
        };
        rest = advance(rest, moved);
    }
    Ok(())
}

/// Drops `moved` bytes from the front.
pub(super) fn advance(buffers: &mut [libc::iovec], mut moved: usize) -> &mut [libc::iovec] {
    let done = buffers
        .iter()
        .take_while(|buffer| {
            let whole = buffer.iov_len <= moved;
            if whole {
                moved -= buffer.iov_len;
            }
            whole
        })
        .count();
    let rest = &mut buffers[done..];
    if let Some(first) = rest.first_mut() {
        first.iov_base = first.iov_base.wrapping_byte_add(moved);
        first.iov_len -= moved;
    }
    rest
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    use std::thread;

    use vm_memory::{Bytes, GuestAddress};

    use super::super::{MemoryOptions, PAGE_SIZE};
    use super::*;

    fn memory() -> GuestMemory {
        GuestMemory::new(MemoryOptions {
            bytes: 64 << 20,
            hugetlb: false,
            expect_incoming: false,
        })
        .expect("memory")
    }

    /// Every second page: more buffers than one call takes, more bytes than a socket holds.
    fn scattered() -> Vec<FrameRun> {
        (0..3000)
            .map(|number| FrameRun {
                first: number * 2,
                count: 1,
            })
            .collect()
    }

    #[test]
    fn scattered_pages_arrive_where_they_belong() {
        let (source, destination) = (memory(), memory());
        for run in scattered() {
            let address = GuestAddress(run.first * PAGE_SIZE + 8);
            source.tracked().write_obj(run.first + 1, address).expect("write");
        }
        let (mine, mut theirs) = UnixStream::pair().expect("pair");
        let sender = thread::spawn({
            let source = source.clone();
            move || source.send(mine.as_fd(), b"head", &scattered())
        });
        let mut head = [0; 4];
        theirs.read_exact(&mut head).expect("prefix");
        destination.receive(theirs.as_fd(), &scattered()).expect("pages");
        sender.join().expect("thread").expect("sent");
        assert_eq!(&head, b"head");
        let whole = FrameRun { first: 0, count: 6000 };
        assert_eq!(
            source.digest(whole).expect("digest"),
            destination.digest(whole).expect("digest")
        );
    }

    #[test]
    fn closed_peer_is_an_unexpected_end() {
        let (mut mine, theirs) = UnixStream::pair().expect("pair");
        mine.write_all(&[1; 100]).expect("some");
        drop(mine);
        let error = memory()
            .receive(theirs.as_fd(), &[FrameRun { first: 0, count: 1 }])
            .expect_err("too little");
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn run_outside_memory_is_refused_before_anything_moves() {
        let (mine, mut theirs) = UnixStream::pair().expect("pair");
        let runs = [
            FrameRun { first: 0, count: 1 },
            FrameRun {
                first: u64::MAX,
                count: 2,
            },
        ];
        let error = memory().send(mine.as_fd(), b"head", &runs).expect_err("out of bounds");
        drop(mine);
        let mut arrived = Vec::new();
        theirs.read_to_end(&mut arrived).expect("end");
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        assert!(arrived.is_empty());
    }
}
