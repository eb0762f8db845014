//! The few objects of ACPI's machine language that our devices need (ACPI 6.5, chapter 20), and resources (6.4).
//!
//! Each function returns an object's bytes; objects that hold others take the bytes of those, one after another.

/// `Name (NAME, value)`
pub(super) fn name(name: [u8; 4], value: &[u8]) -> Vec<u8> {
    [&[0x08], &name[..], value].concat()
}

/// `Scope (\NAME) { ... }`
pub(super) fn scope(name: [u8; 4], objects: &[Vec<u8>]) -> Vec<u8> {
    package_of(&[0x10], &[b"\\", &name[..], &objects.concat()].concat())
}

/// `Device (NAME) { ... }`
pub(super) fn device(name: [u8; 4], objects: &[Vec<u8>]) -> Vec<u8> {
    package_of(&[0x5b, 0x82], &[&name[..], &objects.concat()].concat())
}

/// `Method (NAME, arguments, Serialized) { ... }`
pub(super) fn method(name: [u8; 4], arguments: u8, objects: &[Vec<u8>]) -> Vec<u8> {
    const SERIALIZED: u8 = 1 << 3;
    package_of(
        &[0x14],
        &[&name[..], &[arguments | SERIALIZED], &objects.concat()].concat(),
    )
}

/// `Notify (NAME, value)`
pub(super) fn notify(name: [u8; 4], value: u8) -> Vec<u8> {
    [&[0x86], &name[..], &integer(value.into())].concat()
}

/// `Package () { ... }`, of at most 255 elements.
pub(super) fn package(elements: &[Vec<u8>]) -> Vec<u8> {
    package_of(&[0x12], &[&[elements.len() as u8], &elements.concat()[..]].concat())
}

/// An integer, in its shortest form.
pub(super) fn integer(value: u64) -> Vec<u8> {
    let bytes = value.to_le_bytes();
    match value {
        0 => vec![0x00],
        1 => vec![0x01],
        2..=0xff => vec![0x0a, bytes[0]],
        0x100..=0xffff => [&[0x0b], &bytes[..2]].concat(),
        0x1_0000..=0xffff_ffff => [&[0x0c], &bytes[..4]].concat(),
        _ => [&[0x0e], &bytes[..]].concat(),
    }
}

/// A string of ASCII.
pub(super) fn string(text: &str) -> Vec<u8> {
    [&[0x0d], text.as_bytes(), &[0]].concat()
}

/// `EisaId ("PNP0501")`: three capital letters and four hexadecimal digits, packed.
pub(super) fn eisa_id(id: [u8; 7]) -> Vec<u8> {
    let letter = |at: usize| u32::from(id[at] & 0x1f);
    let digits = id[3..].iter().fold(0, |value, digit| {
        value << 4 | char::from(*digit).to_digit(16).unwrap_or(0)
    });
    let packed = letter(0) << 26 | letter(1) << 21 | letter(2) << 16 | digits;
    integer(packed.swap_bytes().into())
}

/// `ResourceTemplate () { ... }`
pub(super) fn resources(resources: &[Vec<u8>]) -> Vec<u8> {
    /// The end, and a checksum of 0, which nobody checks.
    const END: [u8; 2] = [0x79, 0];
    let bytes = [&resources.concat()[..], &END].concat();
    package_of(&[0x11], &[&integer(bytes.len() as u64)[..], &bytes].concat())
}

/// `IO (Decode16, first, first, 1, count)`
pub(super) fn ports(first: u16, count: u8) -> Vec<u8> {
    const DECODES_16_BITS: u8 = 1;
    let [low, high] = first.to_le_bytes();
    vec![0x47, DECODES_16_BITS, low, high, low, high, 1, count]
}

/// `Memory32Fixed (ReadWrite, start, len)`
pub(super) fn memory(start: u32, len: u32) -> Vec<u8> {
    const READ_WRITE: u8 = 1;
    [&[0x86, 9, 0, READ_WRITE], &start.to_le_bytes()[..], &len.to_le_bytes()].concat()
}

/// `Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive) { line }`
pub(super) fn edge_interrupt(line: u32) -> Vec<u8> {
    const CONSUMER: u8 = 1 << 0;
    const EDGE: u8 = 1 << 1;
    [&[0x89, 6, 0, CONSUMER | EDGE, 1], &line.to_le_bytes()[..]].concat()
}

/// An object that says how long it is: the opcode, then a length that counts itself.
fn package_of(opcode: &[u8], content: &[u8]) -> Vec<u8> {
    let length = match content.len() {
        ..0x3f => vec![content.len() as u8 + 1],
        0x3f..0xffe => long_length(content.len() + 2, 1),
        0xffe..0xf_fffd => long_length(content.len() + 3, 2),
        _ => long_length(content.len() + 4, 3),
    };
    [opcode, &length, content].concat()
}

/// How many bytes follow the first one, with the lowest four bits; then those bytes.
fn long_length(length: usize, following: u8) -> Vec<u8> {
    let first = following << 6 | (length & 0xf) as u8;
    let rest = (0..following).map(|index| (length >> (4 + 8 * index)) as u8);
    std::iter::once(first).chain(rest).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn objects_are_encoded_as_the_specification_says() {
        assert_eq!(name(*b"_UID", &integer(2)), b"\x08_UID\x0a\x02");
        assert_eq!(eisa_id(*b"PNP0501"), [0x0c, 0x41, 0xd0, 0x05, 0x01]);
        assert_eq!(package(&[integer(5), integer(0)]), [0x12, 5, 2, 0x0a, 5, 0]);
        assert_eq!(
            resources(&[ports(0x3f8, 8)]),
            [0x11, 13, 0x0a, 10, 0x47, 1, 0xf8, 3, 0xf8, 3, 1, 8, 0x79, 0]
        );
        assert_eq!(device(*b"COM1", &[]), b"\x5b\x82\x05COM1");
    }

    /// Reads a length back: its value and how many bytes it takes.
    fn length(bytes: &[u8]) -> (usize, usize) {
        let following = usize::from(bytes[0] >> 6);
        let first = usize::from(bytes[0] & if following == 0 { 0x3f } else { 0xf });
        let value = (0..following).fold(first, |value, index| {
            value | usize::from(bytes[1 + index]) << (4 + 8 * index)
        });
        (value, following + 1)
    }

    proptest! {
        #[test]
        fn lengths_count_themselves_and_what_follows(content in proptest::collection::vec(any::<u8>(), 0..5000)) {
            let bytes = package_of(&[0x10], &content);
            let (value, width) = length(&bytes[1..]);
            prop_assert_eq!(value, bytes.len() - 1);
            prop_assert_eq!(&bytes[1 + width..], &content);
        }
    }

    #[test]
    fn lengths_are_right_where_their_form_changes() {
        for len in [0x3e, 0x3f, 0xffd, 0xffe, 0xf_fffc, 0xf_fffd] {
            let bytes = package_of(&[0x10], &vec![0; len]);
            assert_eq!(length(&bytes[1..]).0, bytes.len() - 1, "content of {len:#x} bytes");
        }
    }
}
