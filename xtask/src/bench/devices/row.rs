//! The rows: what the probe does with a device, the same for all who are measured.

/// One thing that is measured.
#[derive(Clone, Copy, Debug)]
pub(super) struct Row {
    /// Its name.
    pub(super) name: &'static str,
    /// The device.
    pub(super) device: Device,
    /// What the probe is told, beside the time.
    pub(super) work: &'static str,
}

/// What the guest has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Device {
    /// A disk.
    Disk,
    /// A network card whose frames the host counts and drops.
    Sender,
    /// A network card to which the host sends frames of so many bytes, their Ethernet header included.
    Receiver(usize),
}

/// How long the guest measures, in seconds.
pub(super) const SECONDS: u64 = 3;

/// The guest's memory in MiB.
pub(super) const MEMORY_MIB: u64 = 256;

impl Row {
    /// The probe's command line. No heartbeats: each character of one would be an exit in the middle of what is measured.
    ///
    /// `tsc_khz` is what the guest's clock runs at.
    pub(super) fn cmdline(&self, tsc_khz: u64) -> String {
        format!("{} seconds={SECONDS} heartbeat_ms=3600000 tsc_khz={tsc_khz}", self.work)
    }
}

const fn disk(name: &'static str, work: &'static str) -> Row {
    Row {
        name,
        device: Device::Disk,
        work,
    }
}

const fn sender(name: &'static str, work: &'static str) -> Row {
    Row {
        name,
        device: Device::Sender,
        work,
    }
}

const fn receiver(name: &'static str, bytes: usize, work: &'static str) -> Row {
    Row {
        name,
        device: Device::Receiver(bytes),
        work,
    }
}

/// All of them.
pub(super) const ALL: &[Row] = &[
    disk("blk-randread-4k", "work=blk io=randread block_kib=4 depth=32"),
    disk("blk-randread-4k-depth1", "work=blk io=randread block_kib=4 depth=1"),
    disk("blk-randwrite-4k", "work=blk io=randwrite block_kib=4 depth=32"),
    disk("blk-randwrite-4k-depth1", "work=blk io=randwrite block_kib=4 depth=1"),
    disk("blk-seqread-1m", "work=blk io=seqread block_kib=1024 depth=4"),
    disk("blk-seqwrite-1m", "work=blk io=seqwrite block_kib=1024 depth=4"),
    sender("net-send-64", "work=net direction=send packet=64 depth=128"),
    sender("net-send-1500", "work=net direction=send packet=1500 depth=128"),
    // As much as TCP hands to a card that cuts: 44 segments.
    sender("net-send-64k", "work=net direction=send packet=64294 depth=128"),
    receiver("net-receive-64", 64, "work=net direction=receive packet=64 depth=256"),
    receiver(
        "net-receive-1500",
        1500,
        "work=net direction=receive packet=1500 depth=256",
    ),
];

#[cfg(test)]
mod tests {
    use ferry_probe::cmdline::Options;

    use super::*;

    #[test]
    fn the_probe_understands_every_row() {
        for row in ALL {
            let line = row.cmdline(2_000_000);
            let options = Options::parse(&line).unwrap();
            assert_eq!((options.devices.seconds, options.tsc_khz), (SECONDS, Some(2_000_000)));
            if let Device::Receiver(bytes) = row.device {
                assert_eq!(options.devices.packet as usize, bytes, "{line}");
            }
        }
    }
}
