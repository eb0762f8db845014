//! What the VMM tells at the PVH entry: `hvm_start_info`, as in Xen's `public/arch-x86/hvm/start_info.h`.

use core::ptr;

use crate::memory::Memory;

pub const LONGEST_COMMAND_LINE: usize = 2048;

/// What the start info told.
pub struct Machine<'a> {
    pub command_line: &'a str,
    /// `None` if the VMM passed no memory map.
    pub memory: Option<Memory>,
}

unsafe extern "C" {
    /// Address of the start info, kept by `start.s`.
    static start_info: u64;
}

#[repr(C)]
#[derive(Clone, Copy)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    modules: u32,
    module_list: u64,
    command_line: u64,
    rsdp: u64,
    memory_map: u64,
    memory_map_entries: u32,
    reserved: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct MapEntry {
    address: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

const MAGIC: u32 = 0x336e_c578;
const KIND_RAM: u32 = 1;

/// Only the first GiB is mapped when the start info is read.
const MAPPED: u64 = 1 << 30;

/// Reads the start info; the command line is copied to `text`, because what lies below 1 MiB is about to be used.
pub fn read(text: &mut [u8; LONGEST_COMMAND_LINE]) -> Result<Machine<'_>, &'static str> {
    // SAFETY: written once by `start.s`, before Rust ran.
    let info = unsafe { load::<StartInfo>(ptr::read_volatile(&raw const start_info)) };
    let info = info.filter(|info| info.magic == MAGIC);
    let info = info.ok_or("no PVH start info")?;
    let memory = match info.version {
        0 => None,
        _ => read_map(info.memory_map, info.memory_map_entries)?,
    };
    let mut length = 0;
    if info.command_line != 0 {
        loop {
            // SAFETY: any byte below 1 GiB may be read as a byte.
            let byte = unsafe { load::<u8>(info.command_line + length as u64) };
            let byte = byte.ok_or("the command line lies above 1 GiB")?;
            if byte == 0 {
                break;
            }
            *text.get_mut(length).ok_or("the command line is too long")? = byte;
            length += 1;
        }
    }
    let text = core::str::from_utf8(&text[..length]);
    Ok(Machine {
        command_line: text.map_err(|_| "the command line is not UTF-8")?,
        memory,
    })
}

fn read_map(address: u64, entries: u32) -> Result<Option<Memory>, &'static str> {
    let mut memory = Memory::default();
    for entry in 0..u64::from(entries) {
        let at = address + entry * size_of::<MapEntry>() as u64;
        // SAFETY: any bytes are a valid entry.
        let entry = unsafe { load::<MapEntry>(at) }.ok_or("the memory map lies above 1 GiB")?;
        if entry.kind == KIND_RAM {
            memory.add(entry.address, entry.size)?;
        }
    }
    Ok((entries > 0).then_some(memory))
}

/// # Safety
/// Any bytes must be a valid `T`.
unsafe fn load<T: Copy>(address: u64) -> Option<T> {
    let end = address.checked_add(size_of::<T>() as u64)?;
    // SAFETY: the first GiB is mapped one to one; absent memory there reads as ones.
    (end <= MAPPED).then(|| unsafe { ptr::read_unaligned(address as *const T) })
}
