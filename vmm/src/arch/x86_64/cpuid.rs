//! What the guest sees as its processor.
//!
//! Nested virtualisation is never offered: its state is not saved.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use super::features::{FEATURE_WORDS, FeatureWord, Register};
use crate::kvm::{KvmError, Vcpu};
use crate::machine::CpuModel;

/// One line of CPUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CpuidEntry {
    /// The leaf, EAX before the instruction.
    pub function: u32,
    /// The subleaf, ECX before the instruction, if `flags` says that it matters.
    pub index: u32,
    /// KVM_CPUID_FLAG_*.
    pub flags: u32,
    /// EAX after the instruction.
    pub eax: u32,
    /// EBX after the instruction.
    pub ebx: u32,
    /// ECX after the instruction.
    pub ecx: u32,
    /// EDX after the instruction.
    pub edx: u32,
}

impl CpuidEntry {
    pub(crate) fn register(&self, register: Register) -> u32 {
        match register {
            Register::Eax => self.eax,
            Register::Ebx => self.ebx,
            Register::Ecx => self.ecx,
            Register::Edx => self.edx,
        }
    }

    pub(crate) fn register_mut(&mut self, register: Register) -> &mut u32 {
        match register {
            Register::Eax => &mut self.eax,
            Register::Ebx => &mut self.ebx,
            Register::Ecx => &mut self.ecx,
            Register::Edx => &mut self.edx,
        }
    }
}

impl From<kvm_cpuid_entry2> for CpuidEntry {
    fn from(entry: kvm_cpuid_entry2) -> Self {
        let kvm_cpuid_entry2 {
            function,
            index,
            flags,
            eax,
            ebx,
            ecx,
            edx,
            padding: _,
        } = entry;
        Self {
            function,
            index,
            flags,
            eax,
            ebx,
            ecx,
            edx,
        }
    }
}

impl From<CpuidEntry> for kvm_cpuid_entry2 {
    fn from(entry: CpuidEntry) -> Self {
        let CpuidEntry {
            function,
            index,
            flags,
            eax,
            ebx,
            ecx,
            edx,
        } = entry;
        Self {
            function,
            index,
            flags,
            eax,
            ebx,
            ecx,
            edx,
            padding: [0; 3],
        }
    }
}

/// The value of a feature word in a list of entries; 0 where the leaf is absent.
pub(crate) fn value(entries: &[CpuidEntry], word: &FeatureWord) -> u32 {
    entries
        .iter()
        .find(|entry| entry.function == word.function && entry.index == word.index)
        .map_or(0, |entry| entry.register(word.register))
}

/// Names the features that `wanted` has and `offered` lacks.
pub(crate) fn missing(wanted: &[CpuidEntry], offered: &[CpuidEntry]) -> Vec<String> {
    FEATURE_WORDS
        .iter()
        .flat_map(|word| {
            let lacking = value(wanted, word) & !value(offered, word) & !word.volatile;
            word.names_of(lacking)
        })
        .collect()
}

/// What every vCPU of a machine of this model is given, before each gets its own number. `supported` is what KVM says it supports,
/// `seen` what guests can see of the processor: more than that on a host that shows them its own features.
///
/// # Errors
///
/// Names the features that the model has and the host lacks.
pub(crate) fn of_model(
    supported: &[CpuidEntry],
    seen: &[CpuidEntry],
    model: CpuModel,
    tsc_deadline: bool,
) -> Result<Vec<CpuidEntry>, Vec<String>> {
    let mut entries = supported.to_vec();
    set_bit(&mut entries, 1, Register::Ecx, HYPERVISOR, true);
    // KVM does not report it as supported although its local APIC has it.
    set_bit(&mut entries, 1, Register::Ecx, TSC_DEADLINE, tsc_deadline);
    set_bit(&mut entries, 1, Register::Ecx, VMX, false);
    set_bit(&mut entries, 0x8000_0001, Register::Ecx, SVM, false);
    entries.retain(|entry| entry.function != 0x8000_000a);
    let Some(level) = Level::of(model) else {
        return Ok(entries);
    };

    let lacking = level.missing(seen);
    if !lacking.is_empty() {
        return Err(lacking);
    }
    level.mask(&mut entries);
    Ok(entries)
}

/// Takes away what a guest would use by hypercalls: sending interrupts to several vCPUs, yielding to one, waking one.
///
/// Where ring 0 is emulated (kvm-pvm), KVM writes the instruction of a hypercall anew before it carries it out, as it does for a guest
/// that came from another vendor's processor. A Linux guest's text is read-only by then, and the guest ends.
pub(crate) fn withhold_hypercalls(entries: &mut [CpuidEntry]) {
    for feature in [PV_UNHALT, PV_SEND_IPI, PV_SCHED_YIELD] {
        set_bit(entries, KVM_FEATURES, Register::Eax, feature, false);
    }
}

/// Tells the guest how fast its counters run, so that it need not measure: leaf 0x40000010, as other hypervisors have it.
pub(crate) fn tell_frequencies(entries: &mut Vec<CpuidEntry>, tsc_khz: u32) {
    let Some(first) = entries.iter_mut().find(|entry| entry.function == KVM_FIRST) else {
        return;
    };
    if tsc_khz == 0 {
        return;
    }
    first.eax = first.eax.max(KVM_FREQUENCIES);
    entries.push(CpuidEntry {
        function: KVM_FREQUENCIES,
        index: 0,
        flags: 0,
        eax: tsc_khz,
        ebx: APIC_BUS_KHZ,
        ecx: 0,
        edx: 0,
    });
}

/// The entries for one vCPU: its APIC number, and how many there are.
pub(crate) fn of_vcpu(entries: &[CpuidEntry], index: u8, vcpus: u8) -> Vec<CpuidEntry> {
    let (id, count) = (u32::from(index), u32::from(vcpus));
    let core_bits = count.next_power_of_two().trailing_zeros();
    let mut entries = entries.to_vec();
    for entry in &mut entries {
        match (entry.function, entry.index) {
            (1, _) => {
                entry.ebx = entry.ebx & 0x0000_ffff | id << 24 | count << 16;
                // HTT: the count above is valid.
                entry.edx = entry.edx & !(1 << 28) | u32::from(vcpus > 1) << 28;
            }
            // Cache topology: every vCPU has its own caches, all are cores of one package.
            (4, _) if entry.eax & 0x1f != 0 => {
                entry.eax = entry.eax & 0x3fff | ((1 << core_bits) - 1) << 26;
            }
            // Extended topology: no hyper-threads, then cores.
            (0xb | 0x1f, level) => {
                entry.edx = id;
                (entry.eax, entry.ebx, entry.ecx) = match level {
                    0 => (0, 1, 1 << 8),
                    1 => (core_bits, count, 2 << 8 | 1),
                    level => (0, 0, level),
                };
            }
            (0x8000_0008, _) if entry.ecx != 0 => {
                entry.ecx = entry.ecx & !0xf0ff | (count - 1) | core_bits << 12;
            }
            (0x8000_001e, _) => {
                entry.eax = id;
                entry.ebx = id & 0xff;
                entry.ecx = 0;
            }
            _ => {}
        }
    }
    for level in 0..=1 {
        let has_leaf = entries.iter().any(|entry| entry.function == 0xb);
        let has_level = entries
            .iter()
            .any(|entry| entry.function == 0xb && entry.index == level);
        if has_leaf && !has_level {
            entries.push(CpuidEntry {
                function: 0xb,
                index: level,
                flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                eax: if level == 0 { 0 } else { core_bits },
                ebx: if level == 0 { 1 } else { count },
                ecx: level | (level + 1) << 8,
                edx: id,
            });
        }
    }
    entries
}

/// The entries with what code in the guest sees on a host that shows it the processor's own feature leaves.
pub(crate) fn with_native_features(entries: &[CpuidEntry], native: impl Fn(u32, u32) -> [u32; 4]) -> Vec<CpuidEntry> {
    let mut entries = entries.to_vec();
    for word in FEATURE_WORDS
        .iter()
        .filter(|word| word.function & 0xffff_0000 != 0x4000_0000)
    {
        let [eax, ebx, ecx, edx] = native(word.function, word.index);
        for entry in &mut entries {
            if entry.function == word.function && entry.index == word.index {
                *entry.register_mut(word.register) = match word.register {
                    Register::Eax => eax,
                    Register::Ebx => ebx,
                    Register::Ecx => ecx,
                    Register::Edx => edx,
                };
            }
        }
    }
    entries
}

/// Makes a vCPU, before its first run, see this.
pub(crate) fn give(vcpu: &Vcpu, entries: &[CpuidEntry]) -> Result<(), KvmError> {
    let entries: Vec<kvm_cpuid_entry2> = entries.iter().copied().map(Into::into).collect();
    vcpu.set_cpuid(&entries)
}

/// KVM's leaves: the first says which is the last.
const KVM_FIRST: u32 = 0x4000_0000;
const KVM_FEATURES: u32 = 0x4000_0001;
const KVM_FREQUENCIES: u32 = 0x4000_0010;

/// KVM's local APIC counts at 1 GHz.
const APIC_BUS_KHZ: u32 = 1_000_000;

const VMX: u32 = 5;
const SVM: u32 = 2;
const TSC_DEADLINE: u32 = 24;
const HYPERVISOR: u32 = 31;

/// Features of KVM that are hypercalls.
const PV_UNHALT: u32 = 7;
const PV_SEND_IPI: u32 = 11;
const PV_SCHED_YIELD: u32 = 13;

fn set_bit(entries: &mut [CpuidEntry], function: u32, register: Register, bit: u32, on: bool) {
    for entry in entries.iter_mut().filter(|entry| entry.function == function) {
        let value = entry.register_mut(register);
        *value = *value & !(1 << bit) | u32::from(on) << bit;
    }
}

/// A level of the x86-64 psABI: what it demands of a feature word, and what else may stay visible beside it.
struct Level {
    words: &'static [LevelWord],
}

struct LevelWord {
    function: u32,
    index: u32,
    register: Register,
    /// What the level demands.
    demanded: u32,
    /// What system software may use beside it: every processor of the level, of either vendor, that runs Linux 5.15 has it or KVM emulates it.
    allowed: u32,
}

/// FPU to SSE2 with everything that 64-bit mode brings; the level v1 in EDX of leaf 1. Not machine check details, PBE, TM or DTS.
const BASE_EDX: u32 = 0x078b_fbff;

/// The same in EDX of leaf 0x80000001, with SYSCALL, NX, RDTSCP and long mode.
const BASE_EXTENDED_EDX: u32 = 1 << 11 | 1 << 20 | 1 << 27 | 1 << 29;

/// SSE3, SSSE3, CMPXCHG16B, SSE4.1, SSE4.2, POPCNT.
const V2_ECX: u32 = 1 | 1 << 9 | 1 << 13 | 1 << 19 | 1 << 20 | 1 << 23;

/// FMA, MOVBE, XSAVE, AVX, F16C.
const V3_ECX: u32 = 1 << 12 | 1 << 22 | 1 << 26 | 1 << 28 | 1 << 29;

/// x2APIC, TSC deadline, hypervisor: KVM's own, whatever the processor.
const KVM_ECX: u32 = 1 << 21 | 1 << 24 | 1 << 31;

const fn word(function: u32, index: u32, register: Register, demanded: u32, allowed: u32) -> LevelWord {
    LevelWord {
        function,
        index,
        register,
        demanded,
        allowed,
    }
}

const V2: Level = Level {
    words: &[
        word(1, 0, Register::Ecx, V2_ECX, KVM_ECX),
        word(1, 0, Register::Edx, BASE_EDX, 1 << 28),
        word(0x8000_0001, 0, Register::Ecx, 1, 0),
        word(
            0x8000_0001,
            0,
            Register::Edx,
            BASE_EXTENDED_EDX & !(1 << 27),
            0x0183_f3ff | 1 << 27,
        ),
    ],
};

const V3: Level = Level {
    words: &[
        word(1, 0, Register::Ecx, V2_ECX | V3_ECX, KVM_ECX),
        word(1, 0, Register::Edx, BASE_EDX, 1 << 28),
        // BMI1, AVX2, BMI2; FSGSBASE, TSC_ADJUST, SMEP and INVPCID beside them are as old.
        word(7, 0, Register::Ebx, 1 << 3 | 1 << 5 | 1 << 8, 1 | 1 << 1 | 1 << 7),
        // x87, SSE and AVX state.
        word(0xd, 0, Register::Eax, 7, 0),
        word(0xd, 1, Register::Eax, 0, 1),
        // LAHF, LZCNT.
        word(0x8000_0001, 0, Register::Ecx, 1 | 1 << 5, 0),
        word(0x8000_0001, 0, Register::Edx, BASE_EXTENDED_EDX, 0x0183_f3ff),
    ],
};

/// Leaves that describe one processor, not a level: performance counters, resource control, SGX, trace, AMX, keys, encryption.
const DROPPED_LEAVES: [u32; 12] = [
    5,
    0xa,
    0xf,
    0x10,
    0x12,
    0x14,
    0x19,
    0x1c,
    0x1d,
    0x1e,
    0x8000_001b,
    0x8000_0022,
];

impl Level {
    fn of(model: CpuModel) -> Option<&'static Self> {
        match model {
            CpuModel::Host => None,
            CpuModel::X86_64V2 => Some(&V2),
            CpuModel::X86_64V3 => Some(&V3),
        }
    }

    fn missing(&self, entries: &[CpuidEntry]) -> Vec<String> {
        self.words
            .iter()
            .flat_map(|level| {
                let word = level.feature_word();
                word.names_of(level.demanded & !value(entries, word))
            })
            .collect()
    }

    fn mask(&self, entries: &mut Vec<CpuidEntry>) {
        entries.retain(|entry| !DROPPED_LEAVES.contains(&entry.function));
        let words = FEATURE_WORDS
            .iter()
            // KVM's own leaf: what it offers does not depend on the processor.
            .filter(|word| word.function != 0x4000_0001 && word.function != 0x8000_0007 && word.function != 6);
        for word in words {
            let keep = self
                .words
                .iter()
                .find(|level| std::ptr::eq(level.feature_word(), word))
                .map_or(0, |level| level.demanded | level.allowed);
            for entry in entries
                .iter_mut()
                .filter(|entry| entry.function == word.function && entry.index == word.index)
            {
                *entry.register_mut(word.register) &= keep;
            }
        }
        let components = entries
            .iter()
            .find(|entry| entry.function == 0xd && entry.index == 0)
            .map_or(0, |entry| entry.eax);
        // Subleaves from 2 on describe one XSAVE component each.
        entries.retain(|entry| entry.function != 0xd || entry.index < 2 || components >> entry.index.min(31) & 1 == 1);
    }
}

impl LevelWord {
    fn feature_word(&self) -> &'static FeatureWord {
        FEATURE_WORDS
            .iter()
            .find(|word| word.function == self.function && word.index == self.index && word.register == self.register)
            .expect("levels are made of words in the table")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, registers: [u32; 4]) -> CpuidEntry {
        let [eax, ebx, ecx, edx] = registers;
        CpuidEntry {
            function,
            index,
            flags: 0,
            eax,
            ebx,
            ecx,
            edx,
        }
    }

    fn everything() -> Vec<CpuidEntry> {
        vec![
            entry(1, 0, [0, 0, u32::MAX, u32::MAX]),
            entry(7, 0, [1, u32::MAX, u32::MAX, u32::MAX]),
            entry(0xb, 0, [0; 4]),
            entry(0xd, 0, [u32::MAX, 0, 0, 0]),
            entry(0xd, 1, [u32::MAX, 0, u32::MAX, 0]),
            entry(0xd, 2, [256, 576, 0, 0]),
            entry(0xd, 9, [8, 2688, 0, 0]),
            entry(0x8000_0001, 0, [0, 0, u32::MAX, u32::MAX]),
        ]
    }

    #[test]
    fn hypercalls_are_withheld_and_nothing_else_of_kvm() {
        let mut entries = vec![entry(KVM_FEATURES, 0, [u32::MAX, 0, 0, 0]), entry(1, 0, [u32::MAX; 4])];
        withhold_hypercalls(&mut entries);
        assert_eq!(entries[0].eax, !(1 << 7 | 1 << 11 | 1 << 13));
        assert_eq!(entries[1].eax, u32::MAX);
    }

    #[test]
    fn subset_misses_nothing() {
        assert!(missing(&everything(), &everything()).is_empty());
    }

    #[test]
    fn missing_features_are_named() {
        let mut less = everything();
        less[0].ecx &= !(1 << 28);
        less[1].ebx &= !(1 << 5);
        assert_eq!(missing(&everything(), &less), ["avx", "avx2"]);
    }

    #[test]
    fn level_hides_what_is_above_it() {
        let v2 = of_model(&everything(), &everything(), CpuModel::X86_64V2, true).expect("has all");
        let v3 = of_model(&everything(), &everything(), CpuModel::X86_64V3, true).expect("has all");
        assert!(missing(&v2, &v3).is_empty());
        assert!(missing(&v3, &v2).contains(&"avx2".to_owned()));
        assert!(!missing(&everything(), &v3).contains(&"avx2".to_owned()));
        assert!(missing(&everything(), &v3).contains(&"avx512f".to_owned()));
    }

    #[test]
    fn level_keeps_only_its_xsave_components() {
        let v3 = of_model(&everything(), &everything(), CpuModel::X86_64V3, true).expect("has all");
        let subleaves: Vec<u32> = v3
            .iter()
            .filter(|entry| entry.function == 0xd)
            .map(|entry| entry.index)
            .collect();
        assert_eq!(subleaves, [0, 1, 2]);
    }

    #[test]
    fn host_below_the_level_is_refused_by_name() {
        let mut less = everything();
        less[0].ecx &= !(1 << 20);
        assert_eq!(
            of_model(&less, &less, CpuModel::X86_64V2, true),
            Err(vec!["sse4_2".to_owned()])
        );
    }

    #[test]
    fn nested_virtualisation_is_hidden() {
        let host = of_model(&everything(), &everything(), CpuModel::Host, true).expect("has all");
        assert_eq!(host[0].ecx >> VMX & 1, 0);
        assert_eq!(host[7].ecx >> SVM & 1, 0);
    }

    #[test]
    fn frequency_leaf_is_within_the_announced_range() {
        let mut entries = vec![entry(0x4000_0000, 0, [0x4000_0001, 1, 2, 3])];
        tell_frequencies(&mut entries, 2_000_000);
        assert_eq!(entries[0].eax, 0x4000_0010);
        assert_eq!((entries[1].function, entries[1].eax), (0x4000_0010, 2_000_000));
    }

    #[test]
    fn each_vcpu_has_its_own_number() {
        let entries = of_vcpu(&everything(), 2, 3);
        assert_eq!(entries[0].ebx >> 24, 2);
        assert_eq!(entries[0].ebx >> 16 & 0xff, 3);
        let topology: Vec<_> = entries.iter().filter(|entry| entry.function == 0xb).collect();
        assert_eq!(topology.len(), 2);
        assert!(topology.iter().all(|entry| entry.edx == 2));
        assert_eq!((topology[1].eax, topology[1].ebx), (2, 3));
    }
}
