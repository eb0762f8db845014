//! What this host offers to machines, and whether a given machine could run here.

use std::collections::HashSet;

use thiserror::Error;

use crate::arch::x86_64::cpuid::{CpuidEntry, missing, with_native_features, withhold_hypercalls};
use crate::arch::x86_64::vcpu_state::{TscControl, probe_tsc};
use crate::devices::newest_version;
use crate::host_files;
use crate::kvm::{Host, HostError, KvmError, Vm, host_tsc, native_cpuid};
use crate::machine::DirtyMode;
use crate::memory::{GuestMemory, HUGE_PAGE_SIZE, MemoryOptions, PAGE_SIZE};
use crate::state::{MachineProfile, unit_kinds};

/// What this host offers. A snapshot; what it depends on changes only with kernel modules and hardware.
#[derive(Debug, Clone)]
pub struct HostCapabilities {
    /// Whether this is kvm-pvm: no hardware virtualisation, guests see the processor's own feature leaves.
    pub is_pvm: bool,
    /// Memory of the host in bytes.
    pub memory_bytes: u64,
    /// Most vCPUs that a machine may have.
    pub max_vcpus: u32,
    /// Size of the largest dirty ring of a vCPU in bytes; 0 where there is none.
    pub dirty_ring_bytes: u64,
    /// Size of a vCPU's XSAVE area in bytes.
    pub xsave_bytes: u64,
    /// Frequency of a guest's time stamp counter in kHz; 0 where it is unstable.
    pub tsc_khz: u32,
    /// Whether a guest's time stamp counter can be set apart from the host's, so that a guest from a host that booted earlier fits.
    pub tsc_offset_settable: bool,
    /// Names this boot of the host.
    pub boot_id: String,
    /// CPUID as code in a guest of model `host` could see it.
    pub cpuid: Vec<CpuidEntry>,
}

/// Why a machine cannot run on this host.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Incompatibility {
    /// The processor lacks something that the guest was given.
    #[error("CPU feature {0} is missing")]
    CpuFeature(String),
    /// Time would not pass at the same speed.
    #[error("the guest's time stamp counter runs at {guest_khz} kHz, this host's at {host_khz} kHz")]
    TscFrequency {
        /// The guest's.
        guest_khz: u32,
        /// This host's.
        host_khz: u32,
    },
    /// Time would go back.
    #[error(
        "the guest's time stamp counter is at {guest}, this host's at {host}, and this host cannot set it: it would go back"
    )]
    TscBehind {
        /// The guest's.
        guest: u64,
        /// This host's.
        host: u64,
    },
    /// More vCPUs than the host gives one machine.
    #[error("the guest has {guest} vCPUs, at most {host} are possible")]
    Vcpus {
        /// The guest's.
        guest: u32,
        /// This host's limit.
        host: u32,
    },
    /// More memory than the host has.
    #[error("the guest has {} MiB of memory, the host {} MiB", guest >> 20, host >> 20)]
    Memory {
        /// The guest's in bytes.
        guest: u64,
        /// This host's in bytes.
        host: u64,
    },
    /// Memory that no machine here would have like that.
    #[error("guest memory does not lie as it does in a machine of this version")]
    MemoryShape,
    /// Another size of pages.
    #[error("guest pages have {0} bytes")]
    PageSize(u64),
    /// A device that is not known here, or not in this version.
    #[error("device {name} with state {schema:?} version {version} is unknown")]
    Device {
        /// Its name.
        name: String,
        /// Its schema.
        schema: String,
        /// Its version.
        version: u32,
    },
    /// A device that every machine here has is not there.
    #[error("device {0} is not part of the machine")]
    MissingDevice(String),
    /// A device is there more than once.
    #[error("device {0} is part of the machine twice")]
    DoubleDevice(String),
    /// No dirty ring, which the machine was made with.
    #[error("KVM here has no dirty ring, which the guest was run with (--dirty ring)")]
    DirtyRing,
    /// More devices than a machine has, vCPUs among them.
    #[error("the machine has {0} devices, at most {MOST_DEVICES} are possible")]
    Devices(usize),
}

/// Counters this close need no scaling (parts per million).
const TSC_TOLERANCE_PPM: u64 = 250;

/// Looks at this host.
///
/// Makes a VM for a moment to find out what only one can tell.
///
/// # Errors
///
/// What keeps this host from running machines, with a remedy.
pub fn host() -> Result<HostCapabilities, HostError> {
    let host = Host::open()?;
    let memory = GuestMemory::new(MemoryOptions {
        bytes: HUGE_PAGE_SIZE,
        hugetlb: false,
        expect_incoming: true,
    })
    .map_err(HostError::Memory)?;
    let vm = Vm::new(&host, &memory, DirtyMode::Log).map_err(HostError::Ask)?;
    let vcpu = vm.create_vcpu(0).map_err(HostError::Ask)?;
    let tsc = probe_tsc(&vcpu).map_err(HostError::Ask)?;
    HostCapabilities::of(&host, vcpu.tsc_khz(), tsc)
}

impl HostCapabilities {
    /// What the host says of itself, and what a vCPU told of its time stamp counter.
    pub(crate) fn of(host: &Host, tsc_khz: u32, tsc: TscControl) -> Result<Self, HostError> {
        let supported = offered_cpuid(host).map_err(HostError::Ask)?;
        let is_pvm = host_files::is_pvm();
        Ok(Self {
            is_pvm,
            memory_bytes: host_files::memory().map_err(HostError::Open)?,
            max_vcpus: host.max_vcpus.min(u8::MAX.into()) as u32,
            dirty_ring_bytes: host.dirty_ring_bytes as u64,
            xsave_bytes: host.xsave_bytes as u64,
            tsc_khz,
            tsc_offset_settable: tsc != TscControl::Fixed,
            boot_id: host_files::boot_id(),
            cpuid: as_guests_see(&supported, is_pvm),
        })
    }

    /// Names everything that keeps a machine with this profile from running here; nothing if it can.
    #[must_use]
    pub fn check(&self, profile: &MachineProfile) -> Vec<Incompatibility> {
        self.check_at(profile, host_tsc())
    }

    /// What keeps a machine whose writes are found in this way from running here.
    #[must_use]
    pub fn check_tracking(&self, dirty: DirtyMode) -> Option<Incompatibility> {
        (dirty == DirtyMode::Ring && self.dirty_ring_bytes == 0).then_some(Incompatibility::DirtyRing)
    }

    fn check_at(&self, profile: &MachineProfile, tsc: u64) -> Vec<Incompatibility> {
        let mut found: Vec<_> = missing(&profile.cpuid, &self.cpuid)
            .into_iter()
            .filter(|name| !GIVEN_BY_KVM.contains(&name.as_str()))
            .map(Incompatibility::CpuFeature)
            .collect();
        if profile.page_size != PAGE_SIZE {
            found.push(Incompatibility::PageSize(profile.page_size));
        }
        if profile.vcpus == 0 || profile.vcpus > self.max_vcpus {
            found.push(Incompatibility::Vcpus {
                guest: profile.vcpus,
                host: self.max_vcpus,
            });
        }
        found.extend(self.check_memory(profile));
        found.extend(self.check_tsc(profile, tsc));
        found.extend(check_devices(profile));
        found
    }

    fn check_memory(&self, profile: &MachineProfile) -> Option<Incompatibility> {
        let guest = profile
            .shape
            .regions
            .iter()
            .fold(0u64, |sum, region| sum.saturating_add(region.len));
        if guest > self.memory_bytes {
            return Some(Incompatibility::Memory {
                guest,
                host: self.memory_bytes,
            });
        }
        let ours = crate::memory::MemoryShape::from_size(guest);
        (profile.shape != ours).then_some(Incompatibility::MemoryShape)
    }

    fn check_tsc(&self, profile: &MachineProfile, tsc: u64) -> Vec<Incompatibility> {
        let mut found = Vec::new();
        let (guest_khz, host_khz) = (profile.tsc_khz, self.tsc_khz);
        let apart = u64::from(guest_khz.abs_diff(host_khz));
        if apart * 1_000_000 > u64::from(guest_khz) * TSC_TOLERANCE_PPM {
            found.push(Incompatibility::TscFrequency { guest_khz, host_khz });
        }
        let same_counter = self.boot_id == profile.boot_id && !self.boot_id.is_empty();
        if !self.tsc_offset_settable && !same_counter && tsc < profile.tsc {
            found.push(Incompatibility::TscBehind {
                guest: profile.tsc,
                host: tsc,
            });
        }
        found
    }
}

/// Features that a guest has by KVM's doing although KVM does not list them as supported.
const GIVEN_BY_KVM: [&str; 2] = ["hypervisor", "tsc_deadline_timer"];

/// The most units of a profile: 255 vCPUs and some twenty devices are possible.
const MOST_DEVICES: usize = 512;

/// The most characters of a device's name or schema that are told. Those of today have 17 at most; a profile comes from a peer.
const NAME_TOLD: usize = 64;

fn check_devices(profile: &MachineProfile) -> Vec<Incompatibility> {
    if profile.units.len() > MOST_DEVICES {
        return vec![Incompatibility::Devices(profile.units.len())];
    }
    // A machine here has the virtio devices that its configuration names, so those of the profile count as long as they are of a kind
    // that is known.
    let virtio = profile.units.iter().map(|unit| {
        // Whatever is read here is known in the version that it has.
        let newest = newest_version(&unit.schema);
        (unit.name.as_str(), unit.version.clamp(1, newest))
    });
    let virtio: Vec<(&str, u32)> = virtio.collect();
    let known = unit_kinds(profile.vcpus.min(u8::MAX.into()) as usize, &virtio);
    let kinds: HashSet<_> = known.iter().collect();
    let told = |name: &str| name.chars().take(NAME_TOLD).collect::<String>();
    let mut found: Vec<_> = profile
        .units
        .iter()
        .filter(|unit| !kinds.contains(unit))
        .map(|unit| Incompatibility::Device {
            name: told(&unit.name),
            schema: told(&unit.schema),
            version: unit.version,
        })
        .collect();
    let mut names = HashSet::new();
    let doubles = profile.units.iter().filter(|unit| !names.insert(unit.name.as_str()));
    found.extend(doubles.map(|unit| Incompatibility::DoubleDevice(told(&unit.name))));
    let absent = known.iter().filter(|known| !names.contains(known.name.as_str()));
    found.extend(absent.map(|known| Incompatibility::MissingDevice(known.name.clone())));
    found
}

/// What KVM says it supports, without what does not work on this host although it is listed.
pub(crate) fn offered_cpuid(host: &Host) -> Result<Vec<CpuidEntry>, KvmError> {
    let mut entries: Vec<CpuidEntry> = host.supported_cpuid()?.into_iter().map(Into::into).collect();
    if host_files::is_pvm() {
        withhold_hypercalls(&mut entries);
    }
    Ok(entries)
}

/// Entries as code in a guest sees them on this host.
pub(crate) fn as_guests_see(entries: &[CpuidEntry], is_pvm: bool) -> Vec<CpuidEntry> {
    if is_pvm {
        with_native_features(entries, native_cpuid)
    } else {
        entries.to_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MemoryShape;

    fn here() -> HostCapabilities {
        HostCapabilities {
            is_pvm: false,
            memory_bytes: 8 << 30,
            max_vcpus: 4,
            dirty_ring_bytes: 0,
            xsave_bytes: 4096,
            tsc_khz: 2_000_000,
            tsc_offset_settable: false,
            boot_id: "here".to_owned(),
            cpuid: Vec::new(),
        }
    }

    fn profile() -> MachineProfile {
        MachineProfile {
            page_size: PAGE_SIZE,
            shape: MemoryShape::from_size(1 << 30),
            vcpus: 2,
            cpuid: Vec::new(),
            tsc_khz: 2_000_100,
            tsc: 1000,
            boot_id: "there".to_owned(),
            units: unit_kinds(2, &[]),
            disk_sectors: Vec::new(),
        }
    }

    #[test]
    fn fitting_machine_is_accepted() {
        assert_eq!(here().check_at(&profile(), 1000), []);
    }

    #[test]
    fn a_ring_is_needed_by_who_was_run_with_one() {
        assert_eq!(here().check_tracking(DirtyMode::Log), None);
        assert_eq!(here().check_tracking(DirtyMode::Ring), Some(Incompatibility::DirtyRing));
        let with_ring = HostCapabilities {
            dirty_ring_bytes: 1 << 20,
            ..here()
        };
        assert_eq!(with_ring.check_tracking(DirtyMode::Ring), None);
    }

    #[test]
    fn everything_that_does_not_fit_is_named_at_once() {
        let mut profile = profile();
        profile.vcpus = 9;
        profile.tsc_khz = 2_001_000;
        profile.units[3].version = 7;
        profile.shape = MemoryShape::from_size(16 << 30);
        let found = here().check_at(&profile, 999);
        assert!(found.contains(&Incompatibility::Vcpus { guest: 9, host: 4 }));
        assert!(found.iter().any(|one| matches!(one, Incompatibility::Memory { .. })));
        assert!(
            found
                .iter()
                .any(|one| matches!(one, Incompatibility::TscFrequency { .. }))
        );
        assert!(found.contains(&Incompatibility::TscBehind { guest: 1000, host: 999 }));
        assert!(
            found
                .iter()
                .any(|one| matches!(one, Incompatibility::Device { version: 7, .. }))
        );
    }

    #[test]
    fn double_device_is_named() {
        let mut profile = profile();
        profile.units.push(profile.units[0].clone());
        let found = here().check_at(&profile, 1000);
        assert_eq!(found, [Incompatibility::DoubleDevice("clock".to_owned())]);
    }

    #[test]
    fn more_devices_than_a_machine_has_are_not_looked_at() {
        let mut profile = profile();
        let again = profile.units[0].clone();
        profile.units.resize(MOST_DEVICES + 1, again);
        let found = here().check_at(&profile, 1000);
        assert_eq!(found, [Incompatibility::Devices(MOST_DEVICES + 1)]);
    }

    #[test]
    fn the_long_name_of_an_unknown_device_is_not_told_in_full() {
        let mut profile = profile();
        profile.units.push(crate::state::UnitKind {
            name: "x".repeat(1 << 20),
            schema: "y".repeat(1 << 20),
            version: 1,
        });
        let found = here().check_at(&profile, 1000);
        assert!(
            matches!(found.as_slice(), [one] if one.to_string().len() < 300),
            "{}",
            found.len()
        );
    }

    #[test]
    fn counter_behind_is_no_matter_where_offsets_can_be_set() {
        let host = HostCapabilities {
            tsc_offset_settable: true,
            ..here()
        };
        assert_eq!(host.check_at(&profile(), 0), []);
    }

    #[test]
    fn missing_feature_is_named() {
        let mut profile = profile();
        profile.cpuid = vec![CpuidEntry {
            function: 7,
            index: 0,
            flags: 0,
            eax: 0,
            ebx: 1 << 5,
            ecx: 0,
            edx: 0,
        }];
        let found = here().check_at(&profile, 1000);
        assert_eq!(found, [Incompatibility::CpuFeature("avx2".to_owned())]);
    }
}
