//! How often something took how long, good to about 3 percent and in little room.
//!
//! `core` only: the guest compiles this file too.

/// Buckets of each power of two.
const PARTS: usize = 32;
const PARTS_LOG2: u32 = PARTS.ilog2();

/// Values of this many bits and more all fall into the last bucket.
const BITS: u32 = 44;

const BUCKETS: usize = PARTS * (BITS - PARTS_LOG2 + 1) as usize;

/// Counts of values, in buckets that grow with the values.
#[derive(Clone, Debug)]
pub struct Histogram {
    counts: [u32; BUCKETS],
    total: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            counts: [0; BUCKETS],
            total: 0,
        }
    }
}

impl Histogram {
    /// Counts one value.
    #[inline]
    pub fn add(&mut self, value: u64) {
        let count = &mut self.counts[bucket(value)];
        *count = count.saturating_add(1);
        self.total += 1;
    }

    /// The value that this many of a thousand do not exceed; `None` without a value.
    pub fn permille(&self, permille: u64) -> Option<u64> {
        let rank = (self.total * permille).div_ceil(1000).max(1);
        let mut seen = 0;
        let found = self.counts.iter().position(|&count| {
            seen += u64::from(count);
            seen >= rank
        });
        found.map(middle)
    }
}

fn bucket(value: u64) -> usize {
    let value = value.min((1 << BITS) - 1);
    if value < PARTS as u64 {
        return value as usize;
    }
    let shift = value.ilog2() - PARTS_LOG2;
    (shift as usize + 1) * PARTS + ((value >> shift) as usize - PARTS)
}

/// A value in the middle of a bucket.
fn middle(bucket: usize) -> u64 {
    if bucket < PARTS {
        return bucket as u64;
    }
    let shift = bucket / PARTS - 1;
    let first = ((bucket % PARTS + PARTS) as u64) << shift;
    first + (1 << shift) / 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_good_to_a_few_percent() {
        let mut histogram = Histogram::default();
        (1..=100_000).for_each(|value| histogram.add(value));
        for (permille, exact) in [(500, 50_000.0), (990, 99_000.0), (1000, 100_000.0)] {
            let found = histogram.permille(permille).unwrap() as f64;
            assert!((found / exact - 1.0).abs() < 0.04, "{permille}: {found}");
        }
    }

    #[test]
    fn every_value_has_a_bucket_that_knows_it() {
        for value in [0, 1, 31, 32, 33, 1000, (1 << 44) - 1] {
            let found = middle(bucket(value)) as f64;
            assert!((found - value as f64).abs() <= value as f64 / 32.0, "{value}: {found}");
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn nothing_has_no_median() {
        assert_eq!(Histogram::default().permille(500), None);
    }
}
