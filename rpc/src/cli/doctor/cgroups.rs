//! Whether guests outlive their agent: a service manager that stops the agent kills all that is in its cgroup.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::Need;

pub(super) fn needs() -> Vec<Need> {
    let agents = processes("agent", |name| name.ends_with("ferry"));
    let vmms = processes("vmm", |name| name == "ferry-vmm" || name.ends_with("ferry"));
    vec![own_cgroups(&agents), running(&agents, &vmms)]
}

const WANTED: &str = "a cgroup of its own for each VMM";

fn own_cgroups(agents: &[Process]) -> Need {
    let need = "guests outlive the agent";
    let tried = crate::agent::cgroup_root().and_then(|root| {
        let trial = root.join(format!("ferry-doctor-{}", std::process::id()));
        fs::create_dir(&trial)?;
        fs::remove_dir(&trial)?;
        Ok(root)
    });
    let error = match tried {
        Ok(root) => return Need::fact(need, format!("cgroups can be made in {}", root.display()), WANTED),
        Err(error) => error,
    };
    let found = format!("no cgroup can be made: {error}");
    let unit = agents.iter().find_map(|agent| service(&agent.cgroup));
    let remedy = "set KillMode=process in the unit, or run the agent as root where cgroup version 2 is mounted";
    match unit.map(|unit| (unit, kill_mode(unit))) {
        Some((unit, Some(mode))) if matches!(mode.as_str(), "process" | "none") => {
            Need::fact(need, format!("{found}; but {unit} has KillMode={mode}"), WANTED)
        }
        Some((unit, _)) => Need::poor(
            need,
            found,
            WANTED,
            format!("stopping {unit} would kill its guests: {remedy}"),
        ),
        None => {
            let text =
                format!("an agent that runs as a systemd service takes its guests along when it is stopped: {remedy}");
            Need::poor(need, found, WANTED, text)
        }
    }
}

fn running(agents: &[Process], vmms: &[Process]) -> Need {
    let need = "running VMMs";
    let wanted = "none in the cgroup of an agent's service";
    let shares = |vmm: &&Process| {
        let of_a_service = |agent: &Process| agent.cgroup == vmm.cgroup && service(&agent.cgroup).is_some();
        agents.iter().any(of_a_service)
    };
    let found = format!("{} VMMs, {} agents", vmms.len(), agents.len());
    let endangered: Vec<&Process> = vmms.iter().filter(shares).collect();
    let Some(first) = endangered.first() else {
        return Need::fact(need, found, wanted);
    };
    let unit = service(&first.cgroup).unwrap_or_default();
    let pids: Vec<String> = endangered.iter().map(|vmm| vmm.pid.to_string()).collect();
    if matches!(kill_mode(unit).as_deref(), Some("process" | "none")) {
        return Need::fact(need, format!("{found}; {unit} has KillMode=process"), wanted);
    }
    let remedy = format!(
        "stopping {unit} would kill the guests of processes {}: set KillMode=process in the unit",
        pids.join(", ")
    );
    Need::poor(
        need,
        format!("{found}; {} in the cgroup of {unit}", endangered.len()),
        wanted,
        remedy,
    )
}

/// A running process of Ferry's.
#[derive(Debug)]
struct Process {
    pid: u32,
    /// Its path in the unified hierarchy.
    cgroup: String,
}

/// The processes that run `ferry VERB`, as far as we may see them.
fn processes(verb: &str, is_ferry: impl Fn(&str) -> bool) -> Vec<Process> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let found = entries.filter_map(|entry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        let line = fs::read(entry.path().join("cmdline")).ok()?;
        let mut words = line.split(|&byte| byte == 0).map(String::from_utf8_lossy);
        let program = words.next()?;
        let name = Path::new(program.as_ref()).file_name()?.to_str()?;
        if !is_ferry(name) || words.next()? != verb {
            return None;
        }
        let cgroups = fs::read_to_string(entry.path().join("cgroup")).ok()?;
        Some(Process {
            pid,
            cgroup: unified(&cgroups)?.to_owned(),
        })
    });
    found.collect()
}

/// The path in the unified hierarchy, out of /proc/PID/cgroup.
fn unified(cgroups: &str) -> Option<&str> {
    cgroups.lines().find_map(|line| line.strip_prefix("0::"))
}

/// The systemd service that a cgroup belongs to.
fn service(cgroup: &str) -> Option<&str> {
    cgroup
        .split('/')
        .rfind(|part| part.ends_with(".service") && !part.starts_with("user@"))
}

fn kill_mode(unit: &str) -> Option<String> {
    let asked = Command::new("systemctl")
        .args(["show", "--property=KillMode", "--value", unit])
        .output()
        .ok()?;
    let mode = String::from_utf8_lossy(&asked.stdout).trim().to_owned();
    (asked.status.success() && !mode.is_empty()).then_some(mode)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_unified_path_is_found_among_others() {
        assert_eq!(
            unified("8:pids:/x\n0::/system.slice/ferry.service\n"),
            Some("/system.slice/ferry.service")
        );
        assert_eq!(unified("8:pids:/x\n"), None);
    }

    #[test]
    fn a_service_is_told_from_scopes_and_users() {
        assert_eq!(service("/system.slice/ferry.service"), Some("ferry.service"));
        assert_eq!(service("/user.slice/user-0.slice/session-1.scope"), None);
        assert_eq!(service("/user.slice/user@0.service/app.slice"), None);
        assert_eq!(service("/"), None);
    }
}
