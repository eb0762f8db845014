//! The named workloads, the same for all who are measured.

use std::borrow::Cow;

/// One guest with one vCPU and what it does.
#[derive(Clone, Debug)]
pub(super) struct Workload {
    /// Its name.
    pub(super) name: &'static str,
    /// The guest's memory in MiB.
    pub(super) memory_mib: u64,
    /// How much of it the guest touches, in MiB.
    pub(super) touched_mib: u64,
    /// What the probe does.
    pub(super) work: Cow<'static, str>,
}

/// All of them.
pub(super) const ALL: &[Workload] = &[
    Workload {
        name: "random-1g",
        memory_mib: 2048,
        touched_mib: 1024,
        work: Cow::Borrowed("fill=random fill_mib=1008 work=uniform work_mib=16 rate=100"),
    },
    Workload {
        name: "sparse-12g",
        memory_mib: 12 << 10,
        touched_mib: 64,
        work: Cow::Borrowed("fill=random fill_mib=48 work=uniform work_mib=16 rate=100"),
    },
    Workload {
        name: "busy-20k",
        memory_mib: 2048,
        touched_mib: 1024,
        work: Cow::Borrowed("fill=random fill_mib=960 work=uniform work_mib=64 rate=20000"),
    },
    Workload {
        name: "wide-20k",
        memory_mib: 1024,
        touched_mib: 768,
        work: Cow::Borrowed("fill=random fill_mib=512 work=uniform work_mib=256 rate=20000"),
    },
    Workload {
        name: "busy-1g",
        memory_mib: 2048,
        touched_mib: 1024,
        work: Cow::Borrowed("fill=random fill_mib=960 work=uniform work_mib=64 rate=100000"),
    },
    Workload {
        name: "idle-256m",
        memory_mib: 1024,
        touched_mib: 256,
        work: Cow::Borrowed("fill=random fill_mib=256 work=idle"),
    },
];

/// That of [`Workload::outrun`].
pub(super) const OUTRUN: &str = "outrun";

/// Those that are moved over a slow link.
pub(super) const OVER_A_LINK: &[Workload] = &[
    Workload {
        name: "text-512m",
        memory_mib: 1024,
        touched_mib: 512,
        work: Cow::Borrowed("fill=text fill_mib=496 work=uniform work_mib=16 rate=100"),
    },
    Workload {
        name: "random-512m",
        memory_mib: 1024,
        touched_mib: 512,
        work: Cow::Borrowed("fill=random fill_mib=496 work=uniform work_mib=16 rate=100"),
    },
];

/// Idle guests, the smallest first: nothing of their memory is zero or was never touched, but for a little that is the probe's own.
pub(super) const SIZES: &[Workload] = &[
    Workload {
        name: "idle-1g",
        memory_mib: 1 << 10,
        touched_mib: 1 << 10,
        work: Cow::Borrowed("fill=random fill_mib=1008 work=idle"),
    },
    Workload {
        name: "idle-2g",
        memory_mib: 2 << 10,
        touched_mib: 2 << 10,
        work: Cow::Borrowed("fill=random fill_mib=2032 work=idle"),
    },
    Workload {
        name: "idle-4g",
        memory_mib: 4 << 10,
        touched_mib: 4 << 10,
        work: Cow::Borrowed("fill=random fill_mib=4080 work=idle"),
    },
    Workload {
        name: "idle-8g",
        memory_mib: 8 << 10,
        touched_mib: 8 << 10,
        work: Cow::Borrowed("fill=random fill_mib=8176 work=idle"),
    },
];

/// What moves by post-copy: what nobody waits for comes slowly then, so that what somebody waits for is what is measured.
pub(super) static LATE: Workload = Workload {
    name: "late-256m",
    memory_mib: 512,
    touched_mib: 256,
    work: Cow::Borrowed("fill=random fill_mib=128 work=uniform work_mib=128 rate=2000"),
};

impl Workload {
    /// A guest that writes so many pages a second, any of 512 MiB, and none that compresses.
    ///
    /// At 1.5 times the link's rate rounds come to 0.58 of that, and at 1.2 times to 0.31: so much that it fits no blackout of 300 ms at 1 Gbit/s either
    /// way. Of 128 MiB it would, each time a busy host keeps the guest from its rate for a moment.
    pub(super) fn outrun(pages_per_s: u64) -> Self {
        Self {
            name: OUTRUN,
            memory_mib: 1024,
            touched_mib: 640,
            work: format!("fill=random fill_mib=128 work=uniform work_mib=512 rate={pages_per_s}").into(),
        }
    }

    /// The probe's command line: the workload, and heartbeats often enough to tell the clocks apart.
    ///
    /// `tsc_khz` is what its clock runs at.
    pub(super) fn full_cmdline(&self, tsc_khz: u64) -> String {
        format!("{} heartbeat_ms=20 tsc_khz={tsc_khz}", self.work)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferry_probe::cmdline::Options;

    #[test]
    fn what_a_workload_says_it_touches_is_what_its_guest_touches() {
        let outrun = Workload::outrun(45_776);
        let all = ALL.iter().chain(OVER_A_LINK).chain(SIZES).chain([&LATE, &outrun]);
        for workload in all {
            let line = workload.full_cmdline(2_000_000);
            let options = Options::parse(&line).unwrap();
            let touched = options.fill_mib + options.work_size_mib();
            // The probe's own is in the size of one that is all populated.
            assert!(touched + 16 >= workload.touched_mib, "{}", workload.name);
            assert!(touched <= workload.touched_mib, "{}", workload.name);
            assert!(workload.touched_mib <= workload.memory_mib, "{}", workload.name);
        }
    }
}
