//! Requests that are one transfer.

use super::request::Request;
use crate::memory::{MAX_BUFFERS, Span, total};

/// A request that was taken from the queue.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) head: u16,
    pub(super) request: Request,
    pub(super) status: Span,
}

/// Requests of one kind, each of which begins on the disk where the one before it ends; or one of any kind.
#[derive(Debug)]
pub(super) struct Together {
    pub(super) first: Job,
    others: Vec<Job>,
    bytes: u64,
    buffers: usize,
}

/// So many bytes at most, or one request. The first is over with the last: a disk of 3 GiB/s takes 1.3 ms for so much.
const MOST_BYTES: u64 = 4 << 20;

impl Together {
    /// One request.
    pub(super) fn new(first: Job) -> Self {
        let data = first.data();
        Self {
            bytes: total(data),
            buffers: data.len(),
            others: Vec::new(),
            first,
        }
    }

    /// Whether this request can be one more, the last.
    pub(super) fn takes(&self, job: &Job) -> bool {
        let after = match (&self.first.request, &job.request) {
            (Request::Read { offset: first, .. }, Request::Read { offset, .. })
            | (Request::Write { offset: first, .. }, Request::Write { offset, .. }) => offset.checked_sub(*first),
            _ => None,
        };
        let data = job.data();
        after == Some(self.bytes) && self.bytes + total(data) <= MOST_BYTES && self.buffers + data.len() <= MAX_BUFFERS
    }

    /// One more, that it [`takes`](Self::takes).
    pub(super) fn push(&mut self, job: Job) {
        self.bytes += total(job.data());
        self.buffers += job.data().len();
        self.others.push(job);
    }

    /// How many they are.
    pub(super) fn count(&self) -> usize {
        1 + self.others.len()
    }

    /// Where all of what they read or write is in guest memory.
    pub(super) fn data(&self) -> Vec<Span> {
        let jobs = std::iter::once(&self.first).chain(&self.others);
        jobs.flat_map(|job| job.data().iter().copied()).collect()
    }

    /// Each by itself again.
    pub(super) fn jobs(self) -> impl Iterator<Item = Job> {
        std::iter::once(self.first).chain(self.others)
    }
}

impl Job {
    fn data(&self) -> &[Span] {
        match &self.request {
            Request::Read { data, .. } | Request::Write { data, .. } => data,
            _ => &[],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(head: u16, request: Request) -> Job {
        let status = Span { address: 1, len: 1 };
        Job { head, request, status }
    }

    fn data(len: u32, pieces: usize) -> Vec<Span> {
        (0..pieces as u64)
            .map(|number| Span {
                address: number << 20,
                len,
            })
            .collect()
    }

    fn read(offset: u64, len: u32) -> Job {
        job(
            0,
            Request::Read {
                offset,
                data: data(len, 1),
            },
        )
    }

    fn write(offset: u64, len: u32) -> Job {
        job(
            0,
            Request::Write {
                offset,
                data: data(len, 1),
            },
        )
    }

    #[test]
    fn what_follows_on_the_disk_and_does_the_same_goes_together() {
        let mut reads = Together::new(read(4096, 512));
        assert!(reads.takes(&read(4608, 512)));
        let apart = [read(4096, 512), read(4609, 512), read(3584, 512), write(4608, 512)];
        assert!(!apart.iter().any(|job| reads.takes(job)));
        assert!(Together::new(write(0, 512)).takes(&write(512, 512)));
        let flush = || job(0, Request::Flush);
        assert!(!Together::new(flush()).takes(&flush()) && !reads.takes(&flush()));

        reads.push(read(4608, 1024));

        assert!(reads.takes(&read(5632, 1)) && !reads.takes(&read(4608, 512)));
        assert_eq!((reads.count(), total(&reads.data())), (2, 1536));
    }

    #[test]
    fn neither_too_much_nor_too_many_buffers_go_together() {
        let most = MOST_BYTES as u32;
        assert!(Together::new(read(0, most - 512)).takes(&read(u64::from(most) - 512, 512)));
        assert!(!Together::new(read(0, most)).takes(&read(MOST_BYTES, 512)));
        assert!(!Together::new(read(0, u32::MAX)).takes(&read(u32::MAX.into(), u32::MAX)));
        let many = |offset, pieces| {
            job(
                0,
                Request::Read {
                    offset,
                    data: data(4, pieces),
                },
            )
        };
        let full = Together::new(many(0, MAX_BUFFERS - 1));
        let end = 4 * (MAX_BUFFERS as u64 - 1);
        assert!(full.takes(&many(end, 1)) && !full.takes(&many(end, 2)));
    }

    #[test]
    fn all_come_out_again_in_their_order() {
        let mut together = Together::new(read(0, 512));
        (1..4).for_each(|head| {
            together.push(Job {
                head,
                ..read(512 * u64::from(head), 512)
            })
        });
        assert_eq!(together.jobs().map(|job| job.head).collect::<Vec<_>>(), [0, 1, 2, 3]);
    }
}
