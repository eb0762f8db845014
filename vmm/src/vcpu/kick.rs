//! Getting a vCPU thread out of the guest, without a race.
//!
//! The one who kicks *first* enqueues what the thread is to do, *then* signals. The signal's handler, on the vCPU's thread, sets the
//! immediate-exit mark in the page shared with KVM. The thread *first* clears the mark, *then* drains its queue, then enters the guest.
//!
//! Whenever the signal arrives, the command is seen: before the clearing, the command is in the queue that is drained next; between
//! clearing and entering, the mark makes KVM_RUN return at once; in the guest, the signal itself makes it return. The model at
//! the end searches all interleavings of this.

#![expect(unsafe_code, reason = "a signal handler, and the byte shared with KVM that it marks")]

use std::cell::Cell;
use std::io;
use std::marker::PhantomData;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering, compiler_fence};

use crate::kvm::Vcpu;

thread_local! {
    /// The mark of the vCPU that this thread runs. Constant initialisation and no destructor: a handler may touch it at any moment.
    static MARK: Cell<*const AtomicU8> = const { Cell::new(ptr::null()) };
}

/// Makes this thread kickable for as long as it lives; belongs to the thread that made it.
#[derive(Debug)]
pub(super) struct KickTarget {
    mark: *const AtomicU8,
    /// Not `Send`: the mark is this thread's.
    thread: PhantomData<*const ()>,
}

impl KickTarget {
    /// Registers this thread as the one that runs `vcpu`, which must outlive the target.
    pub(super) fn register(vcpu: &mut Vcpu) -> io::Result<Self> {
        install_handler()?;
        let mark = vcpu.immediate_exit_mark();
        MARK.set(mark);
        unblock()?;
        Ok(Self {
            mark,
            thread: PhantomData,
        })
    }

    /// A handle with which any thread can kick this one.
    pub(super) fn kicker(&self) -> Kicker {
        Kicker {
            process: rustix::process::getpid().as_raw_nonzero().get(),
            thread: rustix::thread::gettid().as_raw_nonzero().get(),
        }
    }

    /// Forgets earlier kicks. Call before draining the queue.
    pub(super) fn clear(&self) {
        self.store(0);
        // The handler runs on this thread: only the compiler could let the draining move up.
        compiler_fence(Ordering::SeqCst);
    }

    /// Makes KVM_RUN finish what is pending and return, as if kicked.
    pub(super) fn mark(&self) {
        self.store(1);
    }

    fn store(&self, value: u8) {
        // SAFETY: the vCPU, and with it the shared page, outlives the target (see `register`).
        unsafe { (*self.mark).store(value, Ordering::Relaxed) };
    }
}

impl Drop for KickTarget {
    fn drop(&mut self) {
        MARK.set(ptr::null());
    }
}

/// Kicks one vCPU thread. After the thread ended a kick does nothing, or gives another thread of this process a signal
/// that at most makes it look at its queue once more.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kicker {
    process: i32,
    thread: i32,
}

impl Kicker {
    /// Gets the thread out of the guest. Enqueue first what it is to find.
    pub(super) fn kick(self) {
        // SAFETY: plain numbers; the kernel delivers only to a thread of this process, where the handler is installed.
        unsafe { libc::syscall(libc::SYS_tgkill, self.process, self.thread, signal()) };
    }
}

fn signal() -> libc::c_int {
    libc::SIGRTMIN()
}

/// Runs on the vCPU's thread: only touches a thread-local without destructor and an atomic.
extern "C" fn on_kick(_: libc::c_int) {
    let mark = MARK.get();
    if !mark.is_null() {
        // SAFETY: not null only between registration and drop of the target, within which the shared page is mapped.
        unsafe { (*mark).store(1, Ordering::Relaxed) };
    }
}

fn install_handler() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    let result = INSTALLED.get_or_init(|| {
        // SAFETY: all zeroes is a valid sigaction: no flags, an empty mask.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_kick as extern "C" fn(libc::c_int) as libc::sighandler_t;
        // System calls that a device makes go on; KVM_RUN returns EINTR all the same.
        action.sa_flags = libc::SA_RESTART;
        // SAFETY: the handler is async-signal-safe (see there), the old action is not asked for.
        let result = unsafe { libc::sigaction(signal(), &raw const action, ptr::null_mut()) };
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL))
        }
    });
    result.map_err(io::Error::from_raw_os_error)
}

/// A thread inherits what its creator blocks; this signal must get through.
fn unblock() -> io::Result<()> {
    // SAFETY: all zeroes is a valid signal set; sigemptyset makes it an empty one.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is a live local.
    unsafe { libc::sigemptyset(&raw mut set) };
    // SAFETY: `set` is a live local and the signal a valid number.
    unsafe { libc::sigaddset(&raw mut set, signal()) };
    // SAFETY: changes only this thread's mask; the old one is not asked for.
    match unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, ptr::null_mut()) } {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

#[cfg(test)]
mod model {
    //! The protocol above with the kernel's part made explicit, searched exhaustively: every interleaving of one vCPU thread and one
    //! kicker, the signal delivered at any step after it was sent.

    use std::collections::HashSet;

    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    enum Thread {
        Clear,
        Drain,
        Enter,
        InGuest,
        Obeyed,
    }

    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    struct State {
        thread: Thread,
        mark: bool,
        queued: bool,
        /// Steps that the kicker still has to do.
        kicker: u8,
        signal_pending: bool,
    }

    /// In which order each side does its two steps.
    #[derive(Debug, Clone, Copy)]
    struct Order {
        enqueue_first: bool,
        clear_first: bool,
    }

    fn successors(state: State, order: Order) -> Vec<State> {
        let mut next = Vec::new();
        if state.kicker > 0 {
            let enqueues = (state.kicker == 2) == order.enqueue_first;
            next.push(State {
                kicker: state.kicker - 1,
                queued: state.queued || enqueues,
                signal_pending: state.signal_pending || !enqueues,
                ..state
            });
        }
        if state.signal_pending {
            // The handler marks; a thread in the guest leaves it.
            let thread = if state.thread == Thread::InGuest {
                first(order)
            } else {
                state.thread
            };
            next.push(State {
                signal_pending: false,
                mark: true,
                thread,
                ..state
            });
        }
        match state.thread {
            Thread::Clear => next.push(State {
                mark: false,
                thread: if order.clear_first {
                    Thread::Drain
                } else {
                    Thread::Enter
                },
                ..state
            }),
            Thread::Drain if state.queued => next.push(State {
                thread: Thread::Obeyed,
                ..state
            }),
            Thread::Drain => next.push(State {
                thread: if order.clear_first {
                    Thread::Enter
                } else {
                    Thread::Clear
                },
                ..state
            }),
            // KVM looks at the mark and at pending signals after it has disabled interrupts: atomically with entering.
            Thread::Enter => next.push(State {
                thread: if state.mark || state.signal_pending {
                    first(order)
                } else {
                    Thread::InGuest
                },
                ..state
            }),
            Thread::InGuest | Thread::Obeyed => {}
        }
        next
    }

    fn first(order: Order) -> Thread {
        if order.clear_first {
            Thread::Clear
        } else {
            Thread::Drain
        }
    }

    /// Whether there is a way to be in the guest for ever with a command in the queue.
    fn can_miss_a_command(order: Order) -> bool {
        let mut seen = HashSet::new();
        let mut open = vec![State {
            thread: first(order),
            mark: false,
            queued: false,
            kicker: 2,
            signal_pending: false,
        }];
        while let Some(state) = open.pop() {
            if !seen.insert(state) {
                continue;
            }
            let stuck = state.thread == Thread::InGuest && state.queued && state.kicker == 0 && !state.signal_pending;
            if stuck {
                return true;
            }
            open.extend(successors(state, order));
        }
        false
    }

    #[test]
    fn command_is_seen_in_every_interleaving() {
        assert!(!can_miss_a_command(Order {
            enqueue_first: true,
            clear_first: true
        }));
    }

    #[test]
    fn either_order_turned_around_misses_a_command() {
        assert!(can_miss_a_command(Order {
            enqueue_first: false,
            clear_first: true
        }));
        assert!(can_miss_a_command(Order {
            enqueue_first: true,
            clear_first: false
        }));
    }
}
