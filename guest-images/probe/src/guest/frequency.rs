//! How fast the time stamp counter runs.

use core::arch::x86_64::__cpuid;
use core::hint::spin_loop;

use crate::machine::{clock, read_port, write_port};

/// A frequency and where it comes from.
#[derive(Clone, Copy)]
pub struct Frequency {
    pub khz: u64,
    pub from: &'static str,
}

/// What the command line says, else what the hypervisor or the processor says, else what the PIT measures.
pub fn find(told_khz: Option<u64>) -> Option<Frequency> {
    let told = told_khz.map(|khz| Frequency { khz, from: "cmdline" });
    told.or_else(|| from_cpuid().map(|khz| Frequency { khz, from: "cpuid" }))
        .or_else(|| from_pit().map(|khz| Frequency { khz, from: "pit" }))
}

/// Leaf 0x40000010 (VMware's, given by KVM's VMMs too), then leaf 0x15. Leaf 0x16 is no measure: it is the number on
/// the box.
fn from_cpuid() -> Option<u64> {
    let hypervisor = __cpuid(1).ecx & 1 << 31 != 0;
    if hypervisor && (0x4000_0010..0x4001_0000).contains(&__cpuid(0x4000_0000).eax) {
        let khz = u64::from(__cpuid(0x4000_0010).eax);
        if khz > 0 {
            return Some(khz);
        }
    }
    if __cpuid(0).eax < 0x15 {
        return None;
    }
    let leaf = __cpuid(0x15);
    let hertz = u64::from(leaf.ecx) * u64::from(leaf.ebx);
    let khz = hertz.checked_div(u64::from(leaf.eax))? / 1000;
    (khz > 0).then_some(khz)
}

const PIT_HERTZ: u64 = 1_193_182;

/// Cycles that lie between the two readings: 20 ms at 2 GHz. Long against an exit, short against a boot, and less
/// than the PIT's 55 ms down to a clock of 1 GHz.
const BETWEEN: u64 = 40_000_000;

/// Readings at each end, of which the sharpest counts.
const READINGS: u32 = 16;

/// Has channel 2 count down from its most and compares two readings with the clock.
///
/// Its output would tell the end of a count, but port 0x61 is missing in QEMU's microvm; the count itself can be latched
/// everywhere.
fn from_pit() -> Option<u64> {
    // Gate on, speaker off.
    write_port(0x61, read_port(0x61) & !0x02 | 0x01);
    write_port(0x43, 0xb0);
    write_port(0x42, 0xff);
    write_port(0x42, 0xff);
    let start = sharpest_reading();
    while clock().wrapping_sub(start.tsc) < BETWEEN {
        spin_loop();
    }
    let end = sharpest_reading();
    // Where there is no PIT both read as ones.
    let ticks = start.count.checked_sub(end.count).filter(|&ticks| ticks > 0)?;
    Some((end.tsc - start.tsc) * PIT_HERTZ / ticks / 1000)
}

struct Reading {
    tsc: u64,
    count: u64,
    /// Cycles within which the count was latched.
    doubt: u64,
}

fn sharpest_reading() -> Reading {
    let mut best = reading();
    for _ in 1..READINGS {
        let next = reading();
        if next.doubt < best.doubt {
            best = next;
        }
    }
    best
}

fn reading() -> Reading {
    let before = clock();
    write_port(0x43, 0x80);
    let doubt = clock().saturating_sub(before);
    let count = u64::from(read_port(0x42)) | u64::from(read_port(0x42)) << 8;
    Reading {
        tsc: before + doubt / 2,
        count,
        doubt,
    }
}
