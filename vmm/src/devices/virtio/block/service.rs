//! The queue's service: which requests the kernel gets at once, and which wait for others.
//!
//! ```text
//!   queue ──┬── alone, nothing in flight ───────────────────► carried out at once ──► used ring
//!           ├── read, write, flush ──► ring ──lands, in any order ─────────────────► used ring
//!           └── others, and what has to be done again ──► held until the ring is empty ──► used ring
//! ```
//!
//! A guest with one request at a time gets it done by one system call, without a detour. A guest that has several, which is
//! seen by one coming while another is carried out, gets all of them under way: a request that comes meanwhile is begun while
//! others are in flight, and one that lands is told of while others are.
//!
//! While something is in flight this thread makes no other call that changes the file. A file system that is being frozen
//! waits for writes in flight, whose end only this thread can see to, and holds up new ones (`freeze_super` in the kernel's
//! `fs/super.c`): the thread would wait for itself. So whatever the ring does not do is held until the ring is empty.
//!
//! A flush is for writes that the guest was told of before it asked. Those are over when the flush is begun, so it needs to
//! wait for nothing.
//!
//! When a turn ends nothing is in flight, as every device promises.

use std::io;

use vm_memory::{Bytes, GuestAddress};

use super::super::device::{Broken, Turn};
use super::super::queue::{Chain, DeviceQueue};
use super::Block;
use super::carrying_out::Answer;
use super::request::Request;
use crate::machine::DiskAccess;
use crate::memory::{GuestMemory, Ring, Span};

/// A request that was taken from the queue.
#[derive(Debug)]
pub(super) struct Job {
    head: u16,
    request: Request,
    status: Span,
}

/// So many are begun before the kernel gets them: the first does not wait for the last of a full queue, and a call is for several.
const BATCH: usize = 16;

/// The queue of a disk.
const QUEUE: usize = 0;

impl Block {
    /// Works on every request that there is, or as many as the turn allows.
    ///
    /// # Errors
    /// The guest broke a rule; what was in flight is answered all the same.
    pub(super) fn serve(&mut self, queue: &mut DeviceQueue, turn: &Turn<'_>) -> Result<(), Broken> {
        if let Some(mut ring) = self.ring.take() {
            let mut service = Service {
                disk: self,
                ring: &mut ring,
                queue,
                turn,
                held: Vec::new(),
                most: 0,
            };
            let served = service.run();
            let landed = service.land_all();
            if !ring.is_dead() {
                self.ring = Some(ring);
                return served.and(landed);
            }
            served.and(landed)?;
        }
        queue.serve(turn, |chain| {
            let job = self.job(chain, turn.memory)?;
            let answer = self.carry_out(&job.request, turn.memory);
            tell_status(&job, answer, turn.memory)
        })
    }

    fn job(&self, chain: &Chain, memory: &GuestMemory) -> Result<Job, Broken> {
        let (request, status) = Request::parse(chain, memory, self.sectors)?;
        Ok(Job {
            head: chain.head,
            request,
            status,
        })
    }

    fn way(&self, request: &Request) -> Way {
        match request {
            _ if self.refusal(request).is_some() => Way::AtOnce,
            Request::Read { data, .. } | Request::Write { data, .. } if data.is_empty() => Way::AtOnce,
            Request::Serial { .. } => Way::AtOnce,
            Request::Flush if self.access == DiskAccess::ReadOnly => Way::AtOnce,
            // Of a driver that does not flush: each is written and made to last, in two steps.
            Request::Write { .. } if self.writes_through => Way::Alone,
            Request::Read { .. } | Request::Write { .. } | Request::Flush => Way::Ring,
            _ => Way::Alone,
        }
    }
}

/// How a request gets done.
#[derive(Debug, PartialEq, Eq)]
enum Way {
    /// It does not touch the file.
    AtOnce,
    /// With others.
    Ring,
    /// While nothing is in flight.
    Alone,
}

/// One turn of a disk that has a ring.
struct Service<'a> {
    disk: &'a Block,
    ring: &'a mut Ring<Job>,
    queue: &'a mut DeviceQueue,
    turn: &'a Turn<'a>,
    /// To be carried out once nothing is in flight; until then no further request is taken.
    held: Vec<Job>,
    /// As many were in flight at once since nothing was.
    most: usize,
}

impl Service<'_> {
    /// Until nothing is left, the turn is to end, or the ring is of no more use.
    fn run(&mut self) -> Result<(), Broken> {
        let memory = self.turn.memory;
        loop {
            self.queue.ignore(memory)?;
            let took = self.take()?;
            self.ring.submit();
            if self.land()? {
                self.turn.tell(self.queue)?;
                continue;
            }
            if took {
                continue;
            }
            let takes = self.takes();
            if self.ring.in_flight() > 0 {
                // What comes in between the last look and the request to ring is seen here, as in `DeviceQueue::serve`.
                if !takes || !self.queue.listen(memory)? {
                    self.turn.tell(self.queue)?;
                    self.turn.wait(self.ring, takes.then_some(QUEUE));
                }
            } else if !takes || !self.queue.listen(memory)? {
                // Of a turn that ends early, the worker looks into the queue again.
                return Ok(());
            }
        }
    }

    /// Whether a further request may be begun.
    fn takes(&self) -> bool {
        !self.turn.is_to_end() && self.held.is_empty() && self.ring.has_room()
    }

    /// Takes requests from the queue and begins them. Whether there was any.
    fn take(&mut self) -> Result<bool, Broken> {
        for taken in 0..BATCH {
            if !self.takes() {
                return Ok(taken > 0);
            }
            let Some(chain) = self.queue.pop(self.turn.memory)? else {
                return Ok(taken > 0);
            };
            let job = self.disk.job(&chain, self.turn.memory)?;
            self.begin(job)?;
        }
        Ok(true)
    }

    fn begin(&mut self, job: Job) -> Result<(), Broken> {
        let memory = self.turn.memory;
        let way = self.disk.way(&job.request);
        let is_first = self.ring.in_flight() == 0;
        let is_alone = is_first && !self.disk.is_crowded.get() && !self.queue.has_more(memory)?;
        if way == Way::AtOnce || (is_first && way == Way::Alone) || is_alone {
            let answer = self.disk.carry_out(&job.request, memory);
            // Asked before the guest is answered: what is there now, it asked for without waiting.
            let has_others = self.queue.has_more(memory)?;
            self.disk.is_crowded.set(self.disk.is_crowded.get() || has_others);
            return self.answer(&job, answer);
        }
        if way == Way::Alone {
            self.held.push(job);
            return Ok(());
        }
        self.begin_on_ring(job)
    }

    fn begin_on_ring(&mut self, job: Job) -> Result<(), Broken> {
        let memory = self.turn.memory;
        let begun = match &job.request {
            Request::Read { offset, data } => {
                let (offset, data) = (*offset, data.clone());
                self.ring.read(job, memory, offset, &data)
            }
            Request::Write { offset, data } => {
                let (offset, data) = (*offset, data.clone());
                self.ring.write(job, memory, offset, &data)
            }
            _ => self.ring.sync(job, memory),
        };
        self.most = self.most.max(self.ring.in_flight());
        begun.or_else(|(job, error)| {
            let answer = self.disk.conclude(&job.request, Err(error));
            self.answer(&job, answer)
        })
    }

    /// Answers what has landed, and does what waited for the ring to be empty. Whether there was anything.
    fn land(&mut self) -> Result<bool, Broken> {
        let mut landed = false;
        while let Some((job, outcome)) = self.ring.land() {
            landed = true;
            if outcome.as_ref().is_err_and(is_to_be_done_again) {
                self.held.push(job);
            } else {
                let answer = self.disk.conclude(&job.request, outcome);
                self.answer(&job, answer)?;
            }
        }
        if self.ring.in_flight() > 0 {
            return Ok(landed);
        }
        if self.most > 0 {
            self.disk.is_crowded.set(self.most > 1);
            self.most = 0;
        }
        for job in std::mem::take(&mut self.held) {
            landed = true;
            let answer = self.disk.carry_out(&job.request, self.turn.memory);
            self.answer(&job, answer)?;
        }
        Ok(landed)
    }

    /// Lets everything land that is in flight: nothing is when this returns.
    fn land_all(&mut self) -> Result<(), Broken> {
        let mut answered = Ok(());
        while self.ring.in_flight() > 0 {
            self.ring.submit();
            match self.land() {
                Ok(true) => {}
                Ok(false) => self.turn.wait(self.ring, None),
                Err(broken) => answered = answered.and(Err(broken)),
            }
        }
        answered
    }

    fn answer(&mut self, job: &Job, answer: Answer) -> Result<(), Broken> {
        let written = tell_status(job, answer, self.turn.memory)?;
        self.queue.push(self.turn.memory, job.head, written)
    }
}

/// Writes the status of a request; returns how many bytes the guest gets altogether.
fn tell_status(job: &Job, (code, given): Answer, memory: &GuestMemory) -> Result<u32, Broken> {
    let status = GuestAddress(job.status.address);
    memory.tracked().write_obj(code, status).map_err(Broken::new)?;
    Ok(given.saturating_add(1))
}

/// Buffers that direct I/O does not take go through another one; the rest is the kernel's want of something at this moment.
fn is_to_be_done_again(error: &io::Error) -> bool {
    let again = [libc::EINVAL, libc::EAGAIN, libc::EINTR, libc::ECANCELED];
    error.raw_os_error().is_some_and(|code| again.contains(&code))
}
