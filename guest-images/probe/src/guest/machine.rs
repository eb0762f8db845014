//! The bare processor and the few devices that the guest uses: ports, clock, memory primitives.

use core::arch::{asm, global_asm};

use crate::cmdline::End;

global_asm!(include_str!("start.s"));

pub const PAGE_BYTES: u64 = 4096;
pub const MIB: u64 = 1 << 20;

unsafe extern "C" {
    /// First address behind the image, from the linker script.
    static image_end: u8;
}

/// Guest physical address of the first byte behind the image.
pub fn image_end_address() -> u64 {
    &raw const image_end as u64
}

/// Reads the time stamp counter. Also a barrier for the compiler: what pages hold is read after it, not before.
#[inline(always)]
pub fn clock() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: RDTSC has no effect; CR4.TSD is clear, so ring 3 may use it.
    unsafe { asm!("rdtsc", out("eax") low, out("edx") high, options(nostack)) };
    u64::from(high) << 32 | u64::from(low)
}

#[inline]
pub fn write_port(port: u16, value: u8) {
    // SAFETY: the guest owns the machine; no port that it writes lets a device touch memory.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nostack)) };
}

#[inline]
pub fn read_port(port: u16) -> u8 {
    let value: u8;
    // SAFETY: as for `write_port`.
    unsafe { asm!("in al, dx", out("al") value, in("dx") port, options(nostack)) };
    value
}

fn write_port16(port: u16, value: u16) {
    // SAFETY: as for `write_port`.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nostack)) };
}

/// Does to the machine what `end` says. Comes back only if the machine did not heed it.
pub fn end_with(end: End) {
    match end {
        End::PowerOff => write_port16(0x604, 0x2000),
        End::Reset => write_port(0xcf9, 0x06),
        End::Panic => write_port(0x505, 1),
        // SAFETY: the interrupt table is empty, so this exception is the end of the machine, as asked.
        End::TripleFault => unsafe { asm!("ud2", options(nostack)) },
    }
}

/// Does nothing more, for good. The vCPU spins: HLT is not for ring 3.
pub fn halt() -> ! {
    loop {
        core::hint::spin_loop();
    }
}

// The compiler calls these by name, and there is no C library to bring them.

/// # Safety
/// As C's `memcpy`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, bytes: usize) -> *mut u8 {
    // SAFETY: the caller's promise; the direction flag is clear since the entry.
    unsafe {
        asm!("rep movsb", inout("rcx") bytes => _, inout("rdi") to => _, inout("rsi") from => _,
            options(nostack, preserves_flags));
    }
    to
}

/// # Safety
/// As C's `memmove`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, bytes: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= bytes {
        // SAFETY: a copy upwards does not overwrite what it has yet to read.
        return unsafe { memcpy(to, from, bytes) };
    }
    // SAFETY: the caller's promise; copied from the end down, and the direction flag is put back.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rcx") bytes => _,
            inout("rdi") to.wrapping_add(bytes).wrapping_sub(1) => _,
            inout("rsi") from.wrapping_add(bytes).wrapping_sub(1) => _, options(nostack));
    }
    to
}

/// # Safety
/// As C's `memset`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, value: i32, bytes: usize) -> *mut u8 {
    // SAFETY: the caller's promise; the direction flag is clear since the entry.
    unsafe {
        asm!("rep stosb", inout("rcx") bytes => _, inout("rdi") to => _, in("al") value as u8,
            options(nostack, preserves_flags));
    }
    to
}

/// # Safety
/// As C's `memcmp`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(left: *const u8, right: *const u8, bytes: usize) -> i32 {
    for at in 0..bytes {
        // SAFETY: the caller's promise.
        let (left, right) = unsafe { (left.add(at).read_volatile(), right.add(at).read_volatile()) };
        if left != right {
            return i32::from(left) - i32::from(right);
        }
    }
    0
}

/// # Safety
/// As C's `bcmp`.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(left: *const u8, right: *const u8, bytes: usize) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { memcmp(left, right, bytes) }
}
