//! What every vCPU does: fill its share, then write and check pages at their rates, and look at the clock all along.

use core::sync::atomic::Ordering;

use crate::cmdline::Work;
use crate::front::Front;
use crate::machine::clock;
use crate::pattern::{self, Area, PAGE_WORDS, Page};
use crate::plan::Plan;
use crate::rng::Rng;
use crate::shared::{ACCOUNTS, Account, STARTED};

/// One vCPU's work and its share of the memory.
pub struct Worker {
    plan: &'static Plan,
    account: &'static Account,
    watch: Watch,
    front: Option<Front>,
    fill: Share,
    work: Share,
    rng: Rng,
    sweep: u64,
    check: u64,
    writes: u64,
    checked: u64,
}

/// Page numbers from `first`, so many.
#[derive(Clone, Copy)]
struct Share {
    first: u64,
    count: u64,
}

impl Share {
    fn of(pages: u64, cpu: u32, cpus: u32) -> Self {
        let bound = |cpu: u32| pages * u64::from(cpu) / u64::from(cpus);
        Self {
            first: bound(cpu),
            count: bound(cpu + 1) - bound(cpu),
        }
    }
}

impl Worker {
    pub fn new(plan: &'static Plan, cpu: u32, front: Option<Front>) -> Self {
        let (cpus, writers) = (plan.options.cpus, plan.options.writing_cpus());
        let account = &ACCOUNTS[cpu as usize];
        Self {
            plan,
            account,
            watch: Watch::new(account),
            front,
            fill: Share::of(plan.fill.count(), cpu, cpus),
            work: match cpu < writers {
                true => Share::of(plan.work.count(), cpu, writers),
                false => Share { first: 0, count: 0 },
            },
            rng: Rng::new(plan.options.seed, !u64::from(cpu)),
            sweep: 0,
            check: 0,
            writes: 0,
            checked: 0,
        }
    }

    /// Never ends; the machine does.
    pub fn run(mut self) -> ! {
        self.fill_share();
        self.account.filled.store(true, Ordering::Release);
        while !STARTED.load(Ordering::Acquire) {
            let now = self.look();
            if let Some(front) = &mut self.front {
                front.start_if_filled(now);
            }
        }
        let options = &self.plan.options;
        let (writers, checkers) = (options.writing_cpus(), options.checking_cpus());
        let checks = options.check && (self.work.count == 0 || checkers == options.cpus);
        let check_rate = if checks { options.check_rate } else { 0 };
        let mut writing = Pace::new(self.plan, (options.write_rate(), writers), self.work.count);
        let checked = self.fill.count + self.work.count;
        let mut checking = Pace::new(self.plan, (check_rate, checkers), checked);
        loop {
            let now = self.look();
            if writing.is_due(now) {
                self.write_page();
            }
            if checking.is_due(now) {
                self.check_page();
            }
            if let Some(front) = &mut self.front {
                front.work_on_device(now);
            }
        }
    }

    /// Looks at the clock, and lets vCPU 0 do a step of its other job.
    #[inline]
    fn look(&mut self) -> u64 {
        let (now, back) = self.watch.look();
        if let Some(front) = &mut self.front {
            if back {
                front.clock_went_back(now);
            }
            front.step(now);
        }
        now
    }

    fn fill_share(&mut self) {
        let options = &self.plan.options;
        for page in self.fill.first..self.fill.first + self.fill.count {
            let content = page_at(self.plan.fill.address(page));
            pattern::write_body(content, options.fill, options.seed, Area::Fill, page);
            self.look();
        }
        for page in self.work.first..self.work.first + self.work.count {
            let content = page_at(self.plan.work.address(page));
            pattern::write_body(content, options.fill, options.seed, Area::Work, page);
            pattern::stamp(content, options.seed, page, 1);
            *self.version(page) = 1;
            self.look();
        }
    }

    #[inline]
    fn write_page(&mut self) {
        let options = &self.plan.options;
        let page = self.work.first + self.pick(options.work);
        let version = *self.version(page);
        let content = page_at(self.plan.work.address(page));
        if options.check
            && let Err(damage) = pattern::check_stamp(content, options.seed, page, version)
        {
            self.account.note_fault(Area::Work, page, version, damage);
            pattern::write_body(content, options.fill, options.seed, Area::Work, page);
        }
        let version = version.wrapping_add(1);
        pattern::stamp(content, options.seed, page, version);
        *self.version(page) = version;
        self.writes += 1;
        self.account.writes.store(self.writes, Ordering::Relaxed);
    }

    /// The page of the share that is written next.
    #[inline]
    fn pick(&mut self, work: Work) -> u64 {
        let count = self.work.count;
        match work {
            Work::HotCold if self.rng.below(10) > 0 => self.rng.below((count / 10).max(1)),
            Work::HotCold => {
                let hot = (count / 10).max(1);
                (hot + self.rng.below(count - hot)).min(count - 1)
            }
            Work::Sweep => {
                self.sweep = (self.sweep + 1) % count;
                self.sweep
            }
            Work::Uniform | Work::Idle | Work::Block | Work::Net => self.rng.below(count),
        }
    }

    /// Reads the next page of the share in full, the fill area first. A damaged page is made good, so that each damage
    /// counts once.
    fn check_page(&mut self) {
        let options = &self.plan.options;
        let (fill, seed) = (options.fill, options.seed);
        if self.check < self.fill.count {
            let page = self.fill.first + self.check;
            let content = page_at(self.plan.fill.address(page));
            if let Err(damage) = pattern::check_fill(content, fill, seed, page) {
                self.account.note_fault(Area::Fill, page, 0, damage);
                pattern::write_body(content, fill, seed, Area::Fill, page);
            }
        } else {
            let page = self.work.first + self.check - self.fill.count;
            let want = *self.version(page);
            let content = page_at(self.plan.work.address(page));
            if let Err(damage) = pattern::check_work(content, fill, seed, page, want) {
                self.account.note_fault(Area::Work, page, want, damage);
                pattern::write_body(content, fill, seed, Area::Work, page);
                pattern::stamp(content, seed, page, want);
            }
        }
        self.check = (self.check + 1) % (self.fill.count + self.work.count);
        self.checked += 1;
        self.account.checked.store(self.checked, Ordering::Relaxed);
    }

    /// The version of a page of this vCPU's share.
    #[inline]
    fn version(&mut self, page: u64) -> &mut u32 {
        // SAFETY: the table has an entry for each page of the work area, and only the vCPU that has the page in its
        // share uses that entry; the borrow of `self` keeps it to one reference at a time.
        unsafe { &mut *(self.plan.versions as *mut u32).add(page as usize) }
    }
}

/// The content of a page of this vCPU's share.
#[inline]
fn page_at(address: u64) -> &'static mut Page {
    const { assert!(size_of::<Page>() == PAGE_WORDS * 8) };
    // SAFETY: pages of the areas are mapped, and belong to the one vCPU that has them in its share; each caller is
    // done with the reference before the next one is made.
    unsafe { &mut *(address as *mut Page) }
}

/// Looks at the clock and remembers the largest gap between two looks.
struct Watch {
    account: &'static Account,
    last: u64,
}

impl Watch {
    fn new(account: &'static Account) -> Self {
        Self { account, last: clock() }
    }

    /// The time, and whether it is before the last one.
    #[inline]
    fn look(&mut self) -> (u64, bool) {
        let now = clock();
        let back = now < self.last;
        if back {
            self.account.tsc_back.fetch_add(1, Ordering::Relaxed);
        } else {
            self.account.note_gap(now - self.last);
        }
        self.last = now;
        (now, back)
    }
}

/// Says when the next of so many a second is due.
///
/// What a stall made late is made up for, but never more than 10 ms of it: after a blackout the guest goes on at its
/// rate, it does not run after its deadlines.
struct Pace {
    next: u64,
    /// Cycles from one to the next: `step + rest / rate`.
    step: u64,
    rest: u64,
    rate: u64,
    carried: u64,
    most_late: u64,
}

impl Pace {
    /// `rate` is of so many vCPUs together; `pages` is what this one has: with none, nothing is ever due.
    fn new(plan: &Plan, (rate, cpus): (u64, u32), pages: u64) -> Self {
        let rate = if pages == 0 { 0 } else { rate };
        // Cycles a second divided among the vCPUs: each does its part of the rate.
        let cycles = plan.cycles(1000) * u64::from(cpus);
        let step = cycles.checked_div(rate);
        Self {
            next: step.map_or(u64::MAX, |step| clock() + step),
            step: step.unwrap_or(0),
            rest: cycles.checked_rem(rate).unwrap_or(0),
            rate,
            carried: 0,
            most_late: plan.cycles(10),
        }
    }

    #[inline]
    fn is_due(&mut self, now: u64) -> bool {
        if now < self.next {
            // A clock that went backwards must not stop the work until it has caught up again.
            if self.rate > 0 && self.next - now > self.step + 1 {
                self.next = now;
            }
            return false;
        }
        if now - self.next > self.most_late {
            self.next = now - self.most_late;
        }
        self.next += self.step;
        self.carried += self.rest;
        if self.carried >= self.rate {
            self.carried -= self.rate;
            self.next += 1;
        }
        true
    }
}
