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
//! Reads that come together and follow each other on the disk are one transfer, and so are writes: a disk takes one of 4 MiB faster than four
//! of 1 MiB, and there is one call and one wake-up for all. What failed together is carried out again one by one, so that each
//! request is answered for itself.
//!
//! A write that has to wait because the disk is being copied (`holding_back.rs`) is put back into the queue, and nothing behind it is taken: so the
//! order of requests stays what it was, and a machine that is stopped meanwhile has the request in its queue, for whoever runs it next. Requests of
//! other disks, and those in flight, go on.
//!
//! When a turn ends nothing is in flight, as every device promises.

use std::io;

use vm_memory::{Bytes, GuestAddress};

use super::super::device::{Broken, Turn};
use super::super::queue::{Chain, DeviceQueue};
use super::carrying_out::Answer;
use super::request::Request;
use super::together::{Job, Together};
use super::{Block, QUEUE};
use crate::machine::DiskAccess;
use crate::memory::{GuestMemory, Ring, total};

/// So many are begun before the kernel gets them: the first does not wait for the last of a full queue, and a call is for several.
const BATCH: usize = 16;

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
                gathered: None,
                held: Vec::new(),
                in_flight: 0,
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
        self.serve_one_by_one(queue, turn)
    }

    fn serve_one_by_one(&mut self, queue: &mut DeviceQueue, turn: &Turn<'_>) -> Result<(), Broken> {
        loop {
            queue.ignore(turn.memory)?;
            self.is_held_back = false;
            while !turn.is_to_end() {
                let Some(job) = self.next_job(queue, turn.memory)? else {
                    break;
                };
                let Some(answer) = self.carry_out(&job.request, turn) else {
                    queue.undo_pop();
                    break;
                };
                let written = tell_status(&job, answer, turn.memory)?;
                queue.push(turn.memory, job.head, written)?;
            }
            if self.is_held_back || !queue.listen(turn.memory)? || turn.is_to_end() {
                return Ok(());
            }
        }
    }

    /// Takes the next request, unless there is none or it has to wait.
    fn next_job(&mut self, queue: &mut DeviceQueue, memory: &GuestMemory) -> Result<Option<Job>, Broken> {
        let Some(chain) = queue.pop(memory)? else {
            return Ok(None);
        };
        let job = self.job(&chain, memory)?;
        let is_admitted = match &job.request {
            request if self.refusal(request).is_some() => true,
            Request::Write { offset, data } => self.admits([(*offset, total(data))].into_iter()),
            Request::Discard(extents) | Request::WriteZeroes(extents) => {
                self.admits(extents.iter().map(|extent| (extent.offset, extent.len)))
            }
            _ => true,
        };
        if !is_admitted {
            queue.undo_pop();
            return Ok(None);
        }
        Ok(Some(job))
    }

    fn admits(&mut self, extents: impl Iterator<Item = (u64, u64)>) -> bool {
        self.is_held_back = !self.written.admits(extents);
        !self.is_held_back
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
    disk: &'a mut Block,
    ring: &'a mut Ring<Together>,
    queue: &'a mut DeviceQueue,
    turn: &'a Turn<'a>,
    /// Taken, and not begun yet: what comes next may be behind it. Begun before anything is waited for.
    gathered: Option<Together>,
    /// To be carried out once nothing is in flight; until then no further request is taken.
    held: Vec<Job>,
    /// Requests in flight, each by itself.
    in_flight: usize,
    /// As many of them were at once since none was.
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
        // What is gathered needs a place, too.
        let further = 1 + usize::from(self.gathered.is_some());
        !self.turn.is_to_end() && !self.disk.is_held_back && self.held.is_empty() && self.ring.has_room_for(further)
    }

    /// Takes requests from the queue and begins them. Whether there was any.
    fn take(&mut self) -> Result<bool, Broken> {
        let taken = self.gather();
        let begun = self.begin_gathered();
        taken.and_then(|taken| begun.map(|()| taken))
    }

    fn gather(&mut self) -> Result<bool, Broken> {
        // It may be its turn by now.
        self.disk.is_held_back = false;
        for taken in 0..BATCH {
            if !self.takes() {
                return Ok(taken > 0);
            }
            let Some(job) = self.disk.next_job(self.queue, self.turn.memory)? else {
                return Ok(taken > 0);
            };
            self.begin(job)?;
        }
        Ok(true)
    }

    fn begin(&mut self, job: Job) -> Result<(), Broken> {
        let memory = self.turn.memory;
        let way = self.disk.way(&job.request);
        let is_first = self.ring.in_flight() == 0 && self.gathered.is_none();
        let is_alone = is_first && !self.disk.is_crowded.get() && !self.queue.has_more(memory)?;
        if way == Way::AtOnce || (is_first && way == Way::Alone) || is_alone {
            let Some(answer) = self.disk.carry_out(&job.request, self.turn) else {
                self.queue.undo_pop();
                return Ok(());
            };
            // Asked before the guest is answered: what is there now, it asked for without waiting.
            let has_others = self.queue.has_more(memory)?;
            self.disk.is_crowded.set(self.disk.is_crowded.get() || has_others);
            return self.answer(&job, answer);
        }
        if way == Way::Alone {
            self.held.push(job);
            return Ok(());
        }
        match &mut self.gathered {
            Some(before) if before.takes(&job) => before.push(job),
            _ => {
                self.begin_gathered()?;
                self.gathered = Some(Together::new(job));
            }
        }
        Ok(())
    }

    fn begin_gathered(&mut self) -> Result<(), Broken> {
        let Some(together) = self.gathered.take() else {
            return Ok(());
        };
        let memory = self.turn.memory;
        let data = together.data();
        self.in_flight += together.count();
        self.most = self.most.max(self.in_flight);
        let begun = match together.first.request {
            Request::Read { offset, .. } => self.ring.read(together, memory, offset, &data),
            Request::Write { offset, .. } => self.ring.write(together, memory, offset, &data),
            _ => self.ring.sync(together, memory),
        };
        begun.or_else(|(together, error)| {
            self.in_flight -= together.count();
            self.conclude(together, || Err(error.kind().into()))
        })
    }

    /// Answers a transfer that is over, or has its requests carried out again.
    fn landed(&mut self, together: Together, outcome: io::Result<()>) -> Result<(), Broken> {
        self.in_flight -= together.count();
        match outcome {
            Ok(()) => self.conclude(together, || Ok(())),
            Err(error) if together.count() > 1 || is_to_be_done_again(&error) => {
                self.held.extend(together.jobs());
                Ok(())
            }
            Err(error) => {
                let answer = self.disk.conclude(&together.first.request, Err(error));
                self.answer(&together.first, answer)
            }
        }
    }

    /// The same came of all of them. Each is taken note of, also where the guest's queue takes no answer.
    fn conclude(&mut self, together: Together, outcome: impl Fn() -> io::Result<()>) -> Result<(), Broken> {
        let mut answered = Ok(());
        for job in together.jobs() {
            let answer = self.disk.conclude(&job.request, outcome());
            answered = answered.and(self.answer(&job, answer));
        }
        answered
    }

    /// Answers what has landed, and does what waited for the ring to be empty. Whether there was anything.
    fn land(&mut self) -> Result<bool, Broken> {
        let mut landed = false;
        while let Some((together, outcome)) = self.ring.land() {
            landed = true;
            self.landed(together, outcome)?;
        }
        if self.ring.in_flight() > 0 {
            return Ok(landed);
        }
        if self.most > 0 {
            self.disk.is_crowded.set(self.most > 1);
            self.most = 0;
        }
        let mut answered = Ok(());
        for job in std::mem::take(&mut self.held) {
            landed = true;
            match self.disk.carry_out(&job.request, self.turn) {
                Some(answer) => answered = answered.and(self.answer(&job, answer)),
                // The last that was taken: nothing is while something is held, and what else is held was in flight and goes in no pieces.
                None => self.queue.undo_pop(),
            }
        }
        answered.map(|()| landed)
    }

    /// Lets everything land that is in flight: nothing is when this returns.
    fn land_all(&mut self) -> Result<(), Broken> {
        let mut answered = Ok(());
        while self.ring.in_flight() > 0 || !self.held.is_empty() {
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
