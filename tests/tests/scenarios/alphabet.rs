//! The smallest guests with a PVH note, made by hand: one prints the alphabet on the serial port for ever.

use std::fs;
use std::path::Path;

use anyhow::Result;

/// Where they are loaded and entered.
pub(crate) const ENTRY: u32 = 0x10_0000;

/// 32-bit code: `a` to `z` with a pause after each, a line end, again.
const CODE: [u8; 29] = [
    0xb3,
    b'a', // start: mov bl, 'a'
    0x66,
    0xba,
    0xf8,
    0x03, // next: mov dx, 0x3f8
    0x88,
    0xd8, // mov al, bl
    0xee, // out dx, al
    0xb9,
    0xd0,
    0x07,
    0x00,
    0x00, // mov ecx, 2000
    0x49, // pause: dec ecx
    0x75,
    0xfd, // jnz pause
    0xfe,
    0xc3, // inc bl
    0x80,
    0xfb,
    b'z' + 1, // cmp bl, 'z' + 1
    0x75,
    0xea, // jne next
    0xb0,
    b'\n', // mov al, line feed
    0xee,  // out dx, al
    0xeb,
    0xe3, // jmp start
];

const HEADER: usize = 64;
const SEGMENT: usize = 56;
const NOTE_AT: usize = HEADER + 2 * SEGMENT;
const CODE_AT: usize = 0x1000;

/// Writes the guest that prints the alphabet into a folder and gives its path.
pub(crate) fn file(folder: &Path) -> Result<String> {
    file_of(folder, "alphabet.elf", &CODE)
}

/// Writes a guest of this 32-bit code, which starts at [`ENTRY`] in ring 0, into a folder and gives its path.
pub(crate) fn file_of(folder: &Path, name: &str, code: &[u8]) -> Result<String> {
    let file = folder.join(name);
    fs::write(&file, elf(code))?;
    Ok(file.display().to_string())
}

/// The guest as an ELF file: one segment, and one note (Xen, type 18) that names the 32-bit entry.
fn elf(code: &[u8]) -> Vec<u8> {
    let note = [
        &4_u32.to_le_bytes()[..],
        &8_u32.to_le_bytes(),
        &18_u32.to_le_bytes(),
        b"Xen\0",
        &u64::from(ENTRY).to_le_bytes(),
    ]
    .concat();
    let mut file = header();
    file.extend(segment(1, CODE_AT, u64::from(ENTRY), code.len()));
    file.extend(segment(4, NOTE_AT, 0, note.len()));
    file.extend(note);
    file.resize(CODE_AT, 0);
    file.extend(code);
    file
}

fn header() -> Vec<u8> {
    let mut header = b"\x7fELF\x02\x01\x01".to_vec();
    header.resize(16, 0);
    header.extend(2_u16.to_le_bytes()); // executable
    header.extend(62_u16.to_le_bytes()); // x86-64
    header.extend(1_u32.to_le_bytes());
    header.extend(u64::from(ENTRY).to_le_bytes());
    header.extend((HEADER as u64).to_le_bytes());
    header.extend(0_u64.to_le_bytes()); // no sections
    header.extend(0_u32.to_le_bytes());
    for half in [HEADER, SEGMENT, 2, 64, 0, 0] {
        header.extend((half as u16).to_le_bytes());
    }
    header
}

fn segment(kind: u32, offset: usize, address: u64, size: usize) -> Vec<u8> {
    let mut segment = kind.to_le_bytes().to_vec();
    segment.extend(5_u32.to_le_bytes()); // read, execute
    for word in [offset as u64, address, address, size as u64, size as u64, 4] {
        segment.extend(word.to_le_bytes());
    }
    segment
}
