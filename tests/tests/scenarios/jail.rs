//! What a VMM can do beyond its guest: nothing.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use ferry_tests::{Guest, Host, Pair, Witness, intrusion, until, waiting::CALL};
use libtest_mimic::Trial;
use nix::libc;

use crate::scenario::{command, on_kvm, with_mounts_of_its_own};

pub(crate) fn trials() -> Vec<Trial> {
    // What an agent that is not root can do for its VMMs depends on the host.
    if !rustix::process::geteuid().is_root() {
        return Vec::new();
    }
    on_kvm![
        a_vmm_has_no_privileges,
        a_vmm_sees_its_folder_and_no_network,
        each_vmm_has_a_user_of_its_own,
        a_guest_that_moved_is_confined_there,
        each_vmm_has_a_cgroup_of_its_own,
        a_forbidden_call_of_a_vcpu_kills_that_vmm_only,
        a_forbidden_call_of_a_device_kills_that_vmm_only,
        a_forbidden_call_of_who_listens_kills_that_vmm_only,
        a_forbidden_call_of_the_machines_owner_kills_that_vmm_only,
        a_ring_made_in_the_jail_kills_that_vmm_only,
        a_ring_changed_in_the_jail_kills_that_vmm_only,
        doctor_tells_how_far_the_jail_goes,
    ]
}

fn a_vmm_has_no_privileges(pair: &mut Pair) -> Result<()> {
    pair.run(&Guest::new("g"))?;

    let status = Status::of(pair.a.vmm()?)?;

    status.has("CapInh", "0000000000000000")?;
    status.has("CapPrm", "0000000000000000")?;
    status.has("CapEff", "0000000000000000")?;
    status.has("CapBnd", "0000000000000000")?;
    status.has("CapAmb", "0000000000000000")?;
    status.has("NoNewPrivs", "1")?;
    status.has("Seccomp", "2")?;
    status.has("Groups", "")?;
    ensure!(status.user()? != 0, "it is root");
    Ok(())
}

fn a_vmm_sees_its_folder_and_no_network(pair: &mut Pair) -> Result<()> {
    pair.run(&Guest::new("g"))?;
    let folder = folder(&pair.a, "g")?;
    let process = PathBuf::from(format!("/proc/{}", pair.a.vmm()?));

    let root = process.join("root");
    let links = fs::read_to_string(process.join("net/dev"))?;

    ensure!(root.join(folder.strip_prefix("/")?).join("vmm.sock").exists());
    for hidden in ["etc", "proc", "dev", "usr"] {
        ensure!(!root.join(hidden).exists(), "it sees /{hidden}");
    }
    ensure!(
        !root
            .join(pair.a.data_dir.strip_prefix("/")?)
            .join("journal.db")
            .exists()
    );
    let mounts = fs::read_to_string(process.join("mounts"))?;
    ensure!(mounts.lines().all(|mount| mount.contains(" ro,")), "{mounts}");
    ensure!(
        links.lines().skip(2).all(|line| line.trim_start().starts_with("lo:")),
        "{links}"
    );
    for namespace in ["mnt", "net"] {
        let of = |process: &Path| fs::read_link(process.join("ns").join(namespace));
        ensure!(of(&process)? != of(Path::new("/proc/self"))?, "it shares {namespace}");
    }
    Ok(())
}

fn each_vmm_has_a_user_of_its_own(pair: &mut Pair) -> Result<()> {
    pair.run(&Guest::new("g"))?;
    let first = Status::of(vmm(&pair.a, "g")?)?.user()?;
    pair.a.ferry(&Guest::new("h").arguments(&pair.kernel()))?.exit(0)?;
    let second = Status::of(vmm(&pair.a, "h")?)?.user()?;

    ensure!(first != second, "both are {first}");
    ensure!(fs::metadata(folder(&pair.a, "g")?)?.gid() == first);

    // The number stays the instance's, whoever starts its VMM.
    pair.a.kill();
    pair.a.start()?;
    pair.a.ferry(&["stop", "g", "--force"])?.exit(0)?;
    pair.a.ferry(&["start", "g"])?.exit(0)?;
    ensure!(Status::of(vmm(&pair.a, "g")?)?.user()? == first);
    Ok(())
}

fn a_guest_that_moved_is_confined_there(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g"))?;

    pair.migrate("g", &["--digests"])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;

    pair.runs_only_at(&pair.b, "g", &witness)?;
    let status = Status::of(pair.b.vmm()?)?;
    status.has("CapEff", "0000000000000000")?;
    status.has("Seccomp", "2")?;
    ensure!(status.user()? != 0, "it is root");
    // Its kernel is read once more.
    pair.b.ferry(&["reboot", "g"])?.exit(0)?;
    witness.wait_ready_times(2)?;
    pair.b.wait_for_status("g", "running")?;
    Ok(())
}

/// Everything that is in a VMM's process is its instance's, and goes on when a service manager ends the agent's cgroup.
fn each_vmm_has_a_cgroup_of_its_own(pair: &mut Pair) -> Result<()> {
    pair.a.terminate()?;
    with_mounts_of_its_own(|| {
        // Whatever this host has mounted for itself.
        command("mount", &["-t", "cgroup2", "none", "/sys/fs/cgroup"])?;
        pair.a.start()
    })?;
    pair.run(&Guest::new("g"))?;
    let (process, folder) = (pair.a.vmm()?, folder(&pair.a, "g")?);
    let own = format!("0::/ferry/{}", folder.file_name().context("no name")?.display());

    let is_there = || -> Result<bool> {
        let groups = fs::read_to_string(format!("/proc/{process}/cgroup"))?;
        Ok(groups.lines().any(|group| group == own))
    };
    until(&format!("the VMM is in {own}"), CALL, || Ok(is_there()?.then_some(())))?;

    let seen_by_the_agent = PathBuf::from(format!(
        "/proc/{}/root/sys/fs/cgroup",
        pair.a.pid().context("no agent")?
    ));
    let group = seen_by_the_agent.join(own.trim_start_matches("0::/"));
    ensure!(group.is_dir(), "{}", group.display());
    pair.a.ferry(&["delete", "g", "--force"])?.exit(0)?;
    until("the cgroup is gone", CALL, || Ok((!group.exists()).then_some(())))
}

fn a_forbidden_call_of_a_vcpu_kills_that_vmm_only(pair: &mut Pair) -> Result<()> {
    dies_alone(pair, "vcpu0", libc::SYS_socket)
}

/// Of KVM it has no business: others of the process have.
fn a_forbidden_call_of_a_device_kills_that_vmm_only(pair: &mut Pair) -> Result<()> {
    dies_alone(pair, "rng0", libc::SYS_ioctl)
}

fn a_forbidden_call_of_who_listens_kills_that_vmm_only(pair: &mut Pair) -> Result<()> {
    dies_alone(pair, "accept", libc::SYS_epoll_create1)
}

fn a_forbidden_call_of_the_machines_owner_kills_that_vmm_only(pair: &mut Pair) -> Result<()> {
    dies_alone(pair, "main", libc::SYS_execve)
}

/// A ring that was not restricted would do what no filter sees.
fn a_ring_made_in_the_jail_kills_that_vmm_only(pair: &mut Pair) -> Result<()> {
    dies_alone(pair, "main", libc::SYS_io_uring_setup)
}

fn a_ring_changed_in_the_jail_kills_that_vmm_only(pair: &mut Pair) -> Result<()> {
    dies_alone(pair, "rng0", libc::SYS_io_uring_register)
}

/// Somebody has taken over a thread of one of two guests on a host.
fn dies_alone(pair: &mut Pair, thread: &str, call: libc::c_long) -> Result<()> {
    pair.run(&Guest::new("g"))?;
    pair.a.ferry(&Guest::new("h").arguments(&pair.kernel()))?.exit(0)?;
    let id = pair.a.show("h")?["id"].as_str().context("no id")?.to_owned();
    let other = Witness::of_instance(&[&pair.a], &id);
    other.wait_ready()?;

    intrusion::force_call(vmm(&pair.a, "g")?, thread, call)?;

    let crashed = pair.a.wait_for_status("g", "crashed")?;
    let reason = crashed["reason"].as_str().unwrap_or_default();
    ensure!(reason.contains("SIGSYS") && reason.contains("forbids"), "{crashed}");
    other.wait_for_beats_at("a", 5)?;
    pair.a.wait_for_status("h", "running")?;
    pair.a.ferry(&["start", "g"])?.exit(0)?;
    pair.a.wait_for_status("g", "running")?;
    other.check()
}

fn doctor_tells_how_far_the_jail_goes(pair: &mut Pair) -> Result<()> {
    let told = pair.a.ferry(&["doctor"])?.json_lines()?;

    let parts: Vec<_> = told
        .iter()
        .filter(|need| need["need"].as_str().is_some_and(|need| need.starts_with("jail: ")))
        .collect();
    ensure!(parts.len() == 7, "{told:?}");
    // Whether root may raise a limit is the host's business.
    ensure!(
        parts
            .iter()
            .all(|part| part["ok"] == true || part["need"] == "jail: weight"),
        "{parts:?}"
    );
    Ok(())
}

fn vmm(host: &Host, instance: &str) -> Result<u32> {
    let shown = host.show(instance)?;
    let id = shown["vmm_pid"].as_u64().with_context(|| format!("no VMM: {shown}"))?;
    Ok(u32::try_from(id)?)
}

fn folder(host: &Host, instance: &str) -> Result<PathBuf> {
    let shown = host.show(instance)?;
    let id = shown["id"].as_str().context("no id")?;
    Ok(host.data_dir.join("instances").join(id))
}

/// What the kernel says of a process.
pub(crate) struct Status(String);

impl Status {
    pub(crate) fn of(process: u32) -> Result<Self> {
        Ok(Self(fs::read_to_string(format!("/proc/{process}/status"))?))
    }

    fn field(&self, name: &str) -> Option<&str> {
        let mut lines = self.0.lines();
        lines.find_map(|line| Some(line.strip_prefix(name)?.strip_prefix(':')?.trim()))
    }

    pub(crate) fn has(&self, name: &str, value: &str) -> Result<()> {
        ensure!(self.field(name) == Some(value), "{name} is {:?}", self.field(name));
        Ok(())
    }

    /// Its user, if real, effective, saved and file system's are the same.
    pub(crate) fn user(&self) -> Result<u32> {
        let users: Vec<_> = self.field("Uid").unwrap_or_default().split_whitespace().collect();
        ensure!(users.windows(2).all(|pair| pair[0] == pair[1]), "{users:?}");
        Ok(users.first().context("no user")?.parse()?)
    }
}
