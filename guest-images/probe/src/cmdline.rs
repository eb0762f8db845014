//! The guest's command line: words of the form `key=value`, separated by spaces.
//!
//! A key that the guest does not know is an error, because a misspelt workload that runs as something else
//! would be measured as something else. Only `console=` and `virtio_mmio.*`, which VMMs add for Linux's
//! sake, are passed over. `core` only: the guest compiles this file too.

use core::fmt;
use core::str::FromStr;

use crate::device_work::DeviceOptions;

/// What the guest fills its memory with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// Incompressible words.
    Random,
    /// Zero bytes, written: the pages are populated and hold zeros.
    Zero,
    /// Log-like ASCII that compresses about three to one.
    Text,
}

/// What the guest does with its work area once filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Writes nothing.
    Idle,
    /// Writes pages picked at random.
    Uniform,
    /// Nine writes of ten go to the first tenth of each vCPU's pages.
    HotCold,
    /// Writes page after page, round and round.
    Sweep,
    /// Writes no pages: keeps a virtio disk busy, and then says how fast it was.
    Block,
    /// Writes no pages: sends or receives frames on a virtio network card, and then says how fast it was.
    Net,
}

/// How the guest ends itself, for tests of what the VMM makes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// ACPI soft-off at port 0x604.
    PowerOff,
    /// Reset control register at port 0xcf9.
    Reset,
    /// pvpanic at port 0x505.
    Panic,
    /// An exception without an interrupt table.
    TripleFault,
}

/// All that a command line can say, with the defaults for what it leaves out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Content of the fill area, and of the work area below the writes.
    pub fill: Fill,
    /// Size of the fill area in MiB: written once, then only checked.
    pub fill_mib: u64,
    /// The workload.
    pub work: Work,
    /// Size of the work area in MiB; `None` is 64, or 0 for a guest that writes none.
    pub work_mib: Option<u64>,
    /// Page writes a second, all vCPUs together; `u64::MAX` (`rate=max`) is as fast as it goes.
    pub rate: u64,
    /// Milliseconds from heartbeat to heartbeat.
    pub heartbeat_ms: u64,
    /// vCPUs to bring up; APIC ids `0..cpus`.
    pub cpus: u32,
    /// vCPUs that write, the first ones; the others check, and then the writers check nothing in the background. `None`: all do both.
    pub writers: Option<u32>,
    /// Whether pages are checked before they are written and in the background.
    pub check: bool,
    /// Pages a second that the background check reads in full, all vCPUs together.
    pub check_rate: u64,
    /// Seed of all content and of the order of writes.
    pub seed: u64,
    /// How to end, and after how many milliseconds from READY.
    pub end: Option<(End, u64)>,
    /// Frequency of the time stamp counter in kHz; `None` has the guest find out.
    pub tsc_khz: Option<u64>,
    /// Memory size in MiB, used only if the VMM passes no memory map.
    pub mem_mib: Option<u64>,
    /// What is done with a device, if the work is on one.
    pub devices: DeviceOptions,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            fill: Fill::Random,
            fill_mib: 0,
            work: Work::Idle,
            work_mib: None,
            rate: 1000,
            heartbeat_ms: 100,
            cpus: 1,
            writers: None,
            check: true,
            check_rate: 200,
            seed: 1,
            end: None,
            tsc_khz: None,
            mem_mib: None,
            devices: DeviceOptions::default(),
        }
    }
}

/// A word of the command line that the guest does not accept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadOption<'a> {
    /// The key is none of the guest's.
    Unknown(&'a str),
    /// The key is known, its value is not one it takes.
    Value(&'a str),
}

impl fmt::Display for BadOption<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown(word) => write!(f, "unknown option {word}"),
            Self::Value(word) => write!(f, "bad value in {word}"),
        }
    }
}

impl core::error::Error for BadOption<'_> {}

/// The largest number of vCPUs the guest brings up.
pub const MAX_CPUS: u32 = 64;

/// 16 TiB: more than any page number here could overflow.
const MAX_MIB: u64 = 1 << 24;

impl Options {
    /// Reads a command line; later words win over earlier ones.
    ///
    /// # Errors
    /// The first word that is not understood.
    pub fn parse(line: &str) -> Result<Self, BadOption<'_>> {
        let mut options = Self::default();
        for word in line.split_ascii_whitespace() {
            options.set(word)?;
        }
        Ok(options)
    }

    /// Size of the work area in MiB, the default for this workload if none was given.
    pub fn work_size_mib(&self) -> u64 {
        match (self.work_mib, self.work) {
            (Some(mib), _) => mib,
            (None, Work::Idle | Work::Block | Work::Net) => 0,
            (None, Work::Uniform | Work::HotCold | Work::Sweep) => 64,
        }
    }

    /// Page writes a second that the workload asks for: none when idle or on a device.
    pub fn write_rate(&self) -> u64 {
        match self.work {
            Work::Idle | Work::Block | Work::Net => 0,
            Work::Uniform | Work::HotCold | Work::Sweep => self.rate,
        }
    }

    /// vCPUs that write.
    pub fn writing_cpus(&self) -> u32 {
        self.writers.unwrap_or(self.cpus).min(self.cpus)
    }

    /// vCPUs that check pages in the background.
    pub fn checking_cpus(&self) -> u32 {
        match self.cpus - self.writing_cpus() {
            0 => self.cpus,
            others => others,
        }
    }

    fn set<'a>(&mut self, word: &'a str) -> Result<(), BadOption<'a>> {
        let (key, value) = word.split_once('=').unwrap_or((word, ""));
        let bad = BadOption::Value(word);
        let number = |max: u64| value.parse::<u64>().ok().filter(|&n| n <= max).ok_or(bad);
        match key {
            "fill" => self.fill = named(FILLS, value).ok_or(bad)?,
            "fill_mib" => self.fill_mib = number(MAX_MIB)?,
            "work" => self.work = named(WORKS, value).ok_or(bad)?,
            "work_mib" => self.work_mib = Some(number(MAX_MIB)?),
            "rate" if value == "max" => self.rate = u64::MAX,
            "rate" => self.rate = number(1_000_000_000)?,
            "heartbeat_ms" => self.heartbeat_ms = number(3_600_000)?.max(1),
            "cpus" => {
                self.cpus = match number(u64::from(MAX_CPUS))? {
                    0 => return Err(bad),
                    cpus => cpus as u32,
                }
            }
            "writers" => {
                self.writers = match number(u64::from(MAX_CPUS))? {
                    0 => return Err(bad),
                    writers => Some(writers as u32),
                }
            }
            "check" => self.check = named(&[("on", true), ("off", false)], value).ok_or(bad)?,
            "check_rate" => self.check_rate = number(1_000_000_000)?,
            "seed" => self.seed = number(u64::MAX)?,
            "tsc_khz" => self.tsc_khz = Some(number(1 << 30)?).filter(|&khz| khz > 0),
            "mem" => self.mem_mib = Some(size_mib(value).ok_or(bad)?),
            "console" => {}
            _ if key.starts_with("virtio_mmio.") => {}
            _ if self.devices.set(key, value).map_err(|_| bad)? => {}
            _ => {
                let end = key.strip_suffix("_after_ms").and_then(|end| named(ENDS, end));
                let end = end.ok_or(BadOption::Unknown(word))?;
                self.end = Some((end, number(u64::from(u32::MAX))?));
            }
        }
        Ok(())
    }
}

/// Writes the command line that parses back to the same options.
impl fmt::Display for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = |names, value| name_of(names, value);
        write!(f, "fill={}", word(FILLS, self.fill))?;
        write!(f, " fill_mib={}", self.fill_mib)?;
        write!(f, " work={}", name_of(WORKS, self.work))?;
        if let Some(mib) = self.work_mib {
            write!(f, " work_mib={mib}")?;
        }
        match self.rate {
            u64::MAX => f.write_str(" rate=max")?,
            rate => write!(f, " rate={rate}")?,
        }
        write!(f, " heartbeat_ms={} cpus={}", self.heartbeat_ms, self.cpus)?;
        if let Some(writers) = self.writers {
            write!(f, " writers={writers}")?;
        }
        write!(f, " check={}", if self.check { "on" } else { "off" })?;
        write!(f, " check_rate={} seed={}", self.check_rate, self.seed)?;
        if let Some((end, ms)) = self.end {
            write!(f, " {}_after_ms={ms}", name_of(ENDS, end))?;
        }
        if let Some(khz) = self.tsc_khz {
            write!(f, " tsc_khz={khz}")?;
        }
        if let Some(mib) = self.mem_mib {
            write!(f, " mem={mib}M")?;
        }
        match self.work {
            Work::Block | Work::Net => self.devices.fmt(f),
            Work::Idle | Work::Uniform | Work::HotCold | Work::Sweep => Ok(()),
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(name_of(ENDS, *self))
    }
}

/// The end that its command-line word names: `poweroff`, `reset`, `panic` or `triplefault`.
impl FromStr for End {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        named(ENDS, name).ok_or(())
    }
}

const FILLS: &[(&str, Fill)] = &[("random", Fill::Random), ("zero", Fill::Zero), ("text", Fill::Text)];

const WORKS: &[(&str, Work)] = &[
    ("idle", Work::Idle),
    ("uniform", Work::Uniform),
    ("hotcold", Work::HotCold),
    ("sweep", Work::Sweep),
    ("blk", Work::Block),
    ("net", Work::Net),
];

const ENDS: &[(&str, End)] = &[
    ("poweroff", End::PowerOff),
    ("reset", End::Reset),
    ("panic", End::Panic),
    ("triplefault", End::TripleFault),
];

fn named<T: Copy>(names: &[(&str, T)], name: &str) -> Option<T> {
    let found = names.iter().find(|(known, _)| *known == name);
    found.map(|&(_, value)| value)
}

fn name_of<T: Copy + PartialEq>(names: &'static [(&'static str, T)], value: T) -> &'static str {
    let found = names.iter().find(|&&(_, known)| known == value);
    found.map_or("", |(name, _)| name)
}

fn size_mib(value: &str) -> Option<u64> {
    let (digits, scale) = match value.as_bytes().last()? {
        b'G' | b'g' => (&value[..value.len() - 1], 1024),
        b'M' | b'm' => (&value[..value.len() - 1], 1),
        _ => return None,
    };
    let mib = digits.parse::<u64>().ok()?.checked_mul(scale)?;
    (1..=MAX_MIB).contains(&mib).then_some(mib)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_line_is_an_idle_guest() {
        let options = Options::parse("").unwrap();
        assert_eq!(options, Options::default());
        assert_eq!((options.work_size_mib(), options.write_rate()), (0, 0));
    }

    #[test]
    fn every_key_is_understood() {
        let line = "fill=text fill_mib=12 work=hotcold work_mib=3 rate=500000 heartbeat_ms=10 cpus=2 writers=1 \
                    check=off check_rate=5 seed=9 panic_after_ms=70 tsc_khz=2000000 mem=2G";
        let options = Options::parse(line).unwrap();
        let expected = Options {
            fill: Fill::Text,
            fill_mib: 12,
            work: Work::HotCold,
            work_mib: Some(3),
            rate: 500_000,
            heartbeat_ms: 10,
            cpus: 2,
            writers: Some(1),
            check: false,
            check_rate: 5,
            seed: 9,
            end: Some((End::Panic, 70)),
            tsc_khz: Some(2_000_000),
            mem_mib: Some(2048),
            devices: DeviceOptions::default(),
        };
        assert_eq!(options, expected);
        assert_eq!(Options::parse(&options.to_string()).unwrap(), options);
    }

    #[test]
    fn what_is_shown_parses_back() {
        for line in [
            "",
            "work=uniform rate=max",
            "cpus=2 writers=1",
            "reset_after_ms=1",
            "work=sweep",
        ] {
            let options = Options::parse(line).unwrap();
            assert_eq!(Options::parse(&options.to_string()).unwrap(), options);
        }
        assert_eq!(Options::parse("work=sweep").unwrap().work_size_mib(), 64);
    }

    #[test]
    fn misspelt_words_are_named() {
        for word in ["wrok=idle", "filler", "explode_after_ms=1", "=", "_after_ms=1"] {
            assert_eq!(Options::parse(word), Err(BadOption::Unknown(word)));
        }
        for word in [
            "work=fast",
            "cpus=0",
            "cpus=65",
            "writers=0",
            "fill_mib=-1",
            "fill_mib=99999999999",
            "rate=",
            "rate",
            "mem=5",
            "mem=G",
            "check=yes",
            "reset_after_ms=soon",
        ] {
            assert_eq!(Options::parse(word), Err(BadOption::Value(word)), "{word}");
        }
    }

    #[test]
    fn what_vmms_add_for_linux_is_passed_over() {
        let line = "console=ttyS0 virtio_mmio.device=512@0xfeb00e00:12 seed=4";
        assert_eq!(Options::parse(line).unwrap().seed, 4);
    }
}
