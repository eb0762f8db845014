//! Disks that are block devices: those of both hosts are the same one, or are not.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use ferry_tests::{Guest, LoopDevice, Pair};
use libtest_mimic::Trial;
use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat};

use crate::device_work::{is_stamped, stamped_image, transfers, with_disk};
use crate::scenario::on_kvm;
use crate::storage::folders;

pub(crate) fn trials() -> Vec<Trial> {
    let trials = on_kvm![
        a_block_device_goes_from_host_to_host_with_its_guest,
        a_device_that_is_another_one_at_the_destination_is_not_taken_for_the_guests,
        a_device_of_larger_sectors_than_the_guests_is_written_through_the_page_cache,
    ];
    if LoopDevice::can_be_had() {
        return trials;
    }
    trials.into_iter().map(|trial| trial.with_ignored_flag(true)).collect()
}

fn a_block_device_goes_from_host_to_host_with_its_guest(pair: &mut Pair) -> Result<()> {
    let image = stamped_image(pair)?;
    let device = LoopDevice::on(&image, 512)?;
    // Through a link, as in /dev/mapper: that is its name, and not the kernel's.
    let link = pair.folder().join("web");
    std::os::unix::fs::symlink(device.path(), &link)?;
    let work = "io=randwrite block_kib=8 depth=16 seconds=20";
    let witness = pair.run(&with_disk(&link, work))?;
    ensure!(pair.a.show("g")?["disks"][0]["path"] == link.display().to_string());
    ensure!(
        is_direct(pair.a.vmm()?, device.path())?,
        "it is written through the page cache"
    );

    let copied = pair.migrate("g", &["--storage", "copy"])?.exit(4)?;
    copied.says("nothing is written over")?;
    pair.migrate("g", &["--storage", "shared"])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;
    pair.runs_only_at(&pair.b, "g", &witness)?;
    // Both agents are on one host, and can tell that the device is the same.
    let back = pair.b.ferry(&["migrate", "g", "--to", "a"])?.exit(0)?.migration()?;
    ensure!(back.record["copied_disks"] == serde_json::json!([]), "{}", back.record);
    back.is("completed", "a")?;

    pair.runs_only_at(&pair.a, "g", &witness)?;
    let told = transfers(&pair.a)?;
    ensure!(told.operations > 0 && told.failed == 0, "{told}");
    pair.a.ferry(&["stop", "g", "--force"])?.exit(0)?;
    is_stamped(device.path())?;
    is_stamped(&image)
}

fn a_device_that_is_another_one_at_the_destination_is_not_taken_for_the_guests(pair: &mut Pair) -> Result<()> {
    let folders = folders(pair)?;
    let image = |name: &str| -> Result<LoopDevice> {
        let path = pair.folder().join(name);
        fs::write(&path, vec![name.as_bytes()[0]; 1 << 20])?;
        LoopDevice::on(&path, 512)
    };
    let (at_a, at_b) = (image("a.img")?, image("b.img")?);
    node(&at_a, &folders.a.join("vdb"))?;
    node(&at_b, &folders.b.join("vdb"))?;
    let path = folders.both.join("vdb").display().to_string();
    let witness = pair.run(&Guest::new("g").disk(&format!("path={path}")))?;

    let refused = |pair: &Pair, why: &str| -> Result<()> {
        let told = pair.migrate("g", &[])?.exit(4)?;
        told.says("host b")?.says(&path)?.says(why)?.says("--storage shared")?;
        Ok(())
    };
    refused(pair, "does not tell which one")?;
    pair.migrate("g", &["--dry-run"])?.exit(4)?.says("--storage shared")?;
    // And a file of that name is no more the guest's than another device is.
    fs::remove_file(folders.b.join("vdb"))?;
    File::create(folders.b.join("vdb"))?.set_len(1 << 20)?;
    refused(pair, "at the source a block device")?;

    pair.runs_only_at(&pair.a, "g", &witness)?;
    let mut bytes = vec![0; 1 << 20];
    File::open(at_b.path())?.read_exact_at(&mut bytes, 0)?;
    ensure!(bytes.iter().all(|&byte| byte == b'b'), "somebody wrote the device of b");
    Ok(())
}

fn a_device_of_larger_sectors_than_the_guests_is_written_through_the_page_cache(pair: &mut Pair) -> Result<()> {
    let image = stamped_image(pair)?;
    let device = LoopDevice::on(&image, 4096)?;
    let work = "io=randwrite block_kib=4 depth=4 seconds=10";
    let witness = pair.run(&with_disk(device.path(), work))?;
    ensure!(!is_direct(pair.a.vmm()?, device.path())?, "single sectors would fail");

    pair.migrate("g", &[])?.exit(0)?.migration()?.is("completed", "b")?;

    pair.runs_only_at(&pair.b, "g", &witness)?;
    ensure!(
        !is_direct(pair.b.vmm()?, device.path())?,
        "single sectors would fail at b"
    );
    let told = transfers(&pair.b)?;
    ensure!(told.operations > 0 && told.failed == 0, "{told}");
    pair.b.ferry(&["stop", "g", "--force"])?.exit(0)?;
    is_stamped(device.path())
}

/// Whether a process has this device open past the page cache.
fn is_direct(process: u32, device: &Path) -> Result<bool> {
    let open = fs::read_dir(format!("/proc/{process}/fd"))?.flatten();
    let number = open
        .filter(|entry| fs::read_link(entry.path()).is_ok_and(|path| path == device))
        .find_map(|entry| entry.file_name().into_string().ok());
    let number = number.with_context(|| format!("VMM {process} has {} not open", device.display()))?;
    let told = fs::read_to_string(format!("/proc/{process}/fdinfo/{number}"))?;
    let flags = told.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = u32::from_str_radix(flags.context("no flags")?.trim(), 8)?;
    Ok(flags & OFlags::DIRECT.bits() != 0)
}

/// Another name for a device.
fn node(device: &LoopDevice, path: &Path) -> Result<()> {
    let number = fs::metadata(device.path())?.rdev();
    mknodat(CWD, path, FileType::BlockDevice, Mode::RUSR | Mode::WUSR, number)
        .with_context(|| format!("failed to make the device {}", path.display()))
}
