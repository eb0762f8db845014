//! What only vCPU 0 does: heartbeats, the lines on the console, work on a device, and the end.

use core::sync::atomic::Ordering;

use crate::cmdline::End;
use crate::machine::{end_with, halt};
use crate::pattern::Area;
use crate::plan::Plan;
use crate::report::{Fault, Heartbeat, Line, Ready};
use crate::serial::{Serial, Text};
use crate::shared::{ACCOUNTS, Account, STARTED};
use crate::transfers::Job;

/// Room that the longest line needs: below it, lines wait rather than be cut.
const LINE_ROOM: usize = 320;

/// vCPU 0's second job, done a step at a time.
pub struct Front {
    plan: &'static Plan,
    serial: Serial,
    accounts: &'static [Account],
    next_heartbeat: u64,
    sequence: u64,
    max_gap: u64,
    /// FAULT lines printed, by vCPU.
    printed: [u64; ACCOUNTS.len()],
    end: Option<(End, u64)>,
    job: Option<Job>,
}

impl Front {
    pub fn new(plan: &'static Plan, serial: Serial, job: Option<Job>) -> Self {
        Self {
            plan,
            serial,
            accounts: &ACCOUNTS[..plan.options.cpus as usize],
            next_heartbeat: 0,
            sequence: 0,
            max_gap: 0,
            printed: [0; ACCOUNTS.len()],
            end: None,
            job,
        }
    }

    /// Says READY once all vCPUs have filled their share, and lets the workload start.
    pub fn start_if_filled(&mut self, now: u64) {
        if self.serial.room() < LINE_ROOM || !self.accounts.iter().all(|a| a.filled.load(Ordering::Acquire)) {
            return;
        }
        let options = &self.plan.options;
        self.serial.print(Line::Ready(Ready {
            tsc_khz: self.plan.frequency.khz,
            tsc_from: self.plan.frequency.from,
            mem_mib: self.plan.mem_mib,
            cpus: options.cpus,
            fill_mib: options.fill_mib,
            work_mib: options.work_size_mib(),
        }));
        // Filling makes the host find memory: those gaps are not the workload's.
        for account in self.accounts {
            account.take_gap();
        }
        self.max_gap = 0;
        self.end = options.end.map(|(end, ms)| (end, now + self.plan.cycles(ms)));
        STARTED.store(true, Ordering::Release);
    }

    /// One small piece of what is due: at most one exit or one line made up.
    #[inline]
    pub fn step(&mut self, now: u64) {
        self.serial.step();
        if now >= self.next_heartbeat {
            self.heartbeat(now);
        }
        if self.end.is_some_and(|(_, at)| now >= at) {
            self.finish();
        }
    }

    /// One look at the device, if the work is on one. Not before the workload starts.
    #[inline]
    pub fn work_on_device(&mut self, now: u64) {
        let Some(job) = &mut self.job else { return };
        // What came of it must not be cut.
        if self.serial.room() < LINE_ROOM {
            return;
        }
        if let Some(transfers) = job.step(now, self.plan) {
            self.serial.print(Line::Transfers(transfers));
        }
    }

    /// A beat waits until the line before it is gone: where its characters take longer than from beat to beat, beats that queue would leave
    /// no room for any other line, and READY would never be said.
    #[cold]
    fn heartbeat(&mut self, now: u64) {
        if !self.serial.is_empty() {
            return;
        }
        self.print_faults();
        if self.serial.room() < LINE_ROOM {
            return;
        }
        let gap = self.accounts.iter().map(Account::take_gap).max().unwrap_or(0);
        self.max_gap = self.max_gap.max(gap);
        let total = |count: fn(&Account) -> u64| self.accounts.iter().map(count).sum();
        let heartbeat = Heartbeat {
            seq: self.sequence,
            tsc: now,
            gap_ns: self.plan.nanoseconds(gap),
            max_gap_ns: self.plan.nanoseconds(self.max_gap),
            writes: total(|account| account.writes.load(Ordering::Relaxed)),
            checked: total(|account| account.checked.load(Ordering::Relaxed)),
            faults: total(|account| account.faults.load(Ordering::Relaxed)),
            tsc_back: total(|account| account.tsc_back.load(Ordering::Relaxed)),
        };
        self.serial.print(Line::Heartbeat(heartbeat));
        self.sequence += 1;
        // After a blackout the beat goes on from here: heartbeats are not made up for.
        let interval = self.plan.cycles(self.plan.options.heartbeat_ms);
        self.next_heartbeat = match self.next_heartbeat + interval {
            next if next > now => next,
            _ => now + interval,
        };
    }

    /// The clock went backwards: what was set by it starts again.
    #[cold]
    pub fn clock_went_back(&mut self, now: u64) {
        self.next_heartbeat = now;
    }

    fn print_faults(&mut self) {
        for (cpu, account) in self.accounts.iter().enumerate() {
            while self.serial.room() >= LINE_ROOM {
                let Some(noted) = account.fault(self.printed[cpu]) else {
                    break;
                };
                self.printed[cpu] += 1;
                let (area, pages) = match noted.area {
                    Area::Fill => ("fill", &self.plan.fill),
                    Area::Work => ("work", &self.plan.work),
                };
                self.serial.print(Line::Fault(Fault {
                    page: noted.page,
                    want: noted.want,
                    got: noted.got,
                    kind: noted.kind,
                    area,
                    holds: noted.holds,
                    gpa: pages.address(noted.page),
                    cpu: cpu as u32,
                }));
            }
        }
    }

    #[cold]
    fn finish(&mut self) {
        let Some((end, _)) = self.end.take() else {
            return;
        };
        self.serial.flush();
        self.serial.print(Line::End(end));
        self.serial.flush();
        end_with(end);
        let text = Text::of(format_args!("the machine did not heed {end}"));
        self.serial.print(Line::Error(text.as_str()));
        self.serial.flush();
        halt()
    }
}
