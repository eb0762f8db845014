//! What is said of an instruction that KVM's emulator does not know: where it is, its bytes, and its name if it is one of those that kernels use.
//!
//! Where ring 0 is emulated (kvm-pvm) a kernel that uses such an instruction ends at it; elsewhere only code that uses one on a device's memory does.

use std::fmt::Write;

use crate::host_files;

/// Longest instruction of the architecture in bytes.
const LONGEST: usize = 15;

/// Tells which instruction it is that the guest ended at; `bytes` begin with it, and may go on behind it. Without bytes KVM did not tell them.
pub(super) fn not_emulated(rip: u64, bytes: &[u8]) -> String {
    let mut told = format!("KVM cannot emulate the instruction at rip {rip:#x}");
    let bytes = &bytes[..bytes.len().min(LONGEST)];
    if !bytes.is_empty() {
        told.push_str(": bytes");
    }
    for byte in bytes {
        let _ = write!(told, " {byte:02x}");
    }
    if let Some(name) = name(bytes) {
        let _ = write!(told, " ({name})");
    }
    if host_files::is_pvm() {
        told.push_str(
            "; this host emulates a guest's ring 0 (kvm-pvm): use a kernel that does without it there (guest-images/linux), or another host",
        );
    }
    told
}

/// An instruction taken apart as far as its name needs it.
#[derive(Debug, Clone, Copy)]
struct Parts<'a> {
    /// 0xf2 or 0xf3, the last of them that is there.
    repeat: Option<u8>,
    /// REX.W: operands of 64 bits.
    is_wide: bool,
    /// The opcode, and what follows it.
    rest: &'a [u8],
}

impl<'a> Parts<'a> {
    fn of(bytes: &'a [u8]) -> Self {
        let mut parts = Self {
            repeat: None,
            is_wide: false,
            rest: bytes,
        };
        while let [prefix, rest @ ..] = parts.rest {
            match prefix {
                0xf2 | 0xf3 => parts.repeat = Some(*prefix),
                0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf0 => {}
                // REX. Outside 64-bit mode these would be INC and DEC, which are emulated and do not come here.
                0x40..=0x4f => parts.is_wide = prefix & 8 != 0,
                _ => break,
            }
            parts.rest = rest;
        }
        parts
    }
}

/// The name of an instruction that the emulator lacks, or the kind of it.
fn name(bytes: &[u8]) -> Option<&'static str> {
    let parts = Parts::of(bytes);
    match parts.rest {
        [0xcc, ..] => Some("int3"),
        [0xcf, ..] => Some("iret"),
        [0x9b, ..] => Some("fwait"),
        [0xdb, 0xe2, ..] => Some("fnclex"),
        [0xd8..=0xdf, ..] => Some("x87"),
        [0xc4 | 0xc5, ..] => Some("AVX or BMI"),
        [0x62, ..] => Some("AVX-512"),
        [0x0f, rest @ ..] => name_of_two_bytes(parts, rest),
        _ => None,
    }
}

/// Those whose opcode begins with 0x0f; `rest` is what follows that.
fn name_of_two_bytes(parts: Parts<'_>, rest: &[u8]) -> Option<&'static str> {
    const REPEATED: Option<u8> = Some(0xf3);

    let extension = rest.get(1).map(|modrm| modrm >> 3 & 7);
    let is_in_memory = rest.get(1).is_some_and(|modrm| *modrm < 0xc0);
    match (rest.first()?, extension, parts.repeat) {
        (0x01, ..) => match rest.get(1)? {
            0xc8 => Some("monitor"),
            0xc9 => Some("mwait"),
            0xca => Some("clac"),
            0xcb => Some("stac"),
            0xd0 => Some("xgetbv"),
            0xee => Some("rdpkru"),
            0xef => Some("wrpkru"),
            _ => None,
        },
        (0xb8, _, REPEATED) => Some("popcnt"),
        (0xbc, _, REPEATED) => Some("tzcnt"),
        (0xbd, _, REPEATED) => Some("lzcnt"),
        (0xc7, Some(1), _) if parts.is_wide => Some("cmpxchg16b"),
        (0xc7, Some(3), _) => Some("xrstors"),
        (0xc7, Some(4), _) => Some("xsavec"),
        (0xc7, Some(5), _) => Some("xsaves"),
        (0xc7, Some(6), _) => Some("rdrand"),
        (0xc7, Some(7), REPEATED) => Some("rdpid"),
        (0xc7, Some(7), _) => Some("rdseed"),
        (0xae, Some(0), REPEATED) => Some("rdfsbase"),
        (0xae, Some(1), REPEATED) => Some("rdgsbase"),
        (0xae, Some(2), REPEATED) => Some("wrfsbase"),
        (0xae, Some(3), REPEATED) => Some("wrgsbase"),
        (0xae, Some(4), _) if is_in_memory => Some("xsave"),
        (0xae, Some(5), _) if is_in_memory => Some("xrstor"),
        (0xae, Some(6), _) if is_in_memory => Some("xsaveopt"),
        (0x10..=0x17 | 0x28..=0x2f | 0x38..=0x3a | 0x50..=0x7f | 0xc2 | 0xc4..=0xc6 | 0xd0..=0xfe, ..) => {
            Some("MMX or SSE")
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn instructions_that_kernels_use_have_names() {
        let named: [(&[u8], &str); 17] = [
            (&[0xcc], "int3"),
            (&[0x9b], "fwait"),
            (&[0x48, 0xcf], "iret"),
            (&[0xdb, 0xe2], "fnclex"),
            (&[0xdd, 0x06], "x87"),
            (&[0xf3, 0x48, 0x0f, 0xb8, 0xc7], "popcnt"),
            (&[0x66, 0xf3, 0x0f, 0xb8, 0xc0], "popcnt"),
            (&[0x65, 0x48, 0x0f, 0xc7, 0x0e], "cmpxchg16b"),
            (&[0xf0, 0x49, 0x0f, 0xc7, 0x4c, 0x24, 0x10], "cmpxchg16b"),
            (&[0x48, 0x0f, 0xae, 0x27], "xsave"),
            (&[0x48, 0x0f, 0xae, 0x2f], "xrstor"),
            (&[0x0f, 0x01, 0xca], "clac"),
            (&[0x0f, 0x01, 0xcb], "stac"),
            (&[0xf3, 0x48, 0x0f, 0xae, 0xd8], "wrgsbase"),
            (&[0x0f, 0xc7, 0xf0], "rdrand"),
            (&[0xc5, 0xfc, 0x77], "AVX or BMI"),
            (&[0x66, 0x0f, 0xef, 0xc0], "MMX or SSE"),
        ];
        for (bytes, expected) in named {
            assert_eq!(name(bytes), Some(expected), "{bytes:02x?}");
        }
    }

    #[test]
    fn others_are_told_by_their_bytes() {
        // cmpxchg8b, lfence, bsf and nothing: all of them are emulated, or none.
        for bytes in [&[0x0f, 0xc7, 0x0e][..], &[0x0f, 0xae, 0xe8], &[0x0f, 0xbc, 0xc0], &[]] {
            assert_eq!(name(bytes), None, "{bytes:02x?}");
        }
        let told = not_emulated(0xffff_8000, &[0x0f, 0xa2]);
        assert!(
            told.starts_with("KVM cannot emulate the instruction at rip 0xffff8000: bytes 0f a2"),
            "{told}"
        );
        assert!(!not_emulated(1, &[]).contains("bytes"));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..20)) {
            let _ = not_emulated(0, &bytes);
        }
    }
}
