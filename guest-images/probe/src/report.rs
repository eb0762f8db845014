//! The lines that the guest prints on its serial console.
//!
//! The guest writes them through `Display`, the host reads them back with [`crate::console::parse`]. A line is a
//! word in capitals, then `key=value` pairs; a reader passes over keys that it does not know, so pairs may be added.
//! They are short because each character costs an exit. `core` only: the guest compiles this file too.

use core::fmt;

use crate::cmdline::End;

/// One line of the console.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Line<'a> {
    /// The first line, before anything else is done.
    Probe {
        /// Version of the guest.
        version: &'a str,
    },
    /// Memory is filled, all vCPUs run, the workload starts.
    Ready(Ready<'a>),
    /// A sign of life.
    Heartbeat(Heartbeat),
    /// A page does not hold what was written to it.
    Fault(Fault<'a>),
    /// The work on a device is done.
    Transfers(Transfers),
    /// The guest cannot do what it was asked and does nothing more.
    Error(&'a str),
    /// The guest ends itself, as asked.
    End(End),
}

/// What the guest found when it started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ready<'a> {
    /// Frequency of the time stamp counter in kHz.
    pub tsc_khz: u64,
    /// Where that frequency comes from: `cmdline`, `cpuid` or `pit`.
    pub tsc_from: &'a str,
    /// Memory in MiB.
    pub mem_mib: u64,
    /// vCPUs that run.
    pub cpus: u32,
    /// Size of the fill area in MiB.
    pub fill_mib: u64,
    /// Size of the work area in MiB.
    pub work_mib: u64,
}

/// A sign of life, printed by vCPU 0 for all of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Heartbeat {
    /// Counts up by one, from 0.
    pub seq: u64,
    /// The raw time stamp counter of vCPU 0 when the line was made up.
    pub tsc: u64,
    /// The largest gap, in ns, between two looks at the clock on any vCPU since the last heartbeat.
    pub gap_ns: u64,
    /// The largest gap, in ns, since READY.
    pub max_gap_ns: u64,
    /// Pages written since READY, all vCPUs.
    pub writes: u64,
    /// Pages read in full by the background check since READY, all vCPUs.
    pub checked: u64,
    /// Pages found damaged so far.
    pub faults: u64,
    /// How often a vCPU saw its time stamp counter go backwards; printed only if it did.
    pub tsc_back: u64,
}

/// A damaged page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault<'a> {
    /// Number of the page in its area.
    pub page: u64,
    /// The version it should hold (0 in the fill area, which has no versions).
    pub want: u32,
    /// The version it holds.
    pub got: u32,
    /// `stale`, `foreign`, `zero`, `torn` or `body`.
    pub kind: &'a str,
    /// `fill` or `work`.
    pub area: &'a str,
    /// The page number it holds; another one than `page` if it is `foreign`.
    pub holds: u64,
    /// Guest physical address of the page.
    pub gpa: u64,
    /// The vCPU that found it.
    pub cpu: u32,
}

/// What came of the work on a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Transfers {
    /// Requests or frames that were done within the time.
    pub operations: u64,
    /// Their bytes, without headers that only guest and device see.
    pub bytes: u64,
    /// The time, in ns.
    pub nanoseconds: u64,
    /// The time from offering a request or frame until it was seen to be done, in ns: median and 99th percentile. `None` where frames are
    /// received, which are done when they come.
    pub latency_ns: Option<(u64, u64)>,
    /// Requests that the device failed.
    pub failed: u64,
    /// Blocks read that do not hold what the disk should hold.
    pub wrong: u64,
}

impl fmt::Display for Line<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Probe { version } => write!(f, "PROBE version={version}"),
            Self::Ready(ready) => ready.fmt(f),
            Self::Heartbeat(heartbeat) => heartbeat.fmt(f),
            Self::Fault(fault) => fault.fmt(f),
            Self::Transfers(transfers) => transfers.fmt(f),
            Self::Error(text) => write!(f, "ERROR {text}"),
            Self::End(end) => write!(f, "END {end}"),
        }
    }
}

impl fmt::Display for Ready<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "READY tsc_khz={} tsc_from={}", self.tsc_khz, self.tsc_from)?;
        write!(f, " mem_mib={} cpus={}", self.mem_mib, self.cpus)?;
        write!(f, " fill_mib={} work_mib={}", self.fill_mib, self.work_mib)
    }
}

impl fmt::Display for Heartbeat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HB seq={} tsc={}", self.seq, self.tsc)?;
        write!(f, " gap_ns={} maxgap_ns={}", self.gap_ns, self.max_gap_ns)?;
        write!(
            f,
            " writes={} checked={} faults={}",
            self.writes, self.checked, self.faults
        )?;
        match self.tsc_back {
            0 => Ok(()),
            times => write!(f, " tscback={times}"),
        }
    }
}

impl fmt::Display for Fault<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FAULT page={} want={} got={}", self.page, self.want, self.got)?;
        write!(f, " kind={} area={} holds={}", self.kind, self.area, self.holds)?;
        write!(f, " gpa={} cpu={}", self.gpa, self.cpu)
    }
}

impl fmt::Display for Transfers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "IO ops={} bytes={} ns={}",
            self.operations, self.bytes, self.nanoseconds
        )?;
        if let Some((median, p99)) = self.latency_ns {
            write!(f, " median_ns={median} p99_ns={p99}")?;
        }
        write!(f, " failed={} wrong={}", self.failed, self.wrong)
    }
}
