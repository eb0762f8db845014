//! Disks that are block devices: those of both hosts are the same one, or are not.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use ferry_tests::{Guest, LoopDevice, Pair, until, waiting::CALL};
use libtest_mimic::Trial;
use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat};

use crate::device_work::{is_stamped, stamped_image, with_disk};
use crate::readonly::of_g;
use crate::scenario::{has_nothing, on_kvm};
use crate::storage::{Folders, folders};

pub(crate) fn trials() -> Vec<Trial> {
    let trials = on_kvm![
        a_block_device_goes_from_host_to_host_with_its_guest,
        a_device_that_is_another_one_at_the_destination_is_not_taken_for_the_guests,
        what_is_on_a_device_is_written_over_another_one_if_its_user_says_so,
        a_device_that_is_too_small_or_in_use_is_not_written_over,
        an_aborted_copy_onto_a_device_says_that_it_is_there,
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
    copied.says("the very block device that the guest has")?;
    pair.migrate("g", &["--storage", "shared"])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;
    pair.runs_only_at(&pair.b, "g", &witness)?;
    // Both agents are on one host, and can tell that the device is the same.
    let began = Instant::now();
    let back = pair
        .b
        .ferry(&["migrate", "g", "--to", "a", "--verify"])?
        .exit(0)?
        .migration()?;
    ensure!(back.record["copied_disks"] == serde_json::json!([]), "{}", back.record);
    back.is("completed", "a")?;

    pair.runs_only_at(&pair.a, "g", &witness)?;
    let told = witness.transfers_after(began)?;
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

/// A device at A with a guest's stamps on it, and one of the same name and so many bytes at B, full of something else.
fn devices(pair: &mut Pair, at_b: u64) -> Result<(Folders, LoopDevice, LoopDevice)> {
    let folders = folders(pair)?;
    let at_a = LoopDevice::on(&stamped_image(pair)?, 512)?;
    let at_b = device(pair, "at-b", &vec![b'b'; at_b as usize])?;
    node(&at_a, &folders.a.join("vdb"))?;
    node(&at_b, &folders.b.join("vdb"))?;
    Ok((folders, at_a, at_b))
}

/// A device with this on it.
fn device(pair: &Pair, name: &str, contents: &[u8]) -> Result<LoopDevice> {
    let image = pair.folder().join(name);
    fs::write(&image, contents)?;
    LoopDevice::on(&image, 512)
}

/// What the probe's stamps take.
const STAMPED: u64 = 16 << 20;
const WRITES: &str = "io=randwrite block_kib=8 depth=4 seconds=3600";

fn bytes(device: &LoopDevice, from: u64, count: u64) -> Result<Vec<u8>> {
    let mut bytes = vec![0; count as usize];
    File::open(device.path())?.read_exact_at(&mut bytes, from)?;
    Ok(bytes)
}

fn what_is_on_a_device_is_written_over_another_one_if_its_user_says_so(pair: &mut Pair) -> Result<()> {
    let further = 1 << 20;
    let (folders, at_a, at_b) = devices(pair, STAMPED + further)?;
    // One that nobody writes, and half of which is zero.
    let other = [vec![3; 1 << 20], vec![0; 2 << 20], vec![4; 1 << 20]].concat();
    let other_at_a = device(pair, "other-at-a", &other)?;
    let other_at_b = device(pair, "other-at-b", &vec![b'b'; other.len()])?;
    node(&other_at_a, &folders.a.join("vdc"))?;
    node(&other_at_b, &folders.b.join("vdc"))?;
    let (path, other_path) = (folders.both.join("vdb"), folders.both.join("vdc"));
    let guest = with_disk(&path, WRITES).disk(&format!("path={}", other_path.display()));
    let witness = pair.run(&guest)?;

    pair.migrate("g", &[])?.exit(4)?.says("--storage copy")?;
    let copy = ["--storage", "copy", "--digests"];
    let moved = pair.migrate("g", &copy)?.exit(0)?.migration()?.is("completed", "b")?;

    ensure!(
        moved.record["copied_disks"] == serde_json::json!([path, other_path]),
        "{}",
        moved.record
    );
    let total = STAMPED + other.len() as u64;
    ensure!(moved.number("disk_total")? == total as f64, "{}", moved.record);
    pair.runs_only_at(&pair.b, "g", &witness)?;
    pair.b.ferry(&["stop", "g", "--force"])?.exit(0)?;
    is_stamped(at_b.path())?;
    ensure!(
        bytes(&other_at_b, 0, other.len() as u64)? == other,
        "what was there shows through"
    );
    let behind = bytes(&at_b, STAMPED, further)?;
    ensure!(
        behind.iter().all(|&byte| byte == b'b'),
        "more was written than the guest's disk"
    );
    // The source's stays, and is written over on the way back.
    is_stamped(at_a.path())?;
    let back = ["migrate", "g", "--to", "a", "--cold", "--storage", "copy"];
    pair.b.ferry(&back)?.exit(4)?.says(&format!("it has {STAMPED} bytes"))?;
    Ok(())
}

fn a_device_that_is_too_small_or_in_use_is_not_written_over(pair: &mut Pair) -> Result<()> {
    let (folders, _at_a, at_b) = devices(pair, STAMPED - 512)?;
    let path = folders.both.join("vdb");
    pair.run(&with_disk(&path, WRITES))?;
    let witness = of_g(pair)?;
    let refused = |pair: &Pair, why: &str| -> Result<()> {
        for how in [
            &["--storage", "copy"][..],
            &["--storage", "copy", "--dry-run", "--sample", "none"],
        ] {
            pair.migrate("g", how)?.exit(4)?.says("host b")?.says(why)?;
        }
        Ok(())
    };
    refused(pair, "and the guest's disk")?;
    let large = device(pair, "large", &vec![b'b'; STAMPED as usize])?;
    fs::remove_file(folders.b.join("vdb"))?;
    refused(pair, "onto a block device of that name only")?;
    node(&large, &folders.b.join("vdb"))?;
    let other = Guest {
        name: "other".to_owned(),
        ..Guest::new("other").disk(&format!("path={}", path.display()))
    };
    pair.b.ferry(&other.arguments(&pair.kernel()))?.exit(0)?;
    refused(pair, "locked by another guest")?;
    pair.b.ferry(&["delete", "other", "--force"])?.exit(0)?;
    // As a file system that is mounted, or a volume: for itself alone.
    let claim = (OFlags::EXCL | OFlags::NONBLOCK).bits().cast_signed();
    let claimed = File::options().read(true).custom_flags(claim).open(large.path())?;
    refused(pair, "in use on this host")?;
    drop(claimed);

    pair.runs_only_at(&pair.a, "g", &witness)?;
    for device in [&at_b, &large] {
        let kept = bytes(device, 0, STAMPED - 512)?;
        ensure!(kept.iter().all(|&byte| byte == b'b'), "somebody wrote a device of b");
    }
    Ok(())
}

fn an_aborted_copy_onto_a_device_says_that_it_is_there(pair: &mut Pair) -> Result<()> {
    let (folders, at_a, _at_b) = devices(pair, STAMPED)?;
    let path = folders.both.join("vdb");
    let witness = pair.run(&with_disk(&path, WRITES))?;
    let slow = ["--storage", "copy", "--bandwidth", "16Mbit"];
    let underway = pair.migrate_until("g", &slow, |record| Ok(record.record["status"] == "running"))?;
    // Nobody else gets it meanwhile.
    let other = Guest {
        name: "other".to_owned(),
        ..Guest::new("other").disk(&format!("path={}", path.display()))
    };
    let taken = pair.b.ferry(&other.arguments(&pair.kernel()))?.exit(4)?;
    taken.says("vdb")?;
    pair.a.ferry(&["migration", "abort", &underway.id])?.exit(0)?;

    ensure!(underway.call.wait()?.code == Some(1));
    pair.runs_only_at(&pair.a, "g", &witness)?;
    has_nothing(&pair.b)?;
    // B's own word: `show` would ask the source.
    until("b says that the device keeps what it has", CALL, || {
        let listed = pair.b.ferry(&["migration", "list"])?.exit(0)?.stdout;
        Ok(listed.contains("keeps what was copied onto it").then_some(()))
    })?;
    pair.a.ferry(&["stop", "g", "--force"])?.exit(0)?;
    is_stamped(at_a.path())
}

fn a_device_of_larger_sectors_than_the_guests_is_written_through_the_page_cache(pair: &mut Pair) -> Result<()> {
    let image = stamped_image(pair)?;
    let device = LoopDevice::on(&image, 4096)?;
    let work = "io=randwrite block_kib=4 depth=4 seconds=10";
    let witness = pair.run(&with_disk(device.path(), work))?;
    ensure!(!is_direct(pair.a.vmm()?, device.path())?, "single sectors would fail");

    let began = Instant::now();
    pair.migrate("g", &[])?.exit(0)?.migration()?.is("completed", "b")?;

    pair.runs_only_at(&pair.b, "g", &witness)?;
    ensure!(
        !is_direct(pair.b.vmm()?, device.path())?,
        "single sectors would fail at b"
    );
    let told = witness.transfers_after(began)?;
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
