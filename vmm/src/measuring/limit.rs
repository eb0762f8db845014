//! What a copy of guest memory could cost at best: its bytes over TCP connections within this host, and nothing else.

use std::io;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::sockopt::{set_socket_recv_buffer_size, set_socket_send_buffer_size};
use vm_memory::{Bytes, GuestAddress};

use crate::memory::{FrameRun, GuestMemory, HUGE_PAGE_SIZE, MemoryOptions, PAGE_SIZE};

/// Buffers of the size that was found best between two processes of one host; a migration's have it too.
const SEND_BUFFER: usize = 128 << 10;
const RECEIVE_BUFFER: usize = 512 << 10;

/// What a raw copy took.
#[derive(Debug, Clone, Copy)]
pub struct RawCopy {
    /// From the first byte sent until the last one was in memory.
    pub elapsed: Duration,
    /// How much was copied.
    pub bytes: u64,
}

/// Copies `bytes` of memory, advised huge and filled with what does not compress, over `streams` connections of loopback TCP into new memory, advised
/// huge: a sending and a receiving thread for each, 2 MiB a call. No frame, no check for zero pages, no log of dirty pages, no rounds, no guest.
///
/// `before` is called when all is ready, right before the first byte: to warm the host's memory, say.
///
/// The receiving thread backs each huge page right before its data, as a migration does.
///
/// # Errors
///
/// If `before` fails, the host has not twice the memory, loopback does not work, or what arrived is not what was sent.
pub fn raw_copy(bytes: u64, streams: u64, before: impl FnOnce() -> io::Result<()>) -> io::Result<RawCopy> {
    let share = (bytes / streams.max(1)).next_multiple_of(HUGE_PAGE_SIZE);
    let (source, destination) = (memory(share * streams)?, memory(share * streams)?);
    fill(&source)?;
    let pairs = (0..streams).map(|_| connection()).collect::<io::Result<Vec<_>>>()?;
    // Memory has a hole, so frames are counted through its runs.
    let blocks: Vec<FrameRun> = source.shape().runs().into_iter().flat_map(blocks_of).collect();
    let each = blocks.len().div_ceil(pairs.len().max(1));
    before()?;
    let began = Instant::now();
    thread::scope(|scope| {
        let mut threads = Vec::new();
        for ((sending, receiving), blocks) in pairs.iter().zip(blocks.chunks(each.max(1))) {
            let (source, destination) = (&source, &destination);
            threads.push(scope.spawn(move || {
                let mut blocks = blocks.iter();
                blocks.try_for_each(|&block| source.send(sending.as_fd(), &[], &[block]))
            }));
            threads.push(scope.spawn(move || {
                blocks.iter().try_for_each(|&block| {
                    destination.populate(block).map_err(io::Error::other)?;
                    destination.receive(receiving.as_fd(), &[block])
                })
            }));
        }
        let ends = threads.into_iter().map(|thread| thread.join());
        ends.map(|end| end.unwrap_or_else(|_| Err(io::Error::other("a copying thread panicked"))))
            .collect::<io::Result<Vec<()>>>()
    })?;
    let elapsed = began.elapsed();
    for run in source.shape().runs() {
        let [sent, arrived] = [&source, &destination].map(|memory| memory.digest(run).map_err(io::Error::other));
        if sent? != arrived? {
            return Err(io::Error::other("what arrived is not what was sent"));
        }
    }
    Ok(RawCopy {
        elapsed,
        bytes: share * streams,
    })
}

fn memory(bytes: u64) -> io::Result<GuestMemory> {
    let options = MemoryOptions {
        bytes,
        hugetlb: false,
        expect_incoming: false,
    };
    GuestMemory::new(options).map_err(io::Error::other)
}

/// Words that differ from page to page; what they are does not matter, only that no page is zero and none like another.
fn fill(memory: &GuestMemory) -> io::Result<()> {
    let mut word = 0x9e37_79b9_7f4a_7c15_u64;
    let mut page = [0; PAGE_SIZE as usize];
    for run in memory.shape().runs() {
        for frame in run.first..run.end() {
            for place in page.chunks_exact_mut(8) {
                word ^= word << 13;
                word ^= word >> 7;
                word ^= word << 17;
                place.copy_from_slice(&word.to_le_bytes());
            }
            let written = memory.tracked().write_slice(&page, GuestAddress(frame * PAGE_SIZE));
            written.map_err(io::Error::other)?;
        }
    }
    Ok(())
}

fn blocks_of(run: FrameRun) -> impl Iterator<Item = FrameRun> {
    let frames = HUGE_PAGE_SIZE / PAGE_SIZE;
    (run.first..run.end())
        .step_by(frames as usize)
        .map(move |first| FrameRun {
            first,
            count: frames.min(run.end() - first),
        })
}

fn connection() -> io::Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let sending = TcpStream::connect(listener.local_addr()?)?;
    let receiving = listener.accept()?.0;
    set_socket_send_buffer_size(&sending, SEND_BUFFER)?;
    set_socket_recv_buffer_size(&receiving, RECEIVE_BUFFER)?;
    Ok((sending, receiving))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_of_it_is_copied_over_any_number_of_streams() {
        for streams in [1, 2, 3] {
            let copy = raw_copy(9 << 20, streams, || Ok(())).expect("a copy");
            assert!(copy.bytes >= 9 << 20, "{copy:?}");
            assert!(copy.elapsed > Duration::ZERO, "{copy:?}");
        }
    }
}
