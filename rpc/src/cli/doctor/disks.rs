//! What makes guests' disks fast.

use super::{Need, kernel_file};

/// Whether a VMM of this user gets rings of the kernel's, as far as this process can tell.
pub(super) fn rings() -> Need {
    let (need, wanted) = ("io_uring", "requests of one disk go to the kernel together");
    let Err(error) = ferry_vmm::probe_rings() else {
        return Need::fact(need, "available, restricted to reads, writes and flushes", wanted);
    };
    let allowed = kernel_file("/proc/sys/kernel/io_uring_disabled").unwrap_or_else(|| "not there".to_owned());
    let found = format!("{error} (kernel.io_uring_disabled: {allowed})");
    let remedy = "guests' disks work, one request at a time: boot a kernel from 5.10 on with CONFIG_IO_URING, set \
                  sysctl kernel.io_uring_disabled=0 (1 is enough for an agent that is root), and let a container's filter allow io_uring_setup";
    Need::poor(need, found, wanted, remedy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_comes_with_a_remedy() {
        let need = rings();
        assert_eq!(need.ok, need.remedy.is_none());
        assert!(!need.required);
    }
}
