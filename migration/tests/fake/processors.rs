//! How the threads that copy share the processors with the guest: a record of what each had asked the scheduler for when it did something.

use std::cell::Cell;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ferry_migration::guest::FrameRun;

thread_local! {
    /// How long the turns are that the calling thread asked for, and got.
    static TURNS: Cell<Option<Duration>> = const { Cell::new(None) };
}

/// What a thread did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deed {
    /// Wrote a frame to its socket.
    Sent,
    /// Read a frame's pages from its socket.
    Received,
    /// Put late pages where they are awaited.
    Supplied,
    /// Put a huge page below small ones.
    MadeHuge,
    /// Let somebody else have its processor.
    GaveWay,
}

/// Something that a thread did.
#[derive(Clone, Debug)]
pub struct Done {
    pub deed: Deed,
    pub runs: Vec<FrameRun>,
    /// The thread took turns of this length.
    pub turns: Option<Duration>,
    /// Its weight: 0 is the usual one, more is less.
    pub nice: i32,
    /// The guest stood still.
    pub guest_stands_still: bool,
}

impl Done {
    pub fn pages(&self) -> u64 {
        self.runs.iter().map(|run| run.count).sum()
    }

    pub fn has(&self, frame: u64) -> bool {
        self.runs.iter().any(|run| (run.first..run.end()).contains(&frame))
    }
}

/// The processors of a host, as threads of a migration use them.
#[derive(Debug, Default)]
pub struct Processors {
    has_turns: AtomicBool,
    guest_stands_still: AtomicBool,
    done: Mutex<Vec<Done>>,
}

impl Processors {
    /// The scheduler gives turns as long as they are asked for; without this it knows weights alone.
    pub fn have_turns(&self) {
        self.has_turns.store(true, Ordering::Relaxed);
    }

    /// What was done, in this order.
    pub fn done(&self, deed: Deed) -> Vec<Done> {
        let done = self.done.lock().unwrap();
        done.iter().filter(|done| done.deed == deed).cloned().collect()
    }

    pub(super) fn guest_stops(&self) {
        self.guest_stands_still.store(true, Ordering::SeqCst);
    }

    pub(super) fn guest_runs(&self) {
        self.guest_stands_still.store(false, Ordering::SeqCst);
    }

    pub(super) fn set_turns(&self, length: Option<Duration>) -> bool {
        let has_turns = self.has_turns.load(Ordering::Relaxed);
        if has_turns {
            TURNS.set(length);
        }
        has_turns
    }

    pub(super) fn note(&self, deed: Deed, runs: &[FrameRun]) {
        self.done.lock().unwrap().push(Done {
            deed,
            runs: runs.to_vec(),
            turns: TURNS.get(),
            nice: nice(),
            guest_stands_still: self.guest_stands_still.load(Ordering::SeqCst),
        });
    }
}

/// The calling thread's weight.
pub fn nice() -> i32 {
    // With no process given Linux means the calling thread, see NOTES in setpriority(2).
    rustix::process::getpriority_process(None).unwrap()
}

/// What comes of it where a thread stands back: under a runner that is nice itself it cannot be seen.
pub fn nice_of_who_stands_back() -> i32 {
    let stands_back = || {
        let _ = rustix::process::setpriority_process(None, 5);
        nice()
    };
    std::thread::spawn(stands_back).join().unwrap()
}
