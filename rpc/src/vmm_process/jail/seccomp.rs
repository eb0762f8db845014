//! Which system calls a thread may make: the filters, and their installation.
//!
//! The process's filter comes first and is every thread's; a thread's own comes on top, and of two answers the kernel takes the
//! stricter. A call that no filter allows kills the process, so that nothing is tried twice. Two kinds of calls fail instead, because
//! the C library makes them of its own accord and does without: see [`REFUSED_TO_ALL`] and [`REFUSED_TO_NARROW`].

use std::collections::BTreeMap;
use std::io;
use std::sync::LazyLock;

use nix::libc;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, apply_filter,
};

use super::calls::{self, Calls, Condition};

/// What a thread does, and so which filter it gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::vmm_process) enum Kind {
    /// The process as a whole, and the thread that owns the machine.
    Process,
    /// Runs a vCPU.
    Vcpu,
    /// Works a device's queues.
    Device,
    /// Moves the guest, with the threads that it starts.
    Migration,
    /// Writes a snapshot or restores one, with the threads that it starts.
    Snapshot,
    /// Listens to agents, and to nobody else.
    Control,
}

/// Takes from the calling thread, and from those that it will start, the calls that its kind does not need.
///
/// # Errors
/// The kernel has no filters, or does not take this one: the thread may make the calls that it could make before.
pub(super) fn install(kind: Kind) -> io::Result<()> {
    let programs = match kind {
        Kind::Process => &PROCESS,
        Kind::Vcpu => &VCPU,
        Kind::Device => &DEVICE,
        Kind::Migration => &MIGRATION,
        Kind::Snapshot => &SNAPSHOT,
        Kind::Control => &CONTROL,
    };
    let programs = programs.as_ref().map_err(|error| io::Error::other(error.clone()))?;
    programs
        .iter()
        .try_for_each(|program| apply_filter(program).map_err(io::Error::other))
}

type Programs = LazyLock<Result<Vec<BpfProgram>, String>>;

static PROCESS: Programs = LazyLock::new(|| compile(Kind::Process, SeccompAction::KillProcess));
static VCPU: Programs = LazyLock::new(|| compile(Kind::Vcpu, SeccompAction::KillProcess));
static DEVICE: Programs = LazyLock::new(|| compile(Kind::Device, SeccompAction::KillProcess));
static MIGRATION: Programs = LazyLock::new(|| compile(Kind::Migration, SeccompAction::KillProcess));
static SNAPSHOT: Programs = LazyLock::new(|| compile(Kind::Snapshot, SeccompAction::KillProcess));
static CONTROL: Programs = LazyLock::new(|| compile(Kind::Control, SeccompAction::KillProcess));

/// A filter sees numbers only: what `clone3` is asked for lies behind a pointer. Told that the kernel does not know it, the C library
/// takes `clone`, whose flags a filter can read.
const REFUSED_TO_ALL: (&[libc::c_long], i32) = (&[libc::SYS_clone3], libc::ENOSYS);

/// The C library's allocator looks for the number of processors in `/sys` when a thread first needs memory, and asks the scheduler
/// where it may not; Rust's looks for debug information when it tells of a panic, and goes without.
const REFUSED_TO_NARROW: (&[libc::c_long], i32) = (calls::LOOKING, libc::EACCES);

/// The programs of a kind: what it may call, and what of it fails.
fn compile(kind: Kind, otherwise: SeccompAction) -> Result<Vec<BpfProgram>, String> {
    let allowed = match kind {
        Kind::Process => vec![calls::process()],
        Kind::Vcpu => vec![calls::every_thread(), calls::vcpu()],
        Kind::Device => vec![calls::every_thread(), calls::device()],
        Kind::Migration => vec![calls::every_thread(), calls::migration()],
        Kind::Snapshot => vec![calls::every_thread(), calls::snapshot()],
        Kind::Control => vec![calls::every_thread(), calls::control()],
    };
    let (refused, error) = match kind {
        Kind::Process => REFUSED_TO_ALL,
        Kind::Migration | Kind::Snapshot => (&[][..], 0),
        Kind::Vcpu | Kind::Device | Kind::Control => REFUSED_TO_NARROW,
    };
    let mut programs = Vec::new();
    let mut allowed = merge(allowed)?;
    if !refused.is_empty() {
        let refused: Calls = refused.iter().map(|&call| (call, Vec::new())).collect();
        let refusals = merge(vec![refused])?;
        allowed.extend(refusals.clone());
        programs.push(program(
            refusals,
            SeccompAction::Allow,
            SeccompAction::Errno(error.unsigned_abs()),
        )?);
    }
    programs.push(program(allowed, otherwise, SeccompAction::Allow)?);
    Ok(programs)
}

fn program(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    matched: SeccompAction,
) -> Result<BpfProgram, String> {
    let filter = SeccompFilter::new(rules, otherwise, matched, TargetArch::x86_64);
    filter
        .and_then(BpfProgram::try_from)
        .map_err(|error| format!("a filter cannot be compiled: {error}"))
}

/// A call of several lists is allowed where one of them allows it.
fn merge(lists: Vec<Calls>) -> Result<BTreeMap<i64, Vec<SeccompRule>>, String> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for (call, conditions) in lists.into_iter().flatten() {
        let wanted = conditions.into_iter().map(rule).collect::<Result<Vec<_>, _>>()?;
        match rules.get_mut(&call) {
            None => {
                rules.insert(call, wanted);
            }
            // No condition allows the call altogether.
            Some(known) if known.is_empty() || wanted.is_empty() => known.clear(),
            Some(known) => {
                let new: Vec<_> = wanted.into_iter().filter(|rule| !known.contains(rule)).collect();
                known.extend(new);
            }
        }
    }
    Ok(rules)
}

fn rule(condition: Condition) -> Result<SeccompRule, String> {
    let conditions = condition.0.into_iter().map(|test| {
        let comparison = match test.mask {
            None => SeccompCmpOp::Eq,
            Some(mask) => SeccompCmpOp::MaskedEq(mask),
        };
        // Flags, commands and numbers of processes: the kernel looks at 32 bits of each.
        SeccompCondition::new(test.argument, SeccompCmpArgLen::Dword, comparison, test.value)
    });
    conditions
        .collect::<Result<Vec<_>, _>>()
        .and_then(SeccompRule::new)
        .map_err(|error| format!("a filter cannot be made: {error}"))
}

#[cfg(test)]
mod tests {
    use std::backtrace::Backtrace;
    use std::fs::File;
    use std::io::{ErrorKind, Write};
    use std::net::UdpSocket;
    use std::thread;

    use super::*;

    /// On a thread that has the filter of this kind, where a forbidden call fails with "function not implemented".
    fn confined<T: Send + 'static>(kind: Kind, work: impl FnOnce() -> T + Send + 'static) -> T {
        let programs = compile(kind, SeccompAction::Errno(libc::ENOSYS.unsigned_abs())).unwrap();
        let run = move || {
            for program in &programs {
                apply_filter(program).unwrap();
            }
            work()
        };
        thread::spawn(run).join().unwrap()
    }

    const EVERY_KIND: [Kind; 6] = [
        Kind::Process,
        Kind::Vcpu,
        Kind::Device,
        Kind::Migration,
        Kind::Snapshot,
        Kind::Control,
    ];

    #[test]
    fn every_kind_has_its_programs() {
        for programs in [&PROCESS, &VCPU, &DEVICE, &MIGRATION, &SNAPSHOT, &CONTROL] {
            assert!(programs.is_ok(), "{programs:?}");
        }
    }

    #[test]
    fn no_kind_opens_a_network_connection_or_starts_a_program() {
        for kind in EVERY_KIND {
            let tried = move || {
                let bound = UdpSocket::bind("127.0.0.1:0").map(drop);
                (bound, std::process::Command::new("/bin/true").status().map(drop))
            };
            let (bound, started) = confined(kind, tried);
            assert_eq!(bound.unwrap_err().kind(), ErrorKind::Unsupported, "{kind:?}");
            assert!(started.is_err(), "{kind:?}");
        }
    }

    #[test]
    fn only_who_needs_it_opens_files() {
        let open = || File::open("/dev/null").map(drop).map_err(|error| error.kind());
        assert_eq!(confined(Kind::Process, open), Ok(()));
        assert_eq!(confined(Kind::Migration, open), Ok(()));
        assert_eq!(confined(Kind::Snapshot, open), Ok(()));
        for kind in [Kind::Vcpu, Kind::Device, Kind::Control] {
            assert_eq!(confined(kind, open), Err(ErrorKind::PermissionDenied), "{kind:?}");
        }
    }

    /// What a ring is asked for, no filter sees: there are those that were made and restricted before the jail, and no others.
    #[test]
    fn nobody_makes_a_ring() {
        for kind in EVERY_KIND {
            let made = confined(kind, ferry_vmm::probe_rings).map_err(|error| error.raw_os_error());
            assert_eq!(made, Err(Some(libc::ENOSYS)), "{kind:?}");
        }
    }

    #[test]
    fn only_devices_and_who_starts_them_use_a_ring() {
        let use_one = |calls: Calls| calls.iter().any(|(call, _)| *call == libc::SYS_io_uring_enter);
        assert!(use_one(calls::device()) && use_one(calls::process()));
        for calls in [
            calls::every_thread(),
            calls::vcpu(),
            calls::migration(),
            calls::snapshot(),
            calls::control(),
        ] {
            assert!(!use_one(calls));
        }
    }

    #[test]
    fn threads_are_started_by_those_who_have_some() {
        let start = || {
            thread::Builder::new()
                .spawn(|| 7)
                .map(|thread| thread.join().unwrap())
                .ok()
        };
        for kind in [Kind::Process, Kind::Migration, Kind::Snapshot, Kind::Control] {
            assert_eq!(confined(kind, start), Some(7), "{kind:?}");
        }
        for kind in [Kind::Vcpu, Kind::Device] {
            assert_eq!(confined(kind, start), None, "{kind:?}");
        }
    }

    #[test]
    fn a_descriptor_that_is_open_is_written_by_any() {
        for kind in EVERY_KIND {
            let mut file = tempfile::tempfile().unwrap();
            assert!(confined(kind, move || file.write_all(b"x").is_ok()), "{kind:?}");
        }
    }

    /// Of a panic, the message and the backtrace: the C library and Rust's look for files, and do without.
    #[test]
    fn a_panic_is_told_by_every_kind() {
        for kind in EVERY_KIND {
            let programs = compile(kind, SeccompAction::KillThread).unwrap();
            let run = move || {
                for program in &programs {
                    apply_filter(program).unwrap();
                }
                Backtrace::force_capture().to_string().len()
            };
            // Of a thread that was killed there is nothing to join, which panics here.
            assert!(thread::spawn(run).join().unwrap() > 0, "{kind:?}");
        }
    }

    #[test]
    fn a_call_of_two_lists_is_allowed_where_one_allows_it() {
        let on = |value| {
            Condition(vec![calls::Test {
                argument: 0,
                mask: None,
                value,
            }])
        };
        let both = merge(vec![vec![(1, vec![on(1)])], vec![(1, vec![on(2)])]]).unwrap();
        assert_eq!(both[&1].len(), 2);
        let altogether = merge(vec![vec![(1, vec![on(1)])], vec![(1, Vec::new())]]).unwrap();
        assert!(altogether[&1].is_empty());
    }
}
