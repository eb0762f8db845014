//! Agents that are not root: they run guests, confine them as far as they can, and move them.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use ferry_tests::{Guest, Host, Pair, Witness, binary};
use libtest_mimic::Trial;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::mount::mount_bind;

use crate::jail::Status;
use crate::scenario::{on_kvm, with_mounts_of_its_own};

pub(crate) fn trials() -> Vec<Trial> {
    // Only root can make another user's agents.
    if !rustix::process::geteuid().is_root() {
        return Vec::new();
    }
    on_kvm![
        an_agent_that_is_not_root_confines_its_vmms,
        guests_move_between_agents_that_are_not_root,
    ]
}

const NOBODY: u32 = 65534;

/// What it can without being root: filters, and nothing to be had beyond its user. The rest depends on the host.
fn an_agent_that_is_not_root_confines_its_vmms(pair: &mut Pair) -> Result<()> {
    let kernel = become_nobodys(pair)?;

    pair.a.ferry(&Guest::new("g").arguments(&kernel))?.exit(0)?;

    let witness = Witness::of(&[&pair.a]);
    witness.wait_ready()?;
    is_confined(&pair.a)?;
    pair.a.ferry(&["reboot", "g"])?.exit(0)?;
    witness.wait_ready_times(2)
}

fn guests_move_between_agents_that_are_not_root(pair: &mut Pair) -> Result<()> {
    let kernel = become_nobodys(pair)?;
    let (image, disk) = (pair.folder().join("nobody/disk"), pair.folder().join("disk"));
    fs::write(&image, vec![0x5a; 1 << 20])?;
    chown(&image, Some(NOBODY), Some(NOBODY))?;
    // Of another user, and closed to all others.
    fs::write(&disk, vec![0x5a; 1 << 20])?;
    fs::set_permissions(&disk, Permissions::from_mode(0o600))?;
    let with = |disk: &Path| Guest::new("g").disk(&format!("path={}", disk.display()));
    let refused = pair.a.ferry(&with(&disk).arguments(&kernel))?;
    refused.exit(4)?.says(&disk.display().to_string())?.says("denied")?;

    pair.a.ferry(&with(&image).arguments(&kernel))?.exit(0)?;
    let witness = Witness::of(&[&pair.a, &pair.b]);
    witness.wait_ready()?;
    names_what_keeps_pages_from_coming_late(pair)?;
    for (from, to) in [(&pair.a, &pair.b), (&pair.b, &pair.a)] {
        let moved = from.ferry(&["migrate", "g", "--to", to.name, "--digests"])?.exit(0)?;
        moved.migration()?.is("completed", to.name)?;
        pair.runs_only_at(to, "g", &witness)?;
        is_confined(to)?;
    }
    Ok(())
}

/// Before anything is prepared, and with what to do about it.
fn names_what_keeps_pages_from_coming_late(pair: &Pair) -> Result<()> {
    const SYSCTL: &str = "vm.unprivileged_userfaultfd";
    let permitted = fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd")?.trim() == "1";
    let is_everybodys = || fs::metadata("/dev/userfaultfd").is_ok_and(|device| device.mode() & 0o006 == 0o006);
    if permitted || is_everybodys() {
        eprintln!("this host lets everybody watch absent pages");
        return Ok(());
    }
    for further in [&[][..], &["--dry-run"]] {
        let words = [&["--mode", "hybrid"], further].concat();
        pair.migrate("g", &words)?.exit(4)?.says("LATE_PAGES")?.says(SYSCTL)?;
    }
    Ok(())
}

fn is_confined(host: &Host) -> Result<()> {
    let status = Status::of(host.vmm()?)?;
    status.has("CapEff", "0000000000000000")?;
    status.has("NoNewPrivs", "1")?;
    status.has("Seccomp", "2")?;
    ensure!(status.user()? == NOBODY);
    Ok(())
}

/// Both agents become another user's, with what they need in a folder of that user's. A kernel that they can read.
fn become_nobodys(pair: &mut Pair) -> Result<String> {
    fs::set_permissions(pair.folder(), Permissions::from_mode(0o755))?;
    let (home, ferry) = (pair.folder().join("nobody"), pair.folder().join("ferry"));
    fs::copy(binary::ferry()?, &ferry).context("failed to copy the binary")?;
    fs::create_dir(&home)?;
    chown(&home, Some(NOBODY), Some(NOBODY))?;
    let kernel = home.join("probe.elf");
    fs::copy(pair.kernel(), &kernel)?;
    let node = kvm_of_everybodys(&home)?;
    for host in [&mut pair.a, &mut pair.b] {
        host.kill();
        host.become_user(NOBODY, &ferry, &home.join(host.name));
        with_mounts_of_its_own(|| {
            mount_bind(&node, "/dev/kvm")?;
            host.start()
        })?;
    }
    Ok(kernel.display().to_string())
}

/// A node like `/dev/kvm` that every user may open: the host's stays as it is.
fn kvm_of_everybodys(home: &Path) -> Result<PathBuf> {
    let node = home.join("kvm");
    let device = fs::metadata("/dev/kvm")?.rdev();
    mknodat(CWD, &node, FileType::CharacterDevice, Mode::empty(), device)?;
    fs::set_permissions(&node, Permissions::from_mode(0o666))?;
    Ok(node)
}
