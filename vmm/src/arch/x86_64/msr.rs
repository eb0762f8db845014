//! Which model-specific registers are saved.

/// The time stamp counter: saved and set apart from the others, by its offset where the host can.
pub(crate) const IA32_TSC: u32 = 0x10;

/// The local APIC's deadline: set after the counter that it is compared with, and after the APIC whose mode it needs.
pub(crate) const IA32_TSC_DEADLINE: u32 = 0x6e0;

/// How many machine check banks there are (low byte).
pub(crate) const IA32_MCG_CAP: u32 = 0x179;

/// Fast string operations are on after a start (bit 0).
pub(crate) const IA32_MISC_ENABLE: u32 = 0x1a0;

/// Memory is write-back where nothing else is said (0x806): firmware would have set it.
pub(crate) const MTRR_DEFAULT_TYPE: u32 = 0x2ff;

/// Registers that KVM keeps but leaves out of its list: MTRRs.
const MTRRS: [u32; 28] = [
    0x200,
    0x201,
    0x202,
    0x203,
    0x204,
    0x205,
    0x206,
    0x207,
    0x208,
    0x209,
    0x20a,
    0x20b,
    0x20c,
    0x20d,
    0x20e,
    0x20f,
    0x250,
    0x258,
    0x259,
    0x268,
    0x269,
    0x26a,
    0x26b,
    0x26c,
    0x26d,
    0x26e,
    0x26f,
    MTRR_DEFAULT_TYPE,
];

/// First register of the machine check banks, four for each.
const MACHINE_CHECK_BANKS: u32 = 0x400;

/// Read-only counters and the like that some kernels list although time or the host alone changes them.
const NEVER_SAVED: [u32; 5] = [
    IA32_TSC,
    // Saved with the others would come too early; see IA32_TSC_DEADLINE.
    IA32_TSC_DEADLINE,
    // Hyper-V: reference counter, TSC and APIC frequency.
    0x4000_0020,
    0x4000_0022,
    0x4000_0023,
];

/// What is worth trying to save, in the order in which it is restored: what the host lists, MTRRs, machine check banks.
pub(crate) fn candidates(listed: &[u32], machine_check_banks: u32) -> Vec<u32> {
    let banks = MACHINE_CHECK_BANKS..MACHINE_CHECK_BANKS + 4 * machine_check_banks.min(32);
    let mut all: Vec<u32> = Vec::new();
    for index in listed.iter().copied().chain(MTRRS).chain(banks) {
        if !NEVER_SAVED.contains(&index) && !all.contains(&index) {
            all.push(index);
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counter_and_deadline_are_not_among_the_others() {
        let all = candidates(&[0x174, IA32_TSC, IA32_TSC_DEADLINE, 0x174], 2);
        assert!(!all.contains(&IA32_TSC) && !all.contains(&IA32_TSC_DEADLINE));
        assert_eq!(all.iter().filter(|index| **index == 0x174).count(), 1);
        assert_eq!(all.last(), Some(&0x407));
    }
}
