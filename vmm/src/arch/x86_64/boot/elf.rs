//! Reads an ELF kernel: which parts go where, and where it starts: its PVH entry, else that of a 64-bit Linux.
//!
//! linux-loader has such a reader too; this one also takes 32-bit files, leaves nothing of a used memory in what a segment
//! zeroes, and can say what is wrong with the file.

use std::io;

use super::kernel::{Fields, Image, Kernel, KernelError, LONGEST_CMDLINE, Segment, Start};

/// Reads headers and notes; the segments' contents are not touched.
///
/// # Errors
///
/// What is wrong with the file.
pub(super) fn parse(image: &impl Image) -> Result<Kernel, KernelError> {
    let len = image.len().map_err(KernelError::Unreadable)?;
    let header = Header::read(image)?;
    let mut segments = Vec::new();
    let mut pvh = None;
    let mut needs_interpreter = false;
    for program in header.programs(image, len)? {
        let in_file = program
            .offset
            .checked_add(program.file_bytes)
            .is_some_and(|end| end <= len);
        match program.kind {
            PT_LOAD if program.memory_bytes > 0 => {
                if !in_file || program.file_bytes > program.memory_bytes {
                    return Err(damaged("a segment reaches beyond the end of the file"));
                }
                segments.push(Segment {
                    offset: program.offset,
                    file_bytes: program.file_bytes,
                    address: program.address,
                    memory_bytes: program.memory_bytes,
                });
            }
            PT_INTERP => needs_interpreter = true,
            PT_NOTE if pvh.is_none() => {
                if !in_file {
                    return Err(damaged("its notes reach beyond the end of the file"));
                }
                pvh = pvh_entry(&program.read(image)?, program.align);
            }
            _ => {}
        }
    }
    if segments.is_empty() {
        return Err(damaged("it has nothing to load"));
    }
    if overlap(&segments) {
        return Err(damaged("two of its segments overlap in memory"));
    }
    let start = match (pvh, header.machine) {
        (Some(entry), _) => Start::Pvh(entry),
        // A vmlinux: its entry is `startup_64`, as a physical address. One that could lie anywhere, as programs do, is none.
        (None, EM_X86_64) if header.wide && header.kind == ET_EXEC && !needs_interpreter => Start::Linux64 {
            entry: header.entry,
            setup_header: Vec::new(),
        },
        (None, _) => return Err(KernelError::NoEntry),
    };
    Ok(Kernel {
        segments,
        workspace: 0..0,
        cmdline_limit: match start {
            // PVH sets no limit.
            Start::Pvh(_) => LONGEST_CMDLINE,
            Start::Linux64 { .. } => LINUX_CMDLINE_LIMIT,
        },
        initrd_end: u64::MAX,
        start,
    })
}

/// Whether memory would get the same bytes twice. Where none does, no more is copied than the guest has memory, however many segments there are.
fn overlap(segments: &[Segment]) -> bool {
    let mut spans: Vec<_> = segments
        .iter()
        .map(|segment| (segment.address, segment.address.saturating_add(segment.memory_bytes)))
        .collect();
    spans.sort_unstable();
    spans.windows(2).any(|pair| pair[1].0 < pair[0].1)
}

/// `COMMAND_LINE_SIZE` of Linux on x86, without the terminating zero: a vmlinux does not say it, and cuts off what is longer.
const LINUX_CMDLINE_LIMIT: usize = 2047;

fn damaged(what: &'static str) -> KernelError {
    KernelError::Damaged { file: "ELF file", what }
}

const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;
const EM_386: u16 = 3;
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_INTERP: u32 = 3;
const PT_NOTE: u32 = 4;

/// XEN_ELFNOTE_PHYS32_ENTRY (`xen/include/public/elfnote.h`).
const PHYS32_ENTRY: u32 = 18;

/// Notes are a few hundred bytes; this much of them is looked at.
const NOTES_LIMIT: u64 = 64 << 10;

/// All program headers together, as Linux limits them (`load_elf_phdrs` in `fs/binfmt_elf.c`): kernels have about five.
const TABLE_LIMIT: usize = 64 << 10;

/// Where a field lies depends on the class.
struct Header {
    wide: bool,
    /// `e_type`.
    kind: u16,
    machine: u16,
    /// `e_entry`.
    entry: u64,
    program_offset: u64,
    program_size: usize,
    program_count: usize,
}

struct Program {
    kind: u32,
    offset: u64,
    address: u64,
    file_bytes: u64,
    memory_bytes: u64,
    align: u64,
}

impl Header {
    fn read(image: &impl Image) -> Result<Self, KernelError> {
        let mut ident = [0; 16];
        match image.read_exact_at(&mut ident, 0) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(KernelError::Unknown),
            other => other.map_err(KernelError::Unreadable)?,
        }
        let wide = match &ident[..6] {
            [0x7f, b'E', b'L', b'F', 1, 1] => false,
            [0x7f, b'E', b'L', b'F', 2, 1] => true,
            _ => return Err(KernelError::Unknown),
        };
        let mut bytes = vec![0; if wide { 64 } else { 52 }];
        image
            .read_exact_at(&mut bytes, 0)
            .map_err(|_| damaged("its header is cut short"))?;
        let fields = Fields(&bytes);
        let (kind, machine) = (fields.half(16), fields.half(18));
        if !matches!(kind, ET_EXEC | ET_DYN) || !matches!(machine, EM_386 | EM_X86_64) {
            return Err(KernelError::WrongMachine { kind, machine });
        }
        let (entry, program_offset, sizes) = if wide {
            (fields.long(24), fields.long(32), 54)
        } else {
            (fields.word(24).into(), fields.word(28).into(), 42)
        };
        Ok(Self {
            wide,
            kind,
            machine,
            entry,
            program_offset,
            program_size: fields.half(sizes).into(),
            program_count: fields.half(sizes + 2).into(),
        })
    }

    fn programs(&self, image: &impl Image, len: u64) -> Result<Vec<Program>, KernelError> {
        let right = if self.wide { 56 } else { 32 };
        if self.program_size != right {
            return Err(damaged("its program headers have not the size of this class"));
        }
        let size = self.program_size * self.program_count;
        if size > TABLE_LIMIT {
            return Err(damaged("it has more than 64 KiB of program headers"));
        }
        let end = self.program_offset.checked_add(size as u64);
        if end.is_none_or(|end| end > len) {
            return Err(damaged("its program headers are cut short"));
        }
        let mut table = vec![0; size];
        image
            .read_exact_at(&mut table, self.program_offset)
            .map_err(KernelError::Unreadable)?;
        let program = |bytes: &[u8]| {
            let fields = Fields(bytes);
            if self.wide {
                Program {
                    kind: fields.word(0),
                    offset: fields.long(8),
                    address: fields.long(24),
                    file_bytes: fields.long(32),
                    memory_bytes: fields.long(40),
                    align: fields.long(48),
                }
            } else {
                Program {
                    kind: fields.word(0),
                    offset: fields.word(4).into(),
                    address: fields.word(12).into(),
                    file_bytes: fields.word(16).into(),
                    memory_bytes: fields.word(20).into(),
                    align: fields.word(28).into(),
                }
            }
        };
        Ok(table.chunks_exact(self.program_size).map(program).collect())
    }
}

impl Program {
    fn read(&self, image: &impl Image) -> Result<Vec<u8>, KernelError> {
        let mut bytes = vec![0; self.file_bytes.min(NOTES_LIMIT) as usize];
        image
            .read_exact_at(&mut bytes, self.offset)
            .map_err(KernelError::Unreadable)?;
        Ok(bytes)
    }
}

/// Finds the PVH entry among the notes of one segment.
fn pvh_entry(notes: &[u8], align: u64) -> Option<u32> {
    // Names and contents are padded to four bytes, also in most 64-bit files; eight only where the segment says so.
    let align = if align == 8 { 8 } else { 4 };
    let mut rest = notes;
    while rest.len() >= 12 {
        let fields = Fields(rest);
        let (name_len, content_len, kind) = (fields.word(0) as usize, fields.word(4) as usize, fields.word(8));
        let content_start = 12usize.checked_add(name_len)?.checked_next_multiple_of(align)?;
        let content_end = content_start.checked_add(content_len)?;
        let name = rest.get(12..12 + name_len)?;
        let content = rest.get(content_start..content_end)?;
        if kind == PHYS32_ENTRY && name == b"Xen\0" && content_len >= 4 {
            return Some(Fields(content).word(0));
        }
        rest = rest.get(content_end.checked_next_multiple_of(align)?..)?;
    }
    None
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    fn note() -> Vec<u8> {
        let mut note = Vec::new();
        for word in [4u32, 4, PHYS32_ENTRY] {
            note.extend(word.to_le_bytes());
        }
        note.extend(b"Xen\0");
        note.extend(0x10_0000u32.to_le_bytes());
        note
    }

    /// A 64-bit file with a note at 0x100 and eight bytes of code at 0x200 that go to 1 MiB.
    pub(in super::super) fn wide() -> Vec<u8> {
        let mut file = vec![0u8; 0x208];
        file[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1]);
        file[16..20].copy_from_slice(&[2, 0, 62, 0]);
        file[32] = 64;
        file[54] = 56;
        file[56] = 2;
        for (at, kind, offset, address, file_bytes, memory_bytes) in [
            (64, PT_NOTE, 0x100u64, 0u64, 20u64, 20u64),
            (120, PT_LOAD, 0x200, 0x10_0000, 8, 64),
        ] {
            file[at..at + 4].copy_from_slice(&kind.to_le_bytes());
            for (field, value) in [
                (8, offset),
                (24, address),
                (32, file_bytes),
                (40, memory_bytes),
                (48, 4),
            ] {
                file[at + field..at + field + 8].copy_from_slice(&value.to_le_bytes());
            }
        }
        file[0x100..0x114].copy_from_slice(&note());
        file
    }

    /// The same as a 32-bit file.
    pub(in super::super) fn narrow() -> Vec<u8> {
        let mut file = vec![0u8; 0x208];
        file[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', 1, 1]);
        file[16..20].copy_from_slice(&[2, 0, 3, 0]);
        file[28] = 52;
        file[42] = 32;
        file[44] = 2;
        for (at, words) in [
            (52, [PT_NOTE, 0x100, 0, 0, 20, 20, 0, 4]),
            (84, [PT_LOAD, 0x200, 0, 0x10_0000, 8, 64, 0, 4]),
        ] {
            for (index, word) in words.into_iter().enumerate() {
                file[at + index * 4..at + index * 4 + 4].copy_from_slice(&word.to_le_bytes());
            }
        }
        file[0x100..0x114].copy_from_slice(&note());
        file
    }

    fn expected() -> Kernel {
        Kernel {
            segments: vec![Segment {
                offset: 0x200,
                file_bytes: 8,
                address: 0x10_0000,
                memory_bytes: 64,
            }],
            workspace: 0..0,
            start: Start::Pvh(0x10_0000),
            cmdline_limit: LONGEST_CMDLINE,
            initrd_end: u64::MAX,
        }
    }

    #[test]
    fn both_classes_are_read() {
        assert_eq!(parse(&wide()).expect("64 bits"), expected());
        assert_eq!(parse(&narrow()).expect("32 bits"), expected());
    }

    #[test]
    fn kernel_of_another_machine_is_refused() {
        let mut file = wide();
        file[18] = 183;
        assert!(matches!(
            parse(&file),
            Err(KernelError::WrongMachine { machine: 183, .. })
        ));
    }

    #[test]
    fn wide_file_without_the_note_starts_as_a_vmlinux() {
        let mut file = wide();
        file[0x100 + 8] = 17;
        file[24..32].copy_from_slice(&0x10_0004u64.to_le_bytes());
        let start = parse(&file).expect("a vmlinux").start;
        assert!(matches!(start, Start::Linux64 { entry: 0x10_0004, .. }), "{start:?}");
    }

    #[test]
    fn narrow_file_without_the_note_is_refused() {
        let mut file = narrow();
        file[0x100 + 8] = 17;
        assert!(matches!(parse(&file), Err(KernelError::NoEntry)));
    }

    #[test]
    fn segment_beyond_the_file_is_refused() {
        let mut file = wide();
        file[120 + 32] = 9;
        assert!(matches!(parse(&file), Err(KernelError::Damaged { .. })));
    }

    /// What is wrong with this file.
    fn damage(file: &Vec<u8>) -> &'static str {
        match parse(file) {
            Err(KernelError::Damaged { what, .. }) => what,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn program_headers_of_another_size_are_refused() {
        let (mut longer, mut shorter, mut narrow) = (wide(), wide(), narrow());
        longer[54..56].copy_from_slice(&(16u16 << 10).to_le_bytes());
        shorter[54] = 55;
        narrow[42] = 56;
        for file in [longer, shorter, narrow] {
            assert!(damage(&file).contains("size of this class"));
        }
    }

    #[test]
    fn table_of_program_headers_above_64_kib_is_refused() {
        let mut file = wide();
        // All of them are in the file.
        file.resize(4 << 20, 0);
        file[56..58].copy_from_slice(&1171u16.to_le_bytes());
        assert!(damage(&file).contains("64 KiB"));
        file[56..58].copy_from_slice(&1170u16.to_le_bytes());
        // What follows the second one is no header, and is passed over or is damaged: it is not too large.
        assert!(!matches!(parse(&file), Err(KernelError::Damaged { what, .. }) if what.contains("64 KiB")));
    }

    /// The file with a second segment, in place of its notes.
    fn with_segment(address: u64) -> Vec<u8> {
        let mut file = wide();
        let segment = file[120..176].to_vec();
        file[64..120].copy_from_slice(&segment);
        file[64 + 24..64 + 32].copy_from_slice(&address.to_le_bytes());
        file
    }

    #[test]
    fn segments_that_overlap_in_memory_are_refused() {
        for address in [0x10_0000, 0x10_003f, 0x10_0000 - 63] {
            assert!(damage(&with_segment(address)).contains("overlap"), "{address:#x}");
        }
        for address in [0x10_0040, 0x10_0000 - 64] {
            assert_eq!(parse(&with_segment(address)).expect("a vmlinux").segments.len(), 2);
        }
    }

    #[test]
    fn foreign_notes_before_the_entry_are_skipped() {
        let mut notes = Vec::new();
        for word in [4u32, 3, 1] {
            notes.extend(word.to_le_bytes());
        }
        notes.extend(b"GNU\0abc\0");
        notes.extend(note());
        assert_eq!(pvh_entry(&notes, 4), Some(0x10_0000));
    }

    proptest! {
        #[test]
        fn damaged_files_never_panic(at in 0usize..0x208, value: u8, cut in 0usize..0x209) {
            for mut file in [wide(), narrow()] {
                file[at] = value;
                file.truncate(cut);
                let _ = parse(&file);
            }
        }

        #[test]
        fn random_notes_never_panic(notes in proptest::collection::vec(any::<u8>(), 0..200), align in 0u64..16) {
            let _ = pvh_entry(&notes, align);
        }
    }
}
