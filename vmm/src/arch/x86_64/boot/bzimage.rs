//! Reads a bzImage: the compressed Linux kernel that distributions install as `vmlinuz`.
//!
//! It begins with real-mode code that a BIOS would start, with the setup header in it; what follows is a 64-bit program
//! that unpacks the kernel. That program is loaded, and started at its second entry point, 0x200 bytes on.

use std::io;

use super::kernel::{Fields, Image, Kernel, KernelError, LONGEST_CMDLINE, Segment, Start};

/// Where the setup header begins, in the file as in the boot parameters.
pub(super) const SETUP_HEADER: usize = 0x1f1;

/// Where the setup header ends at the latest: other boot parameters follow.
pub(super) const SETUP_HEADER_END: usize = 0x290;

/// Reads the setup header; what it describes is not touched.
///
/// # Errors
///
/// What is wrong with the file.
pub(super) fn parse(image: &impl Image) -> Result<Kernel, KernelError> {
    let len = image.len().map_err(KernelError::Unreadable)?;
    let mut start = [0; SETUP_HEADER_END];
    match image.read_exact_at(&mut start, 0) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(KernelError::Unknown),
        other => other.map_err(KernelError::Unreadable)?,
    }
    let fields = Fields(&start);
    if fields.half(BOOT_FLAG) != 0xaa55 || start[MAGIC..MAGIC + 4] != *b"HdrS" {
        return Err(KernelError::Unknown);
    }
    let version = fields.half(VERSION);
    if version < PROTOCOL_2_12 {
        return Err(KernelError::TooOld { version });
    }
    if fields.half(XLOADFLAGS) & KERNEL_64 == 0 {
        return Err(KernelError::No64BitEntry);
    }
    // The jump over the header, at its beginning, says how long it is.
    let header_end = MAGIC + usize::from(start[JUMP_DISTANCE]);
    if header_end < INIT_SIZE + 4 {
        return Err(damaged("its setup header is shorter than its version says"));
    }
    let setup_sectors = match start[SETUP_SECTORS] {
        // So it was before the field existed, and so it is still meant.
        0 => 4,
        sectors => u64::from(sectors),
    };
    // The first sector is not counted.
    let offset = (setup_sectors + 1) * 512;
    let file_bytes = len
        .checked_sub(offset)
        .filter(|bytes| *bytes > ENTRY_64)
        .ok_or(damaged("it ends before the kernel begins"))?;
    let preferred = fields.long(PREFERRED_ADDRESS);
    let address = if start[RELOCATABLE] == 0 {
        fields.word(CODE32_START).into()
    } else {
        preferred
    };
    let workspace_end = preferred
        .checked_add(fields.word(INIT_SIZE).into())
        .filter(|_| address.checked_add(file_bytes).is_some())
        .ok_or(damaged("it is to lie beyond the end of all addresses"))?;
    Ok(Kernel {
        segments: vec![Segment {
            offset,
            file_bytes,
            address,
            memory_bytes: file_bytes,
        }],
        // Loaded lower, it would move there first: `LOAD_PHYSICAL_ADDR` in `arch/x86/boot/compressed/head_64.S`.
        workspace: preferred..workspace_end,
        start: Start::Linux64 {
            entry: address + ENTRY_64,
            setup_header: start[SETUP_HEADER..header_end.min(SETUP_HEADER_END)].to_vec(),
        },
        cmdline_limit: (fields.word(CMDLINE_SIZE) as usize).min(LONGEST_CMDLINE),
        initrd_end: u64::from(fields.word(INITRD_ADDRESS_MAX)) + 1,
    })
}

/// The 64-bit entry point, from the start of what is loaded.
const ENTRY_64: u64 = 0x200;

/// The first version with `xloadflags`.
const PROTOCOL_2_12: u16 = 0x020c;

/// XLF_KERNEL_64: there is a 64-bit entry point.
const KERNEL_64: u16 = 1;

/// Offsets of fields (`Documentation/arch/x86/boot.rst`, "Details of Header Fields").
const SETUP_SECTORS: usize = 0x1f1;
const BOOT_FLAG: usize = 0x1fe;
const JUMP_DISTANCE: usize = 0x201;
const MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const CODE32_START: usize = 0x214;
const INITRD_ADDRESS_MAX: usize = 0x22c;
const RELOCATABLE: usize = 0x234;
const XLOADFLAGS: usize = 0x236;
const CMDLINE_SIZE: usize = 0x238;
const PREFERRED_ADDRESS: usize = 0x258;
const INIT_SIZE: usize = 0x260;

fn damaged(what: &'static str) -> KernelError {
    KernelError::Damaged { file: "bzImage", what }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A relocatable one that prefers 2 MiB, works in 64 KiB, and whose code begins with these bytes at its 64-bit entry.
    pub(in super::super) fn file(code: &[u8]) -> Vec<u8> {
        let mut file = vec![0; 1024];
        let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
        put(SETUP_SECTORS, &[1]);
        put(BOOT_FLAG, &[0x55, 0xaa, 0xeb, 0x6a]);
        put(MAGIC, b"HdrS");
        put(VERSION, &[0x0f, 0x02]);
        put(CODE32_START, &0x10_0000u32.to_le_bytes());
        put(INITRD_ADDRESS_MAX, &0x7fff_ffffu32.to_le_bytes());
        put(RELOCATABLE, &[1]);
        put(XLOADFLAGS, &[1]);
        put(CMDLINE_SIZE, &2047u32.to_le_bytes());
        put(PREFERRED_ADDRESS, &0x20_0000u64.to_le_bytes());
        put(INIT_SIZE, &0x1_0000u32.to_le_bytes());
        file.resize(1024 + 0x200, 0);
        file.extend(code);
        file
    }

    #[test]
    fn relocatable_kernel_goes_where_it_wants_to_run() {
        let kernel = parse(&file(b"code")).expect("a bzImage");
        assert_eq!(
            kernel.segments,
            [Segment {
                offset: 1024,
                file_bytes: 0x204,
                address: 0x20_0000,
                memory_bytes: 0x204
            }]
        );
        assert_eq!(kernel.workspace, 0x20_0000..0x21_0000);
        let Start::Linux64 { entry, setup_header } = kernel.start else {
            panic!("{:?}", kernel.start);
        };
        assert_eq!((entry, setup_header.len()), (0x20_0200, 0x26c - 0x1f1));
    }

    #[test]
    fn kernel_that_does_not_move_goes_where_it_was_linked() {
        let mut file = file(b"code");
        file[RELOCATABLE] = 0;
        let kernel = parse(&file).expect("a bzImage");
        assert_eq!(kernel.segments[0].address, 0x10_0000);
        assert_eq!(kernel.end(), 0x21_0000);
    }

    #[test]
    fn no_sectors_mean_four() {
        let mut file = file(&[0; 4096]);
        file[SETUP_SECTORS] = 0;
        assert_eq!(parse(&file).expect("a bzImage").segments[0].offset, 5 * 512);
    }

    #[test]
    fn old_protocol_is_refused_by_its_version() {
        let mut file = file(b"code");
        file[VERSION] = 0x0b;
        let error = parse(&file).expect_err("2.11");
        assert!(error.to_string().contains("2.11"), "{error}");
    }

    #[test]
    fn kernel_of_32_bits_is_refused() {
        let mut file = file(b"code");
        file[XLOADFLAGS] = 0;
        assert!(matches!(parse(&file), Err(KernelError::No64BitEntry)));
    }

    #[test]
    fn file_that_is_cut_short_is_refused() {
        let mut file = file(b"code");
        file.truncate(1024 + 0x200);
        assert!(matches!(parse(&file), Err(KernelError::Damaged { .. })));
    }

    #[test]
    fn short_header_is_refused() {
        let mut file = file(b"code");
        file[JUMP_DISTANCE] = 0x10;
        assert!(matches!(parse(&file), Err(KernelError::Damaged { .. })));
    }

    proptest! {
        #[test]
        fn damaged_files_never_panic(at in SETUP_HEADER..0x290, bytes: [u8; 8], cut in 0usize..0x700) {
            let mut file = file(b"code");
            file[at..at + 8].copy_from_slice(&bytes);
            if let Ok(kernel) = parse(&file) {
                prop_assert!(kernel.segments.iter().all(|segment| segment.offset + segment.file_bytes <= file.len() as u64));
                prop_assert!(kernel.cmdline_limit <= LONGEST_CMDLINE);
                let _ = kernel.end();
            }
            file.truncate(cut);
            let _ = parse(&file);
        }
    }
}
