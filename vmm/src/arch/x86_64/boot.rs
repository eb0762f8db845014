//! Puts a kernel into guest memory and the first vCPU in front of it, as the PVH boot protocol says
//! (`docs/misc/pvh.pandoc` of Xen): 32-bit protected mode, flat segments, no paging, EBX pointing to the start information.
//!
//! Everything is written through the tracked memory: a reset in the middle of a migration is then as dirty as it must be.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs2};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};
use zerocopy::IntoBytes;

use super::elf::{ElfError, ElfImage, Segment};
use super::layout::{BOOT_INFORMATION_START, CONVENTIONAL_END};
use super::msr::{IA32_MISC_ENABLE, MTRR_DEFAULT_TYPE};
use super::start_info::{Module, START_MAGIC, StartInfo, memory_map};
use crate::kvm::{KvmError, Vcpu};
use crate::memory::{FrameRun, GuestMemory, MemoryError, PAGE_SIZE};

/// What a guest is started with.
#[derive(Debug)]
pub struct BootPayload {
    /// An ELF file with a PVH note.
    pub kernel: File,
    /// An initial RAM disk, handed on as it is.
    pub initrd: Option<File>,
    /// The kernel's command line.
    pub cmdline: String,
}

/// Why a guest could not be loaded.
#[derive(Debug, Error)]
pub enum LoadError {
    /// The kernel file is not one that can be started.
    #[error(transparent)]
    Kernel(#[from] ElfError),
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
    /// The command line cannot be handed over.
    #[error("load the command line: it is longer than {CMDLINE_LIMIT} bytes or contains a zero byte")]
    Cmdline,
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

/// Where the first vCPU starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct EntryPoint {
    /// Physical address of its first instruction.
    pub(crate) rip: u64,
    /// Physical address of the start information.
    pub(crate) start_info: u64,
}

const CMDLINE_LIMIT: usize = 64 << 10;

/// Loads kernel, initrd, command line and start information.
///
/// # Errors
///
/// What is wrong with the payload. Guest memory may then hold part of it.
pub(crate) fn load(memory: &GuestMemory, payload: &BootPayload, before: MemoryBefore) -> Result<EntryPoint, LoadError> {
    if payload.cmdline.len() > CMDLINE_LIMIT || payload.cmdline.contains('\0') {
        return Err(LoadError::Cmdline);
    }
    let image = ElfImage::parse(&payload.kernel)?;
    for segment in &image.segments {
        place("kernel", memory, segment.address, segment.memory_bytes)?;
    }
    place("kernel's entry point", memory, image.entry.into(), 1)?;
    for segment in &image.segments {
        load_segment(memory, &payload.kernel, segment, before)?;
    }

    let kernel_end = image
        .segments
        .iter()
        .map(|segment| segment.address + segment.memory_bytes)
        .max()
        .unwrap_or(0);
    let (information, information_end) = find_information_space(memory, &image.segments, payload)?;
    let module = match &payload.initrd {
        Some(initrd) => Some(load_initrd(memory, initrd, kernel_end.max(information_end))?),
        None => None,
    };
    write_information(memory, information, &payload.cmdline, module)?;
    Ok(EntryPoint {
        rip: image.entry.into(),
        start_info: information,
    })
}

/// Sets the registers of the first vCPU, fresh from its creation or set back to that, to the start of a kernel.
///
/// # Errors
///
/// If KVM refuses.
pub(crate) fn enter(vcpu: &Vcpu, entry: EntryPoint) -> Result<(), KvmError> {
    let sregs = vcpu.sregs()?;
    vcpu.set_sregs(&protected_mode(&sregs))?;
    vcpu.set_regs(&kvm_regs {
        rip: entry.rip,
        rbx: entry.start_info,
        // Bit 1 is always one.
        rflags: 2,
        ..Default::default()
    })?;
    // What firmware would have done; a host that does not know one of them leaves the guest a little slower.
    for register in [(IA32_MISC_ENABLE, 1), (MTRR_DEFAULT_TYPE, 0x806)] {
        vcpu.set_msrs(&[register])?;
    }
    Ok(())
}

fn protected_mode(sregs: &kvm_sregs2) -> kvm_sregs2 {
    let flat = |selector, type_| kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let data = flat(0x18, 3);
    kvm_sregs2 {
        cs: flat(0x10, 11),
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: kvm_segment {
            base: 0,
            limit: 0x67,
            selector: 0x20,
            type_: 11,
            present: 1,
            ..Default::default()
        },
        // The guest brings its own before it loads a segment or takes an interrupt.
        gdt: kvm_dtable::default(),
        idt: kvm_dtable::default(),
        // Protection enabled; bit 4 is always one.
        cr0: 0x11,
        cr3: 0,
        cr4: 0,
        efer: 0,
        ..*sregs
    }
}

fn load_segment(memory: &GuestMemory, kernel: &File, segment: &Segment, before: MemoryBefore) -> Result<(), LoadError> {
    copy_file(
        memory,
        kernel,
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
fn load_initrd(memory: &GuestMemory, initrd: &File, floor: u64) -> Result<Module, LoadError> {
    let what = "initrd";
    let size = initrd
        .metadata()
        .map_err(|source| LoadError::Unreadable { what, source })?
        .len();
    let low_end = memory.shape().regions[0].len;
    let floor = floor.next_multiple_of(PAGE_SIZE);
    let address = low_end
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
    Ok(Module {
        address,
        size,
        cmdline: 0,
        reserved: 0,
    })
}

/// Finds room for start information and command line that no segment covers, first below 640 KiB, else after the kernel.
fn find_information_space(
    memory: &GuestMemory,
    segments: &[Segment],
    payload: &BootPayload,
) -> Result<(u64, u64), LoadError> {
    let size = (PAGE_SIZE + payload.cmdline.len() as u64 + 1).next_multiple_of(PAGE_SIZE);
    let is_free = |start: u64| {
        segments
            .iter()
            .all(|segment| start + size <= segment.address || start >= segment.address + segment.memory_bytes)
    };
    let low = (BOOT_INFORMATION_START..CONVENTIONAL_END - size)
        .step_by(PAGE_SIZE as usize)
        .find(|start| is_free(*start));
    let start = low.unwrap_or_else(|| {
        segments
            .iter()
            .map(|segment| segment.address + segment.memory_bytes)
            .max()
            .unwrap_or(0)
            .next_multiple_of(PAGE_SIZE)
    });
    place("start information", memory, start, size)?;
    Ok((start, start + size))
}

/// One page of structures, then the command line.
fn write_information(memory: &GuestMemory, start: u64, cmdline: &str, module: Option<Module>) -> Result<(), LoadError> {
    let tracked = memory.tracked();
    let map = memory_map(memory.shape());
    let modules = start + size_of::<StartInfo>() as u64;
    let memory_map = modules + size_of::<Module>() as u64;
    let cmdline_start = start + PAGE_SIZE;
    let info = StartInfo {
        magic: START_MAGIC,
        version: 1,
        flags: 0,
        module_count: u32::from(module.is_some()),
        modules: if module.is_some() { modules } else { 0 },
        cmdline: cmdline_start,
        rsdp: 0,
        memory_map,
        memory_map_entries: map.len() as u32,
        reserved: 0,
    };
    tracked.write_slice(info.as_bytes(), GuestAddress(start))?;
    if let Some(module) = module {
        tracked.write_slice(module.as_bytes(), GuestAddress(modules))?;
    }
    tracked.write_slice(map.as_bytes(), GuestAddress(memory_map))?;
    tracked.write_slice(cmdline.as_bytes(), GuestAddress(cmdline_start))?;
    tracked.write_slice(&[0], GuestAddress(cmdline_start + cmdline.len() as u64))?;
    Ok(())
}

/// Checks that a span of at least one byte lies in guest memory.
fn place(what: &'static str, memory: &GuestMemory, start: u64, size: u64) -> Result<(), LoadError> {
    let end = start.saturating_add(size);
    let first = start / PAGE_SIZE;
    let run = FrameRun {
        first,
        count: end.div_ceil(PAGE_SIZE) - first,
    };
    if end - start == size && memory.shape().contains(run) {
        Ok(())
    } else {
        Err(LoadError::DoesNotFit {
            what,
            start,
            end,
            memory: memory.shape().bytes(),
        })
    }
}

fn copy_file(
    memory: &GuestMemory,
    file: &File,
    what: &'static str,
    offset: u64,
    address: u64,
    len: u64,
) -> Result<(), LoadError> {
    let mut file = file;
    file.seek(SeekFrom::Start(offset))
        .map_err(|source| LoadError::Unreadable { what, source })?;
    memory
        .tracked()
        .read_exact_volatile_from(GuestAddress(address), &mut file, len as usize)
        .map_err(|error| match error {
            GuestMemoryError::IOError(source) => LoadError::Unreadable { what, source },
            other => LoadError::Write(other),
        })
}

/// Zeroes a span that was placed before.
fn clear(memory: &GuestMemory, start: u64, end: u64) -> Result<(), LoadError> {
    const ZEROES: [u8; PAGE_SIZE as usize] = [0; PAGE_SIZE as usize];
    let mut start = start;
    while start < end {
        let page_end = (start / PAGE_SIZE + 1) * PAGE_SIZE;
        let whole_end = end / PAGE_SIZE * PAGE_SIZE;
        if start.is_multiple_of(PAGE_SIZE) && whole_end > start {
            memory.write_zeroes(FrameRun {
                first: start / PAGE_SIZE,
                count: (whole_end - start) / PAGE_SIZE,
            })?;
            start = whole_end;
        } else {
            let part = (page_end.min(end) - start) as usize;
            memory.tracked().write_slice(&ZEROES[..part], GuestAddress(start))?;
            start += part as u64;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::memory::MemoryOptions;

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
        let entry = load(&memory, &payload, MemoryBefore::Fresh).expect("loads");

        let read = |address: u64| memory.tracked().read_obj::<u64>(GuestAddress(address)).expect("read");
        let text = |address: u64| read(address).to_le_bytes();
        assert_eq!(entry.rip, 0x10_0000);
        assert_eq!(&text(0x10_0000)[..4], b"code");
        assert_eq!(read(entry.start_info) as u32, START_MAGIC);
        assert_eq!(&text(read(entry.start_info + 24))[..4], b"a=b\0");
        assert_eq!(&text(read(read(entry.start_info + 16)))[..7], b"archive");
        assert!(memory.device_dirty().contains(0x10_0000 / PAGE_SIZE));
    }

    #[test]
    fn used_memory_is_cleared_where_the_kernel_expects_zeroes() {
        let memory = memory();
        memory
            .tracked()
            .write_slice(&[0xff; 0x4000], GuestAddress(0x10_0000))
            .expect("write");
        load(&memory, &payload(&kernel(0x10_0000)), MemoryBefore::Used).expect("loads");
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
        let error = load(&memory(), &payload(&kernel(8 << 20)), MemoryBefore::Fresh);
        assert!(matches!(error, Err(LoadError::DoesNotFit { what: "kernel", .. })));
    }

    #[test]
    fn kernel_in_low_memory_pushes_the_information_away() {
        let entry = load(&memory(), &payload(&kernel(0x6000)), MemoryBefore::Fresh).expect("loads");
        assert!(entry.start_info >= 0x8000);
    }

    #[test]
    fn initrd_that_leaves_no_room_is_refused() {
        let mut payload = payload(&kernel(0x10_0000));
        let initrd = tempfile::tempfile().expect("file");
        initrd.set_len(16 << 20).expect("length");
        payload.initrd = Some(initrd);
        let error = load(&memory(), &payload, MemoryBefore::Fresh);
        assert!(matches!(error, Err(LoadError::DoesNotFit { what: "initrd", .. })));
    }
}
