//! What a kernel file says about loading it, whatever kind of file it is.
//!
//! The file is hostile: every number in it is checked before it is used.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use thiserror::Error;

use super::{bzimage, elf};

/// Why a file is no kernel that can be started.
#[derive(Debug, Error)]
pub enum KernelError {
    /// It cannot be read.
    #[error("read the kernel")]
    Unreadable(#[source] io::Error),
    /// It does not begin as any kernel does.
    #[error("load the kernel: it is neither an ELF file nor a bzImage")]
    Unknown,
    /// It is for another machine, or not executable.
    #[error("load the kernel: it is not an executable for x86 (ELF type {kind}, machine {machine})")]
    WrongMachine {
        /// `e_type`.
        kind: u16,
        /// `e_machine`.
        machine: u16,
    },
    /// Something in it contradicts itself or the file's length.
    #[error("load the kernel: the {file} is damaged: {what}")]
    Damaged {
        /// What kind of file.
        file: &'static str,
        /// What is wrong with it.
        what: &'static str,
    },
    /// An ELF file that only PVH could start, and that has no such entry point.
    #[error(
        "load the kernel: it is an ELF file without a PVH entry point (no note of owner Xen and type 18; Linux needs CONFIG_PVH), and no 64-bit vmlinux"
    )]
    NoEntry,
    /// A bzImage from before the 64-bit entry point was described.
    #[error(
        "load the kernel: the bzImage is too old: its boot protocol is {}.{:02}, the 64-bit entry point needs 2.12 (Linux 3.8)",
        version >> 8,
        version & 0xff
    )]
    TooOld {
        /// The version of the boot protocol, as the file has it.
        version: u16,
    },
    /// A bzImage of a 32-bit kernel.
    #[error("load the kernel: the bzImage has no 64-bit entry point (XLF_KERNEL_64): it is a 32-bit kernel")]
    No64BitEntry,
}

/// No kernel is given a longer command line, whatever it says that it takes: the boot information must find room.
pub(super) const LONGEST_CMDLINE: usize = 64 << 10;

/// What is to be loaded, and how it is started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Kernel {
    /// What must be in memory, in the order of the file; lengths and file offsets are checked against the file.
    pub(super) segments: Vec<Segment>,
    /// Where a kernel that unpacks itself works, beside its segments: it need not be zero, but memory and nobody else's.
    pub(super) workspace: Range<u64>,
    /// The protocol.
    pub(super) start: Start,
    /// The longest command line that it takes, in bytes without the terminating zero.
    pub(super) cmdline_limit: usize,
    /// The address after the last one at which an initial RAM disk may lie.
    pub(super) initrd_end: u64,
}

/// How a kernel is started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Start {
    /// PVH, at this physical address.
    Pvh(u32),
    /// The 64-bit protocol of Linux.
    Linux64 {
        /// Physical address of the first instruction.
        entry: u64,
        /// The file's setup header, from [`SETUP_HEADER`](bzimage::SETUP_HEADER) on; a vmlinux has none.
        setup_header: Vec<u8>,
    },
}

/// A piece of the file and where it goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment {
    /// Where in the file.
    pub(super) offset: u64,
    /// How many bytes of the file.
    pub(super) file_bytes: u64,
    /// Guest physical address.
    pub(super) address: u64,
    /// How many bytes of memory; those after `file_bytes` are zero.
    pub(super) memory_bytes: u64,
}

impl Kernel {
    /// Reads headers and notes; what is to be loaded is not touched.
    ///
    /// # Errors
    ///
    /// What is wrong with the file.
    pub(crate) fn parse(image: &impl Image) -> Result<Self, KernelError> {
        let mut magic = [0; 4];
        match image.read_exact_at(&mut magic, 0) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(KernelError::Unknown),
            other => other.map_err(KernelError::Unreadable)?,
        }
        if magic == *b"\x7fELF" {
            return elf::parse(image);
        }
        bzimage::parse(image)
    }

    /// Everything that the kernel needs to itself when it starts.
    pub(super) fn occupied(&self) -> impl Iterator<Item = Range<u64>> {
        let workspace = Some(self.workspace.clone()).filter(|workspace| !workspace.is_empty());
        self.segments
            .iter()
            .map(|segment| segment.address..segment.address.saturating_add(segment.memory_bytes))
            .chain(workspace)
    }

    /// The address after the last one that it needs.
    pub(super) fn end(&self) -> u64 {
        self.occupied().map(|span| span.end).max().unwrap_or(0)
    }
}

/// Something to read a kernel from.
pub(crate) trait Image {
    /// Fills `buffer` from `offset` on.
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
    /// Length in bytes.
    fn len(&self) -> io::Result<u64>;
}

impl Image for File {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        FileExt::read_exact_at(self, buffer, offset)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }
}

/// Little-endian fields of a header whose length was checked.
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl Fields<'_> {
    pub(super) fn half(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.0[at], self.0[at + 1]])
    }

    pub(super) fn word(&self, at: usize) -> u32 {
        u32::from(self.half(at)) | u32::from(self.half(at + 2)) << 16
    }

    pub(super) fn long(&self, at: usize) -> u64 {
        u64::from(self.word(at)) | u64::from(self.word(at + 4)) << 32
    }
}

#[cfg(test)]
impl Image for Vec<u8> {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        let end = start.checked_add(buffer.len()).ok_or(io::ErrorKind::InvalidInput)?;
        buffer.copy_from_slice(self.get(start..end).ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn script_is_no_kernel() {
        let error = Kernel::parse(&b"#!/bin/sh\nexit 0\n".to_vec());
        assert!(matches!(error, Err(KernelError::Unknown)));
        assert!(matches!(Kernel::parse(&Vec::new()), Err(KernelError::Unknown)));
    }
}
