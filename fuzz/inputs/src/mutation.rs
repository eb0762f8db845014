//! How an input is made of samples.

use crate::random::Random;

/// Inputs do not grow beyond this, unless a sample is longer.
const LONGEST: usize = 64 << 10;

/// Numbers at which code that counts goes wrong.
const EDGES: [u64; 20] = [
    0,
    1,
    2,
    4,
    7,
    16,
    64,
    0x7f,
    0x80,
    0xff,
    0x100,
    0x1000,
    0x7fff,
    0xffff,
    0x7fff_ffff,
    0xffff_ffff,
    1 << 32,
    0x7fff_ffff_ffff_ffff,
    u64::MAX - 0xfff,
    u64::MAX,
];

/// An input: a sample with some changes, now and then nothing but random bytes.
pub(crate) fn input(random: &mut Random, samples: &[Vec<u8>]) -> Vec<u8> {
    if samples.is_empty() || random.one_in(32) {
        let length = random.below(1024);
        return (0..length).map(|_| random.byte()).collect();
    }
    let mut bytes = samples[random.below(samples.len())].clone();
    // One change half of the time, two a quarter, and so on: many at once hardly leave anything that means something.
    loop {
        change(&mut bytes, random, samples);
        if random.one_in(2) {
            return bytes;
        }
    }
}

fn change(bytes: &mut Vec<u8>, random: &mut Random, samples: &[Vec<u8>]) {
    if bytes.is_empty() {
        bytes.push(random.byte());
        return;
    }
    let at = random.below(bytes.len());
    match random.below(12) {
        0 => bytes[at] ^= 1 << random.below(8),
        1 => bytes[at] = random.byte(),
        2 => bytes[at] = bytes[at].wrapping_add(1),
        3 => bytes[at] = bytes[at].wrapping_sub(1),
        // A number of 1, 2, 4 or 8 bytes, most often where one may be expected.
        4..=6 => {
            let width = 1 << random.below(4);
            let at = if random.one_in(4) { at } else { at / width * width };
            let edge = EDGES[random.below(EDGES.len())];
            let room = width.min(bytes.len() - at);
            bytes[at..at + room].copy_from_slice(&edge.to_le_bytes()[..room]);
        }
        7 => bytes.truncate(at),
        8 => {
            let end = at + random.below(bytes.len() - at + 1);
            bytes.drain(at..end);
        }
        9 => insert(bytes, at, random),
        // A part of it once more, elsewhere.
        10 => {
            let part = part_of(bytes, random);
            let room = part.len().min(bytes.len() - at);
            bytes[at..at + room].copy_from_slice(&part[..room]);
        }
        // It goes on as another sample does.
        _ => {
            let other = &samples[random.below(samples.len())];
            bytes.truncate(at);
            bytes.extend(other.iter().skip(at));
        }
    }
}

fn insert(bytes: &mut Vec<u8>, at: usize, random: &mut Random) {
    let part = if random.one_in(2) {
        part_of(bytes, random)
    } else {
        let value = random.byte();
        vec![value; random.below(64)]
    };
    if bytes.len() + part.len() <= LONGEST {
        bytes.splice(at..at, part);
    }
}

fn part_of(bytes: &[u8], random: &mut Random) -> Vec<u8> {
    let from = random.below(bytes.len());
    let length = random.below((bytes.len() - from).min(256) + 1);
    bytes[from..from + length].to_vec()
}
