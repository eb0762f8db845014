//! What a host must offer to take a machine over.

use ferry_proto::state::v1 as saved;
use prost::Message;

use super::envelope::{StateError, decode};
use crate::arch::x86_64::cpuid::CpuidEntry;
use crate::memory::{MemoryRegion, MemoryShape, PAGE_SIZE};

/// What of a machine must fit the host it is to run on. Compared before anything moves, see
/// [`HostCapabilities::check`](crate::HostCapabilities::check).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineProfile {
    /// Size of a guest page in bytes.
    pub page_size: u64,
    /// Where guest memory lies.
    pub shape: MemoryShape,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// CPUID as code in the guest sees it.
    pub cpuid: Vec<CpuidEntry>,
    /// Frequency of the guest's time stamp counter in kHz.
    pub tsc_khz: u32,
    /// The guest's time stamp counter when the profile was made.
    pub tsc: u64,
    /// Names the host's boot; within one boot counters compare exactly.
    pub boot_id: String,
    /// The saved units that will come.
    pub units: Vec<UnitKind>,
    /// Sectors of 512 bytes of each disk, as the guest knows them; empty of a build that did not tell. What holds the disks is opened by who
    /// makes a machine, and so compared there.
    pub disk_sectors: Vec<u64>,
}

/// A kind of saved unit.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct UnitKind {
    /// Which device.
    pub name: String,
    /// Which schema its state is in.
    pub schema: String,
    /// Which version of it.
    pub version: u32,
}

/// The one version of the profile's message that exists so far.
const VERSION: u32 = 1;

const WHAT: &str = "the machine's profile";

impl MachineProfile {
    /// Encodes it: a `ferry.state.v1.MachineProfile`.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let Self {
            page_size,
            shape,
            vcpus,
            cpuid,
            tsc_khz,
            tsc,
            boot_id,
            units,
            disk_sectors,
        } = self;
        saved::MachineProfile {
            version: VERSION,
            page_size: *page_size as u32,
            regions: shape
                .regions
                .iter()
                .map(|region| saved::MemoryRegion {
                    start: region.start,
                    len: region.len,
                })
                .collect(),
            vcpus: *vcpus,
            cpuid: cpuid.iter().copied().map(Into::into).collect(),
            tsc_khz: *tsc_khz,
            tsc: *tsc,
            boot_id: boot_id.clone(),
            units: units
                .iter()
                .map(|unit| saved::Unit {
                    name: unit.name.clone(),
                    schema: unit.schema.clone(),
                    version: unit.version,
                    body: Vec::new(),
                })
                .collect(),
            disk_sectors: disk_sectors.clone(),
        }
        .encode_to_vec()
    }

    /// Decodes what [`to_bytes`](Self::to_bytes) gave, anywhere.
    ///
    /// # Errors
    ///
    /// If it is of another version, or a region of memory is empty, unaligned, out of order or overlapping.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, StateError> {
        let saved::MachineProfile {
            version,
            page_size,
            regions,
            vcpus,
            cpuid,
            tsc_khz,
            tsc,
            boot_id,
            units,
            disk_sectors,
        } = decode(WHAT, bytes)?;
        let value = |field: String| StateError::Value {
            what: WHAT.to_owned(),
            field,
        };
        if version != VERSION {
            return Err(value(format!("its version is {version}, known is {VERSION}")));
        }
        let mut previous_end = 0;
        for region in &regions {
            let end = region.start.checked_add(region.len);
            let aligned = region.start.is_multiple_of(PAGE_SIZE) && region.len.is_multiple_of(PAGE_SIZE);
            match end {
                Some(end) if aligned && region.len > 0 && region.start >= previous_end => previous_end = end,
                _ => return Err(value(format!("memory region at {:#x} cannot be", region.start))),
            }
        }
        Ok(Self {
            page_size: page_size.into(),
            shape: MemoryShape {
                regions: regions
                    .into_iter()
                    .map(|region| MemoryRegion {
                        start: region.start,
                        len: region.len,
                    })
                    .collect(),
            },
            vcpus,
            cpuid: cpuid.into_iter().map(Into::into).collect(),
            tsc_khz,
            tsc,
            boot_id,
            units: units
                .into_iter()
                .map(|unit| UnitKind {
                    name: unit.name,
                    schema: unit.schema,
                    version: unit.version,
                })
                .collect(),
            disk_sectors,
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(in super::super) fn profile() -> MachineProfile {
        MachineProfile {
            page_size: PAGE_SIZE,
            shape: MemoryShape::from_size(5 << 30),
            vcpus: 2,
            cpuid: Vec::new(),
            tsc_khz: 2_000_000,
            tsc: 77,
            boot_id: "boot".to_owned(),
            units: super::super::unit_kinds(2, &[]),
            disk_sectors: vec![2048, 1],
        }
    }

    #[test]
    fn bytes_survive_decoding() {
        assert_eq!(MachineProfile::from_bytes(&profile().to_bytes()), Ok(profile()));
    }

    #[test]
    fn overlapping_memory_is_refused() {
        let mut wrong = profile();
        wrong.shape.regions[1].start = 1 << 30;
        assert!(matches!(
            MachineProfile::from_bytes(&wrong.to_bytes()),
            Err(StateError::Value { .. })
        ));
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = MachineProfile::from_bytes(&bytes);
        }
    }
}
