//! Limits of the process: what a broken one could otherwise use up, and the one that a healthy one needs raised.

use std::io;

use rustix::process::{Resource, Rlimit, setrlimit};

/// Descriptors of a machine with the most vCPUs, devices and streams, several times over.
const DESCRIPTORS: u64 = 1024;

/// Threads of a machine with the most vCPUs, devices and streams, and one more for each processor of a large host.
const THREADS: u64 = 4096;

/// The limit that allows nice 0: 20 minus the least nice value, see `getrlimit(2)`.
const USUAL_WEIGHT: u64 = 20;

/// Limits what the process can use up. A core dump would put the guest's memory on disk.
pub(super) fn set() -> io::Result<()> {
    lower(Resource::Nofile, DESCRIPTORS)?;
    lower(Resource::Core, 0)
}

/// Lets threads that copy at a lower weight take their usual one again, although the process will have no CAP_SYS_NICE.
pub(super) fn allow_usual_weight() -> io::Result<()> {
    let wanted = Some(USUAL_WEIGHT);
    let now = rustix::process::getrlimit(Resource::Nice);
    // No limit, or a higher one, is more than this process needs.
    let enough = |limit: Option<u64>| limit.is_none_or(|limit| limit >= USUAL_WEIGHT);
    if enough(now.current) {
        return Ok(());
    }
    let maximum = if enough(now.maximum) { now.maximum } else { wanted };
    setrlimit(
        Resource::Nice,
        Rlimit {
            current: wanted,
            maximum,
        },
    )
    .map_err(Into::into)
}

/// Limits the threads of a user that only this process has. Those of a user that others have would be counted together.
pub(super) fn set_threads() -> io::Result<()> {
    lower(Resource::Nproc, THREADS)
}

/// For good: the process will have no right to raise it again.
fn lower(resource: Resource, limit: u64) -> io::Result<()> {
    let now = rustix::process::getrlimit(resource).maximum;
    let limit = Some(now.map_or(limit, |now| now.min(limit)));
    let both = Rlimit {
        current: limit,
        maximum: limit,
    };
    setrlimit(resource, both).map_err(Into::into)
}
