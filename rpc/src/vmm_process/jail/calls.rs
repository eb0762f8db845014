//! The lists of system calls, by who makes them.
//!
//! They were found by tracing runs, pauses, reboots, moves and ends of guests, and close relatives were added that other versions of
//! the C library take instead. A list names what is used; nothing is there for the case that it might be.

use nix::libc::{self, c_long};

/// Calls, each with the conditions on its arguments of which one must hold; none of them allows every argument.
pub(super) type Calls = Vec<(c_long, Vec<Condition>)>;

/// Tests that must all hold.
#[derive(Debug)]
pub(super) struct Condition(pub(super) Vec<Test>);

/// A test on the low 32 bits of one argument.
#[derive(Debug)]
pub(super) struct Test {
    pub(super) argument: u8,
    /// The bits that are looked at; all of them without a mask.
    pub(super) mask: Option<u64>,
    pub(super) value: u64,
}

/// What the thread that owns the machine may call, and the process as a whole: all that the others may, to build a machine, to accept
/// an agent, and to give threads their own filters.
pub(super) fn process() -> Calls {
    let mut calls = every_thread();
    calls.extend(
        [vcpu(), device(), migration(), snapshot(), control()]
            .into_iter()
            .flatten(),
    );
    calls.extend(always(&[libc::SYS_eventfd2, libc::SYS_epoll_create1]));
    calls.push((libc::SYS_ioctl, kvm(&BUILDING)));
    // More filters can only take away.
    calls.push((libc::SYS_prctl, equal(0, &[libc::PR_SET_NO_NEW_PRIVS as u64])));
    calls.push((libc::SYS_seccomp, equal(0, &[libc::SECCOMP_SET_MODE_FILTER.into()])));
    calls
}

/// What the C library and Rust's need on any thread, and what needs an open descriptor only.
pub(super) fn every_thread() -> Calls {
    let mut calls = always(&[
        libc::SYS_read,
        libc::SYS_write,
        libc::SYS_close,
        libc::SYS_brk,
        libc::SYS_munmap,
        libc::SYS_mremap,
        libc::SYS_madvise,
        libc::SYS_futex,
        libc::SYS_rseq,
        libc::SYS_set_robust_list,
        libc::SYS_sigaltstack,
        libc::SYS_rt_sigaction,
        libc::SYS_rt_sigprocmask,
        libc::SYS_rt_sigreturn,
        // In the place of a call that a stop interrupted.
        libc::SYS_restart_syscall,
        libc::SYS_gettid,
        libc::SYS_getpid,
        libc::SYS_sched_getaffinity,
        libc::SYS_sched_yield,
        libc::SYS_getcpu,
        libc::SYS_getrandom,
        // Where the kernel's page of functions does not tell the time.
        libc::SYS_clock_gettime,
        libc::SYS_clock_getres,
        libc::SYS_gettimeofday,
        libc::SYS_time,
        libc::SYS_clock_nanosleep,
        libc::SYS_nanosleep,
        libc::SYS_exit,
        libc::SYS_exit_group,
    ]);
    let no_program = || {
        vec![Condition(vec![Test {
            argument: 2,
            mask: Some(libc::PROT_EXEC as u64),
            value: 0,
        }])]
    };
    let own_process = equal(0, &[std::process::id().into()]);
    let names = [libc::PR_SET_NAME as u64, PR_SET_VMA, PR_GET_AUXV];
    calls.extend([
        (libc::SYS_mmap, no_program()),
        (libc::SYS_mprotect, no_program()),
        (libc::SYS_tgkill, own_process),
        (libc::SYS_prctl, equal(0, &names)),
        // Rust's library looks whether a descriptor that it closes was open, in builds for tests.
        (libc::SYS_fcntl, equal(1, &[libc::F_GETFD as u64])),
    ]);
    calls
}

/// A vCPU's thread: KVM first, because that is what it does all the time.
pub(super) fn vcpu() -> Calls {
    let mut requests = kvm(&RUNNING);
    requests.extend(equal(1, &[TUN_SET_OFFLOAD]));
    // The guest's console is written here, and what is too old of it is let go. Nothing else can be done with that call.
    let let_go = (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE) as u64;
    vec![(libc::SYS_ioctl, requests), (libc::SYS_fallocate, equal(1, &[let_go]))]
}

/// A device's thread: doorbells, and whatever its backend is.
pub(super) fn device() -> Calls {
    let mut calls = always(&[
        libc::SYS_epoll_wait,
        libc::SYS_epoll_pwait,
        libc::SYS_epoll_pwait2,
        libc::SYS_epoll_ctl,
        libc::SYS_readv,
        libc::SYS_writev,
        libc::SYS_pread64,
        libc::SYS_pwrite64,
        libc::SYS_preadv,
        libc::SYS_pwritev,
        libc::SYS_preadv2,
        libc::SYS_pwritev2,
        libc::SYS_fdatasync,
        libc::SYS_fsync,
        libc::SYS_fallocate,
        libc::SYS_poll,
        libc::SYS_ppoll,
    ]);
    // On rings that were made and restricted before the jail (`ferry_vmm::keep_host_files`): nobody in here makes one, or registers
    // anything with one. To hand requests over, and nothing else.
    let hand_over = Condition(vec![Test {
        argument: 3,
        mask: Some(u64::from(!IORING_ENTER_GETEVENTS)),
        value: 0,
    }]);
    calls.push((libc::SYS_io_uring_enter, vec![hand_over]));
    calls.push((libc::SYS_ioctl, equal(1, &[TUN_SET_OFFLOAD])));
    calls
}

/// The thread of a migration and those that it starts: it has the machine meanwhile, may have to boot it anew, and copies.
pub(super) fn migration() -> Calls {
    let mut calls = machine();
    calls.extend(always(&[
        libc::SYS_recvfrom,
        libc::SYS_sendto,
        libc::SYS_recvmsg,
        libc::SYS_sendmsg,
        libc::SYS_getsockopt,
        libc::SYS_setsockopt,
        libc::SYS_getsockname,
        libc::SYS_getpeername,
        libc::SYS_shutdown,
        libc::SYS_poll,
        libc::SYS_ppoll,
    ]));
    // On what was opened before the jail (`ferry_vmm::keep_host_files`): nobody in here opens another.
    calls.push((libc::SYS_ioctl, equal(1, &UFFDIO)));
    calls
}

/// The thread that writes a snapshot or restores one, and those that it starts: it has the machine meanwhile, and files, but no connection.
pub(super) fn snapshot() -> Calls {
    let mut calls = machine();
    calls.extend(always(&[
        libc::SYS_preadv,
        libc::SYS_pwritev,
        libc::SYS_preadv2,
        libc::SYS_pwritev2,
    ]));
    calls
}

/// A thread that has the machine.
fn machine() -> Calls {
    let mut calls = always(LOOKING);
    calls.extend(always(&[
        libc::SYS_readv,
        libc::SYS_writev,
        libc::SYS_pread64,
        libc::SYS_pwrite64,
        libc::SYS_lseek,
        libc::SYS_fstat,
        libc::SYS_newfstatat,
        libc::SYS_statx,
        libc::SYS_fsync,
        libc::SYS_fdatasync,
        libc::SYS_fallocate,
        libc::SYS_fadvise64,
        libc::SYS_ftruncate,
    ]));
    let mut requests = kvm(&MOVING);
    requests.extend(kvm(&RUNNING));
    requests.extend(equal(1, &[FIONBIO, FIOCLEX, PAGEMAP_SCAN, TUN_SET_OFFLOAD]));
    let locks = [
        libc::F_DUPFD_CLOEXEC,
        libc::F_GETFL,
        libc::F_SETFL,
        libc::F_SETFD,
        libc::F_OFD_SETLK,
        libc::F_OFD_GETLK,
    ];
    // Its own weight and turns only.
    let own_weight = Condition(vec![
        Test {
            argument: 0,
            mask: None,
            value: libc::PRIO_PROCESS.into(),
        },
        Test {
            argument: 1,
            mask: None,
            value: 0,
        },
    ]);
    calls.extend([
        (libc::SYS_ioctl, requests),
        (libc::SYS_fcntl, equal(1, &locks.map(|command| command as u64))),
        (libc::SYS_setpriority, vec![own_weight]),
        (libc::SYS_sched_getattr, equal(0, &[0])),
        (libc::SYS_sched_setattr, equal(0, &[0])),
    ]);
    calls.extend(starting_threads());
    calls
}

/// The threads that accept an agent and read its orders, those that pass reports on, and those that announce a guest.
pub(super) fn control() -> Calls {
    let mut calls = always(&[
        libc::SYS_accept,
        libc::SYS_accept4,
        libc::SYS_recvmsg,
        libc::SYS_recvfrom,
        libc::SYS_sendmsg,
        libc::SYS_sendto,
        libc::SYS_setsockopt,
        libc::SYS_getsockopt,
        libc::SYS_shutdown,
        libc::SYS_poll,
        libc::SYS_ppoll,
    ]);
    let copies = [libc::F_DUPFD_CLOEXEC, libc::F_SETFD].map(|command| command as u64);
    calls.extend([
        (libc::SYS_fcntl, equal(1, &copies)),
        (libc::SYS_ioctl, equal(1, &[FIOCLEX])),
    ]);
    calls.extend(starting_threads());
    calls
}

/// Calls that look for a file.
pub(super) const LOOKING: &[c_long] = &[
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_getcwd,
];

fn always(calls: &[c_long]) -> Calls {
    calls.iter().map(|&call| (call, Vec::new())).collect()
}

/// One of these values.
fn equal(argument: u8, values: &[u64]) -> Vec<Condition> {
    let test = |&value: &u64| {
        Condition(vec![Test {
            argument,
            mask: None,
            value: value & u64::from(u32::MAX),
        }])
    };
    values.iter().map(test).collect()
}

/// A thread of this process in its namespaces, nothing else that `clone` can make. Of `clone3` the process's filter says that the kernel does
/// not know it; it must be asked.
fn starting_threads() -> Calls {
    let new = libc::CLONE_NEWNS
        | libc::CLONE_NEWCGROUP
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUSER
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWNET;
    let thread = Condition(vec![Test {
        argument: 0,
        mask: Some((libc::CLONE_THREAD | new) as u64),
        value: libc::CLONE_THREAD as u64,
    }]);
    vec![(libc::SYS_clone, vec![thread]), (libc::SYS_clone3, Vec::new())]
}

/// Requests to KVM, by their numbers in `linux/kvm.h`. Size and direction are not looked at: of those that share a number, one is for
/// a vCPU and one for the machine.
fn kvm(numbers: &[u64]) -> Vec<Condition> {
    const KVM: u64 = 0xae << 8;
    let test = |&number: &u64| {
        Condition(vec![Test {
            argument: 1,
            mask: Some(0xffff),
            value: KVM | number,
        }])
    };
    numbers.iter().map(test).collect()
}

/// Of a vCPU's thread.
const RUNNING: [u64; 29] = [
    0x80, // KVM_RUN
    0x61, // KVM_IRQ_LINE
    0xc7, // KVM_RESET_DIRTY_RINGS
    0x81, // KVM_GET_REGS
    0x82, // KVM_SET_REGS
    0x83, // KVM_GET_SREGS
    0x84, // KVM_SET_SREGS
    0xcc, // KVM_GET_SREGS2
    0xcd, // KVM_SET_SREGS2
    0x88, // KVM_GET_MSRS
    0x89, // KVM_SET_MSRS
    0x8e, // KVM_GET_LAPIC
    0x8f, // KVM_SET_LAPIC
    0x90, // KVM_SET_CPUID2
    0x98, // KVM_GET_MP_STATE
    0x99, // KVM_SET_MP_STATE
    0x9f, // KVM_GET_VCPU_EVENTS
    0xa0, // KVM_SET_VCPU_EVENTS
    0xa1, // KVM_GET_DEBUGREGS
    0xa2, // KVM_SET_DEBUGREGS
    0xa3, // KVM_GET_TSC_KHZ
    0xa4, // KVM_GET_XSAVE
    0xa5, // KVM_SET_XSAVE
    0xcf, // KVM_GET_XSAVE2
    0xa6, // KVM_GET_XCRS
    0xa7, // KVM_SET_XCRS
    0xad, // KVM_KVMCLOCK_CTRL
    0xe1, // KVM_SET_DEVICE_ATTR
    0xe2, // KVM_GET_DEVICE_ATTR
];

/// Of whoever has the machine: its memory, clock and interrupt controllers.
const MOVING: [u64; 10] = [
    0xa3, // KVM_ENABLE_CAP: how the dirty log begins
    0x42, // KVM_GET_DIRTY_LOG
    0xc0, // KVM_CLEAR_DIRTY_LOG
    0x46, // KVM_SET_USER_MEMORY_REGION
    0x62, // KVM_GET_IRQCHIP
    0x63, // KVM_SET_IRQCHIP
    0x7b, // KVM_SET_CLOCK
    0x7c, // KVM_GET_CLOCK
    0x9f, // KVM_GET_PIT2
    0xa0, // KVM_SET_PIT2
];

/// Of whoever builds it.
const BUILDING: [u64; 14] = [
    0x00, // KVM_GET_API_VERSION
    0x01, // KVM_CREATE_VM
    0x02, // KVM_GET_MSR_INDEX_LIST
    0x03, // KVM_CHECK_EXTENSION
    0x04, // KVM_GET_VCPU_MMAP_SIZE
    0x05, // KVM_GET_SUPPORTED_CPUID
    0x41, // KVM_CREATE_VCPU
    0x47, // KVM_SET_TSS_ADDR
    0x48, // KVM_SET_IDENTITY_MAP_ADDR
    0x60, // KVM_CREATE_IRQCHIP
    0x77, // KVM_CREATE_PIT2
    0x76, // KVM_IRQFD
    0x79, // KVM_IOEVENTFD
    0xa3, // KVM_ENABLE_CAP
];

const FIONBIO: u64 = 0x5421;
const FIOCLEX: u64 = 0x5451;
const TUN_SET_OFFLOAD: u64 = 0x4004_54d0;
const PAGEMAP_SCAN: u64 = 0xc060_6610;
/// Of memory whose absent pages are watched: to begin and to end that, to wake who waits, to supply a page, or zeroes.
const UFFDIO: [u64; 5] = [0xc020_aa00, 0x8010_aa01, 0x8010_aa02, 0xc028_aa03, 0xc020_aa04];
/// Of the flags of `io_uring_enter`: to wait, and to have the kernel catch up.
const IORING_ENTER_GETEVENTS: u32 = 1;

/// Names memory for those who look into `/proc`: some C libraries do.
const PR_SET_VMA: u64 = 0x5356_4d41;
/// What the kernel told the process when it began; asked once.
const PR_GET_AUXV: u64 = 0x4155_5856;
