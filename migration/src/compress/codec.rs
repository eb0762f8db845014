//! The ways to compress, what a user says of them, and the compressing itself.

use std::fmt::{self, Display};
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::{Duration, Instant};

use lz4_flex::block::{self, CompressTable};
use rustix::time::{ClockId, clock_gettime};
use zstd_safe::CCtx;

use super::delta::{PAGE, apply_delta, is_near};
use super::measure::Sampled;
use super::{GuestIs, SentPages};
use crate::guest::{FRAME_SIZE, FrameRun, GuestError, GuestMemory};

/// What is before the compressed bytes of a frame: their CRC-32.
pub(crate) const COMPRESSED_SUM_BYTES: usize = 4;

/// What compressing has to take away of a frame: less is not worth what the other side spends on it.
const LEAST_SAVED: usize = 16;

/// How much of a frame is compressed as a sample: 256 KiB, that is 0.2 to 2 ms.
const SAMPLE_PAGES: u64 = 64;

/// The levels of zstd that are to be had: those above need more memory at the destination than its frame has.
const ZSTD_LEVELS: RangeInclusive<u8> = 1..=19;

/// A format of compressed pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codec {
    /// LZ4's block format.
    Lz4,
    /// Zstandard frames.
    Zstd,
}

impl Codec {
    const ALL: [Self; 2] = [Self::Lz4, Self::Zstd];

    /// Its number in handshakes and frames.
    pub(crate) fn number(self) -> u8 {
        match self {
            Self::Lz4 => 1,
            Self::Zstd => 2,
        }
    }

    pub(crate) fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|codec| codec.number() == number)
    }
}

impl Display for Codec {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        })
    }
}

/// The number, among those of formats, of what goes with each of them: pages that are told by what they changed ([`super::SentPages`]).
const DELTAS: u8 = 3;

/// A set of formats, and whether pages may be told by what they changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Codecs(u8);

impl Codecs {
    /// All that this build reads and writes.
    pub(crate) fn ours() -> Self {
        Codec::ALL.into_iter().fold(Self::default(), Self::with).with_deltas()
    }

    pub(crate) fn with(self, codec: Codec) -> Self {
        Self(self.0 | 1 << codec.number())
    }

    pub(crate) fn contains(self, codec: Codec) -> bool {
        self.0 & 1 << codec.number() != 0
    }

    pub(crate) fn with_deltas(self) -> Self {
        Self(self.0 | 1 << DELTAS)
    }

    pub(crate) fn without_deltas(self) -> Self {
        Self(self.0 & !(1 << DELTAS))
    }

    pub(crate) fn has_deltas(self) -> bool {
        self.0 & 1 << DELTAS != 0
    }

    /// There is no format in it.
    pub(crate) fn is_empty(self) -> bool {
        self.without_deltas().0 == 0
    }

    pub(crate) fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// What a peer says that it knows; numbers that are not known here are left out.
    pub(crate) fn from_wire(numbers: &[u32]) -> Self {
        let numbers = numbers.iter().filter_map(|&number| u8::try_from(number).ok());
        numbers.fold(Self::default(), |known, number| match Codec::from_number(number) {
            Some(codec) => known.with(codec),
            None if number == DELTAS => known.with_deltas(),
            None => known,
        })
    }

    pub(crate) fn to_wire(self) -> Vec<u32> {
        let mine = Codec::ALL.into_iter().filter(|&codec| self.contains(codec));
        let deltas = self.has_deltas().then_some(DELTAS);
        mine.map(Codec::number).chain(deltas).map(u32::from).collect()
    }
}

/// A way to compress: the format, and how much effort is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// LZ4, which has no levels here.
    Lz4,
    /// Zstandard at this level, 1 to 19.
    Zstd(u8),
}

impl Method {
    /// The format.
    #[must_use]
    pub fn codec(self) -> Codec {
        match self {
            Self::Lz4 => Codec::Lz4,
            Self::Zstd(_) => Codec::Zstd,
        }
    }
}

impl Display for Method {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lz4 => formatter.write_str("lz4"),
            Self::Zstd(level) => write!(formatter, "zstd:{level}"),
        }
    }
}

/// What a migration's user wants of compression; written as on the command line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// Where it pays, as it pays.
    Auto,
    /// None.
    #[default]
    Off,
    /// All pages that get any smaller by it, whether it pays or not.
    Always(Method),
}

impl Display for Compression {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => formatter.write_str("auto"),
            Self::Off => formatter.write_str("off"),
            Self::Always(method) => method.fmt(formatter),
        }
    }
}

/// A word that is no way to compress.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is none of auto, off, lz4, zstd and zstd:1 to zstd:19")]
pub struct ParseCompressionError(String);

impl FromStr for Compression {
    type Err = ParseCompressionError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || ParseCompressionError(text.to_owned());
        match text {
            "auto" => Ok(Self::Auto),
            "off" => Ok(Self::Off),
            "lz4" => Ok(Self::Always(Method::Lz4)),
            "zstd" => Ok(Self::Always(Method::Zstd(*ZSTD_LEVELS.start()))),
            _ => {
                let level = text.strip_prefix("zstd:").and_then(|level| level.parse().ok());
                let level = level.filter(|level| ZSTD_LEVELS.contains(level)).ok_or_else(wrong)?;
                Ok(Self::Always(Method::Zstd(level)))
            }
        }
    }
}

/// One stream's compressor. Its buffers, a frame's pages and as much again, are there from the first frame on that is compressed.
#[derive(Default)]
pub(crate) struct Compressor {
    pages: Vec<u8>,
    /// Pages of the frame that are told by what they changed.
    told: Vec<FrameRun>,
    /// The sum and the compressed bytes.
    block: Vec<u8>,
    lz4: Option<CompressTable>,
    zstd: Option<CCtx<'static>>,
}

/// What is made of a frame's pages.
#[derive(Clone, Copy)]
pub(crate) struct How<'a> {
    /// The way to compress; `None`: only frames are compressed that have pages which are told by what they changed.
    pub(crate) method: Option<Method>,
    /// Where copies of what is sent are, the round, and whether the guest waits for it, where pages are told by what they changed.
    pub(crate) deltas: Option<(&'a SentPages, (u32, GuestIs))>,
}

impl How<'_> {
    /// All pages are compressed in this way, as they are.
    pub(crate) fn whole(method: Method) -> Self {
        Self {
            method: Some(method),
            deltas: None,
        }
    }
}

/// What came of a frame's pages.
#[derive(Default)]
pub(crate) struct PackedFrame<'a> {
    /// How they were compressed, or were tried to be.
    pub(crate) method: Option<Method>,
    /// What is sent in their place; `None` if that would hardly be less.
    pub(crate) block: Option<&'a [u8]>,
    /// Pages of which there were copies.
    pub(crate) copies: u64,
    /// Those of them that are told by what they changed, in the block.
    pub(crate) told: &'a [FrameRun],
    /// The pages, as copies of them are kept; they are sent as they are here if there is no block.
    pub(crate) plain: &'a [u8],
    pub(crate) took: Took,
}

/// What compresses pages that are told by their changes, where nothing else is compressed: nearly all of them is zeroes.
pub(crate) const OF_DELTAS: Method = Method::Lz4;

/// How long something took.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Took {
    /// By the clock: with the time that others had the processor.
    pub(crate) time: Duration,
    /// Of a processor.
    pub(crate) work: Duration,
}

/// When something began.
struct Began {
    time: Instant,
    work: Duration,
}

impl Began {
    fn now() -> Self {
        Self {
            time: Instant::now(),
            work: worked(),
        }
    }

    fn took(&self) -> Took {
        Took {
            time: self.time.elapsed(),
            work: worked().saturating_sub(self.work),
        }
    }
}

/// The processor time that this thread has had.
fn worked() -> Duration {
    let had = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(had.tv_sec.unsigned_abs(), had.tv_nsec.unsigned_abs() as u32)
}

impl Compressor {
    /// Compresses the pages of `runs`, a frame's at most, as they are now.
    pub(crate) fn pack(
        &mut self,
        memory: &impl GuestMemory,
        runs: &[FrameRun],
        how: How<'_>,
    ) -> Result<PackedFrame<'_>, GuestError> {
        let began = Began::now();
        self.take(memory, runs)?;
        self.told.clear();
        let copies = match how.deltas {
            Some((sent, round)) => sent.take(runs, round, &mut self.pages, &mut self.told),
            None => 0,
        };
        let method = how.method.or((!self.told.is_empty()).then_some(OF_DELTAS));
        let most = self.pages.len() - self.pages.len() / LEAST_SAVED;
        let packed = method.and_then(|method| self.compress(method));
        let packed = packed.filter(|&size| size + COMPRESSED_SUM_BYTES <= most);
        match (packed, how.deltas) {
            (Some(size), _) => {
                let (sum, bytes) = self.block[..COMPRESSED_SUM_BYTES + size].split_at_mut(COMPRESSED_SUM_BYTES);
                sum.copy_from_slice(&crc32fast::hash(bytes).to_le_bytes());
            }
            (None, Some((sent, _))) => {
                sent.put_back(runs, &mut self.pages, &self.told);
                self.told.clear();
            }
            (None, None) => {}
        }
        Ok(PackedFrame {
            method,
            copies,
            block: packed.map(|size| &self.block[..COMPRESSED_SUM_BYTES + size]),
            told: &self.told,
            plain: &self.pages,
            took: began.took(),
        })
    }

    /// Compresses some pages of `runs`, spread over them, and sends nothing.
    pub(crate) fn sample(
        &mut self,
        memory: &impl GuestMemory,
        runs: &[FrameRun],
        method: Method,
    ) -> Result<Option<Sampled>, GuestError> {
        let part = spread(runs);
        if part.is_empty() {
            return Ok(None);
        }
        let began = Began::now();
        self.take(memory, &part)?;
        let packed = self.compress(method).unwrap_or(self.pages.len());
        Ok(Some(Sampled {
            method,
            bytes: self.pages.len() as u64,
            packed: packed.min(self.pages.len()) as u64,
            took: began.took().work,
        }))
    }

    /// Compresses what pages changed that were these bytes, as far as they were written since, and sends nothing.
    pub(super) fn try_deltas(
        &mut self,
        memory: &impl GuestMemory,
        runs: &[FrameRun],
        before: &[u8],
    ) -> Result<Sampled, GuestError> {
        let began = Began::now();
        self.take(memory, runs)?;
        let mut left = 0;
        for (before, at) in before.chunks_exact(PAGE).zip((0..).step_by(PAGE)) {
            let now = &mut self.pages[at..at + PAGE];
            if before == now {
                continue;
            }
            if is_near(before, now) {
                apply_delta(before, now);
            }
            self.pages.copy_within(at..at + PAGE, left);
            left += PAGE;
        }
        self.pages.truncate(left);
        let packed = if left == 0 { None } else { self.compress(OF_DELTAS) };
        Ok(Sampled {
            method: OF_DELTAS,
            bytes: left as u64,
            packed: packed.unwrap_or(left).min(left) as u64,
            took: began.took().work,
        })
    }

    fn take(&mut self, memory: &impl GuestMemory, runs: &[FrameRun]) -> Result<(), GuestError> {
        let bytes = runs.iter().map(|run| run.count).sum::<u64>() * FRAME_SIZE;
        self.pages.resize(bytes as usize, 0);
        memory.read_pages(runs, &mut self.pages)
    }

    /// How many bytes it came to, behind the sum; `None` if they did not become less.
    fn compress(&mut self, method: Method) -> Option<usize> {
        match method {
            Method::Lz4 => {
                let most = block::get_maximum_output_size(self.pages.len());
                let room = room(&mut self.block, most);
                let table = self.lz4.get_or_insert_with(CompressTable::large);
                block::compress_into_with_table(&self.pages, room, table).ok()
            }
            Method::Zstd(level) => {
                if self.zstd.is_none() {
                    // Without memory for it pages travel as they are.
                    self.zstd = CCtx::try_create();
                }
                let room = room(&mut self.block, self.pages.len());
                self.zstd.as_mut()?.compress(room, &self.pages, level.into()).ok()
            }
        }
    }
}

/// So many pages of these runs, in four stretches that are as far apart as they allow.
fn spread(runs: &[FrameRun]) -> Vec<FrameRun> {
    const STRETCHES: u64 = 4;
    let pages: u64 = runs.iter().map(|run| run.count).sum();
    let (stretch, apart) = (SAMPLE_PAGES / STRETCHES, pages / STRETCHES);
    if pages <= SAMPLE_PAGES {
        return runs.to_vec();
    }
    let (mut part, mut before) = (Vec::new(), 0);
    for run in runs {
        for number in 0..STRETCHES {
            // Where this stretch begins and ends among all pages, as far as it is in this run.
            let (begins, ends) = (number * apart, number * apart + stretch);
            let (first, end) = (begins.max(before), ends.min(before + run.count));
            if first < end {
                part.push(FrameRun {
                    first: run.first + (first - before),
                    count: end - first,
                });
            }
        }
        before += run.count;
    }
    part
}

/// Room for so many bytes behind the sum.
fn room(block: &mut Vec<u8>, bytes: usize) -> &mut [u8] {
    let len = COMPRESSED_SUM_BYTES + bytes;
    block.resize(block.len().max(len), 0);
    &mut block[COMPRESSED_SUM_BYTES..len]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_understood_and_said_again() {
        for text in ["auto", "off", "lz4", "zstd:1", "zstd:19"] {
            assert_eq!(text.parse::<Compression>().unwrap().to_string(), text);
        }
        assert_eq!("zstd".parse(), Ok(Compression::Always(Method::Zstd(1))));
        for text in ["", "on", "lz4:1", "zstd:0", "zstd:20", "zstd:", "zstd:-1", "gzip"] {
            let error = text.parse::<Compression>().unwrap_err();
            assert!(
                error.to_string().starts_with(&format!("{text:?} is none of")),
                "{error}"
            );
        }
    }

    #[test]
    fn samples_are_spread_over_a_frame() {
        let run = |first, count| FrameRun { first, count };
        assert_eq!(spread(&[run(7, 64)]), [run(7, 64)]);
        assert_eq!(
            spread(&[run(0, 512)]),
            [run(0, 16), run(128, 16), run(256, 16), run(384, 16)]
        );
        let split = spread(&[run(0, 130), run(1000, 382)]);
        assert_eq!(
            split,
            [run(0, 16), run(128, 2), run(1000, 14), run(1126, 16), run(1254, 16)]
        );
        let scattered: Vec<_> = (0..512).map(|page| run(page * 2, 1)).collect();
        assert_eq!(spread(&scattered).len(), 64);
    }

    #[test]
    fn sets_of_formats_come_out_as_they_went_in() {
        assert_eq!(Codecs::from_wire(&Codecs::ours().to_wire()), Codecs::ours());
        let theirs = Codecs::from_wire(&[2, 77, u32::MAX]);
        assert_eq!(theirs, Codecs::default().with(Codec::Zstd));
        assert!(!theirs.contains(Codec::Lz4) && !theirs.has_deltas());
        let deltas = Codecs::from_wire(&[3]);
        assert!(deltas.has_deltas() && deltas.is_empty());
        assert_eq!(Codecs::ours().without_deltas().to_wire(), [1, 2]);
    }
}
