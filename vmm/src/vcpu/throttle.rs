//! Keeping vCPUs from running for a share of the time: what a guest writes, it writes while it runs.
//!
//! ```text
//!   throttle         kick                    kick
//!   vCPU     ── runs ──┤─ rests ─┤── runs ─────┤─ rests ─┤─ …
//! ```
//!
//! A thread of its own kicks each vCPU out of the guest once it has run for a while. The vCPU then rests on its own thread, where it waits for
//! commands: a pause is as prompt as ever. It rests for as long as is due for the time that it ran, which is longer than was meant wherever
//! the kick was late, and never for longer than [`LONGEST_REST`] at once: what is due beyond that, after a short run.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};
use std::{fmt, io};

use super::kick::Kicker;

/// The longest that a vCPU stands still at a time: what its guest feels of it is how long one of its own threads, or a timer, may be late.
pub const LONGEST_REST: Duration = Duration::from_millis(20);

/// The most of its time that a vCPU can be kept from running: it must run to end what it does.
pub const MOST_PERCENT: u32 = 99;

/// How long a vCPU runs between two rests, unless they would have to be longer than allowed for that.
const RUN: Duration = Duration::from_millis(10);

/// How long it runs where more rest is due than it may have at once.
const SHORT_RUN: Duration = Duration::from_micros(200);

/// The most rest that is kept for later: a host that was too busy for a while is not made up for any longer.
const MOST_DUE: Duration = Duration::from_millis(200);

/// What the throttle and one vCPU's thread share.
#[derive(Debug)]
pub(super) struct Rests {
    /// Of its time; 0: it is left alone.
    percent: AtomicU32,
    /// Kicked for a rest, which it has not begun yet.
    is_kicked: AtomicBool,
    /// When its last rest ends or ended, and how long it is to run then; nanoseconds since `began`.
    rested: AtomicU64,
    run: AtomicU64,
    /// Rest that is due and was not had; nanoseconds. The vCPU's own.
    due: AtomicU64,
    began: Instant,
}

impl Default for Rests {
    fn default() -> Self {
        Self {
            percent: AtomicU32::new(0),
            is_kicked: AtomicBool::new(false),
            rested: AtomicU64::new(0),
            run: AtomicU64::new(0),
            due: AtomicU64::new(0),
            began: Instant::now(),
        }
    }
}

impl Rests {
    /// From now on the vCPU is kept from running for so much of its time.
    fn set(&self, percent: u32) {
        let percent = percent.min(MOST_PERCENT);
        let before = self.percent.swap(percent, Ordering::Relaxed);
        if before == 0 || percent == 0 {
            // The time before counts for nothing.
            self.is_kicked.store(false, Ordering::Relaxed);
            self.due.store(0, Ordering::Relaxed);
            self.run.store(nanoseconds(run(percent)), Ordering::Relaxed);
            self.rested.store(nanoseconds(self.began.elapsed()), Ordering::Relaxed);
        }
    }

    /// How long the vCPU is to rest now, if it was kicked for that. It does.
    pub(super) fn take(&self) -> Option<Duration> {
        // Of what the kick is for nothing else is read but what this thread itself wrote, and a percentage of any age.
        if !self.is_kicked.load(Ordering::Relaxed) {
            return None;
        }
        let now = self.began.elapsed();
        let rest = self.rest(now);
        self.is_kicked.store(false, Ordering::Relaxed);
        rest
    }

    fn rest(&self, now: Duration) -> Option<Duration> {
        let percent = self.percent.load(Ordering::Relaxed);
        if percent == 0 {
            return None;
        }
        let ran = now.saturating_sub(Duration::from_nanos(self.rested.load(Ordering::Relaxed)));
        let due =
            Duration::from_nanos(self.due.load(Ordering::Relaxed)) + ran.min(MOST_DUE) * percent / (100 - percent);
        let rest = due.min(LONGEST_REST);
        let later = (due - rest).min(MOST_DUE);
        let run = if later.is_zero() { run(percent) } else { SHORT_RUN };
        self.due.store(nanoseconds(later), Ordering::Relaxed);
        self.run.store(nanoseconds(run), Ordering::Relaxed);
        self.rested.store(nanoseconds(now + rest), Ordering::Relaxed);
        Some(rest)
    }

    /// Kicks the vCPU for a rest if that is due at this time, and tells when it may be again.
    fn kick(&self, now: Duration, kick: impl FnOnce()) -> Option<Duration> {
        if self.percent.load(Ordering::Relaxed) == 0 {
            return None;
        }
        let sum = self.rested.load(Ordering::Relaxed) + self.run.load(Ordering::Relaxed);
        let next = Duration::from_nanos(sum);
        if next > now && !self.is_kicked.load(Ordering::Relaxed) {
            return Some(next);
        }
        self.is_kicked.store(true, Ordering::Relaxed);
        // After the mark: a vCPU that leaves the guest for it finds it.
        kick();
        // By then it has begun to rest, and it is known until when.
        Some(now + LONGEST_REST / 4)
    }
}

/// How long a vCPU runs before a rest of the length that makes its share.
fn run(percent: u32) -> Duration {
    match percent {
        0 => RUN,
        percent => RUN.min(LONGEST_REST * (100 - percent) / percent),
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// One vCPU, as the throttle sees it.
pub(super) struct Throttled {
    pub(super) kicker: Kicker,
    pub(super) rests: Arc<Rests>,
}

/// The thread that kicks. Dropping it leaves all vCPUs alone, and ends it.
pub(crate) struct Throttle {
    /// Something has changed.
    bell: Option<Sender<()>>,
    vcpus: Vec<Arc<Rests>>,
    thread: Option<JoinHandle<()>>,
}

impl Throttle {
    /// A throttle for these vCPUs, all of which are left alone. Its thread may do what the calling one may.
    ///
    /// # Errors
    /// If the thread cannot be started.
    pub(super) fn start(vcpus: Vec<Throttled>) -> io::Result<Self> {
        let (bell, rung) = channel();
        let rests = vcpus.iter().map(|vcpu| Arc::clone(&vcpu.rests)).collect();
        let thread = Builder::new()
            .name("throttle".to_owned())
            .spawn(move || kick_all(&vcpus, &rung))?;
        Ok(Self {
            bell: Some(bell),
            vcpus: rests,
            thread: Some(thread),
        })
    }

    /// Keeps the vCPUs for which `is_throttled` holds from running for so much of their time, and leaves the others alone.
    pub(crate) fn set(&self, percent: u32, is_throttled: impl Fn(usize) -> bool) {
        for (index, rests) in self.vcpus.iter().enumerate() {
            rests.set(if is_throttled(index) { percent } else { 0 });
        }
        if let Some(bell) = &self.bell {
            // A thread that panicked leaves the vCPUs alone.
            let _ = bell.send(());
        }
    }

    /// Leaves all vCPUs alone. Does not wait for the thread.
    pub(crate) fn release(&self) {
        self.set(0, |_| false);
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        self.release();
        self.bell = None;
        // It waits for nothing but its bell.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

impl fmt::Debug for Throttle {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Throttle")
            .field("vcpus", &self.vcpus)
            .finish_non_exhaustive()
    }
}

fn kick_all(vcpus: &[Throttled], rung: &Receiver<()>) {
    loop {
        let kick = |vcpu: &Throttled| {
            let rests = &vcpu.rests;
            let now = rests.began.elapsed();
            let next = rests.kick(now, || vcpu.kicker.kick())?;
            Some(next.saturating_sub(now))
        };
        let rung = match vcpus.iter().filter_map(kick).min() {
            None => rung.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(pause) => rung.recv_timeout(pause),
        };
        if rung == Err(RecvTimeoutError::Disconnected) {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn rests(percent: u32) -> Rests {
        let rests = Rests::default();
        rests.set(percent);
        rests.rested.store(0, Ordering::Relaxed);
        rests
    }

    /// Runs until the throttle wants it to rest, and so much longer; returns how long it ran and rested.
    fn turn(rests: &Rests, now: &mut Duration, late: Duration) -> (Duration, Duration) {
        let mut kicked = false;
        let due = rests.kick(*now, || kicked = true).unwrap();
        assert!(!kicked && due > *now, "it is kicked before it has run");
        let ran = due - *now + late;
        *now += ran;
        rests.kick(*now, || kicked = true);
        assert!(kicked);
        let rest = rests.rest(*now).unwrap();
        rests.is_kicked.store(false, Ordering::Relaxed);
        *now += rest;
        (ran, rest)
    }

    #[test]
    fn rests_make_their_share_however_late_kicks_are_and_none_is_longer_than_allowed() {
        for late in [Duration::ZERO, MS / 10, MS] {
            for percent in 1..=MOST_PERCENT {
                let (rests, mut now) = (rests(percent), Duration::ZERO);
                let (mut ran, mut rested) = (Duration::ZERO, Duration::ZERO);
                for _ in 0..500 {
                    let (run, rest) = turn(&rests, &mut now, late);
                    assert!(rest <= LONGEST_REST, "{percent}: {rest:?}");
                    (ran, rested) = (ran + run, rested + rest);
                }
                let share = rested.as_secs_f64() / (ran + rested).as_secs_f64() * 100.0;
                // Short runs that are as late as that leave no room for more rest between them.
                let possible = LONGEST_REST.as_secs_f64() / (LONGEST_REST + SHORT_RUN + late).as_secs_f64() * 100.0;
                let wanted = f64::from(percent).min(possible);
                assert!(
                    (share - wanted).abs() < 0.5,
                    "{percent}, {late:?} late: {share} for {wanted}"
                );
            }
        }
    }

    #[test]
    fn one_that_is_left_alone_is_not_kicked_and_does_not_rest() {
        let rests = rests(0);
        assert_eq!(rests.kick(MS * 100, || panic!("kicked")), None);
        rests.is_kicked.store(true, Ordering::Relaxed);
        assert_eq!(rests.take(), None);
    }

    #[test]
    fn a_kick_that_was_not_seen_is_given_again() {
        let rests = rests(50);
        let mut kicks = 0;
        let again = rests.kick(MS * 11, || kicks += 1).unwrap();
        rests.kick(again, || kicks += 1);
        assert_eq!(kicks, 2);
    }
}
