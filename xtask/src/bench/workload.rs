//! The named workloads, the same for all who are measured.

/// One guest with one vCPU and what it does.
#[derive(Clone, Copy, Debug)]
pub(super) struct Workload {
    /// Its name.
    pub(super) name: &'static str,
    /// The guest's memory in MiB.
    pub(super) memory_mib: u64,
    /// How much of it the guest touches, in MiB.
    pub(super) touched_mib: u64,
    /// What the probe does.
    pub(super) work: &'static str,
}

/// All of them.
pub(super) const ALL: &[Workload] = &[
    Workload {
        name: "random-1g",
        memory_mib: 2048,
        touched_mib: 1024,
        work: "fill=random fill_mib=1008 work=uniform work_mib=16 rate=100",
    },
    Workload {
        name: "sparse-12g",
        memory_mib: 12 << 10,
        touched_mib: 64,
        work: "fill=random fill_mib=48 work=uniform work_mib=16 rate=100",
    },
    Workload {
        name: "busy-20k",
        memory_mib: 2048,
        touched_mib: 1024,
        work: "fill=random fill_mib=960 work=uniform work_mib=64 rate=20000",
    },
    Workload {
        name: "busy-1g",
        memory_mib: 2048,
        touched_mib: 1024,
        work: "fill=random fill_mib=960 work=uniform work_mib=64 rate=100000",
    },
    Workload {
        name: "idle-256m",
        memory_mib: 1024,
        touched_mib: 256,
        work: "fill=random fill_mib=256 work=idle",
    },
];

/// Those that are moved over a slow link.
pub(super) const OVER_A_LINK: &[Workload] = &[
    Workload {
        name: "text-512m",
        memory_mib: 1024,
        touched_mib: 512,
        work: "fill=text fill_mib=496 work=uniform work_mib=16 rate=100",
    },
    Workload {
        name: "random-512m",
        memory_mib: 1024,
        touched_mib: 512,
        work: "fill=random fill_mib=496 work=uniform work_mib=16 rate=100",
    },
];

impl Workload {
    /// The probe's command line: the workload, and heartbeats often enough to tell the clocks apart.
    ///
    /// `tsc_khz` is what its clock runs at.
    pub(super) fn full_cmdline(&self, tsc_khz: u64) -> String {
        format!("{} heartbeat_ms=20 tsc_khz={tsc_khz}", self.work)
    }
}
