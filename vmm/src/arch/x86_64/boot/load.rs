//! Loading: the kernel, its initial RAM disk, its command line, and what firmware would have left.

use std::fs::File;
use std::io;

use thiserror::Error;
use vm_memory::GuestMemoryError;

use super::super::board::Board;
use super::super::layout::{ACPI_START, HIGH_MEMORY_START};
use super::boot_params::{BootParams, TABLES_BYTES};
use super::cmdline;
use super::entry::EntryPoint;
use super::firmware::write_firmware;
use super::kernel::{Kernel, KernelError, Segment, Start};
use super::place::{clear, copy_file, find_information_space, place};
use super::start_info::{StartInformation, memory_map};
use crate::memory::{GuestMemory, MemoryError, PAGE_SIZE};

/// What a guest is started with.
#[derive(Debug)]
pub struct BootPayload {
    /// An ELF file with a PVH note, a vmlinux or a bzImage.
    pub kernel: File,
    /// An initial RAM disk, handed on as it is.
    pub initrd: Option<File>,
    /// The kernel's command line. With the word `acpi=off` there are no ACPI tables; the virtio devices are then told in words behind it.
    pub cmdline: String,
}

/// Why a guest could not be loaded.
#[derive(Debug, Error)]
pub enum LoadError {
    /// The kernel file is not one that can be started.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// A file could not be read.
    #[error("read the {what}")]
    Unreadable {
        /// Kernel or initrd.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Something does not lie in guest memory.
    #[error(
        "load the {what}: it needs guest memory from {start:#x} to {end:#x}, and the guest has {} MiB",
        memory >> 20
    )]
    DoesNotFit {
        /// What was to be placed.
        what: &'static str,
        /// First guest physical address.
        start: u64,
        /// The address after the last one.
        end: u64,
        /// Size of guest memory in bytes.
        memory: u64,
    },
    /// The kernel would lie where the tables do by which it finds processors and devices.
    #[error("load the kernel: it is to lie from {start:#x} to {end:#x}, and firmware's tables are in between")]
    CoversFirmware {
        /// First guest physical address.
        start: u64,
        /// The address after the last one.
        end: u64,
    },
    /// The kernel would cut off the command line.
    #[error("load the command line: it is {len} bytes long, this kernel takes {limit}")]
    CmdlineTooLong {
        /// Its length, with the words for devices.
        len: usize,
        /// The kernel's limit.
        limit: usize,
    },
    /// The command line would end early.
    #[error("load the command line: it contains a zero byte")]
    CmdlineZero,
    /// The host has no random numbers for the generation id.
    #[error("make a generation id")]
    Random(#[source] io::Error),
    /// Guest memory could not be written.
    #[error("write the guest's memory")]
    Write(#[from] GuestMemoryError),
    /// Guest memory could not be zeroed.
    #[error("clear the guest's memory")]
    Clear(#[from] MemoryError),
}

/// What memory holds before a kernel is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MemoryBefore {
    /// Nothing but zeroes: it was never used.
    Fresh,
    /// Whatever an earlier kernel left.
    Used,
}

/// Where the initial RAM disk lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Initrd {
    pub(super) address: u64,
    pub(super) size: u64,
}

/// Loads kernel, initrd, command line, and the tables by which the guest finds its processors and devices.
///
/// # Errors
///
/// What is wrong with the payload. Guest memory may then hold part of it.
pub(crate) fn load(
    memory: &GuestMemory,
    board: Board,
    payload: &BootPayload,
    before: MemoryBefore,
) -> Result<EntryPoint, LoadError> {
    let kernel = Kernel::parse(&payload.kernel)?;
    let wants_acpi = cmdline::wants_acpi(&payload.cmdline);
    let cmdline = if wants_acpi {
        payload.cmdline.clone()
    } else {
        cmdline::with_devices(&payload.cmdline, board.virtio_devices)
    };
    check_cmdline(&cmdline, kernel.cmdline_limit)?;
    load_kernel(memory, &kernel, &payload.kernel, before)?;
    let rsdp = Some(write_firmware(memory, board, before)?).filter(|_| wants_acpi);

    let tables_bytes = match kernel.start {
        Start::Pvh(_) => PAGE_SIZE,
        Start::Linux64 { .. } => TABLES_BYTES,
    };
    let information_bytes = tables_bytes + cmdline.len() as u64 + 1;
    let information = find_information_space(memory, &kernel, information_bytes)?;
    let floor = kernel.end().max(information + information_bytes);
    let initrd = match &payload.initrd {
        Some(initrd) => Some(load_initrd(memory, initrd, floor, kernel.initrd_end)?),
        None => None,
    };
    let memory_map = memory_map(memory.shape());
    match &kernel.start {
        Start::Pvh(entry) => {
            let told = StartInformation {
                cmdline: &cmdline,
                initrd,
                memory_map: &memory_map,
                rsdp,
            };
            told.write(memory, information)?;
            Ok(EntryPoint::Pvh {
                rip: (*entry).into(),
                start_info: information,
            })
        }
        Start::Linux64 { entry, setup_header } => {
            let told = BootParams {
                setup_header,
                cmdline: &cmdline,
                initrd,
                memory_map: &memory_map,
                rsdp,
            };
            Ok(EntryPoint::Linux64 {
                rip: *entry,
                boot_params: information,
                tables: told.write(memory, information)?,
            })
        }
    }
}

fn check_cmdline(cmdline: &str, limit: usize) -> Result<(), LoadError> {
    if cmdline.contains('\0') {
        return Err(LoadError::CmdlineZero);
    }
    if cmdline.len() > limit {
        return Err(LoadError::CmdlineTooLong {
            len: cmdline.len(),
            limit,
        });
    }
    Ok(())
}

fn load_kernel(memory: &GuestMemory, kernel: &Kernel, file: &File, before: MemoryBefore) -> Result<(), LoadError> {
    for span in kernel.occupied() {
        place("kernel", memory, span.start, span.end - span.start)?;
        if span.start < HIGH_MEMORY_START && span.end > ACPI_START {
            return Err(LoadError::CoversFirmware {
                start: span.start,
                end: span.end,
            });
        }
    }
    let entry = match kernel.start {
        Start::Pvh(entry) => entry.into(),
        Start::Linux64 { entry, .. } => entry,
    };
    place("kernel's entry point", memory, entry, 1)?;
    for segment in &kernel.segments {
        load_segment(memory, file, segment, before)?;
    }
    Ok(())
}

fn load_segment(memory: &GuestMemory, file: &File, segment: &Segment, before: MemoryBefore) -> Result<(), LoadError> {
    copy_file(
        memory,
        file,
        "kernel",
        segment.offset,
        segment.address,
        segment.file_bytes,
    )?;
    if before == MemoryBefore::Used {
        clear(
            memory,
            segment.address + segment.file_bytes,
            segment.address + segment.memory_bytes,
        )?;
    }
    Ok(())
}

/// The initrd goes to the end of low memory, out of the way of a kernel that unpacks itself upwards.
fn load_initrd(memory: &GuestMemory, initrd: &File, floor: u64, limit: u64) -> Result<Initrd, LoadError> {
    let what = "initrd";
    let size = initrd
        .metadata()
        .map_err(|source| LoadError::Unreadable { what, source })?
        .len();
    let end = memory.shape().regions[0].len.min(limit);
    let floor = floor.max(HIGH_MEMORY_START).next_multiple_of(PAGE_SIZE);
    let address = end
        .checked_sub(size)
        .map(|start| start / PAGE_SIZE * PAGE_SIZE)
        .filter(|start| *start >= floor)
        .ok_or(LoadError::DoesNotFit {
            what,
            start: floor,
            end: floor.saturating_add(size),
            memory: memory.shape().bytes(),
        })?;
    copy_file(memory, initrd, what, 0, address, size)?;
    Ok(Initrd { address, size })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use vm_memory::{Bytes, GuestAddress};

    use super::super::bzimage;
    use super::super::start_info::START_MAGIC;
    use super::*;
    use crate::memory::MemoryOptions;

    const BOARD: Board = Board {
        vcpus: 2,
        virtio_devices: 1,
    };

    fn memory() -> GuestMemory {
        GuestMemory::new(MemoryOptions {
            bytes: 8 << 20,
            hugetlb: false,
            expect_incoming: false,
        })
        .expect("memory")
    }

    fn payload(kernel: &[u8]) -> BootPayload {
        let mut file = tempfile::tempfile().expect("file");
        file.write_all(kernel).expect("write");
        BootPayload {
            kernel: file,
            initrd: None,
            cmdline: "a=b".to_owned(),
        }
    }

    /// A 32-bit file with a note, whose one segment has four bytes in the file and two pages in memory.
    fn kernel(address: u32) -> Vec<u8> {
        let mut file = vec![0u8; 0x204];
        file[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', 1, 1]);
        file[16..20].copy_from_slice(&[2, 0, 3, 0]);
        (file[28], file[42], file[44]) = (52, 32, 2);
        let headers = [[4, 0x100, 0, 0, 20, 20, 0, 4], [1, 0x200, 0, address, 4, 8192, 0, 4]];
        for (at, words) in [52, 84].into_iter().zip(headers) {
            for (index, word) in words.into_iter().enumerate() {
                file[at + index * 4..at + index * 4 + 4].copy_from_slice(&u32::to_le_bytes(word));
            }
        }
        for (index, word) in [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), address]
            .into_iter()
            .enumerate()
        {
            file[0x100 + index * 4..0x104 + index * 4].copy_from_slice(&word.to_le_bytes());
        }
        file[0x200..].copy_from_slice(b"code");
        file
    }

    #[test]
    fn guest_finds_kernel_initrd_and_cmdline() {
        let memory = memory();
        let mut payload = payload(&kernel(0x10_0000));
        let mut initrd = tempfile::tempfile().expect("file");
        initrd.write_all(b"archive").expect("write");
        payload.initrd = Some(initrd);
        let entry = load(&memory, BOARD, &payload, MemoryBefore::Fresh).expect("loads");

        let read = |address: u64| memory.tracked().read_obj::<u64>(GuestAddress(address)).expect("read");
        let text = |address: u64| read(address).to_le_bytes();
        let EntryPoint::Pvh { rip, start_info } = entry else {
            panic!("{entry:?}");
        };
        assert_eq!(rip, 0x10_0000);
        assert_eq!(&text(0x10_0000)[..4], b"code");
        assert_eq!(read(start_info) as u32, START_MAGIC);
        assert_eq!(&text(read(start_info + 24))[..4], b"a=b\0");
        assert_eq!(&text(read(read(start_info + 16)))[..7], b"archive");
        assert_eq!(&text(read(start_info + 32)), b"RSD PTR ");
        assert!(memory.device_dirty().contains(0x10_0000 / PAGE_SIZE));
    }

    #[test]
    fn used_memory_is_cleared_where_the_kernel_expects_zeroes() {
        let memory = memory();
        memory
            .tracked()
            .write_slice(&[0xff; 0x4000], GuestAddress(0x10_0000))
            .expect("write");
        load(&memory, BOARD, &payload(&kernel(0x10_0000)), MemoryBefore::Used).expect("loads");
        let mut bytes = [0; 0x4000];
        memory
            .tracked()
            .read_slice(&mut bytes, GuestAddress(0x10_0000))
            .expect("read");
        assert_eq!(&bytes[..4], b"code");
        assert!(bytes[4..8192].iter().all(|byte| *byte == 0));
        assert!(bytes[8192..].iter().all(|byte| *byte == 0xff));
    }

    #[test]
    fn kernel_outside_memory_is_refused() {
        let error = load(&memory(), BOARD, &payload(&kernel(8 << 20)), MemoryBefore::Fresh);
        assert!(matches!(error, Err(LoadError::DoesNotFit { what: "kernel", .. })));
    }

    #[test]
    fn kernel_over_the_tables_is_refused() {
        let error = load(&memory(), BOARD, &payload(&kernel(0xe_f000)), MemoryBefore::Fresh);
        assert!(matches!(error, Err(LoadError::CoversFirmware { start: 0xe_f000, .. })));
    }

    #[test]
    fn kernel_in_low_memory_pushes_the_information_away() {
        let entry = load(&memory(), BOARD, &payload(&kernel(0x6000)), MemoryBefore::Fresh).expect("loads");
        assert!(matches!(entry, EntryPoint::Pvh { start_info, .. } if start_info >= 0x8000));
    }

    #[test]
    fn initrd_that_leaves_no_room_is_refused() {
        let mut payload = payload(&kernel(0x10_0000));
        let initrd = tempfile::tempfile().expect("file");
        initrd.set_len(16 << 20).expect("length");
        payload.initrd = Some(initrd);
        let error = load(&memory(), BOARD, &payload, MemoryBefore::Fresh);
        assert!(matches!(error, Err(LoadError::DoesNotFit { what: "initrd", .. })));
    }

    #[test]
    fn bzimage_starts_at_its_64_bit_entry_with_its_parameters() {
        let memory = memory();
        let entry = load(
            &memory,
            BOARD,
            &payload(&bzimage::tests::file(b"code")),
            MemoryBefore::Fresh,
        )
        .expect("loads");
        let EntryPoint::Linux64 { rip, boot_params, .. } = entry else {
            panic!("{entry:?}");
        };
        let read = |address: u64| memory.tracked().read_obj::<u32>(GuestAddress(address)).expect("read");
        assert_eq!(rip, 0x20_0200);
        assert_eq!(read(0x20_0200).to_le_bytes(), *b"code");
        assert_eq!(read(boot_params + 0x202).to_le_bytes(), *b"HdrS");
        assert_eq!(read(read(boot_params + 0x228).into()).to_le_bytes(), *b"a=b\0");
        assert_eq!(read(read(boot_params + 0x70).into()).to_le_bytes(), *b"RSD ");
    }

    #[test]
    fn without_acpi_devices_are_told_on_the_command_line() {
        let memory = memory();
        let mut payload = payload(&kernel(0x10_0000));
        payload.cmdline = "acpi=off".to_owned();
        let entry = load(&memory, BOARD, &payload, MemoryBefore::Fresh).expect("loads");
        let EntryPoint::Pvh { start_info, .. } = entry else {
            panic!("{entry:?}");
        };
        let read = |address: u64| memory.tracked().read_obj::<u64>(GuestAddress(address)).expect("read");
        assert_eq!(read(start_info + 32), 0, "no RSDP");
        let mut text = [0; 43];
        let cmdline = GuestAddress(read(start_info + 24));
        memory.tracked().read_slice(&mut text, cmdline).expect("read");
        assert_eq!(&text, b"acpi=off virtio_mmio.device=4K@0xd0000000:5");
    }

    #[test]
    fn command_line_that_the_kernel_would_cut_off_is_refused() {
        let mut payload = payload(&bzimage::tests::file(b"code"));
        payload.cmdline = "x".repeat(2048);
        let error = load(&memory(), BOARD, &payload, MemoryBefore::Fresh);
        assert!(matches!(
            error,
            Err(LoadError::CmdlineTooLong { len: 2048, limit: 2047 })
        ));
    }

    #[test]
    fn kernel_without_room_to_unpack_itself_is_refused() {
        let mut file = bzimage::tests::file(b"code");
        file[0x263] = 1;
        let error = load(&memory(), BOARD, &payload(&file), MemoryBefore::Fresh);
        assert!(matches!(error, Err(LoadError::DoesNotFit { what: "kernel", .. })));
    }
}
