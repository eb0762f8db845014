//! What a machine opens of its host by path, so that a process can open all of it before it gives up its view of the host.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::OnceLock;

use rustix::fs::{Mode, OFlags, open};
use rustix::io::{Errno, fcntl_dupfd_cloexec};

use crate::arch::x86_64::layout::VIRTIO_SLOTS;
use crate::memory::{keep_rings, open_watcher};

const KVM_PATH: &str = "/dev/kvm";

/// Of this process for good: one that has given up its view cannot open them anew, and one that has not need not keep them.
static KEPT: OnceLock<HostFiles> = OnceLock::new();

/// An error is kept as well: whoever asks later hears why, and not that the view is empty.
#[derive(Debug)]
struct HostFiles {
    kvm: Result<OwnedFd, KvmDenied>,
    pagemap: Result<OwnedFd, Errno>,
    watcher: Result<OwnedFd, Errno>,
    boot_id: String,
    memory: Option<u64>,
    is_pvm: bool,
}

/// Opens what machines of this process will need of the host, and keeps it; a ring for each disk that a machine can have, too. To be called before the process gives up its view of
/// `/dev`, `/proc` and `/sys`; without it each is opened when it is needed.
pub fn keep_host_files() {
    keep_rings(VIRTIO_SLOTS);
    KEPT.get_or_init(|| HostFiles {
        kvm: open_kvm(),
        pagemap: open_pagemap(),
        watcher: open_watcher(),
        boot_id: read_boot_id(),
        memory: read_memory().ok(),
        is_pvm: look_for_pvm(),
    });
}

/// Why /dev/kvm could not be opened, and what there was to be known of that.
#[derive(Debug, Clone)]
pub(crate) struct KvmDenied {
    pub(crate) error: Errno,
    /// The group that the device belongs to.
    pub(crate) group: String,
    /// Who asked.
    pub(crate) user: String,
}

/// An open /dev/kvm.
pub(crate) fn kvm() -> Result<OwnedFd, KvmDenied> {
    let Some(kept) = KEPT.get() else { return open_kvm() };
    let kvm = kept.kvm.as_ref().map_err(Clone::clone)?;
    fcntl_dupfd_cloexec(kvm, 0).map_err(|error| KvmDenied {
        error,
        group: String::new(),
        user: String::new(),
    })
}

/// What this process has mapped (`admin-guide/mm/pagemap.rst`).
pub(crate) fn pagemap() -> io::Result<File> {
    let Some(kept) = KEPT.get() else {
        return Ok(open_pagemap()?.into());
    };
    let pagemap = kept.pagemap.as_ref().map_err(|&error| error)?;
    Ok(fcntl_dupfd_cloexec(pagemap, 0)?.into())
}

/// What tells of absent pages of guest memory that are touched (`admin-guide/mm/userfaultfd.rst`). All copies of one are the same.
pub(crate) fn watcher() -> Result<OwnedFd, Errno> {
    let Some(kept) = KEPT.get() else { return open_watcher() };
    let watcher = kept.watcher.as_ref().map_err(|&error| error)?;
    fcntl_dupfd_cloexec(watcher, 0)
}

/// Names this boot of this host; counters of two boots do not compare. Empty where the kernel does not tell.
pub(crate) fn boot_id() -> String {
    KEPT.get().map_or_else(read_boot_id, |kept| kept.boot_id.clone())
}

/// Memory of the host in bytes.
pub(crate) fn memory() -> io::Result<u64> {
    KEPT.get().and_then(|kept| kept.memory).map_or_else(read_memory, Ok)
}

/// Whether the guest sees the processor's own features, whatever KVM was told.
pub(crate) fn is_pvm() -> bool {
    KEPT.get().map_or_else(look_for_pvm, |kept| kept.is_pvm)
}

fn open_kvm() -> Result<OwnedFd, KvmDenied> {
    open(KVM_PATH, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(kvm_denied)
}

fn kvm_denied(error: Errno) -> KvmDenied {
    KvmDenied {
        error,
        group: fs::metadata(KVM_PATH).map_or_else(|_| "kvm".to_owned(), |metadata| name_of_group(metadata.gid())),
        user: std::env::var("USER").unwrap_or_else(|_| rustix::process::getuid().as_raw().to_string()),
    }
}

fn name_of_group(gid: u32) -> String {
    let groups = fs::read_to_string("/etc/group").unwrap_or_default();
    groups
        .lines()
        .find_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?;
            (fields.nth(1)?.parse() == Ok(gid)).then(|| name.to_owned())
        })
        .unwrap_or_else(|| gid.to_string())
}

fn open_pagemap() -> Result<OwnedFd, Errno> {
    open("/proc/self/pagemap", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
}

fn read_boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").map_or_else(|_| String::new(), |text| text.trim().to_owned())
}

fn read_memory() -> io::Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    text.lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|rest| rest.trim().strip_suffix("kB"))
        .and_then(|number| number.trim().parse::<u64>().ok())
        .map(|kib| kib << 10)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no MemTotal in /proc/meminfo"))
}

fn look_for_pvm() -> bool {
    Path::new("/sys/module/kvm_pvm").exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_says_what_is_read() {
        let (id, bytes, pvm) = (boot_id(), memory().expect("meminfo"), is_pvm());
        keep_host_files();
        assert_eq!((boot_id(), memory().expect("meminfo"), is_pvm()), (id, bytes, pvm));
        assert!(pagemap().is_ok());
    }
}
