//! How long the calling thread may keep a processor that others want.

#![expect(
    unsafe_code,
    reason = "sched_getattr and sched_setattr have neither a function in the C library nor in a safe one"
)]

use std::io;
use std::mem::size_of;
use std::time::Duration;

/// The first version of `struct sched_attr` (`include/uapi/linux/sched/types.h`); later kernels take it for what it is by its size.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

const _: () = assert!(size_of::<SchedAttr>() == SIZE as usize);

/// `SCHED_ATTR_SIZE_VER0`.
const SIZE: u32 = 48;

/// Asks the scheduler to give the calling thread turns of this length instead of its usual ones (0.7 ms and more, by the number of processors), or its usual
/// ones again. From 100 µs to 100 ms. Its share of a processor stays what it was; `sched_yield` gives away what is left of one turn.
///
/// True if turns are as long as asked for; false where the kernel keeps the usual ones. Linux has them of any length since 6.12, for threads of the normal policy
/// (`sched_runtime` in sched_setattr(2)).
///
/// # Errors
/// The system calls'.
pub fn set_turns(length: Option<Duration>) -> io::Result<bool> {
    let mut attributes = own()?;
    attributes.flags = 0;
    attributes.runtime = length.map_or(0, |length| u64::try_from(length.as_nanos()).unwrap_or(u64::MAX));
    let wanted = attributes.runtime;
    // SAFETY: thread 0 is the calling one; the structure lives through the call and says its own size.
    let set = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    if set != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(wanted == 0 || own()?.runtime == wanted)
}

fn own() -> io::Result<SchedAttr> {
    let mut attributes = SchedAttr::default();
    // SAFETY: thread 0 is the calling one; the kernel writes at most `SIZE` bytes, which the structure has.
    let got = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, SIZE, 0) };
    if got != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(attributes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_are_set_where_the_kernel_has_them_and_leave_the_weight_as_it_is() {
        let before = own().unwrap();
        let turn = Duration::from_micros(500);
        let taken = set_turns(Some(turn)).unwrap();
        let during = own().unwrap();
        assert_eq!(taken, during.runtime == 500_000, "{during:?}");
        assert_eq!((during.policy, during.nice), (before.policy, before.nice));
        assert!(set_turns(None).unwrap());
        assert_eq!(own().unwrap().runtime, before.runtime);
    }
}
