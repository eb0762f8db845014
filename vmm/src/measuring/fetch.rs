//! What fetching a page that somebody waits for costs at least.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use crate::memory::{FrameRun, GuestMemory, MemoryOptions, PAGE_SIZE};

/// What a page must cost that is asked for over this machine's loopback.
#[derive(Debug, Clone, Copy)]
pub struct LeastFetch {
    /// The median of a byte's way there and back, between two threads that do nothing else.
    pub round_trip: Duration,
    /// Backing one page of guest memory, on an average.
    pub population: Duration,
}

/// Measures both, in about a tenth of a second.
///
/// # Errors
///
/// If a connection, a thread or memory cannot be had.
pub fn least_fetch() -> io::Result<LeastFetch> {
    Ok(LeastFetch {
        round_trip: round_trip()?,
        population: population()?,
    })
}

const ROUND_TRIPS: usize = 1001;

fn round_trip() -> io::Result<Duration> {
    let listener = TcpListener::bind(("127.0.0.1", 0))?;
    let mut near = TcpStream::connect(listener.local_addr()?)?;
    let mut far = listener.accept()?.0;
    near.set_nodelay(true)?;
    far.set_nodelay(true)?;
    // Ends with its connection.
    let echo = thread::Builder::new().spawn(move || {
        let mut byte = [0];
        while far.read_exact(&mut byte).is_ok() && far.write_all(&byte).is_ok() {}
    })?;
    let mut times = Vec::with_capacity(ROUND_TRIPS);
    let mut byte = [0];
    for _ in 0..ROUND_TRIPS {
        let began = Instant::now();
        near.write_all(&byte)?;
        near.read_exact(&mut byte)?;
        times.push(began.elapsed());
    }
    drop(near);
    let _ = echo.join();
    let (_, median, _) = times.select_nth_unstable(ROUND_TRIPS / 2);
    Ok(*median)
}

const PAGES: u64 = 8192;

fn population() -> io::Result<Duration> {
    let memory = GuestMemory::new(MemoryOptions {
        bytes: PAGES * PAGE_SIZE,
        hugetlb: false,
        // In small pages, as they are fetched.
        expect_incoming: true,
    })
    .map_err(io::Error::other)?;
    let began = Instant::now();
    for first in 0..PAGES {
        memory
            .populate(FrameRun { first, count: 1 })
            .map_err(io::Error::other)?;
    }
    Ok(began.elapsed() / PAGES as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_costs_something() {
        let least = least_fetch().expect("measured");
        assert!(!least.round_trip.is_zero() && !least.population.is_zero(), "{least:?}");
    }
}
