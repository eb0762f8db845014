//! Saved states of each version, as bytes: whatever changes here, these restore for ever.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;

use ferry_proto::state::v1 as saved;
use prost::Message;

use super::device::Device;
use super::testing::Driver;
use super::{Balloon, Block, Entropy, Net, version_of_saved};
use crate::machine::{DiskAccess, DiskBackend, NicBackend};

/// Version 1 of each schema: a driver is set up with all features that the device had then, and has taken a few chains.
const VERSION_1: [(&str, &str); 4] = [
    (
        "ferry.virtio-blk",
        "08021224080f18c4c4818010200142180880021001188080800120808082012880808301300738051a0a08401a06676f6c64656e",
    ),
    (
        "ferry.virtio-net",
        "0801125d080f18a3f78e811020012802300138024218088002100118808080012080808201288080830130073805421808800210011880808401208080860128808087013007380542170810100118808088012080808a012880808b01300738051a0a0a060200000000091001",
    ),
    (
        "ferry.virtio-rng",
        "08041223080f188080808010200142170840100118808080012080808201288080830130073805",
    ),
    (
        "ferry.virtio-balloon",
        "08051259080f18a480808010200128024218088001100118808080012080808201288080830130073805421808800110011880808401208080860128808087013007380542170840100118808088012080808a012880808b0130073805",
    ),
];

/// Version 2 of the balloon: its driver numbers queues as Linux does, and was asked for hints once.
const BALLOON_2: (&str, &str) = (
    "ferry.virtio-balloon",
    "08051272080f18ac80808010200128024218088001100118808080012080808201288080830130073805421808800110011880808401208080860128808087013007380542170840100118808088012080808a012880808b01300738054217084010011880808c012080808e012880808f01300738051a03f00b02",
);

fn device(schema: &str) -> Box<dyn Device> {
    match schema {
        "ferry.virtio-blk" => {
            let file: File = tempfile::tempfile().expect("file");
            file.set_len(64 * 512).expect("size");
            Box::new(
                Block::new(DiskBackend {
                    file,
                    access: DiskAccess::ReadWrite,
                    serial: "golden".to_owned(),
                    losses: Default::default(),
                })
                .expect("disk"),
            )
        }
        "ferry.virtio-net" => {
            let (tap, _) = UnixDatagram::pair().expect("pair");
            Box::new(Net::new(NicBackend {
                tap: OwnedFd::from(tap),
                mac: [2, 0, 0, 0, 0, 9],
                rate: None,
            }))
        }
        "ferry.virtio-rng" => Box::new(Entropy),
        _ => Box::<Balloon>::default(),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn bytes(hex: &str) -> Vec<u8> {
    let byte = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).expect("hex");
    (0..hex.len()).step_by(2).map(byte).collect()
}

/// Every golden state.
pub(super) fn states() -> Vec<saved::VirtioDevice> {
    let state = |(schema, golden): (&str, &str)| saved::VirtioDevice::decode(bytes(golden).as_slice()).expect(schema);
    VERSION_1.into_iter().chain([BALLOON_2]).map(state).collect()
}

#[test]
fn states_of_each_version_restore_and_are_saved_as_they_were() {
    for (schema, golden) in VERSION_1.into_iter().chain([BALLOON_2]) {
        let driver = Driver::new(device(schema));
        let state = saved::VirtioDevice::decode(bytes(golden).as_slice()).expect(schema);
        driver.device.restore(&state).expect(schema);
        assert_eq!(hex(&driver.device.save().encode_to_vec()), golden, "{schema}");
    }
}

#[test]
fn each_state_is_of_its_version() {
    let versions: Vec<u32> = states().iter().map(version_of_saved).collect();
    assert_eq!(versions, [1, 1, 1, 1, 2]);
}
