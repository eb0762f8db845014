//! What is measured: guests by name. `xtask bench --peer` runs the same ones in its rivals.

use std::time::Duration;

use serde::Serialize;

use super::super::lab::GuestPlan;

/// A guest and what it does.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Workload {
    #[serde(rename = "workload")]
    pub(super) name: &'static str,
    pub(super) description: &'static str,
    pub(super) memory_bytes: u64,
    pub(super) vcpus: u32,
    pub(super) dirty: &'static str,
    /// The probe's command line.
    pub(super) cmdline: &'static str,
    /// Guest memory that is ever touched.
    pub(super) touched_bytes: u64,
    /// It moves by post-copy, and what nobody waits for comes with so many bytes a second.
    pub(super) late: Option<u64>,
}

impl Workload {
    pub(super) fn plan(&self) -> GuestPlan {
        GuestPlan {
            name: self.name.to_owned(),
            memory_bytes: self.memory_bytes,
            vcpus: self.vcpus,
            dirty: self.dirty.to_owned(),
            cmdline: self.cmdline.to_owned(),
            patience: Duration::from_secs(120),
        }
    }
}

/// The workloads of these names, or with these words in their names; all where none are named.
pub(super) fn chosen(names: &[String]) -> Result<Vec<Workload>, String> {
    let is_meant = |workload: &Workload, name: &String| {
        let exact = ALL.iter().any(|known| known.name == name);
        if exact {
            workload.name == name
        } else {
            workload.name.contains(name.as_str())
        }
    };
    if let Some(name) = names
        .iter()
        .find(|name| !ALL.iter().any(|workload| is_meant(workload, name)))
    {
        let known: Vec<&str> = ALL.iter().map(|workload| workload.name).collect();
        return Err(format!(
            "--workload {name}: there is none of this name; there are {}",
            known.join(", ")
        ));
    }
    let meant = |workload: &&Workload| names.is_empty() || names.iter().any(|name| is_meant(workload, name));
    Ok(ALL.iter().filter(meant).copied().collect())
}

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

const ALL: [Workload; 8] = [
    Workload {
        name: "idle-random-1g",
        description: "1 GiB of random data, 100 page writes a second",
        memory_bytes: 2 * GIB,
        vcpus: 1,
        dirty: "log",
        cmdline: "fill=random fill_mib=960 work=uniform work_mib=64 rate=100 heartbeat_ms=20",
        touched_bytes: GIB,
        late: None,
    },
    Workload {
        name: "sparse-12g",
        description: "64 MiB touched of 12 GiB, idle",
        memory_bytes: 12 * GIB,
        vcpus: 1,
        dirty: "log",
        cmdline: "fill=random fill_mib=64 work=idle heartbeat_ms=20",
        touched_bytes: 64 * MIB,
        late: None,
    },
    Workload {
        name: "zero-1g",
        description: "1 GiB that was written with zeroes, idle",
        memory_bytes: 2 * GIB,
        vcpus: 1,
        dirty: "log",
        cmdline: "fill=zero fill_mib=1024 work=idle heartbeat_ms=20",
        touched_bytes: GIB,
        late: None,
    },
    Workload {
        name: "busy-20k",
        description: "768 MiB of random data, 20,000 page writes a second into 256 MiB",
        memory_bytes: GIB,
        vcpus: 1,
        dirty: "log",
        cmdline: "fill=random fill_mib=512 work=uniform work_mib=256 rate=20000 heartbeat_ms=20",
        touched_bytes: 768 * MIB,
        late: None,
    },
    Workload {
        name: "busy-20k-ring",
        description: "as busy-20k, with the dirty ring",
        memory_bytes: GIB,
        vcpus: 1,
        dirty: "ring",
        cmdline: "fill=random fill_mib=512 work=uniform work_mib=256 rate=20000 heartbeat_ms=20",
        touched_bytes: 768 * MIB,
        late: None,
    },
    Workload {
        name: "busy-100k",
        description: "768 MiB of random data, 100,000 page writes a second, nine of ten into 26 MiB",
        memory_bytes: GIB,
        vcpus: 1,
        dirty: "log",
        cmdline: "fill=random fill_mib=512 work=hotcold work_mib=256 rate=100000 heartbeat_ms=20",
        touched_bytes: 768 * MIB,
        late: None,
    },
    Workload {
        name: "late-idle-link",
        description: "by post-copy, all but idle link: 256 MiB of random data, 2,000 page writes a second into half of it",
        memory_bytes: 512 * MIB,
        vcpus: 1,
        dirty: "log",
        cmdline: "fill=random fill_mib=128 work=uniform work_mib=128 rate=2000 heartbeat_ms=20",
        touched_bytes: 256 * MIB,
        late: Some(16 * MIB),
    },
    Workload {
        name: "full-speed",
        description: "512 MiB of random data, page writes as fast as they go into 16 MiB",
        memory_bytes: GIB,
        vcpus: 1,
        dirty: "log",
        cmdline: "fill=random fill_mib=512 work=uniform work_mib=16 rate=max heartbeat_ms=20",
        touched_bytes: 528 * MIB,
        late: None,
    },
];

#[cfg(test)]
mod tests {
    use super::*;
    use ferry_probe::cmdline::Options;

    #[test]
    fn what_a_workload_says_it_touches_is_what_its_guest_touches() {
        for workload in ALL {
            let options = Options::parse(workload.cmdline).unwrap();
            let touched = (options.fill_mib + options.work_size_mib()) * MIB;
            assert_eq!(touched, workload.touched_bytes, "{}", workload.name);
            assert!(touched < workload.memory_bytes, "{}", workload.name);
        }
    }

    #[test]
    fn a_whole_name_means_one_workload_and_a_part_all_that_have_it() {
        let names = |text: &str| {
            chosen(&[text.to_owned()])
                .unwrap()
                .iter()
                .map(|found| found.name)
                .collect::<Vec<_>>()
        };
        assert_eq!(names("busy-20k"), ["busy-20k"]);
        assert_eq!(names("busy"), ["busy-20k", "busy-20k-ring", "busy-100k"]);
    }

    #[test]
    fn unknown_names_are_told_with_the_known_ones() {
        let problem = chosen(&["nonsense".to_owned()]).unwrap_err();
        assert!(
            problem.contains("nonsense") && problem.contains("sparse-12g"),
            "{problem}"
        );
        assert_eq!(chosen(&[]).unwrap().len(), ALL.len());
    }
}
