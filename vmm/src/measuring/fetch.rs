//! What fetching a page that somebody waits for costs at least.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::memory::{FrameRun, GuestMemory, MemoryOptions, PAGE_SIZE};

/// What a page must cost that is asked for over this machine's loopback.
#[derive(Debug, Clone, Copy)]
pub struct LeastFetch {
    /// The median of a byte's way there and back between two threads that do nothing else, each on a processor of its own, as the ends of
    /// a page's way are where they are two hosts: each end is woken on a processor that had nothing to do. `None` where this process may
    /// use one processor only.
    pub round_trip: Option<Duration>,
    /// The same where both share a processor: nobody is woken from idleness, which is less than what two hosts can have.
    pub shared_round_trip: Duration,
    /// Backing one page of guest memory, on an average.
    pub population: Duration,
}

/// Measures all of it, in a few tenths of a second.
///
/// # Errors
///
/// If a connection, a thread, a processor or memory cannot be had.
pub fn least_fetch() -> io::Result<LeastFetch> {
    let allowed = sched_getaffinity(None)?;
    let mut processors = (0..CpuSet::MAX_CPU).filter(|&processor| allowed.is_set(processor));
    let first = processors
        .next()
        .ok_or_else(|| io::Error::other("the kernel named no processor"))?;
    Ok(LeastFetch {
        round_trip: processors.next().map(|other| round_trip(first, other)).transpose()?,
        shared_round_trip: round_trip(first, first)?,
        population: population()?,
    })
}

const ROUND_TRIPS: usize = 1001;

/// Between threads on these processors. Both are the measurement's own: the caller stays where it may be.
fn round_trip(near_processor: usize, far_processor: usize) -> io::Result<Duration> {
    let listener = TcpListener::bind(("127.0.0.1", 0))?;
    let near = TcpStream::connect(listener.local_addr()?)?;
    let far = listener.accept()?.0;
    near.set_nodelay(true)?;
    far.set_nodelay(true)?;
    let times = thread::scope(|scope| {
        // Ends with its connection.
        let echo = thread::Builder::new().spawn_scoped(scope, move || echo(far, far_processor))?;
        let asking = thread::Builder::new().spawn_scoped(scope, move || ask(near, near_processor))?;
        let times = joined(asking.join());
        joined(echo.join()).and(times)
    });
    let mut times = times?;
    let (_, median, _) = times.select_nth_unstable(ROUND_TRIPS / 2);
    Ok(*median)
}

fn joined<T>(result: thread::Result<io::Result<T>>) -> io::Result<T> {
    result.unwrap_or_else(|_| Err(io::Error::other("a measuring thread panicked")))
}

fn echo(mut far: TcpStream, processor: usize) -> io::Result<()> {
    stay_on(processor)?;
    let mut byte = [0];
    while far.read_exact(&mut byte).is_ok() && far.write_all(&byte).is_ok() {}
    Ok(())
}

fn ask(mut near: TcpStream, processor: usize) -> io::Result<Vec<Duration>> {
    stay_on(processor)?;
    let mut times = Vec::with_capacity(ROUND_TRIPS);
    let mut byte = [0];
    for _ in 0..ROUND_TRIPS {
        let began = Instant::now();
        near.write_all(&byte)?;
        near.read_exact(&mut byte)?;
        times.push(began.elapsed());
    }
    Ok(times)
}

/// Keeps the calling thread on one processor.
fn stay_on(processor: usize) -> io::Result<()> {
    let mut only = CpuSet::new();
    only.set(processor);
    Ok(sched_setaffinity(None, &only)?)
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
        assert!(
            !least.shared_round_trip.is_zero() && !least.population.is_zero(),
            "{least:?}"
        );
        let processors = sched_getaffinity(None).expect("read").count();
        assert_eq!(least.round_trip.is_some(), processors > 1, "{least:?}");
    }

    #[test]
    fn a_measurement_leaves_the_caller_where_it_may_be() {
        let before = sched_getaffinity(None).expect("read");
        least_fetch().expect("measured");
        assert_eq!(sched_getaffinity(None).expect("read"), before);
    }
}
