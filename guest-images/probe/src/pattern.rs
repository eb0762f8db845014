//! What pages hold, and the oracle that tells whether they still hold it.
//!
//! Every page has a body, a function of seed, area and page number. A page of the work area also carries a
//! stamp, rewritten by each write: page number and version, and words derived from both at the start of the
//! page and once every 512 bytes, so that a page that arrived in parts, late or in another's place does not pass.
//! `core` only: the guest compiles this file too.
//!
//! ```text
//! word    0      1         2 .. 8    64   128   192 .. 448     all others
//!         page   version   derived   derived, one each         body
//! ```

use core::fmt;

use crate::cmdline::Fill;
use crate::rng::{Rng, mix};

/// A page as the guest sees it: 4096 bytes in words.
pub type Page = [u64; PAGE_WORDS];

/// Words in a page.
pub const PAGE_WORDS: usize = 512;

/// Which part of the guest's memory a page belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Area {
    /// Written once.
    Fill,
    /// Written again and again.
    Work,
}

/// What is wrong with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// It holds another version of itself: a write was lost, or one was undone.
    Stale {
        /// The version it holds.
        got: u32,
    },
    /// It holds another page.
    Foreign {
        /// The number of the page it holds.
        page: u64,
        /// The version of that page.
        got: u32,
    },
    /// All words that were looked at are zero.
    Zero,
    /// It holds parts that do not belong together.
    Torn,
    /// The stamp is right, the rest of the page is not; or a page of the fill area is not what was filled in.
    Body,
}

impl Damage {
    /// One word for a line on the console.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Stale { .. } => "stale",
            Self::Foreign { .. } => "foreign",
            Self::Zero => "zero",
            Self::Torn => "torn",
            Self::Body => "body",
        }
    }
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Writes the body of page number `number` of `area` over the whole page.
pub fn write_body(page: &mut Page, fill: Fill, seed: u64, area: Area, number: u64) {
    let mut words = Body::new(fill, seed, area, number);
    for word in page.iter_mut() {
        *word = words.next_word();
    }
}

/// Checks a page of the fill area in full.
///
/// # Errors
/// What is wrong with it.
pub fn check_fill(page: &Page, fill: Fill, seed: u64, number: u64) -> Result<(), Damage> {
    let mut words = Body::new(fill, seed, Area::Fill, number);
    let mut differences = 0;
    for &word in page {
        differences |= word ^ words.next_word();
    }
    match differences {
        0 => Ok(()),
        _ if page.iter().all(|&word| word == 0) => Err(Damage::Zero),
        _ => Err(Damage::Body),
    }
}

/// Stamps a page of the work area: it now holds `version`.
#[inline]
pub fn stamp(page: &mut Page, seed: u64, number: u64, version: u32) {
    let key = stamp_key(seed, number, version);
    page[0] = number;
    page[1] = u64::from(version);
    for (at, word) in page.iter_mut().enumerate().take(HEADER_WORDS).skip(2) {
        *word = derived(key, at);
    }
    for at in (STRIDE..PAGE_WORDS).step_by(STRIDE) {
        page[at] = derived(key, at);
    }
}

/// Checks the stamp of a page of the work area: it must hold exactly `want`.
///
/// # Errors
/// What is wrong with it.
#[inline]
pub fn check_stamp(page: &Page, seed: u64, number: u64, want: u32) -> Result<(), Damage> {
    if stamp_differences(page, seed, number, want) == 0 {
        return Ok(());
    }
    Err(diagnose(page, seed, number))
}

/// Checks a page of the work area in full: stamp and body.
///
/// # Errors
/// What is wrong with it.
pub fn check_work(page: &Page, fill: Fill, seed: u64, number: u64, want: u32) -> Result<(), Damage> {
    check_stamp(page, seed, number, want)?;
    let mut words = Body::new(fill, seed, Area::Work, number);
    let mut differences = 0;
    for (at, &word) in page.iter().enumerate() {
        let difference = word ^ words.next_word();
        if at >= HEADER_WORDS && !at.is_multiple_of(STRIDE) {
            differences |= difference;
        }
    }
    if differences == 0 { Ok(()) } else { Err(Damage::Body) }
}

/// Words of the stamp at the start of the page.
const HEADER_WORDS: usize = 8;

/// Words from one word of the stamp to the next, after the start.
const STRIDE: usize = 64;

#[inline]
fn stamp_key(seed: u64, number: u64, version: u32) -> u64 {
    mix(mix(seed ^ number.rotate_left(32)).wrapping_add(u64::from(version)))
}

/// Cheap, and different in each place: the key is already scrambled.
#[inline]
fn derived(key: u64, at: usize) -> u64 {
    key.rotate_left(at as u32 % 61) ^ (at as u64 + 1).wrapping_mul(0xd6e8_feb8_6659_fd93)
}

#[inline]
fn stamp_differences(page: &Page, seed: u64, number: u64, version: u32) -> u64 {
    let key = stamp_key(seed, number, version);
    let mut differences = (page[0] ^ number) | (page[1] ^ u64::from(version));
    for (at, &word) in page.iter().enumerate().take(HEADER_WORDS).skip(2) {
        differences |= word ^ derived(key, at);
    }
    for at in (STRIDE..PAGE_WORDS).step_by(STRIDE) {
        differences |= page[at] ^ derived(key, at);
    }
    differences
}

#[cold]
fn diagnose(page: &Page, seed: u64, number: u64) -> Damage {
    let stamped = (0..HEADER_WORDS).chain((STRIDE..PAGE_WORDS).step_by(STRIDE));
    if stamped.into_iter().all(|at| page[at] == 0) {
        return Damage::Zero;
    }
    let (holds, Ok(got)) = (page[0], u32::try_from(page[1])) else {
        return Damage::Torn;
    };
    if stamp_differences(page, seed, holds, got) != 0 {
        return Damage::Torn;
    }
    match holds == number {
        true => Damage::Stale { got },
        false => Damage::Foreign { page: holds, got },
    }
}

/// The words of a page's body, one after the other.
struct Body {
    fill: Fill,
    rng: Rng,
}

impl Body {
    #[inline]
    fn new(fill: Fill, seed: u64, area: Area, number: u64) -> Self {
        let stream = match area {
            Area::Fill => number << 1,
            Area::Work => number << 1 | 1,
        };
        Self {
            fill,
            rng: Rng::new(seed, stream),
        }
    }

    #[inline]
    fn next_word(&mut self) -> u64 {
        match self.fill {
            Fill::Zero => 0,
            Fill::Random => self.rng.word(),
            Fill::Text => text_word(self.rng.word()),
        }
    }
}

/// Eight characters of a log: usually one of a few words, now and then a number.
#[inline]
fn text_word(random: u64) -> u64 {
    if (random >> 56).is_multiple_of(NUMBER_EVERY) {
        return hexadecimal(random as u32);
    }
    u64::from_le_bytes(*TOKENS[(random >> 40) as usize % TOKENS.len()])
}

/// The eight hexadecimal digits of a number, worked out in all bytes of a word at once.
#[inline]
fn hexadecimal(number: u32) -> u64 {
    let mut digits = u64::from(number);
    digits = (digits | digits << 16) & 0x0000_ffff_0000_ffff;
    digits = (digits | digits << 8) & 0x00ff_00ff_00ff_00ff;
    digits = (digits | digits << 4) & 0x0f0f_0f0f_0f0f_0f0f;
    let letters = (digits + 0x0606_0606_0606_0606) >> 4 & 0x0101_0101_0101_0101;
    digits + 0x3030_3030_3030_3030 + letters * 0x27
}

/// One word in this many is a number.
const NUMBER_EVERY: u64 = 4;

const TOKENS: [&[u8; 8]; 32] = [
    b"request ",
    b"from the",
    b" server ",
    b"accepted",
    b" status=",
    b"warning ",
    b"timeout ",
    b" after a",
    b" retry: ",
    b"connect ",
    b"session ",
    b" closed\n",
    b"info at ",
    b"storage ",
    b" volume ",
    b"attached",
    b" worker ",
    b"process ",
    b"finished",
    b" in time",
    b" queue: ",
    b"message ",
    b"deliver ",
    b"to host ",
    b" update ",
    b"version ",
    b" of user",
    b" config ",
    b"changed\n",
    b"network ",
    b" packet ",
    b"dropped\n",
];

#[cfg(test)]
mod tests {
    use super::*;

    const SEED: u64 = 42;

    fn written(fill: Fill, number: u64, version: u32) -> Box<Page> {
        let mut page = Box::new([0; PAGE_WORDS]);
        write_body(&mut page, fill, SEED, Area::Work, number);
        stamp(&mut page, SEED, number, version);
        page
    }

    #[test]
    fn a_page_as_written_passes_each_check() {
        for fill in [Fill::Random, Fill::Zero, Fill::Text] {
            let mut page = written(fill, 7, 1);
            assert_eq!(check_work(&page, fill, SEED, 7, 1), Ok(()));
            stamp(&mut page, SEED, 7, 2);
            assert_eq!(check_stamp(&page, SEED, 7, 2), Ok(()));
            assert_eq!(check_work(&page, fill, SEED, 7, 2), Ok(()));
            write_body(&mut page, fill, SEED, Area::Fill, 9);
            assert_eq!(check_fill(&page, fill, SEED, 9), Ok(()));
        }
    }

    #[test]
    fn a_lost_write_is_stale() {
        let page = written(Fill::Random, 7, 5);
        assert_eq!(check_stamp(&page, SEED, 7, 6), Err(Damage::Stale { got: 5 }));
        assert_eq!(check_stamp(&page, SEED, 7, 4), Err(Damage::Stale { got: 5 }));
    }

    #[test]
    fn a_page_in_anothers_place_is_foreign() {
        let page = written(Fill::Zero, 8, 5);
        let foreign = Damage::Foreign { page: 8, got: 5 };
        assert_eq!(check_stamp(&page, SEED, 7, 5), Err(foreign));
    }

    #[test]
    fn a_lost_page_is_zero() {
        let page = [0; PAGE_WORDS];
        assert_eq!(check_stamp(&page, SEED, 0, 0), Err(Damage::Zero));
        assert_eq!(check_fill(&page, Fill::Random, SEED, 3), Err(Damage::Zero));
        assert_eq!(check_fill(&page, Fill::Zero, SEED, 3), Ok(()));
    }

    #[test]
    fn a_page_of_another_guest_is_torn() {
        let page = written(Fill::Zero, 7, 5);
        assert_eq!(check_stamp(&page, SEED + 1, 7, 5), Err(Damage::Torn));
    }

    #[test]
    fn each_half_of_an_older_version_is_found() {
        let (old, new) = (written(Fill::Random, 7, 5), written(Fill::Random, 7, 6));
        for cut in (STRIDE..PAGE_WORDS).step_by(STRIDE) {
            let mut page = new.clone();
            page[..cut].copy_from_slice(&old[..cut]);
            assert_eq!(check_stamp(&page, SEED, 7, 6), Err(Damage::Torn));
            let mut page = new.clone();
            page[cut..].copy_from_slice(&old[cut..]);
            assert_eq!(check_stamp(&page, SEED, 7, 6), Err(Damage::Torn));
        }
    }

    #[test]
    fn every_word_of_a_page_is_covered() {
        for fill in [Fill::Random, Fill::Zero, Fill::Text] {
            let work = written(fill, 7, 5);
            let mut filled = work.clone();
            write_body(&mut filled, fill, SEED, Area::Fill, 7);
            for at in 0..PAGE_WORDS {
                let (mut work, mut filled) = (work.clone(), filled.clone());
                work[at] ^= 1 << 17;
                filled[at] ^= 1 << 17;
                assert!(check_work(&work, fill, SEED, 7, 5).is_err(), "word {at}");
                assert!(check_fill(&filled, fill, SEED, 7).is_err(), "word {at}");
            }
        }
    }

    #[test]
    fn no_two_pages_are_alike() {
        let mut pages = Vec::new();
        for number in 0..64 {
            for area in [Area::Fill, Area::Work] {
                let mut page = [0; PAGE_WORDS];
                write_body(&mut page, Fill::Text, SEED, area, number);
                pages.push(page);
            }
        }
        pages.sort_unstable();
        pages.dedup();
        assert_eq!(pages.len(), 128);
    }

    #[test]
    fn text_is_text() {
        assert_eq!(&hexadecimal(0x89ab_cdef).to_be_bytes(), b"89abcdef");
        let mut page = [0; PAGE_WORDS];
        write_body(&mut page, Fill::Text, SEED, Area::Fill, 0);
        let mut bytes = page.iter().flat_map(|word| word.to_le_bytes());
        assert!(bytes.all(|byte| byte == b'\n' || (b' '..=b'~').contains(&byte)));
    }
}
