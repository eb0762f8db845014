//! Holds memory that is not like any other, and tells at the end whether it is still what was written there.

use std::io::{self, Read};

/// Words of a page.
const WORDS: usize = 512;

/// Fills so many MiB with what the seed makes of each page, says so, and looks at all of it once its input ends.
pub fn run(mib: usize, seed: u64) -> io::Result<()> {
    let mut held = vec![0; (mib << 20) / 8];
    for (page, words) in held.chunks_exact_mut(WORDS).enumerate() {
        words.iter_mut().zip(numbers(seed, page)).for_each(|(word, number)| *word = number);
    }
    println!("FILLED {seed}");
    io::stdin().read_to_end(&mut Vec::new())?;
    let mut pages = held.chunks_exact(WORDS).enumerate();
    match pages.find(|&(page, words)| !words.iter().copied().eq(numbers(seed, page).take(WORDS))) {
        None => Ok(()),
        Some((page, _)) => Err(io::Error::other(format!("page {page} is not what was written"))),
    }
}

/// Numbers that no compressor makes fewer of (xorshift), and never zero.
fn numbers(seed: u64, page: usize) -> impl Iterator<Item = u64> {
    let start = (seed << 32 | page as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    std::iter::successors(Some(start.max(1)), |&word| {
        let word = word ^ word << 13;
        let word = word ^ word >> 7;
        Some(word ^ word << 17)
    })
}
