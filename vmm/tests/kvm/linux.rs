//! What only a whole kernel can tell: minutes where ring 0 is emulated, so only in long runs.

use std::fs::File;
use std::time::Duration;

use anyhow::{Context, Result};
use ferry_linux_guest::{CMDLINE, image};
use ferry_vmm::{BootPayload, MachineConfig};

use super::Case;
use super::micro::{Rig, blank, config};

pub(crate) const LONG_CASES: &[Case] = &[(
    "linux_hears_of_another_generation_id",
    linux_hears_of_another_generation_id,
)];

const BOOT: Duration = Duration::from_secs(300);

fn linux_hears_of_another_generation_id() -> Result<()> {
    let image = image().context("failed to get the Linux guest")?;
    let (blank, console, events) = blank(&MachineConfig {
        memory_bytes: 256 << 20,
        ..config()
    })?;
    let mut rig = Rig {
        machine: blank.boot(BootPayload {
            kernel: File::open(&image.kernel)?,
            initrd: Some(File::open(&image.initramfs)?),
            cmdline: CMDLINE.to_owned(),
        })?,
        console,
        events,
    };
    rig.machine.run()?;
    rig.console
        .wait_within(BOOT, |text| text.contains("TICK 1 ").then_some(()))?;

    rig.machine.pause()?;
    rig.machine.renew_generation_id()?;
    rig.machine.run()?;

    rig.console.wait_within(BOOT, |text| {
        text.contains("crng reseeded due to virtual machine fork").then_some(())
    })
}
