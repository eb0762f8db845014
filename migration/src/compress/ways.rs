//! The ways to compress and what a byte of a page costs by each of them; before a migration, too, where nothing was sent yet.

use super::codec::Compressor;
use super::worth::FAST_STREAM;
use super::{Compression, Method, Sampled};
use crate::guest::{FRAME_SIZE, FrameRun, GuestError, GuestMemory};

/// The ways that are thought of, each slower than the one before it. What higher levels save is not worth their time at any speed that a migration can live with.
pub(super) const WAYS: [Method; 3] = [Method::Lz4, Method::Zstd(1), Method::Zstd(3)];

/// A way to compress is changed to when a byte costs this share of what it does, or less: what is measured varies.
pub(super) const CLEARLY_LESS: f64 = 0.85;

/// What of the shorter of the two, compressing and sending, is not hidden behind the longer one.
const NOT_HIDDEN: f64 = 0.25;

/// How many runs of pages are tried before a migration, and how many pages of each: 2 MiB, in some hundredths of a second for all ways.
const TRIED_RUNS: usize = 8;
const TRIED_PAGES: u64 = 64;

/// How many pages are watched before a migration: 2 MiB, from all over those that are written.
const WATCHED_PAGES: u64 = 512;

/// How pages are expected to be compressed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Packed {
    /// The way.
    pub method: Method,
    /// What is left of a byte, 0 to 1.
    pub left: f64,
    /// Bytes of pages a second that all sending threads take in.
    pub bytes_per_second: f64,
    /// Its user named it: it is in use from the first page on, not only once it has been found to pay.
    pub is_named: bool,
}

impl Packed {
    /// Seconds for a byte of a page over a link that carries so many bytes a second.
    #[must_use]
    pub fn cost(&self, link: f64) -> f64 {
        cost(1.0 / self.bytes_per_second.max(1.0), self.left, link.max(1.0))
    }
}

/// Seconds for a byte that takes so long to be compressed, and of which so much is left: the slower of the two decides, and some of the other one.
pub(super) fn cost(compressing: f64, left: f64, link: f64) -> f64 {
    let sending = left / link;
    compressing.max(sending) + NOT_HIDDEN * compressing.min(sending)
}

/// What each way that its user's wish allows makes of some of these pages, which are not zero. Nothing is sent.
///
/// # Errors
/// The guest's memory cannot be read.
pub fn try_out(memory: &impl GuestMemory, runs: &[FrameRun], wanted: Compression) -> Result<Vec<Sampled>, GuestError> {
    let ways = match wanted {
        Compression::Off => &[][..],
        Compression::Always(method) => &[method][..],
        Compression::Auto => &WAYS[..],
    };
    let parts = runs
        .iter()
        .step_by(runs.len().div_ceil(TRIED_RUNS).max(1))
        .map(|run| FrameRun {
            count: run.count.min(TRIED_PAGES),
            ..*run
        });
    let parts: Vec<FrameRun> = parts.collect();
    let mut compressor = Compressor::default();
    let mut tried = Vec::new();
    for &method in ways {
        // The first time is not measured: it touches memory of its own that a stream has touched long since, and a nested host takes its time for that.
        if let Some(&part) = parts.first() {
            compressor.sample(memory, &[part], method)?;
        }
        let mut all = Sampled::nothing(method);
        for &part in &parts {
            if let Some(one) = compressor.sample(memory, &[part], method)? {
                all.add(&one);
            }
        }
        tried.push(all);
    }
    Ok(tried)
}

/// How pages will be compressed, for all that was tried, over a link that carries so many bytes a second, by so many threads at once; `None`: they are sent plainly.
#[must_use]
pub fn foresee(wanted: Compression, tried: &[Sampled], link: f64, threads: u32) -> Option<Packed> {
    let known = tried
        .iter()
        .filter(|way| way.bytes > 0 && !way.took.is_zero())
        .map(|way| Packed {
            method: way.method,
            left: way.packed.min(way.bytes) as f64 / way.bytes as f64,
            bytes_per_second: f64::from(threads.max(1)) * way.bytes as f64 / way.took.as_secs_f64(),
            is_named: matches!(wanted, Compression::Always(_)),
        });
    let best = known.min_by(|one, other| one.cost(link).total_cmp(&other.cost(link)))?;
    match wanted {
        Compression::Off => None,
        Compression::Always(_) => Some(best),
        Compression::Auto => Some(best).filter(|best| best.cost(link) < CLEARLY_LESS / link.max(1.0)),
    }
}

/// Pages of a running guest as they were at one moment: what they have changed at another one is what will be told of those that are sent again.
#[derive(Debug)]
pub struct Watched {
    runs: Vec<FrameRun>,
    before: Vec<u8>,
}

impl Watched {
    /// Copies some of these pages, which are a guest's memory.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn take(memory: &impl GuestMemory, written: &[FrameRun]) -> Result<Self, GuestError> {
        let pages: u64 = written.iter().map(|run| run.count).sum();
        let apart = pages.div_ceil(WATCHED_PAGES).max(1);
        let pages = written.iter().flat_map(|run| run.first..run.end());
        let runs = pages.step_by(apart as usize).map(|first| FrameRun { first, count: 1 });
        let runs: Vec<_> = runs.collect();
        let mut before = vec![0; runs.len() * FRAME_SIZE as usize];
        memory.read_pages(&runs, &mut before)?;
        Ok(Self { runs, before })
    }

    /// What is left of those that were written since, told by what they changed; of none: nothing was.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn changes(&self, memory: &impl GuestMemory) -> Result<Sampled, GuestError> {
        let mut compressor = Compressor::default();
        // As in `try_out`.
        compressor.try_deltas(memory, &self.runs, &self.before)?;
        compressor.try_deltas(memory, &self.runs, &self.before)
    }
}

/// How what pages changed that are sent again is expected to be told, as [`foresee`] has it, with so many streams, of which so many threads run at once;
/// `None`: they are sent whole.
#[must_use]
pub fn foresee_deltas(
    wanted: Compression,
    watched: &Sampled,
    link: f64,
    (streams, threads): (u32, u32),
) -> Option<Packed> {
    let told = foresee(Compression::Always(watched.method), &[*watched], link, threads)?;
    let streams = f64::from(streams.max(1));
    match wanted {
        Compression::Off => None,
        Compression::Always(_) => Some(told),
        Compression::Auto => {
            Some(told).filter(|told| link / streams < FAST_STREAM && told.cost(link) < 1.0 / link.max(1.0))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// Of a MiB so much is left, in so many milliseconds.
    fn tried(method: Method, left: u64, ms: u64) -> Sampled {
        Sampled {
            method,
            bytes: 1 << 20,
            packed: left << 10,
            took: Duration::from_millis(ms),
        }
    }

    fn all() -> [Sampled; 2] {
        [tried(Method::Lz4, 512, 2), tried(Method::Zstd(1), 256, 8)]
    }

    #[test]
    fn what_is_expected_depends_on_the_link() {
        let method = |link, streams| foresee(Compression::Auto, &all(), link, streams).map(|packed| packed.method);
        assert_eq!(method(20e6, 2), Some(Method::Zstd(1)));
        assert_eq!(method(300e6, 2), Some(Method::Lz4));
        assert_eq!(method(3e9, 2), None);
        // More threads take in more.
        assert_eq!(method(3e9, 32), Some(Method::Lz4));
    }

    #[test]
    fn what_pages_changed_is_told_over_slow_links() {
        let watched = tried(Method::Lz4, 64, 1);
        let told = |wanted, link| foresee_deltas(wanted, &watched, link, (2, 2)).map(|told| told.left);
        assert_eq!(told(Compression::Auto, 100e6), Some(0.0625));
        assert_eq!(told(Compression::Auto, 2e9), None);
        assert_eq!(told(Compression::Always(Method::Zstd(1)), 2e9), Some(0.0625));
        assert_eq!(told(Compression::Off, 1e6), None);
        let all_of_it = tried(Method::Lz4, 1024, 1);
        assert_eq!(foresee_deltas(Compression::Auto, &all_of_it, 100e6, (2, 2)), None);
        let nothing = Sampled::nothing(Method::Lz4);
        assert_eq!(foresee_deltas(Compression::Auto, &nothing, 100e6, (2, 2)), None);
    }

    #[test]
    fn a_way_that_its_user_chose_is_taken_even_where_it_does_not_pay() {
        let lz4 = Compression::Always(Method::Lz4);
        let packed = foresee(lz4, &all()[..1], 3e9, 1).unwrap();
        assert_eq!((packed.method, packed.left), (Method::Lz4, 0.5));
        assert!(packed.cost(3e9) > 1.0 / 3e9);
        assert_eq!(foresee(Compression::Off, &all(), 1e6, 1), None);
        assert_eq!(foresee(lz4, &[], 1e6, 1), None);
        assert_eq!(foresee(lz4, &[Sampled::nothing(Method::Lz4)], 1e6, 1), None);
    }
}
