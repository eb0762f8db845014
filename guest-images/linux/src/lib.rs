//! A small Linux guest that is nobody's fake: Debian's kernel source, a minimal configuration, busybox, one shell script,
//! and one program that writes a disk and talks over the network.
//!
//! It boots on ordinary KVM hosts and, with small patches, where ring 0 is emulated (kvm-pvm). What is built lies in a
//! cache outside the tree under names made from everything that goes into it, so that a second run builds nothing.
#![forbid(unsafe_code)]

mod cache;
/// What the guest's record writer writes, to be read and checked by whoever has the disk.
#[path = "../programs/chain.rs"]
pub mod chain;
mod initramfs;
mod kernel;
mod programs;

use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::cache::{Ingredients, cached};

/// What the kernel is told in every guest. On kvm-pvm hosts the words hide what the emulator of ring 0 does not know
/// although the guest sees it in CPUID, and keep user mode from registers that such a kernel does not save (AVX);
/// elsewhere they cost nothing that a test would notice.
pub const CMDLINE: &str = "console=ttyS0 panic=-1 nokaslr tsc=reliable no_timer_check noxsave \
    clearcpuid=smap,smep,umip,fsgsbase,popcnt,cx16,xsave,erms,fsrm,pcid,invpcid \
    GLIBC_TUNABLES=glibc.cpu.hwcaps=-AVX_Fast_Unaligned_Load,-AVX2,-AVX512F,-AVX512VL,-ERMS,-FSRM";

/// The guest's two files.
#[derive(Clone, Debug)]
pub struct Image {
    /// An ELF with a PVH note.
    pub kernel: PathBuf,
    /// An uncompressed cpio archive: inflating one is slow where ring 0 is emulated.
    pub initramfs: PathBuf,
}

/// What must be installed to build the image, as Debian names it.
pub const PACKAGES: [&str; 10] = [
    "linux-source-6.1",
    "busybox-static",
    "bc",
    "bison",
    "flex",
    "libelf-dev",
    "libssl-dev",
    "make",
    "patch",
    "xz-utils",
];

/// The image, built if it is not in the cache: minutes then, with what the build prints going to a log beside it.
///
/// # Errors
/// Something that the build needs is not installed, or a step of it failed; names which, and where its log is.
pub fn image() -> Result<Image> {
    // First: it takes a second, and misses what is not installed just as well.
    let initramfs = initramfs()?;
    Ok(Image {
        kernel: kernel()?,
        initramfs,
    })
}

fn kernel() -> Result<PathBuf> {
    let mut ingredients = Ingredients::default();
    ingredients.text(kernel::CONFIG);
    for (_, patch) in kernel::PATCHES {
        ingredients.text(patch);
    }
    ingredients.file(kernel::SOURCE)?;
    let folder = cached("kernel", ingredients, kernel::build)?;
    Ok(folder.join("vmlinux"))
}

fn initramfs() -> Result<PathBuf> {
    const NAME: &str = "initramfs.cpio";
    let mut ingredients = Ingredients::default();
    ingredients.text(initramfs::INIT);
    for (_, source) in programs::SOURCES {
        ingredients.text(source);
    }
    ingredients.bytes(&programs::compiler_version()?);
    ingredients.file(initramfs::BUSYBOX)?;
    let folder = cached("initramfs", ingredients, |folder, _| {
        let workshop = tempfile::tempdir_in(folder).context("failed to make a folder for the guest's program")?;
        let program = programs::build(workshop.path())?;
        initramfs::write(&folder.join(NAME), &program)
    })?;
    Ok(folder.join(NAME))
}

#[cfg(test)]
mod tests {
    use super::chain::{Broken, End, RECORD_BYTES, verify};

    fn records(count: usize) -> Vec<[u8; RECORD_BYTES]> {
        let mut end = End::default();
        (0..count).map(|_| end.append()).collect()
    }

    fn read(records: &[[u8; RECORD_BYTES]]) -> Result<End, Broken> {
        verify(records.as_flattened()).expect("memory can be read")
    }

    #[test]
    fn whole_chain_is_followed_to_its_end() {
        let end = read(&records(5)).expect("whole");
        assert_eq!(end.records, 5);
    }

    #[test]
    fn record_cut_short_at_the_end_does_not_count() {
        let all = records(3);
        let bytes = &all.as_flattened()[..RECORD_BYTES * 2 + 100];
        assert_eq!(verify(bytes).expect("read").expect("whole").records, 2);
    }

    #[test]
    fn one_changed_bit_breaks_the_chain_there() {
        let mut all = records(5);
        all[3][2000] ^= 1;
        let broken = read(&all).expect_err("damaged");
        assert_eq!(broken.to_string(), "3: damaged");
    }

    #[test]
    fn lost_record_breaks_the_chain() {
        let mut all = records(5);
        all.remove(2);
        assert_eq!(read(&all).expect_err("a gap").record, 2);
    }

    #[test]
    fn record_of_another_chain_breaks_it() {
        let mut other = End { records: 0, sum: 7 };
        let mut all = records(3);
        all[0] = other.append();
        assert_eq!(read(&all).expect_err("another's").why, "follows another record");
    }
}
