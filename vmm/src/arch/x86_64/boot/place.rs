//! Puts bytes into guest memory, after a check that they fit.

use std::fs::File;
use std::io::{Seek, SeekFrom};

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::super::layout::{BOOT_INFORMATION_START, CONVENTIONAL_END};
use super::kernel::Kernel;
use super::load::LoadError;
use crate::memory::{FrameRun, GuestMemory, PAGE_SIZE};

/// Checks that a span of at least one byte lies in guest memory.
pub(super) fn place(what: &'static str, memory: &GuestMemory, start: u64, size: u64) -> Result<(), LoadError> {
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

/// Finds room for boot information that the kernel does not cover, first below 640 KiB, else after the kernel.
pub(super) fn find_information_space(memory: &GuestMemory, kernel: &Kernel, size: u64) -> Result<u64, LoadError> {
    let size = size.next_multiple_of(PAGE_SIZE);
    let is_free = |start: u64| {
        kernel
            .occupied()
            .all(|span| start + size <= span.start || start >= span.end)
    };
    let low = (BOOT_INFORMATION_START..CONVENTIONAL_END - size)
        .step_by(PAGE_SIZE as usize)
        .find(|start| is_free(*start));
    let start = low.unwrap_or_else(|| kernel.end().next_multiple_of(PAGE_SIZE));
    place("boot information", memory, start, size)?;
    Ok(start)
}

/// Writes bytes to a span that was placed before.
pub(super) fn write(memory: &GuestMemory, address: u64, bytes: &[u8]) -> Result<(), LoadError> {
    Ok(memory.tracked().write_slice(bytes, GuestAddress(address))?)
}

/// Copies part of a file to a span that was placed before.
pub(super) fn copy_file(
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
pub(super) fn clear(memory: &GuestMemory, start: u64, end: u64) -> Result<(), LoadError> {
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
            write(memory, start, &ZEROES[..part])?;
            start += part as u64;
        }
    }
    Ok(())
}
