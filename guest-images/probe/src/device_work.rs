//! What the guest does with a virtio device, and what both sides know of a disk's content.
//!
//! `core` only: the guest compiles this file too.

use core::fmt;

use crate::rng::mix;

/// What is done with a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Io {
    /// Reads blocks picked at random.
    RandRead,
    /// Writes blocks picked at random.
    RandWrite,
    /// Reads block after block, round and round.
    SeqRead,
    /// Writes block after block, round and round.
    SeqWrite,
}

impl Io {
    /// Whether the disk is written.
    pub fn writes(self) -> bool {
        matches!(self, Self::RandWrite | Self::SeqWrite)
    }

    /// Whether blocks are picked at random.
    pub fn is_random(self) -> bool {
        matches!(self, Self::RandRead | Self::RandWrite)
    }
}

/// Which way frames go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the guest.
    Send,
    /// To the guest.
    Receive,
}

/// The part of the command line that is about `work=blk` and `work=net`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceOptions {
    /// What is done with a disk.
    pub io: Io,
    /// Size of a disk request in KiB, a multiple of 4.
    pub block_kib: u64,
    /// Requests or frames that the device has at a time.
    pub depth: u16,
    /// Bytes of a frame, its Ethernet header included; more than [`LARGEST_USUAL_FRAME`] are left to the card to cut into segments.
    pub packet: u32,
    /// Which way frames go.
    pub direction: Direction,
    /// How long to measure, in seconds; from the first frame on where frames are received.
    pub seconds: u64,
    /// Address of the device's registers; `None` takes the first of its kind.
    pub device: Option<u64>,
}

impl Default for DeviceOptions {
    fn default() -> Self {
        Self {
            io: Io::RandRead,
            block_kib: 4,
            depth: 1,
            packet: 64,
            direction: Direction::Send,
            seconds: 3,
            device: None,
        }
    }
}

/// The most requests or frames that a device may have at a time: all entries of the guest's queues.
pub const MAX_DEPTH: u16 = 256;

/// Descriptors of a disk request: its header, its data, its status.
pub const DISK_DESCRIPTORS: u16 = 3;

/// Bytes of a frame that every Ethernet takes, its header included.
pub const LARGEST_USUAL_FRAME: u32 = 1514;

/// A header of Ethernet and the longest IPv4 packet.
const LARGEST_FRAME: u64 = 14 + 65_535;

/// Bytes of the disk that have a stamp.
pub const STAMPED_BYTES: u64 = 4096;

/// What the first eight bytes of page `number` of a disk hold, little-endian: whoever prepares a disk for the guest writes it, the guest
/// checks it in what it reads and keeps to it in what it writes.
pub const fn disk_stamp(number: u64) -> u64 {
    mix(number.wrapping_add(1))
}

impl DeviceOptions {
    /// Takes one word of the command line; whether it is one of these.
    ///
    /// # Errors
    /// The key is one of these, the value is not one that it takes.
    pub(crate) fn set(&mut self, key: &str, value: &str) -> Result<bool, BadValue> {
        let number = |from: u64, to: u64| {
            let number = value.parse::<u64>().ok();
            number.filter(|number| (from..=to).contains(number)).ok_or(BadValue)
        };
        match key {
            "io" => self.io = named(IOS, value)?,
            "block_kib" => {
                let kib = number(4, 4096)?;
                self.block_kib = Some(kib).filter(|kib| kib % 4 == 0).ok_or(BadValue)?;
            }
            "depth" => self.depth = number(1, MAX_DEPTH.into())? as u16,
            "packet" => self.packet = number(60, LARGEST_FRAME)? as u32,
            "direction" => self.direction = named(DIRECTIONS, value)?,
            "seconds" => self.seconds = number(1, 86_400)?,
            "device" => {
                let digits = value.strip_prefix("0x").ok_or(BadValue)?;
                let address = u64::from_str_radix(digits, 16).map_err(|_| BadValue)?;
                // Where the guest has room for a device's registers: see its page tables.
                let below_4_gib = address < 1 << 32 && address.is_multiple_of(4);
                self.device = Some(Some(address).filter(|_| below_4_gib).ok_or(BadValue)?);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }
}

/// A value that its key does not take.
#[derive(Debug)]
pub(crate) struct BadValue;

/// Writes the words that parse back to the same options, each after a space.
impl fmt::Display for DeviceOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, " io={} block_kib={}", name_of(IOS, self.io), self.block_kib)?;
        write!(f, " depth={} packet={}", self.depth, self.packet)?;
        write!(f, " direction={}", name_of(DIRECTIONS, self.direction))?;
        write!(f, " seconds={}", self.seconds)?;
        match self.device {
            Some(address) => write!(f, " device={address:#x}"),
            None => Ok(()),
        }
    }
}

const IOS: &[(&str, Io)] = &[
    ("randread", Io::RandRead),
    ("randwrite", Io::RandWrite),
    ("seqread", Io::SeqRead),
    ("seqwrite", Io::SeqWrite),
];

const DIRECTIONS: &[(&str, Direction)] = &[("send", Direction::Send), ("receive", Direction::Receive)];

fn named<T: Copy>(names: &[(&str, T)], name: &str) -> Result<T, BadValue> {
    let found = names.iter().find(|(known, _)| *known == name);
    found.map(|&(_, value)| value).ok_or(BadValue)
}

fn name_of<T: Copy + PartialEq>(names: &'static [(&'static str, T)], value: T) -> &'static str {
    let found = names.iter().find(|&&(_, known)| known == value);
    found.map_or("", |(name, _)| name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cmdline::{BadOption, Options, Work};

    #[test]
    fn what_is_done_with_a_device_is_understood_and_shown() {
        let line =
            "work=blk io=seqwrite block_kib=1024 depth=8 packet=1500 direction=receive seconds=5 device=0xd0001000";
        let options = Options::parse(line).unwrap();
        let expected = DeviceOptions {
            io: Io::SeqWrite,
            block_kib: 1024,
            depth: 8,
            packet: 1500,
            direction: Direction::Receive,
            seconds: 5,
            device: Some(0xd000_1000),
        };
        assert_eq!((options.work, options.devices), (Work::Block, expected));
        assert_eq!(Options::parse(&options.to_string()).unwrap(), options);
    }

    #[test]
    fn work_on_a_device_leaves_memory_alone() {
        for line in ["work=blk", "work=net"] {
            let options = Options::parse(line).unwrap();
            assert_eq!((options.work_size_mib(), options.write_rate()), (0, 0), "{line}");
        }
    }

    #[test]
    fn values_that_no_device_takes_are_named() {
        for word in [
            "io=read",
            "block_kib=0",
            "block_kib=6",
            "depth=0",
            "depth=257",
            "packet=59",
            "packet=65550",
            "direction=up",
            "seconds=0",
            "device=512",
            "device=0xd0000001",
            "device=0x100000000",
        ] {
            assert_eq!(Options::parse(word), Err(BadOption::Value(word)), "{word}");
        }
    }

    #[test]
    fn pages_of_a_disk_have_stamps_of_their_own() {
        assert_ne!(disk_stamp(0), 0);
        assert_ne!(disk_stamp(0), disk_stamp(1));
    }
}
