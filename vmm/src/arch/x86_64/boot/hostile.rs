//! What fuzzing does with a kernel's file.

use std::fs::File;
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, memfd_create};

use super::super::board::Board;
use super::entry::EntryPoint;
use super::load::{BootPayload, MemoryBefore, load};
use crate::memory::{GuestMemory, MemoryOptions};

const MEMORY: u64 = 8 << 20;

const BOARD: Board = Board {
    vcpus: 2,
    virtio_devices: 1,
};

thread_local! {
    static GUEST: GuestMemory = GuestMemory::new(MemoryOptions {
        bytes: MEMORY,
        hugetlb: false,
        expect_incoming: false,
    })
    .expect("memory");
}

/// Loads a file with an initial RAM disk as a user may name it, into memory that an earlier kernel used. Whatever it says, nothing is written outside.
pub(crate) fn load_hostile_kernel(bytes: &[u8]) {
    let payload = BootPayload {
        kernel: file(bytes),
        initrd: Some(file(b"initrd")),
        cmdline: "a=b".to_owned(),
    };
    let memory = GUEST.with(GuestMemory::clone);
    if let Ok(entry) = load(&memory, BOARD, &payload, MemoryBefore::Used) {
        let (EntryPoint::Pvh { rip, start_info: told }
        | EntryPoint::Linux64 {
            rip, boot_params: told, ..
        }) = entry;
        assert!(rip < MEMORY && told < MEMORY, "{rip:#x}, {told:#x}");
    }
}

/// A file that is gone with its last descriptor.
fn file(bytes: &[u8]) -> File {
    let file = File::from(memfd_create("file", MemfdFlags::CLOEXEC).expect("descriptors"));
    file.write_all_at(bytes, 0).expect("memory");
    file
}

#[cfg(test)]
mod tests {
    use ferry_fuzz_inputs::feed;

    use super::super::{bzimage, elf};

    #[test]
    fn kernels_are_loaded_or_refused() {
        let image = bzimage::tests::file(b"code");
        let mut fixed = image.clone();
        // It cannot be moved.
        fixed[0x234] = 0;
        let samples = [elf::tests::wide(), elf::tests::narrow(), image, fixed];
        feed("kernel", &samples, crate::fuzz::kernel);
        let headers: Vec<_> = samples[2..].iter().map(|file| file[0x1f1..].to_vec()).collect();
        feed("bzimage", &headers, crate::fuzz::bzimage);
    }
}
